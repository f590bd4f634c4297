"""Backbone against hand-written Keras and NumPy: what trains, what moves, what is saved."""

import copy

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras.src import testing  # Keras's own harness for layers has no public name

from keras_xfer import Backbone

pytestmark = [
    pytest.mark.core,
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a loop in TensorFlow's own words"
)

layers = keras.layers
POLICIES = ("frozen", "affine", "train")


@keras.saving.register_keras_serializable(package="tests")
class Composite(layers.Layer):
    """A layer of one's own that holds others, as transformer and convolution blocks do."""

    def __init__(self, size=5, rate=0.5, **kwargs):
        super().__init__(**kwargs)
        self.size, self.rate = size, rate
        self.dense = layers.Dense(size)
        self.bn = layers.BatchNormalization(momentum=0.5)
        self.dropout = layers.Dropout(rate)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.bn.build((*input_shape[:-1], self.size))
        self.built = True

    def call(self, inputs, training=None):
        return self.dropout(self.bn(self.dense(inputs), training=training), training=training)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.size)

    def get_config(self):
        return {**super().get_config(), "size": self.size, "rate": self.rate}


@keras.saving.register_keras_serializable(package="tests")
class Silent(Composite):
    """The same, without saying that it knows `training`: Keras hands it on past its `call`."""

    def call(self, inputs):
        return self.dropout(self.bn(self.dense(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A model whose `call` is its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.low = layers.Dense(5)
        self.low_bn = layers.BatchNormalization(momentum=0.5)
        self.dropout = layers.Dropout(0.5)
        self.high = layers.Dense(5)
        self.high_bn = layers.BatchNormalization(momentum=0.5)

    def build(self, input_shape):
        self.low.build(input_shape)
        for layer in (self.low_bn, self.high, self.high_bn):
            layer.build((None, 5))
        self.built = True

    def call(self, inputs, training=None):
        x = self.dropout(self.low_bn(self.low(inputs), training=training), training=training)
        return self.high_bn(self.high(x), training=training)


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype("float32")


def norm(name=None, **kwargs):
    return layers.BatchNormalization(momentum=0.5, name=name, **kwargs)


def deep_model():
    """BatchNormalization wherever it can hide: plain, nested twice, inside a layer, in a wrapper,
    without gamma and beta."""
    nested_input = keras.Input((5,))
    innermost = keras.Sequential([keras.Input((5,)), layers.Dense(5), norm()], name="innermost")
    nested = keras.Model(
        nested_input, norm("nested_bn")(innermost(layers.Dense(5)(nested_input))), name="nested"
    )
    inputs = keras.Input((4,))
    x = norm("low_bn")(layers.Dense(5, name="low")(inputs))
    x = Composite(name="composite")(nested(x))
    x = layers.Reshape((1, 5))(x)
    x = layers.TimeDistributed(norm(), name="wrapped")(x)
    x = layers.Flatten()(x)
    x = norm("centred", scale=False)(x)
    x = norm("scaled", center=False)(x)
    x = norm("bare", scale=False, center=False)(x)
    return keras.Model(inputs, norm("high_bn")(layers.Dense(5, name="high")(x)), name="deep")


def batch_norms(layer):
    found = [
        each for each in layer._flatten_layers() if isinstance(each, layers.BatchNormalization)
    ]
    return list({id(each): each for each in found}.values())


def statistics(layer):
    return [
        numpy_of(variable).copy()
        for bn in batch_norms(layer)
        for variable in (bn.moving_mean, bn.moving_variance)
    ]


def affine(layer):
    return [
        numpy_of(variable).copy()
        for bn in batch_norms(layer)
        for variable in (bn.gamma, bn.beta)
        if variable is not None
    ]


def same(one, other):
    return [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]


def with_head(backbone, shape=(4,)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layers.Dense(3, name="head")(backbone(inputs)))


# To trace a step takes TensorFlow ten times as long as to run it, and what a layer does does not
# depend on it; JAX compiles faster than it runs eagerly.
EAGER = keras.backend.backend() != "jax"


def train(model, *, compile=True, epochs=2, eager=EAGER):  # noqa: A002  # Keras's word
    if compile:
        model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=eager)
    x, y = data(8, 4), data(8, 3, seed=1)
    model.fit(x, y, batch_size=4, epochs=epochs, verbose=0)


# --- the BatchNormalization policy, by every road a user takes -------------------------------------


def _backbone_trainable(model, backbone):
    backbone.trainable = True


def _model_trainable(model, backbone):
    model.trainable = False  # on TensorFlow a second True would be dropped
    model.trainable = True


def _inner_trainable(model, backbone):
    backbone.model.trainable = False
    backbone.model.trainable = True


def _nested_trainable(model, backbone):
    backbone.model.get_layer("nested").trainable = True


def _composite_trainable(model, backbone):
    backbone.model.get_layer("composite").trainable = True


def _every_child(model, backbone):
    for layer in backbone.model.layers:
        layer.trainable = True


def _every_batch_norm(model, backbone):
    for bn in batch_norms(backbone):
        bn.trainable = True


def _every_weight(model, backbone):
    for bn in batch_norms(backbone):
        for weight in (bn.gamma, bn.beta):
            if weight is not None:
                weight.trainable = True


def _unfreeze_all(model, backbone):
    backbone.unfreeze()


def _unfreeze_top(model, backbone):
    backbone.unfreeze("nested")


def _unfreeze_all_and_by_hand(model, backbone):
    backbone.unfreeze()
    _every_batch_norm(model, backbone)


ROADS = [
    _backbone_trainable,
    _model_trainable,
    _inner_trainable,
    _nested_trainable,
    _composite_trainable,
    _every_child,
    _every_batch_norm,
    _every_weight,
    _unfreeze_all,
    _unfreeze_top,
    _unfreeze_all_and_by_hand,
]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__[1:])
def test_no_road_moves_the_statistics(road):
    frozen, free = Backbone(deep_model()), Backbone(deep_model(), batch_norm="affine")
    inputs = keras.Input((4,))
    both = layers.Concatenate()([frozen(inputs), free(inputs)])
    model = keras.Model(inputs, layers.Dense(3)(both))
    moving, scales, free_scales = statistics(model), affine(frozen), affine(free)

    for backbone in (frozen, free):  # before compile
        road(model, backbone)
    train(model, epochs=1, eager=False)  # traced, as a user trains
    for backbone in (frozen, free):  # between two fits, after compile
        road(model, backbone)
    train(model, compile=False, epochs=1)
    train(model, epochs=1)  # compiled again

    assert all(same(moving, statistics(model)))
    assert all(same(scales, affine(frozen)))
    assert not all(same(free_scales, affine(free)))  # gamma and beta did train


@pytest.mark.parametrize(
    "road",
    [_backbone_trainable, _model_trainable, _inner_trainable, _every_child, _unfreeze_all],
    ids=lambda road: road.__name__[1:],
)
def test_the_train_policy_is_what_keras_does(road):
    backbone = Backbone(deep_model(), batch_norm="train")
    model = with_head(backbone)
    moving, scales = statistics(backbone), affine(backbone)

    train(model)  # frozen still
    assert all(same(moving, statistics(backbone)))

    road(model, backbone)
    train(model)
    assert not any(same(moving, statistics(backbone)))
    # A bias in front of, or a scale behind a normalisation may get no gradient; most must.
    assert sum(same(scales, affine(backbone))) <= 2


@pytest.mark.parametrize("policy", POLICIES)
def test_flags_set_after_compile_do_not_move_what_the_policy_holds(policy):
    backbone = Backbone(deep_model(), batch_norm=policy)
    model = with_head(backbone)
    train(model, eager=False)
    moving, scales = statistics(backbone), affine(backbone)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    _every_batch_norm(model, backbone)
    if policy == "train":  # Keras moves them, which shows that this test can fail
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.train_on_batch(data(8, 4), data(8, 3))
        assert not all(same(moving, statistics(backbone)))
        return
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.train_on_batch(data(8, 4), data(8, 3))
    assert all(same(moving, statistics(backbone)))
    assert all(same(scales, affine(backbone))) == (policy == "frozen")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_holds_in_models_in_models(policy):
    backbone = Backbone(deep_model(), batch_norm=policy)
    inner = keras.Sequential([keras.Input((4,)), backbone, layers.Dense(4)])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(keras.Sequential([inner])(inputs)))
    moving, scales = statistics(model), affine(model)
    inner.trainable = False
    inner.trainable = True
    train(model)
    assert any(same(moving, statistics(model))) == (policy != "train")
    assert all(same(moving, statistics(model))) == (policy != "train")
    assert all(same(scales, affine(model))) == (policy == "frozen")


def test_the_policy_holds_inside_a_wrapper():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), norm()])
    wrapped = layers.TimeDistributed(Backbone(inner, trainable=True))
    model = keras.Sequential([keras.Input((2, 4)), wrapped, layers.Dense(1)])
    wrapped.trainable = False
    wrapped.trainable = True
    moving, scales = statistics(inner), affine(inner)
    kernel = numpy_of(inner.layers[0].kernel).copy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(data(4, 2, 4), data(4, 2, 1), verbose=0)
    assert all(same(moving + scales, statistics(inner) + affine(inner)))
    assert not np.array_equal(kernel, numpy_of(inner.layers[0].kernel))


def test_a_backbone_inside_a_backbone_keeps_its_own_policy():
    inner = Backbone(keras.Sequential([keras.Input((4,)), layers.Dense(4), norm()]))
    outer_bn = norm()
    outer = Backbone(keras.Sequential([keras.Input((4,)), inner, outer_bn]), batch_norm="train")
    model = with_head(outer)
    outer.trainable = True
    held = statistics(inner)
    free = statistics(outer_bn)
    train(model)
    assert all(same(held, statistics(inner)))
    assert not any(same(free, statistics(outer_bn)))


@pytest.mark.parametrize("kwargs", [{"renorm": True}, {"synchronized": True}])
@pytest.mark.parametrize("policy", ["frozen", "affine"])
def test_every_variant_of_batch_normalization_is_held(kwargs, policy):
    if "synchronized" in kwargs and keras.backend.backend() != "tensorflow":
        pytest.skip("Keras synchronizes on TensorFlow alone")
    bn = layers.BatchNormalization(momentum=0.5, **kwargs)
    backbone = Backbone(
        keras.Sequential([keras.Input((4,)), layers.Dense(4), bn]),
        batch_norm=policy,
        trainable=True,
    )
    model = with_head(backbone)
    gamma = numpy_of(bn.gamma).copy()
    still = [v for v in bn.weights if v is not bn.gamma and v is not bn.beta]
    before = [numpy_of(variable).copy() for variable in still]
    train(model)
    assert all(same(before, [numpy_of(variable) for variable in still]))
    assert np.array_equal(gamma, numpy_of(bn.gamma)) == (policy == "frozen")


@pytest.mark.parametrize("make", [Subclassed, Composite, Silent])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_holds_where_call_is_the_models_own_code(make, policy):
    inner = make()
    inner.build((None, 4))
    backbone = Backbone(inner, batch_norm=policy)
    model = with_head(backbone)
    moving, scales = statistics(backbone), affine(backbone)
    train(model)
    assert all(same(moving + scales, statistics(backbone) + affine(backbone)))
    for child in inner._flatten_layers(include_self=False):
        child.trainable = True
    inner.trainable = True
    train(model)
    assert all(same(moving, statistics(backbone))) == (policy != "train")
    assert any(same(moving, statistics(backbone))) == (policy != "train")
    assert all(same(scales, affine(backbone))) == (policy == "frozen")


@on_tensorflow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_holds_in_a_loop_written_by_hand(policy):
    import tensorflow as tf

    backbone = Backbone(deep_model(), batch_norm=policy)
    model = with_head(backbone)
    moving, scales = statistics(backbone), affine(backbone)
    x, y = data(8, 4), data(8, 3, seed=1)
    for start in ("high", "all"):
        backbone.unfreeze(start)
        _every_batch_norm(model, backbone)
        optimizer = keras.optimizers.SGD(0.05)

        @tf.function
        def step(optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            variables = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        for _ in range(2):
            step()
    assert all(same(moving, statistics(backbone))) == (policy != "train")
    assert all(same(scales, affine(backbone))) == (policy == "frozen")


def test_whoever_looks_first_sees_the_policy_kept():
    backbone = Backbone(deep_model(), trainable=True)

    def thawed():
        return [each.path for bn in batch_norms(backbone) for each in bn.weights if each.trainable]

    assert thawed() == []  # set by the constructor
    backbone.unfreeze()
    assert thawed() == []
    backbone.trainable = True
    assert thawed() == []
    for look in (
        lambda: backbone.variables,
        lambda: backbone.weights,
        lambda: backbone(data(2, 4)),
        lambda: backbone.get_config(),
        lambda: backbone.trainable_summary(),
    ):
        _every_batch_norm(None, backbone)
        assert thawed()
        look()
        assert thawed() == []


@pytest.mark.parametrize("policy", ["frozen", "affine"])
def test_not_even_a_call_past_the_backbone_moves_the_statistics(policy):
    """A feature extractor cut out of the model shares its layers."""
    backbone = Backbone(deep_model(), batch_norm=policy, trainable=True)
    cut = keras.Model(backbone.model.input, backbone.model.get_layer("bare").output)
    moving = statistics(backbone)
    _every_batch_norm(None, backbone)
    cut(data(8, 4), training=True)
    backbone.model(data(8, 4), training=True)
    assert all(same(moving, statistics(backbone)))


def test_the_last_backbone_around_a_model_says_its_policy():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), norm()])
    for policy in ("frozen", "affine", "train", "frozen"):
        backbone = Backbone(inner, batch_norm=policy, trainable=True)
        moving = statistics(inner)
        backbone(data(8, 4), training=True)
        assert all(same(moving, statistics(inner))) == (policy != "train")


@on_tensorflow
@pytest.mark.parametrize("start", [None, "two_conv"])
def test_it_costs_nothing_over_keras_written_by_hand(start):
    """Operation for operation the same train step."""
    import tensorflow as tf

    def base():
        inputs = keras.Input((8, 8, 3))
        x = norm("one_bn")(layers.Conv2D(4, 3, name="one_conv")(inputs))
        x = norm("two_bn")(layers.Conv2D(4, 3, name="two_conv")(layers.ReLU()(x)))
        return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))

    plain = base()
    plain.trainable = start is not None
    for layer in plain.layers:  # what one writes by hand
        above = start is not None and plain.layers.index(layer) >= 4
        layer.trainable = above and not isinstance(layer, layers.BatchNormalization)
    backbone = Backbone(base())
    if start:
        backbone.unfreeze(start)

    def operations(features):
        model = with_head(features, (8, 8, 3))
        variables = model.trainable_variables

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            return tape.gradient(loss, variables)

        graph = step.get_concrete_function(tf.TensorSpec((4, 8, 8, 3)), tf.TensorSpec((4, 3))).graph
        return sorted(operation.type for operation in graph.get_operations())

    assert operations(backbone) == operations(plain)


# --- what is computed ------------------------------------------------------------------------------


def normalised(x, mean, variance, gamma, beta, epsilon=1e-3):
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_batch_normalization_uses_the_moving_statistics(policy, trainable):
    bn = norm()
    frame = keras.Sequential([keras.Input((4,)), bn])
    mean, variance = data(4, seed=2), np.abs(data(4, seed=3)) + 0.5
    gamma, beta = data(4, seed=4), data(4, seed=5)
    bn.set_weights([gamma, beta, mean, variance])
    x = data(16, 4)
    backbone = Backbone(frame, batch_norm=policy, trainable=trainable)
    actual = numpy_of(backbone(x, training=True))
    if policy == "train" and trainable:
        expected = normalised(x, x.mean(0), x.var(0), gamma, beta)
    else:
        expected = normalised(x, mean, variance, gamma, beta)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_prefix_stays_in_inference_mode_under_a_thawed_top():
    low, high = norm("low_bn"), norm("high_bn")
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            low,
            layers.Dropout(0.5, name="low_dropout"),
            layers.GaussianNoise(1.0, name="noise"),
            layers.Dense(4, use_bias=False, kernel_initializer="identity", name="high"),
            high,
        ]
    )
    mean, variance = data(4, seed=2), np.abs(data(4, seed=3)) + 0.5
    low.set_weights([np.ones(4), np.zeros(4), mean, variance])
    backbone = Backbone(inner, batch_norm="train")
    backbone.unfreeze("high")
    x = data(16, 4)
    below = normalised(x, mean, variance, 1.0, 0.0)  # neither batch statistics nor dropout
    expected = normalised(below, below.mean(0), below.var(0), 1.0, 0.0)
    np.testing.assert_allclose(numpy_of(backbone(x, training=True)), expected, atol=1e-4)
    assert np.array_equal(numpy_of(low.moving_mean), mean)
    np.testing.assert_allclose(
        numpy_of(high.moving_mean), 0.5 * below.mean(0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("as_method", ["unfreeze", "by hand"])
def test_dropout_acts_above_the_cut_and_not_below(as_method):
    identity = {"use_bias": False, "kernel_initializer": "identity"}
    inner = keras.Sequential(
        [
            keras.Input((100,)),
            layers.Dense(100, name="low", **identity),
            layers.Dropout(0.5, name="low_dropout"),
            layers.Dense(100, name="high", **identity),
            layers.Dropout(0.5, name="high_dropout"),
        ]
    )
    backbone = Backbone(inner)
    if as_method == "unfreeze":
        backbone.unfreeze("high")
    else:
        for name in ("high", "high_dropout"):
            inner.get_layer(name).trainable = True
    x = np.ones((10, 100), "float32")
    actual = numpy_of(backbone(x, training=True))
    assert set(np.unique(actual)) == {0.0, 2.0}  # one dropout; two would also give 4
    assert 0.4 < (actual == 0).mean() < 0.6
    np.testing.assert_array_equal(numpy_of(backbone(x, training=False)), x)
    np.testing.assert_array_equal(numpy_of(backbone(x)), x)


def noisy():
    augmentation = keras.Sequential([layers.RandomFlip("horizontal")], name="augmentation")
    inputs = keras.Input((8, 8, 3))
    x = augmentation(inputs)
    x = layers.Conv2D(4, 3, name="low")(x)
    x = layers.GaussianNoise(1.0)(x)
    x = layers.SpectralNormalization(layers.Conv2D(4, 3), name="spectral")(x)
    return keras.Model(inputs, layers.Dropout(0.5)(x))


def test_fully_frozen_it_is_deterministic_and_writes_nothing():
    inner = noisy()
    x = data(4, 8, 8, 3)
    vector = numpy_of(inner.get_layer("spectral").vector_u).copy()
    assert not np.allclose(numpy_of(inner(x, training=True)), numpy_of(inner(x)))  # Keras alone,
    assert not np.array_equal(vector, numpy_of(inner.get_layer("spectral").vector_u))
    expected = numpy_of(inner(x, training=False))
    backbone = Backbone(inner)
    before = [numpy_of(variable).copy() for variable in backbone.variables]
    for training in (True, None):
        np.testing.assert_array_equal(numpy_of(backbone(x, training=training)), expected)
    model = keras.Sequential([keras.Input((8, 8, 3)), backbone, layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(x, data(4, 4, 4, 1), verbose=0)
    assert all(same(before, [numpy_of(variable) for variable in backbone.variables]))


def test_thawed_noise_and_spectral_normalization_act():
    backbone = Backbone(noisy())
    vector = backbone.model.get_layer("spectral").vector_u
    before = numpy_of(vector).copy()
    x = data(4, 8, 8, 3)
    backbone.unfreeze("spectral")
    one, other = (numpy_of(backbone(x, training=True)) for _ in range(2))
    assert not np.array_equal(one, other)  # the dropout at the top
    assert not np.array_equal(numpy_of(vector), before)
    backbone.unfreeze()
    augmentation = backbone.model.get_layer("augmentation")
    assert all(layer.trainable for layer in augmentation.layers)


def test_thawed_augmentation_acts():
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.Sequential([layers.RandomTranslation(0.4, 0.4)], name="augmentation"),
            layers.Conv2D(1, 1, use_bias=False, kernel_initializer="ones"),
        ]
    )
    backbone = Backbone(inner)
    x = data(2, 8, 8, 1)
    np.testing.assert_array_equal(numpy_of(backbone(x, training=True)), x)
    backbone.trainable = True
    assert not np.array_equal(numpy_of(backbone(x, training=True)), x)


def test_frozen_dropout_in_layers_of_ones_own_is_off():
    x = data(16, 4)
    inputs = keras.Input((4,))
    for make in (Composite, Silent):
        alone = make()
        alone.build((None, 4))
        layer = make()
        for inner in (alone, keras.Model(inputs, layer(inputs))):
            expected = numpy_of(inner(x, training=False))
            backbone = Backbone(inner)
            np.testing.assert_array_equal(numpy_of(backbone(x, training=True)), expected)
            backbone.trainable = True
            assert not np.array_equal(numpy_of(backbone(x, training=True)), expected)
        # Thawed as a whole, but its dropout frozen by hand.
        layer.dropout.trainable = False
        np.testing.assert_array_equal(numpy_of(backbone(x, training=True)), expected)
        # Frozen as a whole, but its dense layer thawed by hand: dropout stays off.
        backbone.freeze()
        layer.dense.trainable = True
        assert len(backbone.trainable_variables) == 2
        np.testing.assert_array_equal(numpy_of(backbone(x, training=True)), expected)


def test_a_batch_normalization_thawed_by_hand_in_a_frozen_layer_moves():
    """Under "train" it does what Keras does: https://github.com/keras-team/keras/issues/18092."""
    inputs = keras.Input((4,))
    for make in (Composite, Silent):
        layer = make(rate=0.0)
        backbone = Backbone(keras.Model(inputs, layer(inputs)), batch_norm="train")
        moving = statistics(backbone)
        layer.bn.trainable = True
        backbone(data(8, 4), training=True)
        assert not any(same(moving, statistics(backbone)))


def test_a_nested_model_may_be_called_by_keyword():
    nested = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dropout(0.5)])
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, nested(inputs=inputs))
    backbone = Backbone(inner, trainable=True)
    x = data(16, 4)
    assert not np.array_equal(numpy_of(backbone(x, training=True)), numpy_of(inner(x)))
    nested.layers[-1].trainable = False
    np.testing.assert_array_equal(numpy_of(backbone(x, training=True)), numpy_of(inner(x)))


def test_with_every_weight_frozen_by_hand_it_is_in_inference_mode():
    dense = layers.Dense(4)
    inner = keras.Sequential([keras.Input((4,)), dense, layers.Dropout(0.5)])
    backbone = Backbone(inner, trainable=True)
    dense.trainable = False  # the flag of Dropout is still True
    x = data(16, 4)
    np.testing.assert_array_equal(
        numpy_of(backbone(x, training=True)), numpy_of(inner(x, training=False))
    )


def test_training_false_that_the_graph_says_is_kept():
    bn = norm()
    inputs = keras.Input((4,))
    x = layers.Dropout(0.5)(inputs)  # here Keras writes training=False, its default, by itself
    inner = keras.Model(inputs, bn(layers.Dense(4)(x), training=False))
    backbone = Backbone(inner, batch_norm="train", trainable=True)
    moving = statistics(bn)
    one, other = (numpy_of(backbone(data(16, 4), training=True)) for _ in range(2))
    assert all(same(moving, statistics(bn)))
    assert not np.array_equal(one, other)  # and dropout acts


@pytest.mark.parametrize("trainable", [False, True])
def test_dropout_of_the_head_acts_above_it(trainable):
    """In Keras an explicit training=False, which the frozen layers get, reaches later layers."""

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            inner = keras.Sequential(
                [keras.Input((100,)), layers.Dropout(0.0), layers.Dense(100), layers.ReLU()]
            )
            self.backbone = Backbone(inner, trainable=trainable)
            self.dropout = layers.Dropout(0.5)

        def call(self, inputs, training=None):
            return self.dropout(self.backbone(inputs))

    model = Classifier()
    x = np.ones((4, 100), "float32")
    model.backbone.model.layers[-2].set_weights([np.eye(100), np.zeros(100)])
    assert set(np.unique(numpy_of(model(x, training=True)))) == {0.0, 2.0}
    np.testing.assert_array_equal(numpy_of(model(x, training=False)), x)
    np.testing.assert_array_equal(numpy_of(model(x)), x)


@pytest.mark.filterwarnings("ignore:Layer 'recurrent'.*does not support masking")  # Keras's word
def test_masks_pass_through_it():
    tokens = keras.Input((4,), dtype="int32")
    inner_inputs = keras.Input((4, 6))
    recurrent = keras.Model(inner_inputs, layers.GRU(3)(inner_inputs), name="recurrent")
    embedded = layers.Dense(6)(layers.Embedding(5, 6, mask_zero=True)(tokens))
    x = np.array([[1, 2, 0, 0], [3, 1, 2, 0]])
    inner = keras.Model(tokens, recurrent(embedded))
    expected = numpy_of(inner(x))
    backbone = Backbone(inner)
    for trainable in (False, True):
        backbone.trainable = trainable
        for training in (False, True):
            actual = numpy_of(backbone(x, training=training))
            np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert backbone.cuts() == [
        inner.layers[0].name,
        recurrent.layers[-1].name,
    ]  # beside it goes the mask
    assert backbone.blocks


@pytest.fixture(scope="module")
def efficientnet():
    keras.utils.set_random_seed(0)
    return Backbone.from_application("EfficientNetB0", input_shape=(32, 32, 3), weights=None)


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="compiles each operation of each layer; test_fully_frozen_it_is_deterministic… runs there",
)
def test_frozen_efficientnet_features_are_deterministic(efficientnet):
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    efficientnet.freeze()
    expected = numpy_of(efficientnet.model(x, training=False))
    for _ in range(2):
        np.testing.assert_array_equal(numpy_of(efficientnet(x, training=True)), expected)
    drops = [e for e in efficientnet.model.layers if isinstance(e, layers.Dropout)]
    assert len(drops) > 5
    efficientnet.trainable = True  # stochastic depth is on again
    moving = statistics(efficientnet)
    one, other = (numpy_of(efficientnet(x, training=True)) for _ in range(2))
    assert not np.array_equal(one, other)
    assert all(same(moving, statistics(efficientnet)))


# --- flags -----------------------------------------------------------------------------------------


def trainable_names(backbone):
    return sorted(variable.path for variable in backbone.trainable_variables)


def test_it_is_frozen_unless_asked_otherwise():
    inner = deep_model()
    backbone = Backbone(inner)
    assert backbone.trainable is False
    assert backbone.trainable_variables == []
    assert not any(layer.trainable for layer in inner._flatten_layers())
    assert len(backbone.non_trainable_weights) == len(inner.weights)
    thawed = Backbone(deep_model(), trainable=True, batch_norm="train")
    assert thawed.trainable is True
    assert len(thawed.trainable_variables) == sum(
        not path.endswith(("moving_mean", "moving_variance"))
        for path in (weight.path for weight in thawed.weights)
    )


def test_trainable_true_thaws_all_of_a_partly_thawed_backbone():
    """On TensorFlow the assignment of the flag's own value is dropped in plain Keras."""
    backbone = Backbone(deep_model(), batch_norm="train")
    whole = len(Backbone(deep_model(), batch_norm="train", trainable=True).trainable_variables)
    backbone.unfreeze("high")
    assert len(backbone.trainable_variables) == 4  # kernel, bias, gamma, beta
    backbone.trainable = True
    assert len(backbone.trainable_variables) == whole
    backbone.unfreeze("high")
    backbone.trainable = False
    assert backbone.trainable_variables == []


def test_freezing_the_model_above_freezes_it():
    backbone = Backbone(deep_model())
    model = with_head(backbone)
    backbone.unfreeze("high")
    model.trainable = False
    assert model.trainable_variables == []
    assert backbone.trainable is False
    model.trainable = True
    assert len(model.trainable_variables) == 2 + len(
        Backbone(deep_model(), trainable=True).trainable_variables
    )


@pytest.mark.parametrize("road", ["backbone", "model", "nested", "layer"])
def test_gamma_and_beta_freeze_by_every_road(road):
    bn = norm()
    nested = keras.Sequential([keras.Input((4,)), layers.Dense(4), bn], name="nested")
    inner = keras.Sequential([keras.Input((4,)), nested])
    backbone = Backbone(inner, batch_norm="affine", trainable=True)
    model = with_head(backbone)
    assert any(weight is bn.gamma for weight in model.trainable_variables)
    scales = affine(bn)
    {"backbone": backbone, "model": inner, "nested": nested, "layer": bn}[road].trainable = False
    assert len(model.trainable_variables) == (4 if road == "layer" else 2)
    train(model)
    assert all(same(scales, affine(bn)))


def test_a_layer_set_by_hand_trains_alone():
    backbone = Backbone(deep_model())
    model = with_head(backbone)
    low = backbone.model.get_layer("low")
    low.trainable = True
    assert backbone.trainable_variables == [low.kernel, low.bias]
    assert backbone.trainable
    before = {v.path: numpy_of(v).copy() for v in backbone.weights}
    train(model)
    changed = {v.path for v in backbone.weights if not np.array_equal(before[v.path], numpy_of(v))}
    assert changed == {low.kernel.path, low.bias.path}


@pytest.mark.parametrize("start", ["all", "nested", "composite", -2, 0.1])
def test_exactly_what_is_selected_changes_in_fit(start):
    backbone = Backbone(deep_model(), batch_norm="affine")
    model = with_head(backbone)
    backbone.unfreeze(start)
    selected = {variable.path for variable in backbone.trainable_variables}
    before = {v.path: numpy_of(v).copy() for v in backbone.weights}
    train(model)
    changed = {v.path for v in backbone.weights if not np.array_equal(before[v.path], numpy_of(v))}
    # A bias in front of a fixed normalisation gets a gradient; everything selected moves.
    assert changed == selected


def test_unfreeze_again_starts_afresh():
    backbone = Backbone(deep_model())
    backbone.unfreeze("high")
    top = trainable_names(backbone)
    backbone.unfreeze("all")
    backbone.unfreeze("high")
    assert trainable_names(backbone) == top == ["high/bias", "high/kernel"]
    with pytest.raises(ValueError, match="Nearest"):
        backbone.unfreeze("hihg")
    assert trainable_names(backbone) == top  # a refused start changes nothing


# --- construction ----------------------------------------------------------------------------------


def test_what_it_cannot_wrap_is_refused():
    with pytest.raises(TypeError, match="Received: model='MobileNetV2' of type str"):
        Backbone("MobileNetV2")
    with pytest.raises(ValueError, match="not built yet"):
        Backbone(keras.Sequential([layers.Dense(2)]))
    built = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"Received: pooling='mean'"):
        Backbone(built, pooling="mean")
    with pytest.raises(ValueError, match=r"Received: batch_norm='freeze'"):
        Backbone(built, batch_norm="freeze")
    with pytest.raises(TypeError):
        Backbone(built, "frozen")


@pytest.mark.parametrize("pooling", ["avg", "max", None])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_pooling(pooling, data_format):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format(data_format)
    try:
        inner = keras.Sequential([keras.Input((2, 3, 4)), layers.Activation("linear")])
        backbone = Backbone(inner, pooling=pooling)
        x = data(5, 2, 3, 4)
        axes = (1, 2) if data_format == "channels_last" else (2, 3)
        expected = {"avg": np.mean, "max": np.max, None: lambda a, axis: a}[pooling](x, axis=axes)
        np.testing.assert_allclose(numpy_of(backbone(x)), expected, rtol=1e-5)
        symbolic = backbone(keras.Input((2, 3, 4)))
        assert symbolic.shape == (None, *expected.shape[1:])
        assert backbone.compute_output_shape((5, 2, 3, 4)) == expected.shape
    finally:
        keras.config.set_image_data_format(before)


def test_pooling_goes_by_the_models_own_data_format():
    padding = layers.ZeroPadding2D(1, data_format="channels_first")
    inner = keras.Sequential([keras.Input((3, 4, 5)), padding])
    backbone = Backbone(inner, pooling="max")
    x = data(2, 3, 4, 5)
    np.testing.assert_allclose(numpy_of(backbone(x)), np.maximum(x.max((2, 3)), 0))
    again = Backbone.from_config(backbone.get_config())
    np.testing.assert_allclose(numpy_of(again(x)), np.maximum(x.max((2, 3)), 0))


@pytest.mark.parametrize("make", [deep_model, Subclassed, Composite])
def test_shapes_and_dtypes_are_known_without_running_the_model(make):
    inner = make()
    if not inner.built:
        inner.build((None, 4))
    backbone = Backbone(inner, dtype="float16")
    symbolic = backbone(keras.Input((4,)))
    assert symbolic.shape == (None, 5)
    assert symbolic.dtype == "float16"
    assert tuple(backbone(data(2, 4)).shape) == (2, 5)


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected shape"):
        Backbone(deep_model())(keras.Input((3,)))


def test_integer_outputs_are_known_to_be_integers():
    inner = keras.Sequential([keras.Input((4,)), layers.Discretization([0.0])])
    assert "int" in Backbone(inner)(keras.Input((4,))).dtype


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    x = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(4)(b)])
    inner = keras.Model(
        {"a": a, "b": b}, {"sum": layers.Dense(2, name="sum")(x), "all": x}, name="two"
    )
    backbone = Backbone(inner, dtype="float16", trainable=True)
    inputs = {"a": data(4, 3), "b": data(4, 2)}
    expected = inner(inputs)
    for training in (False, True):
        actual = backbone(inputs, training=training)
        assert set(actual) == {"sum", "all"}
        for key, value in actual.items():
            assert keras.backend.standardize_dtype(value.dtype) == "float16"
            np.testing.assert_allclose(
                numpy_of(value), numpy_of(expected[key]), rtol=2e-3, atol=1e-2
            )
    backbone.unfreeze("sum")
    assert trainable_names(backbone) == ["sum/bias", "sum/kernel"]
    symbolic = backbone({"a": a, "b": b})
    model = keras.Model([a, b], symbolic["sum"])
    model.compile("sgd", "mse")
    model.fit([data(4, 3), data(4, 2)], data(4, 2), verbose=0)


def test_a_single_output_in_a_list_is_that_output():
    inputs = keras.Input((4,))
    inner = keras.Model([inputs], [layers.Dense(2)(inputs)])
    for trainable in (False, True):
        backbone = Backbone(inner, trainable=trainable)
        assert tuple(backbone(data(3, 4), training=True).shape) == (3, 2)
        assert backbone(keras.Input((4,))).shape == (None, 2)


def test_uint8_images_and_tf_data():
    import tensorflow as tf

    inner = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(2, 3), norm()])
    backbone = Backbone(inner, pooling="avg")
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype("uint8")
    expected = numpy_of(inner(images.astype("float32"))).mean((1, 2))
    np.testing.assert_allclose(numpy_of(backbone(images)), expected, rtol=1e-4, atol=1e-3)
    model = keras.Sequential([keras.Input((4, 4, 3)), backbone])
    dataset = tf.data.Dataset.from_tensor_slices(images).batch(4)
    np.testing.assert_allclose(model.predict(dataset, verbose=0), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, "float32", "mixed_float16", "bfloat16"])
def test_dtype_casts_the_output_alone(dtype):
    keras.config.set_dtype_policy("float32")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    x = data(5, 4)
    expected = numpy_of(inner(x))
    if dtype is None:
        keras.config.set_dtype_policy("mixed_float16")
    backbone = Backbone(inner, dtype=dtype)
    output = backbone(x)
    wanted = {None: "float16", "mixed_float16": "float16"}.get(dtype, dtype)
    assert keras.backend.standardize_dtype(output.dtype) == wanted
    assert inner.layers[0].compute_dtype == "float32"
    assert inner.layers[0].kernel.dtype == "float32"
    exact = keras.ops.cast(keras.ops.convert_to_tensor(expected), wanted)  # computed in float32
    np.testing.assert_array_equal(
        numpy_of(keras.ops.cast(output, "float32")), numpy_of(keras.ops.cast(exact, "float32"))
    )


def test_pooling_computes_as_the_model_does():
    keras.config.set_dtype_policy("float32")
    inner = keras.Sequential([keras.Input((2, 2, 1)), layers.Rescaling(1.0)])
    keras.config.set_dtype_policy("mixed_float16")
    pooled = Backbone(inner, pooling="avg", dtype="float32")(np.full((1, 2, 2, 1), 1e5, "float32"))
    assert numpy_of(pooled).tolist() == [[1e5]]  # more than float16 holds


def test_integer_outputs_are_not_cast():
    inner = keras.Sequential([keras.Input((4,)), layers.Discretization([0.0])])
    output = Backbone(inner)(data(3, 4))
    assert "int" in keras.backend.standardize_dtype(output.dtype)


def test_a_mixed_precision_model_keeps_its_policies_in_fit():
    keras.config.set_dtype_policy("mixed_float16")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), norm()])
    keras.config.set_dtype_policy("float32")
    backbone = Backbone(inner, trainable=True)
    model = with_head(backbone)
    moving = statistics(backbone)
    train(model)
    assert inner.layers[0].compute_dtype == "float16"
    assert all(same(moving, statistics(backbone)))
    assert keras.backend.standardize_dtype(backbone(data(2, 4)).dtype) == "float32"


def test_regularisation_and_added_losses_arrive():
    @keras.saving.register_keras_serializable(package="tests")
    class Adds(layers.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.sum(inputs))
            return inputs

    dense = layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5))
    nested = keras.Sequential([keras.Input((3,)), Adds()])
    inner = keras.Sequential([keras.Input((4,)), dense, nested])
    backbone = Backbone(inner, trainable=True)
    x = data(5, 4)
    output = numpy_of(backbone(x, training=True))
    kernel = numpy_of(dense.kernel)
    losses = sorted(float(numpy_of(loss)) for loss in backbone.losses)
    np.testing.assert_allclose(losses, sorted([output.sum(), 0.5 * (kernel**2).sum()]), rtol=1e-4)


# --- saving ----------------------------------------------------------------------------------------


def flags(layer):
    """Every layer's and every weight's flag, in order."""
    found = {id(each): each for each in layer._flatten_layers()}.values()
    return [each.trainable for each in found] + [weight.trainable for weight in layer.weights]


def _thaw_by_hand(backbone):
    backbone.model.get_layer("composite").dense.trainable = True
    backbone.model.get_layer("nested").trainable = True


def _thaw_gamma_by_hand(backbone):
    backbone.model.get_layer("low_bn").gamma.trainable = True


STATES = [
    ("frozen", lambda backbone: None),
    ("frozen", lambda backbone: backbone.unfreeze("high")),
    ("frozen", lambda backbone: backbone.unfreeze("innermost")),
    ("affine", lambda backbone: backbone.unfreeze("composite")),
    ("affine", lambda backbone: backbone.unfreeze("all")),
    ("affine", _thaw_by_hand),
    ("train", lambda backbone: backbone.unfreeze("nested")),
    ("train", _thaw_gamma_by_hand),
]


@pytest.mark.parametrize(("policy", "thaw"), STATES)
def test_a_saved_model_goes_on_where_it_was(tmp_path, policy, thaw):
    backbone = Backbone(deep_model(), batch_norm=policy, name="backbone")
    model = with_head(backbone)
    thaw(backbone)
    # No dropout: both must take the same steps.
    backbone.model.get_layer("composite").dropout.rate = 0.0
    backbone.model.get_layer("composite").rate = 0.0
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=EAGER)
    x, y = data(8, 4), data(8, 3, seed=1)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # safe_mode, no custom_objects

    assert isinstance(loaded.get_layer("backbone"), Backbone)
    assert loaded.get_layer("backbone").batch_norm == policy
    assert flags(loaded) == flags(model)
    assert all(same(model.get_weights(), loaded.get_weights()))
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    for mine, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy_of(mine), numpy_of(theirs))

    for each in (model, loaded):
        each.train_on_batch(x, y)
    for mine, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    # And the policy still holds, by a road taken after loading.
    moving = statistics(loaded)
    _every_batch_norm(loaded, loaded.get_layer("backbone"))
    loaded.compile("sgd", "mse", run_eagerly=EAGER)
    loaded.train_on_batch(x, y)
    assert all(same(moving, statistics(loaded))) == (policy != "train")


def test_weights_files(tmp_path):
    one, other = (with_head(Backbone(deep_model(), name="backbone")) for _ in range(2))
    one.get_layer("backbone").unfreeze("high")
    assert not all(same(one.get_weights(), other.get_weights()))
    one.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    x = data(4, 4)
    np.testing.assert_array_equal(numpy_of(one(x)), numpy_of(other(x)))
    assert other.get_layer("backbone").trainable is False


def test_config_round_trip():
    backbone = Backbone(
        deep_model(), batch_norm="affine", pooling=None, name="mine", dtype="bfloat16"
    )
    backbone.unfreeze("composite")
    config = backbone.get_config()
    again = Backbone.from_config(config)
    assert again.get_config() == config
    assert backbone.get_config() == config  # from_config took a copy
    assert (again.name, again.batch_norm, again.pooling) == ("mine", "affine", None)
    assert again.compute_dtype == "bfloat16"
    assert flags(again) == flags(backbone)
    again.set_weights(backbone.get_weights())
    x = data(3, 4)
    np.testing.assert_array_equal(
        numpy_of(keras.ops.cast(again(x), "float32")),
        numpy_of(keras.ops.cast(backbone(x), "float32")),
    )


@pytest.mark.parametrize("road", ["clone_model", "deepcopy"])
def test_copies_are_their_own_and_keep_the_policy(road):
    backbone = Backbone(deep_model(), batch_norm="affine", name="backbone")
    model = with_head(backbone)
    backbone.unfreeze("nested")
    other = keras.models.clone_model(model) if road == "clone_model" else copy.deepcopy(model)
    assert flags(other) == flags(model)
    if road == "deepcopy":
        assert all(same(model.get_weights(), other.get_weights()))
    mine = model.get_weights()
    moving, scales = statistics(other), affine(other)
    other.get_layer("backbone").trainable = True
    _every_batch_norm(other, other.get_layer("backbone"))
    train(other)
    assert all(same(moving, statistics(other)))
    assert not all(same(scales, affine(other)))
    assert all(same(mine, model.get_weights()))


def test_a_backbone_deep_copies_by_itself():
    backbone = Backbone(deep_model())
    backbone.unfreeze("high")
    other = copy.deepcopy(backbone)
    assert other is not backbone
    assert flags(other) == flags(backbone)
    np.testing.assert_array_equal(numpy_of(other(data(3, 4))), numpy_of(backbone(data(3, 4))))


@pytest.mark.parametrize("make", [Subclassed, Composite, Silent])
def test_models_of_ones_own_reload(tmp_path, make):
    inner = make()
    inner.build((None, 4))
    backbone = Backbone(inner, name="backbone", batch_norm="affine")
    model = with_head(backbone)
    inner._flatten_layers(include_self=False)[0].trainable = True
    model.compile("adam", "mse")
    model.train_on_batch(data(4, 4), data(4, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert flags(loaded) == flags(model)
    np.testing.assert_allclose(numpy_of(loaded(data(4, 4))), numpy_of(model(data(4, 4))), atol=1e-6)


# --- looking inside --------------------------------------------------------------------------------


def test_the_summary_of_cuts_shows_what_it_costs_to_keep_them():
    inputs = keras.Input((None, None, 3), name="inputs")
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.Conv2D(64, 1, use_bias=False, name="top")(x)
    backbone = Backbone(keras.Model(inputs, x))
    stem, top = 32 * 32 * 3 * 3 * 3 * 32, 32 * 32 * 32 * 64  # of 64 x 64
    assert backbone.cuts((64, 64, 3))[1].flops == 2 * stem
    assert str(backbone.cuts_summary((64, 64, 3))).splitlines() == [
        "cut     shape         KiB an image  share of FLOPs",
        "inputs  (64, 64, 3)           48.0             0.0",
        f"stem    (32, 32, 32)         128.0           {stem / (stem + top):.3f}",
        "top     (32, 32, 64)         256.0             1.0",
    ]
    assert backbone.cuts_summary().rows[1] == ("stem", (None, None, 32), "-", "-")
    with pytest.raises(ValueError, match="input_shape"):
        backbone.cuts_summary((64, 64))


def test_the_summary_counts_what_trains():
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, strides=2, use_bias=False, name="stem_conv"),
            norm("stem_bn"),
            layers.Conv2D(6, 3, strides=2, name="top_conv"),
            norm("top_bn"),
        ]
    )
    backbone = Backbone(inner, batch_norm="affine")
    backbone.unfreeze("top_conv")
    table = backbone.trainable_summary()
    assert table.columns == ("block", "layers", "parameters", "trainable", "batch_norm")
    stem, top = 3 * 3 * 3 * 4 + 4 * 4, 3 * 3 * 4 * 6 + 6 + 4 * 6
    trained = 3 * 3 * 4 * 6 + 6 + 2 * 6  # the statistics do not
    total = ("total", 4, stem + top, trained, "affine, frozen")
    assert sum(row[1] for row in table.rows[:-1]) == 4
    assert [row[2:] for row in table.rows] == [
        (stem, 0, "frozen"),
        (top, trained, "affine"),
        total[2:],
    ]
    assert tuple(table.rows[-1]) == total
    assert total[2] == inner.count_params()


def test_the_summary_shows_the_policy_and_not_what_was_set_by_hand():
    for policy, state in (("frozen", "frozen"), ("affine", "affine"), ("train", "train")):
        inner = keras.Sequential([keras.Input((4,)), norm()])
        backbone = Backbone(inner, batch_norm=policy)
        inner.layers[0].trainable = True
        row = backbone.trainable_summary().rows[-1]
        assert row[2:] == (16, 0 if policy == "frozen" else 8, state)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the graph is the same on every backend"
)
def test_from_application_hands_everything_on():
    backbone = Backbone.from_application(
        "MobileNet",
        input_shape=(32, 32, 3),
        weights=None,
        pooling="max",
        batch_norm="affine",
        trainable=True,
        name="features",
        alpha=0.25,
    )
    assert backbone.name == "features"
    assert (backbone.batch_norm, backbone.trainable) == ("affine", True)
    reference = keras.applications.MobileNet(
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling="max", alpha=0.25
    )
    assert [type(each) for each in backbone.model.layers] == [
        type(each) for each in reference.layers
    ]
    assert backbone.model.count_params() == reference.count_params()
    assert backbone.model.output_shape == reference.output_shape == (None, 256)
    assert backbone.spec.name == "MobileNet"
    assert Backbone(reference).spec.name == "MobileNet"  # built directly
    image = np.array([[[0.0, 127.5, 255.0]]], "float32")
    np.testing.assert_allclose(
        numpy_of(Backbone(reference).preprocessing()(image)), [[[-1.0, 0.0, 1.0]]], atol=1e-6
    )
    with pytest.raises(ValueError, match="MobileNetV2"):
        Backbone.from_application("MobilNetV2", weights=None)


def test_preprocessing_of_an_unknown_model_is_refused():
    backbone = Backbone(keras.Sequential([keras.Input((4,)), layers.Dense(2)]))
    assert backbone.spec is None
    with pytest.raises(ValueError, match="BackbonePreprocessing"):
        backbone.preprocessing()


# --- keras-hub, where it is installed --------------------------------------------------------------


@pytest.fixture
def hub_models():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("keras-hub brings tensorflow-text with it: tested on TensorFlow")
    return pytest.importorskip("keras_hub", exc_type=ImportError).models


def _resnet(models):
    return models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 8],
        stackwise_num_blocks=[1, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )


def _efficientnet(models):
    return models.EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 12],
        stackwise_expansion_ratios=[1, 4],
        stackwise_strides=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_block_types=["v1", "v1"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        dropout=0.4,
        image_shape=(16, 16, 3),
    )


@pytest.mark.parametrize("make", [_resnet, _efficientnet])
def test_image_backbones_of_keras_hub(hub_models, make, tmp_path):
    inner = make(hub_models)
    backbone = Backbone(inner, pooling="avg", batch_norm="affine", name="hub")
    x = data(4, 16, 16, 3)
    expected = numpy_of(inner(x, training=False)).mean((1, 2))
    np.testing.assert_allclose(numpy_of(backbone(x, training=True)), expected, atol=1e-5)
    assert sum(len(block.layers) for block in backbone.blocks) == len(inner.layers)
    assert len(backbone.blocks) >= 3
    backbone.unfreeze(backbone.blocks[-1].name)
    model = with_head(backbone, (16, 16, 3))
    moving = statistics(backbone)
    before = {v.path: numpy_of(v).copy() for v in backbone.weights}
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, data(4, 3), verbose=0)
    assert all(same(moving, statistics(backbone)))
    changed = {v.path for v in backbone.weights if not np.array_equal(before[v.path], numpy_of(v))}
    assert changed
    assert changed <= {weight.path for weight in backbone.trainable_weights}
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert flags(loaded) == flags(model)
    np.testing.assert_allclose(numpy_of(loaded(x)), numpy_of(model(x)), atol=1e-5)


def test_text_backbones_of_keras_hub(hub_models):
    inner = hub_models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=4,
        intermediate_dim=8,
        max_sequence_length=6,
        dropout=0.5,
    )
    backbone = Backbone(inner)
    tokens = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 0]])
    x = {"token_ids": tokens, "segment_ids": 0 * tokens, "padding_mask": 1 * (tokens > 0)}
    expected = {key: numpy_of(value) for key, value in inner(x, training=False).items()}
    one = backbone(x, training=True)
    for key in ("sequence_output", "pooled_output"):
        np.testing.assert_array_equal(numpy_of(one[key]), expected[key])
    backbone.unfreeze("transformer_layer_1")
    names = {path.split("/")[0] for path in trainable_names(backbone)}
    assert names == {"transformer_layer_1", "pooled_dense"}
    one, other = (numpy_of(backbone(x, training=True)["pooled_output"]) for _ in range(2))
    assert not np.array_equal(one, other)  # dropout of the thawed layer
    inputs = {key: keras.Input((6,), dtype="int32", name=key) for key in x}
    model = keras.Model(inputs, layers.Dense(1)(backbone(inputs)["pooled_output"]))
    model.compile("sgd", "mse")
    model.fit(x, np.ones((2, 1), "float32"), verbose=0)


# --- laws ------------------------------------------------------------------------------------------


@st.composite
def stacks(draw, depth=2):
    """A random stack as layer names; a list is a nested Sequential."""
    leaf = st.sampled_from(["dense", "bn", "dropout"])
    nested = st.lists(leaf, min_size=1, max_size=3) if depth else leaf
    return ["dense", *draw(st.lists(st.one_of(leaf, leaf, nested), min_size=1, max_size=5))]


def _built(stack):
    made = []
    for each in stack:
        if isinstance(each, list):
            made.append(_built(each))
        elif each == "dense":
            made.append(layers.Dense(4))
        elif each == "bn":
            made.append(norm())
        else:
            made.append(layers.Dropout(0.5))
    return keras.Sequential([keras.Input((4,)), *made])


def _leaves(model):
    return [
        leaf
        for layer in model.layers
        for leaf in (_leaves(layer) if isinstance(layer, keras.Sequential) else [layer])
    ]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(stack=stacks(), policy=st.sampled_from(["frozen", "affine"]), choice=st.data())
def test_batch_normalization_never_moves_and_only_the_selected_trains(stack, policy, choice):
    inner = _built(stack)
    backbone = Backbone(inner, batch_norm=policy)
    model = with_head(backbone)
    leaves = _leaves(inner)
    for leaf in choice.draw(st.lists(st.sampled_from(leaves), max_size=3)):  # flags before
        leaf.trainable = choice.draw(st.booleans())
    start = choice.draw(st.integers(0, len(leaves) - 1))
    own = [  # what each leaf can train under the policy
        []
        if isinstance(leaf, layers.BatchNormalization) and policy == "frozen"
        else [*leaf.weights[:2]]
        for leaf in leaves
    ]
    expected = {weight.path for weights in own[start:] for weight in weights}
    if expected:
        backbone.unfreeze(leaves[start].name)
        assert {weight.path for weight in backbone.trainable_variables} == expected
    else:
        with pytest.raises(ValueError, match="at least one layer has weights"):
            backbone.unfreeze(leaves[start].name)
    for leaf in choice.draw(st.lists(st.sampled_from(leaves), max_size=3)):  # flags after
        leaf.trainable = choice.draw(st.booleans())
    moving, scales = statistics(backbone), affine(backbone)
    model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=EAGER)
    model.train_on_batch(data(8, 4), data(8, 3))
    assert all(same(moving, statistics(backbone)))
    if policy == "frozen":
        assert all(same(scales, affine(backbone)))


class KerasHarness(testing.TestCase):
    @pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")  # the harness's own
    def test_keras_own_checks_of_a_layer(self):
        inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), norm()])
        for trainable, count in ((False, 0), (True, 2)):
            self.run_layer_test(
                Backbone,
                init_kwargs={"model": inner, "pooling": "avg", "trainable": trainable},
                input_shape=(2, 8, 8, 3),
                expected_output_shape=(2, 4),
                expected_num_trainable_weights=count,
                expected_num_non_trainable_weights=6 - count,
                expected_num_seed_generators=0,
                expected_num_losses=0,
                supports_masking=False,
                run_training_check=trainable,
                run_mixed_precision_check=False,  # `dtype` casts the output, by contract
                custom_objects={"Backbone": Backbone},
            )
