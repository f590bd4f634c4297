"""The two parts of a backbone against the backbone, and what trains in them."""

import json

import keras
import numpy as np
import pytest

from keras_xfer import Backbone
from keras_xfer.features.split import split_model
from keras_xfer.layers.backbone_part import BackbonePart

pytestmark = [
    pytest.mark.core,
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

layers = keras.layers
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32")


def to_numpy(tensors):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, tensors)


def base(filters=4):
    """low, a residual block with BatchNormalization and dropout, high."""
    inputs = keras.Input((8, 8, 3), name="images")
    x = layers.Conv2D(filters, 3, name="low")(inputs)
    y = layers.BatchNormalization(name="bn", momentum=0.5)(layers.Conv2D(filters, 1, name="mid")(x))
    x = layers.Add(name="add")([x, layers.Dropout(0.5, name="drop")(y)])
    return keras.Model(inputs, layers.Conv2D(5, 3, name="high")(x), name="cnn")


def parts(at="mid", model=None, **kwargs):
    """A backbone, what is below the cut and what is above."""
    backbone = Backbone(base() if model is None else model, name="base", **kwargs)
    whole = keras.Sequential([keras.Input((8, 8, 3)), backbone, layers.Flatten()])
    found = [
        layer
        for half in split_model(whole, at)
        for layer in half.layers
        if isinstance(layer, BackbonePart)
    ]
    return backbone, *found


@pytest.mark.parametrize("pooling", [None, "avg", "max"])
@pytest.mark.parametrize(("at", "crossing"), [("mid", 1), ("bn", 2), ("drop", 2), ("high", 1)])
def test_above_on_what_below_gives_is_the_backbone(at, crossing, pooling):
    backbone, below, above = parts(at, pooling=pooling)
    given = below(IMAGES)
    assert isinstance(given, list)
    assert len(given) == crossing
    expected = to_numpy(backbone(IMAGES))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(to_numpy(above(to_numpy(given))), expected, rtol=1e-5, atol=1e-6)
    if crossing == 1:  # or without the list
        np.testing.assert_allclose(to_numpy(above(given[0])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_symbols_have_the_shapes_and_dtypes_of_what_comes(policy):
    keras.config.set_dtype_policy(policy)
    model = base()
    backbone, below, above = parts("bn", model, pooling="avg", dtype=policy)
    half = {"float32": "float32", "mixed_bfloat16": "bfloat16"}[policy]
    x = IMAGES.astype("float64")  # is converted, as the model does
    for one, symbol in zip(below(x), below(keras.Input((8, 8, 3), dtype="float64")), strict=True):
        assert tuple(symbol.shape) == (None, *one.shape[1:])
        assert keras.backend.standardize_dtype(one.dtype) == symbol.dtype == half
    symbol = above([keras.Input(each.shape[1:], dtype=each.dtype) for each in above_inputs(below)])
    given = above(below(x))
    assert tuple(symbol.shape) == (None, *given.shape[1:]) == (None, 5)
    assert keras.backend.standardize_dtype(given.dtype) == symbol.dtype
    assert symbol.dtype == keras.backend.standardize_dtype(backbone(IMAGES).dtype) == half


def above_inputs(below):
    return below(keras.Input((8, 8, 3)))


def test_parts_hold_the_very_layers_of_their_side():
    backbone, below, above = parts("mid", trainable=True, batch_norm="affine")
    layer = backbone.model.get_layer
    assert {id(each) for each in below.weights} == {id(each) for each in layer("low").weights}
    own = [weight for name in ("mid", "bn", "high") for weight in layer(name).weights]
    assert {id(each) for each in above.weights} == {id(each) for each in own}
    assert len(above.weights) == len(own)
    assert below.variables == below.weights
    assert (below.name, above.name) == ("base_below", "base_above")


def test_what_trains_is_what_the_backbone_trains():
    backbone, below, above = parts("mid", batch_norm="affine")
    assert below.trainable_variables == above.trainable_variables == []
    backbone.unfreeze("high")
    assert [each.path.split("/")[-2] for each in above.trainable_variables] == ["high", "high"]
    backbone.unfreeze("mid")
    assert len(above.trainable_variables) == 6  # gamma and beta
    assert below.trainable_variables == []
    backbone.unfreeze()
    assert len(below.trainable_variables) == 2


def test_an_assignment_to_trainable_always_arrives():
    backbone, _, above = parts("mid", batch_norm="affine")
    for value, count in ((True, 6), (True, 6), (False, 0), (False, 0), (True, 6)):
        above.trainable = value
        assert len(above.trainable_variables) == count
    backbone.freeze()  # by another way, whatever the flag of the part says
    assert above.trainable_variables == []
    above.trainable = True
    assert len(above.trainable_variables) == 6
    assert len(backbone.trainable_variables) == 6


def test_the_policy_is_held_whoever_sets_flags():
    backbone, _, above = parts("mid", batch_norm="frozen")
    above.trainable = True
    assert [each.path.split("/")[-2] for each in above.trainable_variables] == [
        *("mid", "mid", "high", "high")
    ]
    bn = backbone.model.get_layer("bn")
    bn.trainable = True
    assert len(above.trainable_variables) == 4
    assert not bn.trainable


def test_below_never_acts():
    backbone, below, _ = parts("high", batch_norm="train", trainable=True)
    before = [to_numpy(weight) for weight in backbone.weights]
    (expected,) = to_numpy(below(IMAGES))
    (given,) = to_numpy(below(IMAGES, training=True))
    np.testing.assert_array_equal(given, expected)
    for weight, was in zip(backbone.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), was)
    whole = to_numpy(backbone(IMAGES, training=True)) - to_numpy(backbone(IMAGES))
    assert np.ptp(whole) > 0.1  # which the backbone itself does


@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
def test_above_acts_in_what_is_thawed(policy):
    backbone, below, above = parts("mid", batch_norm=policy)
    given = below(IMAGES)
    bn = backbone.model.get_layer("bn")
    still = to_numpy(above(given))
    mean = to_numpy(bn.moving_mean)
    np.testing.assert_array_equal(to_numpy(above(given, training=True)), still)  # all is frozen
    np.testing.assert_array_equal(to_numpy(bn.moving_mean), mean)
    backbone.unfreeze("high")  # dropout and BatchNormalization are below what is thawed
    np.testing.assert_array_equal(to_numpy(above(given, training=True)), still)
    np.testing.assert_array_equal(to_numpy(bn.moving_mean), mean)
    backbone.unfreeze("mid")
    np.testing.assert_array_equal(to_numpy(above(given, training=False)), still)
    np.testing.assert_array_equal(to_numpy(above(given)), still)
    assert np.ptp(to_numpy(above(given, training=True)) - still) > 0.1  # dropout
    moved = not np.array_equal(to_numpy(bn.moving_mean), mean)
    assert moved == (policy == "train")
    if moved:  # by the batch, once
        batch = to_numpy(backbone.model.get_layer("mid")(given[0]))
        expected = 0.5 * mean + 0.5 * batch.mean((0, 1, 2))
        np.testing.assert_allclose(to_numpy(bn.moving_mean), expected, rtol=1e-4, atol=1e-6)


class Around(layers.Layer):
    """A part and a head in a `call` that somebody wrote by hand."""

    def __init__(self, part):
        super().__init__()
        self.part, self.drop = part, layers.Dropout(0.5, seed=1)
        self.built = True

    def call(self, inputs):
        return self.drop(keras.ops.ones_like(self.part(inputs)))


def test_a_head_after_a_frozen_part_still_trains():
    _, below, above = parts("mid")
    around = Around(above)
    assert np.ptp(to_numpy(around(below(IMAGES), training=True))) > 1
    assert np.ptp(to_numpy(around(below(IMAGES)))) == 0


def test_configurations_tell_parts_apart():
    def config(part):
        return json.dumps(part.get_config(), sort_keys=True)  # plain data

    _, below, above = parts("bn")
    _, below_again, above_again = parts("bn")
    assert config(below) == config(below_again)
    assert config(above) == config(above_again)
    others = [
        *parts("mid")[1:],
        *parts("high")[1:],
        *parts("bn", base(filters=6))[1:],
        parts("bn", pooling="avg")[2],
    ]
    seen = {config(each) for each in (below, above, *others)}
    assert len(seen) == 2 + len(others)


def test_how_layers_are_connected_is_in_the_configuration():
    def crossed(swap):
        inputs = keras.Input((8, 8, 3), name="images")
        one = layers.Conv2D(4, 1, name="one")(inputs)
        other = layers.Conv2D(4, 1, name="other")(inputs)
        pair = [other, one] if swap else [one, other]
        return keras.Model(inputs, layers.Conv2D(2, 1, name="top")(layers.Subtract(name="s")(pair)))

    configs = [parts("top", crossed(swap))[1].get_config()["nodes"] for swap in (False, True)]
    assert configs[0] != configs[1]


def test_a_part_is_not_made_of_a_file(tmp_path):
    _, _, above = parts()
    with pytest.raises(NotImplementedError, match=r"save the whole model.*split"):
        BackbonePart.from_config(above.get_config())
