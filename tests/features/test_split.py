"""Two halves against the whole: `model(x)` itself, and which layers are on which side by hand."""

import gc
import math
import re

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, BackbonePreprocessing
from keras_xfer.applications import spec_for
from keras_xfer.blocks import blocks
from keras_xfer.features.split import split_model

core = pytest.mark.core
pytestmark = [
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

layers = keras.layers
BACKEND = keras.backend.backend()

APPLICATIONS = sorted(
    name
    for name in dir(keras.applications)
    if callable(getattr(keras.applications, name)) and name[0].isupper()
)
CHEAP = {
    "MobileNetV2": {"alpha": 0.35},
    "EfficientNetB0": {},
    "VGG16": {},
    "ResNet50": {},
    "ConvNeXtTiny": {},
}


# --- What every test asks ---------------------------------------------------------------------------


def to_numpy(tensors):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, tensors)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_same(actual, expected, tolerance=1e-5):
    """The same structure, dtypes and values, to a tolerance relative to the largest value."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    keras.tree.assert_same_structure(actual, expected)
    for mine, whole in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert mine.dtype == whole.dtype
        mine, whole = mine.astype("float64"), whole.astype("float64")
        assert np.isfinite(whole).all()
        assert np.ptp(whole) > 0  # something that can be wrong
        np.testing.assert_allclose(mine, whole, rtol=0, atol=tolerance * np.abs(whole).max())


def holds(half):
    """The names of the layers with weights inside."""
    return {each.name for each in half._flatten_layers() if not each._layers and each.weights}


def check(model, at, x, *, below=None, above=None, crossing=1, tolerance=1e-5, **kwargs):
    """Split, carry what crosses as plain arrays, and compare with the whole."""
    expected = to_numpy(model(x, training=False))
    prefix, suffix = split_model(model, at, **kwargs)
    assert len(prefix.outputs) == len(suffix.inputs) == crossing
    if below is not None:
        assert holds(prefix) == set(below)
    if above is not None:
        assert holds(suffix) == set(above)
    features = to_numpy(prefix(x))  # as a cache keeps them: without masks or gradients
    assert isinstance(features, list) == (crossing > 1)
    for feature, begin in zip(keras.tree.flatten(features), suffix.inputs, strict=True):
        assert feature.shape[1:] == tuple(begin.shape[1:])
        if begin.dtype != "bfloat16":
            assert feature.dtype == begin.dtype
    assert_same(suffix(features), expected, tolerance)
    assert_same(model(x, training=False), expected, 0)  # the whole is what it was
    return prefix, suffix


def dense(name, units=4, **kwargs):
    kwargs.setdefault("bias_initializer", "normal")
    return layers.Dense(units, activation="tanh", name=name, **kwargs)


def stack(*names, inputs=4, name=None):
    """Dense layers one on the other."""
    return keras.Sequential([keras.Input((inputs,)), *map(dense, names)], name=name)


def conv(name, **kwargs):
    return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)


def residual(**image):
    """Blocks `stem`, `one` and `two`: a stem and two residual blocks, the second one strided."""
    inputs = keras.Input(image.pop("shape", (8, 8, 3)), name="inputs")
    axis = 1 if image.get("data_format") == "channels_first" else -1
    x = conv("stem_conv", strides=2, **image)(inputs)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(axis, name="stem_bn")(x))
    y = layers.ReLU(name="one_relu")(conv("one_conv", **image)(x))
    y = layers.BatchNormalization(axis, name="one_bn")(conv("one_conv2", **image)(y))
    x = layers.ReLU(name="one_out")(layers.Add(name="one_add")([x, y]))
    y = layers.ReLU(name="two_relu")(conv("two_conv", strides=2, **image)(x))
    x = layers.Add(name="two_add")([conv("two_shortcut", strides=2, **image)(x), y])
    return scattered(keras.Model(inputs, layers.ReLU(name="two_out")(x), name="residual"))


def scattered(model):
    """`model` with BatchNormalization that has seen something."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        shape, end = tuple(weight.shape), weight.path.rsplit("/", 1)[-1]
        if end in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, shape))
        elif end in ("beta", "moving_mean"):
            weight.assign(rng.normal(0, 0.3, shape))
    return model


STEM = {"stem_conv", "stem_bn"}
ONE = {"one_conv", "one_conv2", "one_bn"}
TWO = {"two_conv", "two_shortcut"}


def classifier(base, **kwargs):
    """A backbone with a head above."""
    return keras.Sequential(
        [
            keras.Input(base.input_shape[1:]),
            Backbone(base, name="base", **kwargs),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )


IMAGES = random(3, 8, 8, 3)
ROWS = random(3, 4)


# --- Kinds of models --------------------------------------------------------------------------------


@core
def test_sequential_models():
    check(stack("a", "b", "c"), "b", ROWS, below={"a"}, above={"b", "c"})
    unnamed = keras.Sequential([keras.Input((4,)), *(layers.Dense(3) for _ in range(3))])
    first, *rest = [layer.name for layer in unnamed.layers]
    check(unnamed, 1, ROWS, below={first}, above=set(rest))


@core
def test_functional_models_with_one_tensor_or_several_across():
    model = residual()
    check(model, "one", IMAGES, below=STEM, above=ONE | TWO)
    below = STEM | {"one_conv"}
    prefix, _ = check(model, "one_conv2", IMAGES, below=below, crossing=2)  # the skip, and itself
    assert [each.shape[1:] for each in prefix.outputs] == [(4, 4, 4), (4, 4, 4)]
    prefix, _ = check(model, "two_shortcut", IMAGES, crossing=2)
    assert sorted(each.shape[1] for each in prefix.outputs) == [2, 4]


@core
def test_a_tensor_that_is_needed_far_above_crosses_once():
    inputs = keras.Input((4,))
    low = dense("low")(inputs)
    x = dense("b")(dense("a")(low))
    x = layers.Concatenate(name="joined")([x, low, low])
    model = keras.Model(inputs, dense("top")(layers.Add(name="added")([dense("c")(x), low])))
    check(model, "b", ROWS, below={"low", "a"}, crossing=2)
    check(model, "top", ROWS, below={"low", "a", "b", "c"})


@core
def test_nested_models_at_every_depth():
    innermost = stack("c", "d", name="innermost")
    inside = keras.Input((4,), name="inside")
    middle = keras.Model(inside, dense("e")(innermost(dense("b")(inside))), name="middle")
    model = keras.Sequential([keras.Input((4,)), dense("a"), middle, dense("f")])
    order = "abcdef"
    for i in range(1, 6):
        check(model, order[i], ROWS, below=set(order[:i]), above=set(order[i:]))
    check(model, "middle", ROWS, below={"a"})
    check(model, "innermost", ROWS, below={"a", "b"})


@core
def test_a_skip_out_of_a_nested_model_and_one_around_it():
    inside = keras.Input((4,))
    one = dense("one")(inside)
    nested = keras.Model(inside, [one, dense("two")(one)], name="nested")
    inputs = keras.Input((4,))
    one, two = nested(dense("low")(inputs))
    x = layers.Concatenate()([one, dense("top")(two), inputs])
    model = keras.Model(inputs, dense("last")(x))
    check(model, "two", ROWS, below={"low", "one"}, above={"two", "top", "last"}, crossing=2)
    check(model, "last", ROWS, below={"low", "one", "two", "top"})


@core
def test_backbones_deep_inside():
    base = stack("a", "b", "c", name="inner")
    tower = keras.Sequential([keras.Input((4,)), dense("low"), Backbone(base), dense("d")])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense("top")(tower(layers.Rescaling(2.0)(inputs))))
    check(model, "head", ROWS, below={"low", "a", "b", "c"}, above={"d", "top"})
    check(model, "b", ROWS, below={"low", "a"}, above={"b", "c", "d", "top"})
    nested_base = keras.Sequential([keras.Input((4,)), stack("e", "f"), dense("g")])
    check(classifier(nested_base), "f", ROWS, below={"e"}, above={"f", "g", "head"})


@core
@pytest.mark.parametrize("pooling", [None, "avg", "max"])
def test_backbones_with_and_without_pooling(pooling):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), Backbone(residual(), pooling=pooling), layers.Dense(3, name="h")]
    )
    prefix, _ = check(model, "head", IMAGES, below=STEM | ONE | TWO, above={"h"})
    assert prefix.output_shape == ((None, 2, 2, 4) if pooling is None else (None, 4))
    check(model, "two", IMAGES, below=STEM | ONE, above=TWO | {"h"})
    check(model, "one_conv2", IMAGES, below=STEM | {"one_conv"}, crossing=2)


def dict_model():
    inputs = {"p": keras.Input((4,), name="p"), "q": keras.Input((4,), name="q")}
    low = dense("low")(inputs["q"])
    top = dense("top")(layers.Concatenate()([low, inputs["p"]]))
    return keras.Model(inputs, {"b": top, "a": low})


@core
def test_several_inputs_and_outputs_in_dicts():
    x = {"p": ROWS, "q": random(3, 4, seed=1)}
    # `low` is an output that lies below, `p` an input that is needed above alone
    _, suffix = check(dict_model(), "top", x, below={"low"}, above={"top"}, crossing=2)
    assert sorted(suffix.output) == ["a", "b"]


@core
def test_a_prefix_has_the_input_names_of_its_model():
    prefix, _ = split_model(dict_model(), "top")  # Keras warns where they are not the keys
    assert {key: tensor.name for key, tensor in prefix.input.items()} == {"p": "p", "q": "q"}


@core
def test_several_inputs_and_outputs_in_lists():
    one, other, last = (keras.Input((n,)) for n in (4, 3, 2))
    x = dense("a")(one)
    y = dense("b")(layers.Concatenate()([x, other]))
    top = dense("c")(layers.Concatenate()([y, last]))
    model = keras.Model([one, other, last], [top, y, x])
    given = [ROWS, random(3, 3), random(3, 2)]
    check(model, "b", given, below={"a"}, above={"b", "c"}, crossing=3)
    check(model, "c", given, below={"a", "b"}, above={"c"}, crossing=3)


@core
def test_nested_models_that_take_and_give_dicts():
    one, other = keras.Input((4,), name="one"), keras.Input((4,), name="other")
    x = layers.Add()([dense("a")(one), other])
    nested = keras.Model({"one": one, "other": other}, {"y": dense("b")(x)}, name="nested")
    for inside in (nested, Backbone(nested)):
        inputs = keras.Input((4,))
        x = inside({"one": dense("low")(inputs), "other": inputs})
        model = keras.Model(inputs, dense("top")(x["y"]))
        check(model, "b", ROWS, below={"low", "a"}, above={"b", "top"})


@core
def test_outputs_that_are_inputs_or_given_twice():
    inputs = keras.Input((4,))
    x = dense("a")(inputs)
    model = keras.Model(inputs, [dense("b")(x), x, inputs, x])
    check(model, "b", ROWS, below={"a"}, above={"b"}, crossing=2)


@core
def test_optional_inputs_stay_optional():
    inputs, extra = keras.Input((4,)), keras.Input((4,), optional=True)
    model = keras.Model([inputs, extra], dense("b")(Plus()(dense("a")(inputs), extra)))
    expected = to_numpy(model([ROWS, None]))
    prefix, suffix = split_model(model, "b")
    assert_same(suffix(to_numpy(prefix([ROWS, None]))), expected)


class Plus(layers.Layer):
    def call(self, inputs, other=None):
        return inputs * 1.0 if other is None else inputs + other

    def compute_output_spec(self, inputs, other=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@core
@pytest.mark.xfail(
    strict=True, reason="what crosses around a cut layer and inside it is kept twice"
)
def test_a_tensor_that_crosses_around_a_backbone_and_inside_it_is_kept_once():
    inside = keras.Input((4,))
    base = keras.Model(inside, layers.Add()([dense("b")(dense("a")(inside)), inside]))
    inputs = keras.Input((4,))
    low = dense("low")(inputs)
    x = layers.Concatenate()([Backbone(base)(low), low])
    check(keras.Model(inputs, dense("top")(x)), "b", ROWS, below={"low", "a"}, crossing=2)


@core
def test_calls_with_further_arguments():
    class Times(layers.Layer):
        def call(self, inputs, by=1.0):
            return inputs * by

    inputs = keras.Input((5, 4))
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    x = attention(query=dense("q")(inputs), value=dense("v")(inputs), use_causal_mask=True)
    model = keras.Model(inputs, dense("top")(Times(name="times")(x, by=3.0)))
    rows = random(3, 5, 4)
    check(model, "attention", rows, below={"q", "v"}, crossing=2)
    _, suffix = check(model, "times", rows, above={"top"})
    assert suffix.output_shape == (None, 5, 4)


@core
def test_many_cuts_of_one_model_and_models_around_halves():
    model = classifier(residual())
    halves = [split_model(model, at) for at in ("head", "two", "one", "two")]
    expected = to_numpy(model(IMAGES))
    for prefix, suffix in halves:
        assert_same(suffix(to_numpy(prefix(IMAGES))), expected)
        inputs = keras.Input((8, 8, 3))
        assert_same(keras.Model(inputs, suffix(prefix(inputs)))(IMAGES), expected)
        assert_same(suffix.predict(prefix.predict(IMAGES, verbose=0), verbose=0), expected)


@core
def test_an_input_that_the_head_alone_uses_crosses():
    images, extra = keras.Input((8, 8, 3)), keras.Input((2,))
    x = Backbone(residual(), pooling="avg")(images)
    model = keras.Model(
        [images, extra], dense("head")(layers.Concatenate()([x, dense("e")(extra)]))
    )
    given = [IMAGES, random(3, 2)]
    prefix, _ = check(model, "head", given, below=STEM | ONE | TWO, above={"e", "head"}, crossing=2)
    assert sorted(each.shape[1:] for each in prefix.outputs) == [(2,), (4,)]
    check(model, "two", given, below=STEM | ONE, above=TWO | {"e", "head"}, crossing=2)


@core
def test_the_output_of_a_backbone_that_has_several():
    inputs = keras.Input((4,))
    low = dense("low")(inputs)
    base = keras.Model(inputs, {"high": dense("high")(low), "low": low})
    inputs = keras.Input((4,))
    features = Backbone(base)(inputs)
    model = keras.Model(inputs, [dense("one")(features["low"]), dense("two")(features["high"])])
    check(model, "head", ROWS, below={"low", "high"}, above={"one", "two"}, crossing=2)
    check(model, "high", ROWS, below={"low"}, above={"high", "one", "two"})


@core
def test_a_layer_that_is_called_twice():
    shared = dense("shared")
    inputs = keras.Input((4,))
    x = dense("between")(shared(dense("low")(inputs)))
    model = keras.Model(inputs, dense("top")(shared(x)))
    check(model, "shared", ROWS, below={"low"}, above={"shared", "between", "top"})
    # its first call is below, its second above
    below, above = {"low", "shared"}, {"shared", "between", "top"}
    check(model, "between", ROWS, below=below, above=above)
    check(model, "top", ROWS, below={"low", "shared", "between"}, above={"top"})


def siamese(tower):
    one, other = keras.Input((4,)), keras.Input((4,))
    return keras.Model([one, other], dense("top")(layers.Subtract()([tower(one), tower(other)])))


@core
def test_siamese_models_keep_both_features():
    model = siamese(Backbone(stack("a", "b")))
    prefix, _ = check(
        model, "head", [ROWS, random(3, 4, seed=1)], below={"a", "b"}, above={"top"}, crossing=2
    )
    one, other = to_numpy(prefix([ROWS, 2 * ROWS]))
    assert np.abs(one - other).max() > 0.01


@core
def test_siamese_models_are_cut_inside_the_backbone():
    model = siamese(Backbone(stack("a", "b")))
    given = [ROWS, random(3, 4, seed=1)]
    check(model, "b", given, below={"a"}, above={"b", "top"}, crossing=2)


@core
def test_siamese_towers_are_cut():
    tower = keras.Sequential([keras.Input((4,)), Backbone(stack("a", "b")), dense("c")])
    given = [ROWS, random(3, 4, seed=1)]
    check(siamese(tower), "head", given, below={"a", "b"}, above={"c", "top"}, crossing=2)


@core
def test_siamese_towers_without_a_backbone_are_cut():
    given = [ROWS, random(3, 4, seed=1)]
    check(siamese(stack("a", "b")), "b", given, below={"a"}, above={"b", "top"}, crossing=2)


@core
def test_one_of_two_backbones():
    one, other = keras.Input((4,)), keras.Input((4,))
    a = Backbone(stack("a", "a2"), name="left")(one)
    b = Backbone(stack("b", "b2"), name="right")(other)
    model = keras.Model([one, other], dense("top")(layers.Concatenate()([a, b])))
    given = [ROWS, random(3, 4, seed=1)]
    above = {"b", "b2", "top"}
    check(model, "head", given, below={"a", "a2"}, above=above, crossing=2, backbone="left")
    above = {"a", "a2", "b2", "top"}
    right = model.get_layer("right")
    check(model, "b2", given, below={"b"}, above=above, crossing=2, backbone=right)
    with pytest.raises(ValueError, match=r"exactly one.*'left', 'right'"):
        split_model(model, "head")


@core
def test_operations_of_keras_ops():
    inputs = keras.Input((4,))
    x = keras.ops.relu(dense("a")(inputs)) * 2.0 + inputs
    x = keras.ops.concatenate([x, keras.ops.flip(x, axis=-1)], axis=-1)
    one, other = keras.ops.split(dense("b", 6)(x), 2, axis=-1)
    model = keras.Model(inputs, keras.ops.sum(dense("c", 3)(one) * other, axis=-1))
    check(model, "b", ROWS, below={"a"}, above={"b", "c"})
    check(model, "c", ROWS, below={"a", "b"}, above={"c"}, crossing=2)
    inside = keras.Input((4,))
    x = keras.ops.tanh(dense("low")(inside) - inside)
    base = keras.Model(inside, keras.ops.stack([x, dense("high")(x) ** 2.0], axis=-1))
    check(classifier(base), "high", ROWS, below={"low"}, above={"high", "head"})


@core
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    base = residual()
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), Backbone(base, name="base", dtype=policy), layers.Flatten()]
    )
    model.add(layers.Dense(3, name="head"))
    half = policy.removeprefix("mixed_")
    eps = 2.0 ** (-10 if half == "float16" else -7)  # what a rounding may be worth
    for at, crossing in (("head", 1), ("two", 1), ("one_conv2", 2)):
        prefix, _ = check(model, at, IMAGES, crossing=crossing, tolerance=4 * eps)
        assert {each.dtype for each in prefix.outputs} == {half}


@core
def test_the_dtype_policy_of_the_moment_changes_nothing():
    model = classifier(residual())
    expected = to_numpy(model(IMAGES))
    keras.config.set_dtype_policy("mixed_float16")
    prefix, suffix = split_model(model, "two")
    features = to_numpy(prefix(IMAGES))
    assert features.dtype == "float32"
    assert_same(suffix(features), expected)


@core
@pytest.mark.parametrize("at", ["head", "two", "all"])
def test_images_of_bytes(at):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), dtype="uint8"),
            BackbonePreprocessing(1 / 127.5, -1.0),
            Backbone(residual(), pooling="avg"),
            layers.Dense(3, name="head"),
        ]
    )
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("uint8")
    prefix, _ = check(model, at, x)
    assert prefix.inputs[0].dtype == "uint8"
    assert prefix.outputs[0].dtype == "float32"


@core
@pytest.mark.skipif(BACKEND == "tensorflow", reason="no such convolution on TensorFlow's CPU")
def test_channels_first():
    image = {"data_format": "channels_first"}
    x = random(3, 3, 8, 8)
    model = keras.Sequential(
        [keras.Input((3, 8, 8)), Backbone(residual(shape=(3, 8, 8), **image), pooling="avg")]
    )
    model.add(dense("head"))
    check(model, "head", x, below=STEM | ONE | TWO)
    check(model, "two", x, below=STEM | ONE)


@core
def test_images_of_any_size():
    model = keras.Sequential(
        [keras.Input((None, None, 3)), Backbone(residual(shape=(None, None, 3)), pooling="max")]
    )
    model.add(dense("top"))
    for size in (8, 12):
        prefix, suffix = split_model(model, "two")
        x = random(2, size, size, 3)
        assert prefix(x).shape == (2, size // 2, size // 2, 4)
        assert_same(suffix(to_numpy(prefix(x))), model(x))


# --- Every way to say where -------------------------------------------------------------------------


@core
@pytest.mark.parametrize(
    ("at", "below"),
    [
        ("head", STEM | ONE | TWO),
        ("one", STEM),  # a block
        ("two", STEM | ONE),
        ("two_conv", STEM | ONE),  # a layer
        (6, STEM | {"one_conv"}),  # inputs, stem_conv, stem_bn, stem_relu, one_conv, one_relu, …
        (-4, STEM | ONE | {"two_conv"}),  # …, two_conv, two_relu and two_shortcut, add, out
        (0.27, STEM | ONE | {"two_conv"}),  # 4 of 15 layers
        (r"one_.*", STEM),
        (r".*_bn", {"stem_conv"}),  # the first that matches
    ],
)
def test_at_is_what_unfreeze_takes(at, below):
    model = classifier(residual(), batch_norm="affine")
    prefix, suffix = split_model(model, at)
    assert holds(prefix) == below
    assert holds(suffix) == (STEM | ONE | TWO | {"head"}) - below
    assert_same(suffix(to_numpy(prefix(IMAGES))), model(IMAGES))
    if at != "head":  # what is above is what it would thaw
        backbone = model.get_layer("base")
        backbone.unfreeze(at)
        thawed = {each.name for each in backbone.model.layers if each.trainable and each.weights}
        assert thawed == holds(suffix) - {"head"}


# --- Training ---------------------------------------------------------------------------------------


class Path(layers.Layer):
    """Stochastic depth."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(5)

    def call(self, inputs, training=None):
        if not training:
            return inputs
        keep = keras.random.uniform((keras.ops.shape(inputs)[0], 1), seed=self.seeds) < 0.5
        return keras.ops.where(keep, 2 * inputs, 0 * inputs)


def noisy_base():
    """Two residual blocks with BatchNormalization, dropout and stochastic depth in each."""
    inputs = keras.Input((4,))
    x = dense("stem", 6)(inputs)
    for i in (1, 2):
        y = layers.BatchNormalization(momentum=0.5, name=f"bn{i}")(dense(f"dense{i}", 6)(x))
        y = Path(name=f"path{i}")(layers.Dropout(0.5, seed=i, name=f"drop{i}")(y))
        x = layers.Add(name=f"add{i}")([x, y])
    return scattered(keras.Model(inputs, x))


def noisy_model(policy="frozen", start="dense2"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            Backbone(noisy_base(), name="base", batch_norm=policy),
            layers.Dropout(0.4, seed=9, name="head_drop"),
            layers.Dense(2, name="head"),
        ]
    )
    if start is not None:
        model.get_layer("base").unfreeze(start)
    return model


BATCHES = 3 * 8
X, Y = random(BATCHES, 4), random(BATCHES, 2, seed=1)


def fit(model, x):
    """Three steps of plain gradient descent."""
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, Y, batch_size=8, shuffle=False, verbose=0)


def values(model):
    """The weights by layer and name."""
    return {
        (layer.name, weight.name): to_numpy(weight)
        for layer in model._flatten_layers()
        if not layer._layers
        for weight in layer.weights
    }


def changed(before, after):
    return {key for key in before if not np.array_equal(before[key], after[key])}


@core
@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
def test_training_the_suffix_is_training_the_model(policy):
    whole, cut = noisy_model(policy), noisy_model(policy)
    before = values(cut)
    assert not changed(before, values(whole))
    fit(whole, X)
    prefix, suffix = split_model(cut, "dense2")
    fit(suffix, to_numpy(prefix(X)))
    of_bn = {"frozen": (), "affine": ("gamma", "beta")}.get(
        policy, ("gamma", "beta", "moving_mean", "moving_variance")
    )
    assert changed(before, values(cut)) == {
        *((name, weight) for name in ("dense2", "head") for weight in ("kernel", "bias")),
        *(("bn2", weight) for weight in of_bn),
    }
    for key, expected in values(whole).items():
        np.testing.assert_allclose(values(cut)[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


@core
def test_training_on_several_tensors_is_training_the_model():
    whole, cut = noisy_model("train", "bn2"), noisy_model("train", "bn2")
    fit(whole, X)
    prefix, suffix = split_model(cut, "bn2")
    features = to_numpy(prefix(X))
    assert len(features) == 2
    before = values(cut)
    fit(suffix, features)
    assert {name for name, _ in changed(before, values(cut))} == {"bn2", "head"}
    for key, expected in values(whole).items():
        np.testing.assert_allclose(values(cut)[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


@core
def test_noise_acts_in_what_is_thawed_above_the_cut_and_in_the_head():
    model = noisy_model()
    prefix, suffix = split_model(model, "dense2")
    crossing = prefix(X)
    np.testing.assert_array_equal(to_numpy(prefix(X, training=True)), to_numpy(crossing))
    features = keras.Model(suffix.inputs, suffix.layers[1].output)  # what the backbone gives
    assert np.ptp(to_numpy(features(crossing, training=True) - features(crossing))) > 0.1
    model.get_layer("base").freeze()
    np.testing.assert_array_equal(
        to_numpy(features(crossing, training=True)), to_numpy(features(crossing))
    )
    assert np.ptp(to_numpy(suffix(crossing, training=True) - suffix(crossing))) > 0.1  # the head


@core
@pytest.mark.parametrize("policy", ["affine", "train"])
def test_frozen_layers_above_the_cut_stay_as_they_are(policy):
    """The cut is below both blocks, and the upper one alone is thawed."""
    whole, cut = noisy_model(policy), noisy_model(policy)
    prefix, suffix = split_model(cut, "dense1")
    before = values(cut)
    fit(whole, X)
    fit(suffix, to_numpy(prefix(X)))
    moved = {name for name, _ in changed(before, values(cut))}
    assert moved == {"dense2", "bn2", "head"}
    for key, expected in values(whole).items():
        np.testing.assert_allclose(values(cut)[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


@core
def test_the_variables_are_the_very_same():
    model = noisy_model("affine")
    ids = {id(weight): weight.path for weight in model.weights}
    for at in ("head", "dense2", "dense1"):
        prefix, suffix = split_model(model, at)
        halves = [id(weight) for half in (prefix, suffix) for weight in half.weights]
        assert sorted(halves) == sorted(ids)
    assert prefix.trainable_variables == []
    assert [id(each) for each in suffix.trainable_variables] == [
        id(each) for each in model.trainable_variables
    ]
    model.get_layer("base").freeze()  # whatever is said later holds for the halves
    assert [each.path for each in suffix.trainable_variables] == [
        each.path for each in model.get_layer("head").trainable_variables
    ]
    model.get_layer("base").unfreeze()
    assert len(prefix.trainable_variables) == 2
    assert len(suffix.trainable_variables) == 2 * 4 + 2  # two blocks and the head


@core
def test_the_policy_holds_in_the_halves_whatever_is_set():
    model = noisy_model("frozen", None)
    prefix, suffix = split_model(model, "dense2")
    for layer in model._flatten_layers():
        layer.trainable = True
    for half in (prefix, suffix):
        assert {each.path.split("/")[-2] for each in half.trainable_variables}.isdisjoint(
            {"bn1", "bn2"}
        )
    before = values(model)
    fit(suffix, to_numpy(prefix(X)))
    assert {name for name, _ in changed(before, values(model))} == {"dense2", "head"}


@core
def test_what_a_model_without_a_backbone_trains():
    def made():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                *(keras.Input((4,)), dense("a"), dense("b"), layers.Dropout(0.5, seed=1)),
                *(layers.BatchNormalization(momentum=0.5, name="bn"), layers.Dense(2, name="top")),
            ]
        )
        model.get_layer("a").trainable = False
        return model

    whole, cut = made(), made()
    fit(whole, X)
    prefix, suffix = split_model(cut, "b")
    before = values(cut)
    fit(suffix, to_numpy(prefix(X)))
    assert {name for name, _ in changed(before, values(cut))} == {"b", "bn", "top"}
    for key, expected in values(whole).items():
        np.testing.assert_allclose(values(cut)[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


@core
def test_losses_of_the_layers_above_are_the_suffixes():
    base = keras.Sequential(
        [
            keras.Input((4,)),
            dense("a", kernel_regularizer="l2"),
            dense("b", kernel_regularizer="l2"),
        ]
    )
    model = classifier(base)
    model.get_layer("base").unfreeze("b")
    _, suffix = split_model(model, "b")
    kernel = to_numpy(base.get_layer("b").kernel)
    assert [float(to_numpy(each)) for each in suffix.losses] == pytest.approx(
        [0.01 * np.sum(kernel**2)]
    )


@core
@pytest.mark.parametrize("around", [True, False], ids=["backbone", "plain"])
def test_what_a_call_in_the_graph_says_of_training_counts_as_in_the_whole(around):
    """In Keras 3.15 the `training` of `fit` beats the one that was said in the graph."""

    def made():
        keras.utils.set_random_seed(1)
        nested = keras.Sequential(
            [keras.Input((4,)), dense("a"), layers.Dropout(0.5, seed=1), dense("b")]
        )
        inside = Backbone(nested) if around else nested
        for layer in nested.layers:
            layer.trainable = layer.name != "a"
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(2, name="top")(inside(inputs, training=False)))

    whole, cut = made(), made()
    dropout = next(each.name for each in cut._flatten_layers() if "dropout" in each.name)
    fit(whole, X)
    prefix, suffix = split_model(cut, 1 if around else dropout)
    assert holds(prefix) == {"a"}
    before = values(cut)
    fit(suffix, to_numpy(prefix(X)))
    assert {name for name, _ in changed(before, values(cut))} == {"b", "top"}
    for key, expected in values(whole).items():
        np.testing.assert_allclose(values(cut)[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


# --- What cannot be cut -----------------------------------------------------------------------------


class Own(keras.Model):
    """A model whose `call` is its own code."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.dense = inner or dense("inner_dense"), dense("own_dense")

    def build(self, input_shape):
        if not self.inner.built:
            self.inner.build(input_shape)
        self.dense.build((None, 4))
        self.built = True

    def call(self, inputs):
        return self.dense(self.inner(inputs))


def own(**kwargs):
    model = Own(**kwargs)
    model.build((None, 4))
    return model


def masked(name="emb"):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True, name=name)(inputs)
    x = dense("each")(x)
    return keras.Model(inputs, layers.LSTM(3, name="lstm")(x), name="masked")


WORDS = np.array([[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]], "int32")


@core
def test_what_is_no_model_or_has_no_graph():
    with pytest.raises(TypeError, match="Expected a keras.Model.*of type Dense"):
        split_model(layers.Dense(2), "head")
    not_built = keras.Sequential([layers.Dense(2)], name="unbuilt")
    with pytest.raises(ValueError, match=r"model='unbuilt', which is not built.*keras\.Input"):
        split_model(not_built, "head")
    with pytest.raises(ValueError, match="model='mine', whose call is its own code.*functional"):
        split_model(own(name="mine"), "own_dense")


@core
def test_the_head_of_a_model_without_a_backbone():
    with pytest.raises(ValueError, match=r"keras_xfer Backbone.*at='head', model='bare'.*Wrap"):
        split_model(stack("a", "b", name="bare"), "head")
    with pytest.raises(ValueError, match="Backbone of that name inside model 'bare'.*found: none"):
        split_model(stack("a", "b", name="bare"), "b", backbone="base")


@core
def test_what_matches_nothing_names_the_nearest():
    for model in (stack("first", "second"), classifier(stack("first", "second"))):
        with pytest.raises(ValueError, match="start='frist'.*Nearest: 'first'"):
            split_model(model, "frist")
        with pytest.raises(ValueError, match="an index into the 2 layers|into the 3 layers"):
            split_model(model, 7)
        with pytest.raises(ValueError, match=r"strictly between 0 and 1.*1\.5"):
            split_model(model, 1.5)
        for wrong in (True, None, [1]):
            with pytest.raises(TypeError, match="Expected start to be"):
                split_model(model, wrong)


@core
def test_a_backbone_without_a_graph_is_cut_at_its_end_alone():
    model = keras.Sequential(
        [keras.Input((4,)), Backbone(own(name="mine"), name="base"), dense("top")], name="whole"
    )
    check(model, "head", ROWS, below={"inner_dense", "own_dense"}, above={"top"})
    message = r"model 'whole'.*at='own_dense': the model inside 'base', 'mine'.*cuts: .*'head'"
    with pytest.raises(ValueError, match=message):
        split_model(model, "own_dense")


@core
def test_a_backbone_without_a_graph_offers_its_end_alone():
    model = keras.Sequential([keras.Input((4,)), Backbone(own(name="mine")), dense("top")])
    with pytest.raises(ValueError, match=r"nearest cuts: 'head'\.$"):
        split_model(model, "own_dense")


@core
def test_a_backbone_inside_a_layer_without_a_graph():
    body = Backbone(stack("a", "b"))
    model = keras.Sequential([keras.Input((4,)), own(inner=body, name="mine"), dense("top")])
    message = r"at='head': layer 'mine' \(Own\), which holds the backbone.*nearest cuts: 'head'|"
    with pytest.raises(ValueError, match=message + "'mine'"):
        split_model(model, "head")


@core
def test_a_cut_that_is_refused_is_not_offered():
    inputs = keras.Input((5, 4))
    x = layers.TimeDistributed(Backbone(stack("a", "b")), name="each")(inputs)
    with pytest.raises(ValueError, match=r"at='head': layer 'each' \(TimeDist") as raised:
        split_model(keras.Model(inputs, dense("top")(x)), "head")
    assert "'head'" not in str(raised.value).split("nearest cuts")[1]


@core
def test_a_place_with_nothing_below_names_cuts():
    with pytest.raises(ValueError, match=r"'residual'.*at='all': nothing is below.*cuts: .*'one'"):
        split_model(residual(), "all")
    with pytest.raises(ValueError, match=r"at='a': nothing is below the cut.*cuts: .*'head'"):
        split_model(classifier(stack("a", "b")), "a")
    with pytest.raises(ValueError, match=r"'bare'.*at='all': nothing is below"):
        split_model(stack("a", "b", name="bare"), "all")
    # what is below the backbone is below
    model = keras.Sequential([keras.Input((4,)), dense("low"), Backbone(stack("a", "b"))])
    check(model, "all", ROWS, below={"low"}, above={"a", "b"})


@core
def test_a_plain_stack_has_cuts_to_offer():
    with pytest.raises(ValueError, match=r"nearest cuts: .*'b'"):
        split_model(stack("a", "b"), "all")


@core
def test_cuts_that_an_error_offers_are_cuts():
    for model in (residual(), classifier(residual())):
        with pytest.raises(ValueError, match="nothing is below") as raised:
            split_model(model, 0)
        offered = re.findall("'(.*?)'", str(raised.value).split("nearest cuts: ")[1])
        assert len(offered) >= 2
        for at in offered:
            check(model, at, IMAGES)


@core
def test_a_mask_does_not_cross_between_layers():
    with pytest.raises(
        ValueError, match=r"'masked'.*at='lstm': the mask that layer .* would have to cross"
    ):
        split_model(masked(), "lstm")


@core
def test_the_layer_whose_mask_would_cross_is_named():
    with pytest.raises(ValueError, match=r"at=-1: .*'(emb|each|lstm)'"):
        split_model(masked(), -1)


@core
def test_a_mask_inside_a_backbone_crosses_as_a_tensor():
    model = keras.Sequential([keras.Input((5,), dtype="int32"), Backbone(masked()), dense("top")])
    check(model, "head", WORDS, below={"emb", "each", "lstm_cell"}, above={"top"})
    check(model, "lstm", WORDS, below={"emb", "each"}, above={"lstm_cell", "top"}, crossing=2)
    without = WORDS.copy()
    without[without == 0] = 6  # nothing is masked: it matters
    assert np.ptp(to_numpy(model(WORDS) - model(without))) > 1e-4


def words(*above, **kwargs):
    """A backbone that hands a mask on while it runs, of which its symbols say nothing."""
    embedding = layers.Embedding(7, 4, mask_zero=True, name="emb")
    base = keras.Sequential([keras.Input((5,), dtype="int32"), embedding, *above])
    return Backbone(base, name="base", **kwargs)


def reader(*body):
    return keras.Sequential([keras.Input((5,), dtype="int32"), *body, layers.LSTM(3), dense("top")])


@core
@pytest.mark.parametrize(
    ("make", "at"),
    [
        (lambda: reader(words()), "head"),
        (lambda: reader(keras.Sequential([keras.Input((5,), dtype="int32"), words()])), "head"),
        (lambda: reader(words(dense("each"))), "head"),
        (lambda: reader(words(dense("each"))), "each"),
        (lambda: reader(words().model, dense("each")), "each"),
        (lambda: reader(words().model, dense("low"), dense("each")), "each"),
    ],
    ids=["Backbone", "nested", "handed on", "inside", "plain nested", "plain handed on"],
)
def test_a_mask_that_is_handed_on_at_run_time_does_not_cross(make, at):
    model = make()
    without = np.where(WORDS == 0, 6, WORDS)
    assert np.ptp(to_numpy(model(WORDS) - model(without))) > 1e-4  # padding is masked
    with pytest.raises(ValueError, match=rf"at='{at}': the mask that layer .* would have to cross"):
        split_model(model, at)


@core
def test_a_mask_that_ends_or_begins_elsewhere_keeps_nothing_from_crossing():
    ends = keras.Sequential(
        [keras.Input((5,), dtype="int32"), words(layers.LSTM(3, name="lstm")), dense("top")]
    )
    check(ends, "head", WORDS, below={"emb", "lstm_cell"}, above={"top"})
    base = keras.Sequential([keras.Input((5, 1)), dense("low"), layers.Masking(), dense("each")])
    begins = keras.Sequential([keras.Input((5, 1)), Backbone(base), layers.LSTM(3), dense("top")])
    check(begins, 1, WORDS[..., None].astype("float32"))


# --- keras.applications -----------------------------------------------------------------------------


def calibrated(model, x):
    """`model` with random gamma, beta and biases, and in BatchNormalization the statistics of what
    passes, so that every layer tells one image from another to the end."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        end = weight.path.rsplit("/", 1)[-1]
        if end == "gamma":
            weight.assign(rng.uniform(0.5, 1.5, tuple(weight.shape)))
        elif end in ("beta", "bias"):
            weight.assign(rng.normal(0, 0.1, tuple(weight.shape)))
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(x, training=True)
    return model


def check_application(name, **kwargs):
    size = spec_for(name).min_image_size
    shape = (size, size, 3)
    base = getattr(keras.applications, name)(
        include_top=False, weights=None, input_shape=shape, **kwargs
    )
    x = np.random.default_rng(0).uniform(0, 255, (4, *shape)).astype("float32")
    calibrated(base, x)
    expected = to_numpy(base(x, training=False))
    assert np.std(expected, axis=0).max() > 1e-3 * np.abs(expected).max()  # images differ
    names = [block.name for block in blocks(base)[1:]]
    chosen = names[:: max(1, math.ceil(len(names) / 3))]
    assert len(chosen) >= 2
    every = holds(base)
    for at in chosen:
        _check_cut(base, at, x, expected, every)
    whole = keras.Sequential(
        [
            keras.Input(shape),
            Backbone(base, name="around"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="the_head"),
        ]
    )
    expected = to_numpy(whole(x, training=False))
    for at in ("head", *chosen):
        _check_cut(whole, at, x, expected, every | {"the_head"})


def _check_cut(model, at, x, expected, every):
    prefix, suffix = split_model(model, at)
    assert holds(prefix)
    assert holds(suffix)
    assert holds(prefix) | holds(suffix) == every
    assert not holds(prefix) & holds(suffix)
    features = to_numpy(prefix(x))
    try:
        assert_same(suffix(features), expected, 1e-4)
    except AssertionError as error:
        raise AssertionError(f"at={at!r}: {error}") from None


@core
@pytest.mark.parametrize("name", CHEAP)
def test_applications(name):
    if BACKEND == "jax" and name != "MobileNetV2":
        pytest.skip("JAX compiles each operation of each layer; the graph is cut by Keras's own")
    check_application(name, **CHEAP[name])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", APPLICATIONS)
def test_all_applications(name):
    if name == "NASNetMobile" and BACKEND == "torch":
        pytest.skip("keras.applications has no NASNetMobile on torch")
    try:
        check_application(name)
    finally:
        keras.backend.clear_session()
        gc.collect()
