"""Which layers act otherwise while training, by hand; and what augmented features are."""

import keras
import numpy as np
import pytest

from keras_xfer import Backbone
from keras_xfer.features import live
from keras_xfer.features.live import Still, live_layers, random_layers
from keras_xfer.features.split import split_model

pytestmark = [
    pytest.mark.core,
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

layers = keras.layers
ROWS = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
IMAGES = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def names(found):
    return [layer.name for layer in found]


def noisy(name="noisy"):
    """A pretrained model with all that acts while training."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="a"),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(0.5, name="drop"),
            layers.SpectralNormalization(layers.Dense(4, name="b"), name="spectral"),
            layers.GaussianNoise(1.0, name="noise"),
        ],
        name=name,
    )


def with_backbone(*below, above=(), shape=(6,), backbone=None):
    return keras.Sequential([keras.Input(shape), *below, backbone or Backbone(noisy()), *above])


class Wobble(layers.Layer):
    """Somebody's own augmentation: noise on the input while training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs, training=None):
        if not training:
            return inputs
        return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.seeds)


# --- What is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
def test_nothing_inside_a_backbone(policy, trainable):
    body = Backbone(noisy(), batch_norm=policy, trainable=trainable)
    assert live_layers(with_backbone(backbone=body)) == []
    assert live_layers(body) == []
    nested = keras.Sequential([keras.Input((6,)), with_backbone(backbone=body)])
    assert live_layers(nested) == []


def test_nothing_in_the_parts_of_a_backbone():
    model = with_backbone(above=[layers.Dropout(0.5, name="outside")])
    prefix, suffix = split_model(model, "spectral")
    assert live_layers(prefix) == []
    assert names(live_layers(suffix)) == ["outside"]


def test_what_acts_below_a_backbone():
    below = [
        layers.GaussianNoise(0.1, name="noise_below"),
        layers.Dropout(0.1, name="drop_below"),
        Wobble(name="wobble"),
        layers.BatchNormalization(name="bn_below"),
        layers.SpectralNormalization(layers.Dense(6), name="spectral_below"),
        layers.Rescaling(2.0),
        layers.Dense(6),
    ]
    model = with_backbone(*below)
    random = ["noise_below", "drop_below", "wobble"]
    assert names(live_layers(model)) == [*random, "bn_below", "spectral_below"]
    assert names(random_layers(model)) == random


def test_batch_normalization_moves_while_it_is_trainable():
    bn = layers.BatchNormalization(name="bn_below")
    model = with_backbone(bn)
    assert names(live_layers(model)) == ["bn_below"]
    bn.trainable = False
    assert live_layers(model) == []
    inside = keras.Sequential([keras.Input((6,)), bn])
    Backbone(inside, batch_norm="affine", trainable=True)  # holds the statistics, wherever it is
    assert bn.trainable
    assert live_layers(model) == []


def test_images_are_augmented_at_any_depth():
    inner = keras.Sequential(
        [layers.RandomFlip(name="flip"), layers.RandomContrast(0.2, name="contrast")]
    )
    body = Backbone(keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2)]))
    augment = keras.Sequential([inner, layers.RandomRotation(0.1, name="rotation")])
    model = with_backbone(augment, shape=(8, 8, 3), backbone=body)
    assert sorted(names(random_layers(model))) == ["contrast", "flip", "rotation"]
    assert live_layers(model) == random_layers(model)


def test_a_pretrained_model_without_a_backbone_is_live_by_augmentation_alone():
    assert live_layers(noisy()) == []
    model = keras.Sequential([keras.Input((6,)), Wobble(name="wobble"), noisy()])
    assert names(live_layers(model)) == ["wobble"]


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs do not depend on the backend"
)
def test_nothing_in_a_plain_application():
    shape = (32, 32, 3)
    model = keras.applications.EfficientNetB0(
        weights=None, include_top=False, input_shape=shape, pooling="avg"
    )
    drops = [layer for layer in model.layers if isinstance(layer, layers.Dropout)]
    assert len(drops) > 5  # what might be taken for augmentation
    assert live_layers(model) == []
    augmented = keras.Sequential([keras.Input(shape), layers.RandomFlip(name="flip"), model])
    assert names(live_layers(augmented)) == ["flip"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(3),
        lambda: layers.GRU(3),
        lambda: layers.SimpleRNN(3),
        lambda: layers.Conv1D(3, 2),
        lambda: layers.LayerNormalization(),
        lambda: layers.Dropout(0.0),
    ],
    ids=["LSTM", "GRU", "SimpleRNN", "Conv1D", "LayerNormalization", "Dropout"],
)
def test_what_does_the_same_while_training_is_not_live(make):
    layer = make()
    model = keras.Sequential([keras.Input((6, 2)), layer])
    body = Backbone(keras.Sequential([keras.Input(model.output_shape[1:]), layers.Dense(2)]))
    model = keras.Sequential([keras.Input((6, 2)), layer, body])
    x = np.random.default_rng(0).normal(size=(3, 6, 2)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(model(x, training=True)), to_numpy(model(x, training=False)), rtol=1e-6
    )
    assert live_layers(model) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda x: layers.MultiHeadAttention(2, 2, dropout=0.2)(x, x),
        lambda x: layers.SpatialDropout1D(0.2)(x),
        lambda x: layers.LSTM(3, dropout=0.2)(x),
    ],
    ids=["MultiHeadAttention", "SpatialDropout1D", "LSTM"],
)
def test_dropout_of_every_kind_is_no_augmentation(make):
    inputs = keras.Input((6, 4))
    assert live_layers(keras.Model(inputs, make(inputs))) == []


# --- Code of ones own ---------------------------------------------------------------------------------


class Shaky(layers.Layer):
    """Somebody's own augmentation, of which nothing says that it is one."""

    def call(self, inputs, training=False):
        return inputs + keras.random.normal(keras.ops.shape(inputs)) if training else inputs


class Block(layers.Layer):
    """Layers that hear of `training`, in an attribute, in a list and by a method."""

    def __init__(self, *inner, **kwargs):
        super().__init__(**kwargs)
        self.first, self.rest, self.drop = inner[0], list(inner[1:]), None

    def call(self, inputs, training=None):
        x = self.first(inputs, training=training)
        if self.drop is not None:
            x = self.drop(x, training=training)
        return self.tail(x, training=training)

    def tail(self, x, training):
        for layer in self.rest:
            x = layer(x, training=training)
        return x


class Deaf(layers.Layer):
    def call(self, inputs, training=None):
        return 2 * inputs


class ActingBlock(Block):
    def tail(self, x, training):
        return keras.random.shuffle(x) if training else x


class Helped(layers.Layer):
    def call(self, inputs, training=None):
        return shaken(inputs, training=training)


class InnerShaky(Shaky):
    def call(self, inputs, training=False):
        return super().call(inputs, training=training)


def shaken(x, training):
    return keras.random.shuffle(x) if training else x


def unread():
    space = {"layers": layers}
    code = "class Own(layers.Layer):\n    def call(self, x, training=None):\n        return x\n"
    exec(code, space)  # noqa: S102 - so that its source is nowhere
    space["Own"].__module__ = "own"
    return space["Own"](name="acts")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shaky(name="acts"),
        lambda: InnerShaky(name="acts"),
        lambda: ActingBlock(layers.Rescaling(2.0), name="acts"),
        lambda: Block(layers.Rescaling(2.0), Shaky(name="acts")),
        lambda: Helped(name="acts"),
        lambda: layers.Lambda(lambda x, training=None: x, name="acts"),
        unread,
    ],
    ids=["leaf", "inherited", "block", "inside", "function", "Lambda", "no source"],
)
def test_what_acts_by_its_own_code_is_live_in_front_of_a_backbone(make):
    model = with_backbone(make())
    assert names(live_layers(model)) == names(live.own_layers(model)) == ["acts"]
    assert random_layers(model) == []
    inside = keras.Sequential([keras.Input((6,)), make(), layers.Dense(2)])
    assert live_layers(with_backbone(backbone=Backbone(inside))) == []


@pytest.mark.parametrize(
    "make",
    [Deaf, lambda: Block(layers.Rescaling(2.0), layers.Dense(6), Deaf())],
    ids=["unused", "handed on"],
)
def test_who_only_hands_training_on_is_not_live(make):
    assert live_layers(with_backbone(make())) == []


def test_the_layers_of_a_block_answer_for_themselves():
    model = with_backbone(Block(layers.Rescaling(2.0), Wobble(name="wobble")))
    assert names(live_layers(model)) == names(random_layers(model)) == ["wobble"]


@pytest.mark.parametrize(
    "keep", [lambda seed: [seed], lambda seed: {"flip": seed}], ids=["list", "dict"]
)
def test_generators_that_are_kept_in_something(keep):
    layer = Deaf(name="draws")
    layer.seeds = keep(keras.random.SeedGenerator(1))
    model = with_backbone(layer)
    assert names(live_layers(model)) == names(random_layers(model)) == ["draws"]
    assert live.generators(layer) == [keras.tree.flatten(layer.seeds)[0]]


def test_generators_that_no_seed_of_keras_repeats():
    layer = Deaf(name="draws")
    layer.drawn = np.random.default_rng(1)
    model = with_backbone(layer)
    assert names(live_layers(model)) == names(live.own_layers(model)) == ["draws"]
    assert names(live_layers(keras.Sequential([keras.Input((6,)), layer]))) == ["draws"]


# --- Features ---------------------------------------------------------------------------------------


def augmenting_model():
    """Augmentation, of several depths, below a model in which all may act."""
    inner = keras.Sequential([Wobble(name="one")], name="inner")
    augment = keras.Sequential([layers.Rescaling(2.0), inner], name="augment")
    return with_backbone(
        augment, above=[noisy("above")], backbone=Backbone(layers_of_two(), trainable=True)
    )


def layers_of_two():
    return keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.Dropout(0.5)])


def test_features_without_augmentation_are_those_of_predict():
    model = augmenting_model()
    expected = model.predict(ROWS, verbose=0)
    for _ in range(2):
        actual = live.call(model, ROWS, augment=False)
        np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-5, atol=1e-6)


class Holder(layers.Layer):
    """Features in the `call` of a layer, in which one word of training reaches all that follows."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.built = True

    def call(self, inputs):
        return live.call(self.model, inputs, augment=True)


@pytest.mark.parametrize("held", [False, True])
def test_augmentation_acts_anew_each_time_and_nothing_else_does(held):
    """What comes out is the model in inference mode on augmented rows, which undo themselves."""
    model = with_backbone(
        keras.Sequential([layers.Rescaling(2.0), keras.Sequential([Wobble(name="wobble")])]),
        backbone=Backbone(layers_of_two(), trainable=True),
    )
    dense = model.layers[1].model.layers[0]
    kernel, bias = (to_numpy(weight).astype("float64") for weight in dense.weights)
    augmented = Holder(model) if held else lambda rows: live.call(model, rows, augment=True)
    features = [to_numpy(augmented(ROWS)) for _ in range(3)]
    noise = []
    for each in features:
        # were dropout to act, half of what comes back would be nonsense
        rows = np.linalg.solve(kernel.T, (each - bias).T).T
        noise.append(rows - 2.0 * ROWS)
    for one in noise:
        assert 0.5 < one.std() < 1.6
    assert np.abs(noise[0] - noise[1]).max() > 0.5
    assert np.abs(noise[1] - noise[2]).max() > 0.5
    generator = keras.random.SeedGenerator(3)
    for one in noise:  # the very numbers that the layer would draw while training
        expected = to_numpy(keras.random.normal((4, 6), seed=generator))
        np.testing.assert_allclose(one, expected, atol=1e-3)


def test_augmentation_writes_to_no_weights():
    model = augmenting_model()
    before = [to_numpy(weight).copy() for weight in model.weights]
    live.call(model, ROWS, augment=True)
    for weight, was in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), was)


@pytest.mark.filterwarnings("ignore:Tensor.T is deprecated")  # RandAugment's own, on torch
@pytest.mark.parametrize(
    "make", [layers.RandAugment, layers.RandomColorJitter], ids=lambda x: x.__name__
)
def test_augmentation_that_holds_others(make):
    if keras.backend.backend() == "jax" and make is layers.RandAugment:
        pytest.skip("JAX compiles each of its layers; RandomColorJitter holds others, too")
    kwargs = {"value_range": (0, 255)}
    if make is layers.RandomColorJitter:
        kwargs.update(brightness_factor=0.5, contrast_factor=0.5)
    body = Backbone(keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2)]))
    augment = make(**kwargs)
    model = with_backbone(augment, shape=(8, 8, 3), backbone=body)
    assert random_layers(model)
    still = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(to_numpy(live.call(model, IMAGES, augment=False)), still, rtol=1e-4)
    one, other = (to_numpy(live.call(model, IMAGES, augment=True)) for _ in range(2))
    assert np.abs(one - other).max() > 1.0
    assert np.abs(one - still).max() > 1.0


def test_images_are_flipped_or_not():
    """Of an image and its mirror image there is nothing in between."""
    body = Backbone(keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten()]))
    flip = keras.Sequential([keras.Sequential([layers.RandomFlip("horizontal", seed=1)])])
    model = with_backbone(flip, shape=(8, 8, 3), backbone=body)
    seen = set()
    for _ in range(8):
        given = to_numpy(live.call(model, IMAGES, augment=True)).reshape(IMAGES.shape)
        for image, original in zip(given, IMAGES, strict=True):
            flipped = np.allclose(image, original[:, ::-1])
            assert flipped or np.allclose(image, original)
            seen.add(flipped)
    assert seen == {True, False}


def test_the_prefix_of_a_split_augments():
    model = augmenting_model()
    prefix, _ = split_model(model, "head")
    assert names(random_layers(prefix)) == ["one"]
    one, other = (to_numpy(live.call(prefix, ROWS, augment=True)) for _ in range(2))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(
        to_numpy(live.call(prefix, ROWS, augment=False)),
        to_numpy(live.call(prefix, ROWS, augment=False)),
    )


# --- Still ------------------------------------------------------------------------------------------


def test_still_never_acts():
    model = augmenting_model()
    still = Still(model)
    expected = model.predict(ROWS, verbose=0)
    around = keras.Sequential([keras.Input((6,)), still])
    for given in (still(ROWS), around(ROWS, training=True), live.call(still, ROWS, augment=True)):
        np.testing.assert_allclose(to_numpy(given), expected, rtol=1e-5, atol=1e-6)
    assert live_layers(model) != []
    assert live_layers(still) == random_layers(still) == []


def test_still_says_what_is_still():
    layer = layers.Dense(3, name="dense")
    layer.build((None, 6))
    assert Still(layer).get_config()["layer"] == keras.saving.serialize_keras_object(layer)
    assert [id(each) for each in Still(layer).weights] == [id(each) for each in layer.weights]
