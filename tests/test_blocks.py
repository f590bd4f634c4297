"""Cuts against paths counted by hand; blocks against what people call a block."""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import pickle

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xfer import Backbone
from keras_xfer.blocks import Block, Cut, blocks, cuts

layers = keras.layers
core = pytest.mark.core
# Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
# NumPy 2's `copy` yet.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)
# The graphs of keras.applications are the same on every backend.
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs do not depend on the backend"
)

APPLICATIONS = sorted(
    name
    for name in dir(keras.applications)
    if callable(getattr(keras.applications, name)) and name[0].isupper()
)


@functools.cache
def application(name, **kwargs):
    return built(name, 32, **kwargs)


def built(name, size, **kwargs):
    function = getattr(keras.applications, name)
    return function(include_top=False, weights=None, input_shape=(size, size, 3), **kwargs)


def conv(name, **kwargs):
    return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)


def residual():
    """A stem, two residual blocks (the second one strided) and a head."""
    inputs = keras.Input((8, 8, 3), name="inputs")
    x = layers.BatchNormalization(name="stem_bn")(conv("stem_conv", strides=2)(inputs))
    x = layers.ReLU(name="stem_relu")(x)
    y = layers.ReLU(name="one_relu")(conv("one_conv")(x))
    x = layers.Add(name="one_add")([x, conv("one_conv2")(y)])
    x = layers.ReLU(name="one_out")(x)
    y = conv("two_conv", strides=2)(x)
    x = layers.Add(name="two_add")([conv("two_shortcut", strides=2)(x), y])
    x = layers.ReLU(name="two_out")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))


# --- cuts ------------------------------------------------------------------------------------------


@core
def test_cuts_of_a_residual_model():
    assert cuts(residual()) == [
        *("inputs", "stem_conv", "stem_bn", "stem_relu"),
        *("one_add", "one_out", "two_add", "two_out", "pool"),
    ]


@core
def test_models_without_a_graph_have_no_cuts():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model(np.ones((1, 3), "float32"))
    assert cuts(model) == []
    assert [block.name for block in blocks(model)] == [model.dense.name]


@core
def test_cuts_go_through_nested_models_and_stop_at_several_outputs():
    inside = keras.Input((3,), name="inside")
    a, b = layers.Dense(3, name="a")(inside), layers.Dense(3, name="b")(inside)
    nested = keras.Model(inside, layers.Add(name="sum")([a, b]))
    inputs = keras.Input((3,), name="inputs")
    top = layers.Dense(3, name="top")(nested(inputs))
    assert cuts(keras.Model(inputs, top)) == ["inputs", "sum", "top"]
    twice = keras.Model(inputs, layers.Dense(3, name="last")(nested(nested(inputs))))
    assert cuts(twice) == ["inputs", "sum", "sum", "last"]
    two = keras.Model(inputs, [nested(inputs), layers.Dense(2, name="other")(top)])
    assert cuts(two) == ["inputs"]


@core
def test_cuts_of_several_inputs_begin_where_they_meet():
    one, other = keras.Input((3,)), keras.Input((2,))
    x = layers.Concatenate(name="met")([layers.Dense(2)(one), other])
    assert cuts(keras.Model([one, other], layers.Dense(2, name="top")(x))) == ["met", "top"]


@core
def test_operations_without_a_layer_are_followed():
    inputs = keras.Input((3,), name="inputs")
    x = layers.Dense(3, name="a")(inputs)
    x = x + layers.Dense(3, name="b")(x)
    model = keras.Model(inputs, layers.Dense(3, name="c")(x))
    (add,) = [op.name for op in model.operations if type(op).__name__ == "Add"]
    assert cuts(model) == ["inputs", "a", add, "c"]
    assert [len(block.layers) for block in blocks(model)] == [2, 1, 1]


@core
def test_every_cut_really_cuts():
    model = residual()
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    for name in cuts(model)[:-1]:  # above the last one is nothing
        tensor = model.get_layer(name).output
        prefix, suffix = keras.Model(model.input, tensor), keras.Model(tensor, model.output)
        actual = keras.ops.convert_to_numpy(suffix(prefix(x)))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    for name in {layer.name for layer in model.layers} - set(cuts(model)):
        with pytest.raises(ValueError, match=r"disconnected|not connected|cannot"):
            keras.Model(model.get_layer(name).output, model.output)


def _paths(parents, without=None):
    """How many ways lead from 0 to the last node, not through `without`; by dynamic programming."""
    ways = [1]
    for i, above in enumerate(parents, start=1):
        ways.append(0 if i == without else sum(ways[parent] for parent in above))
    return 0 if without == 0 else ways[-1]


@core
@settings(max_examples=40, deadline=None, derandomize=True)
@given(choice=st.data())
def test_cuts_are_what_every_path_passes(choice):
    size = choice.draw(st.integers(2, 9))
    parents = [  # of node i + 1
        sorted(choice.draw(st.sets(st.integers(max(0, i - 3), i), min_size=1, max_size=2)))
        for i in range(size)
    ]
    tensors = [keras.Input((2,), name="n0")]
    for i, above in enumerate(parents, start=1):
        inputs = [tensors[parent] for parent in above]
        layer = layers.Add(name=f"n{i}") if len(inputs) > 1 else layers.Identity(name=f"n{i}")
        tensors.append(layer(inputs if len(inputs) > 1 else inputs[0]))
    model = keras.Model(tensors[0], tensors[-1])
    used = {layer.name for layer in model.layers}
    expected = [
        f"n{i}" for i in range(size + 1) if f"n{i}" in used and _paths(parents, without=i) == 0
    ]
    if f"n{size}" not in expected:
        expected.append(f"n{size}")
    assert cuts(model) == expected


@on_tensorflow
@pytest.mark.parametrize(
    ("name", "count"),
    [("MobileNetV2", 74), ("EfficientNetB0", 83), ("VGG16", 19), ("NASNetMobile", 5)],
)
def test_cuts_of_known_models(name, count):
    model = application(name)
    found = cuts(model)
    assert len(found) == count
    positions = [model.layers.index(model.get_layer(name)) for name in found]
    assert positions == sorted(positions)


@core
def test_a_cut_tells_what_is_kept_and_what_is_done():
    found = {cut: cut for cut in cuts(residual())}
    multiply_adds = 4 * 4 * (3 * 3 * 3 * 4 + 4)
    stem = found["stem_conv"]
    assert (stem.shape, stem.bytes_per_image, stem.flops) == ((4, 4, 4), 256, 2 * multiply_adds)
    multiply_adds += 4 * 4 * 4  # normalization
    elements = 4 * 4 * 4  # of the activation
    assert found["stem_relu"].flops == 2 * multiply_adds + elements
    multiply_adds += 2 * 4 * 4 * (3 * 3 * 4 * 4 + 4) + 2 * 2 * 2 * (3 * 3 * 4 * 4 + 4)
    elements += 3 * 4 * 4 * 4 + 2 * 2 * 2 * 4 + 4
    pool = found["pool"]
    assert (pool.shape, pool.bytes_per_image, pool.flops) == (
        (4,),
        16,
        2 * multiply_adds + elements,
    )
    assert stem.flops_share == stem.flops / pool.flops
    assert found["inputs"].flops_share == 0
    assert pool.flops_share == 1


@core
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_bytes_are_those_of_the_dtype(policy):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 5, dtype=policy, name="embedded")(tokens)
    x = layers.Dense(3, dtype="float32", name="dense")(x)
    found = cuts(keras.Model(tokens, keras.ops.greater(x, 0)))
    assert found[:3] == ["tokens", "embedded", "dense"]
    assert [cut.bytes_per_image for cut in found] == [6 * 4, 6 * 5 * 2, 6 * 3 * 4, 6 * 3]


@core
def test_of_several_outputs_the_one_that_crosses_is_kept():
    inputs = keras.Input((6, 5), name="inputs")
    _, state = layers.GRU(3, return_sequences=True, return_state=True, name="gru")(inputs)
    found = cuts(keras.Model(inputs, layers.Dense(2, name="top")(state)))
    assert [(cut, cut.shape) for cut in found] == [
        *(("inputs", (6, 5)), ("gru", (3,)), ("top", (2,)))
    ]


@core
def test_what_is_not_known_of_a_cut_is_none_until_it_is_said():
    inputs = keras.Input((None, None, 3), name="inputs")
    x = layers.GlobalAveragePooling2D(name="pool")(conv("stem")(inputs))
    model = keras.Model(inputs, x)
    stem, pool = cuts(model)[1:]
    assert (stem.shape, stem.bytes_per_image) == ((None, None, 4), None)
    assert (pool.shape, pool.bytes_per_image) == ((4,), 16)
    for cut in (stem, pool):
        assert (cut.flops, cut.flops_share) == (None, None)
    stem, pool = cuts(model, (8, 6, 3))[1:]
    assert (stem.shape, stem.bytes_per_image) == ((8, 6, 4), 8 * 6 * 4 * 4)
    assert stem.flops == 2 * 8 * 6 * (3 * 3 * 3 * 4 + 4)
    assert pool.flops_share == 1


@core
def test_a_cut_is_a_str_that_cannot_be_changed():
    (*_, cut) = cuts(residual())
    assert isinstance(cut, Cut)
    assert cut == "pool"
    assert hash(cut) == hash("pool")
    assert f"{cut!r} {cut}" == "'pool' pool"
    assert json.dumps([cut]) == '["pool"]'
    assert type(str(cut)) is str
    with pytest.raises(dataclasses.FrozenInstanceError):
        cut.flops = 0
    for again in (copy.copy(cut), copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        assert isinstance(again, Cut)
        assert again == cut
        assert vars(again) == vars(cut) != {}


@on_tensorflow
@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNetB0", "VGG16", "NASNetMobile"])
def test_shares_rise_to_the_whole(name):
    found = cuts(application(name))
    shares = [cut.flops_share for cut in found]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(below < above for below, above in itertools.pairwise(shares))
    for cut in found:
        shape = application(name).get_layer(cut).output.shape[1:]
        assert cut.shape == shape
        assert cut.bytes_per_image == 4 * np.prod(shape)


# --- blocks ----------------------------------------------------------------------------------------


def flat(model):
    """The layers of a model, in order, with those of the models in it (ConvNeXt's stem)."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from flat(layer)
        else:
            yield layer


def check_blocks(model):
    """What holds for the blocks of every model; returns them."""
    found = blocks(model)
    assert [id(layer) for block in found for layer in block.layers] == [
        id(layer) for layer in flat(model)
    ]
    names = [block.name for block in found]
    assert len(set(names)) == len(names)
    for block in found:
        own = {
            id(weight)
            for layer in block.layers
            if not isinstance(layer, layers.BatchNormalization)
            for weight in layer.weights
        }
        assert own, block
    return found


@core
def test_blocks_of_a_residual_model():
    found = check_blocks(residual())
    assert [block.name for block in found] == ["stem", "one", "two"]
    assert [len(block.layers) for block in found] == [4, 5, 5]
    assert found[2].layers[-1].name == "pool"
    assert repr(found[0]) == "Block(name='stem')"
    assert isinstance(found[0], Block)


@core
def test_a_plain_stack_ends_its_blocks_where_the_resolution_changes():
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            conv("a_conv1"),
            conv("a_conv2"),
            layers.MaxPooling2D(name="a_pool"),
            layers.MaxPooling2D(name="another_pool"),  # nothing of its own: not a block
            conv("b_conv"),
            layers.BatchNormalization(name="b_bn"),
            layers.AveragePooling2D(2, name="b_pool"),
            layers.BatchNormalization(name="last_bn"),
        ]
    )
    found = check_blocks(model)
    assert [[layer.name for layer in block.layers] for block in found] == [
        ["a_conv1", "a_conv2", "a_pool", "another_pool"],
        ["b_conv", "b_bn", "b_pool", "last_bn"],
    ]
    assert [block.name for block in found] == ["a", "b"]


@core
def test_a_block_is_never_called_as_a_layer_from_which_less_would_train():
    """`unfreeze` takes a layer of that name before a block."""
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="stem")(inputs)
    for i in range(3):
        y = layers.Dense(4, name=f"inner{i}")(x)
        x = layers.Add(name=f"sum{i}")([x, y])
    backbone = Backbone(keras.Model(inputs, x))
    names = [block.name for block in backbone.blocks]
    assert names == ["stem", "sum0_block", "sum1_block", "sum2_block"]
    for i, block in enumerate(backbone.blocks):
        backbone.unfreeze(block.name)
        expected = [w for b in backbone.blocks[i:] for layer in b.layers for w in layer.weights]
        assert [id(w) for w in backbone.trainable_weights] == [id(w) for w in expected]


@core
def test_blocks_of_one_name_are_numbered():
    stack = []
    for name in ("conv_a", "conv_b", "conv_2_x"):
        stack += [conv(name), layers.MaxPooling2D(name=f"{name}_pool")]
    model = keras.Sequential([keras.Input((32, 32, 3)), *stack])
    names = [block.name for block in check_blocks(model)]
    assert len(names) == 3
    assert all(collections.Counter(names)[name] == 1 for name in names)


@core
def test_a_model_without_weights_is_one_block():
    model = keras.Sequential([keras.Input((4,)), layers.ReLU(), layers.Dropout(0.5)])
    (block,) = blocks(model)
    assert list(block.layers) == model.layers


@core
def test_shared_and_nested_layers_are_in_one_block():
    shared = conv("shared")
    inside = keras.Input((8, 8, 4), name="inside")
    nested = keras.Model(inside, layers.MaxPooling2D(name="pool")(conv("n")(inside)))
    inputs = keras.Input((8, 8, 4), name="inputs")
    x = layers.Add(name="sum")([inputs, shared(shared(inputs))])
    model = keras.Model(inputs, conv("top")(nested(x)))
    flat = [layer.name for block in blocks(model) for layer in block.layers]
    assert sorted(flat) == sorted(["inputs", "shared", "sum", "inside", "n", "pool", "top"])


@on_tensorflow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("VGG16", (5,)),
        ("VGG19", (5,)),
        ("MobileNetV2", (17, 18, 19)),
        ("ResNet50", (17,)),
        ("EfficientNetB0", (16, 17)),
    ],
)
def test_blocks_of_known_models(name, count):
    assert len(check_blocks(application(name))) in count


@on_tensorflow
def test_names_of_known_blocks():
    assert [b.name for b in blocks(application("VGG16"))] == [f"block{i}" for i in range(1, 6)]
    names = [b.name for b in blocks(application("MobileNetV2"))]
    assert names[1:] == [f"block_{i}" for i in range(1, 17)]
    names = [b.name for b in blocks(application("ResNet50"))]
    counts = {"conv2": 3, "conv3": 4, "conv4": 6, "conv5": 3}  # table 1 of arXiv:1512.03385
    assert names[1:] == [f"{c}_block{i}" for c, n in counts.items() for i in range(1, n + 1)]


@on_tensorflow
def test_nasnet_has_its_blocks_by_name():
    model = application("NASNetMobile")
    found = check_blocks(model)
    cells = [each.name for each in model.layers if "concat_" in each.name]
    assert [block.name.removesuffix("_block") for block in found] == cells[: len(found)]
    assert len(found) >= 15  # 4 normal cells in each of 3 groups, 2 reductions, the stem


@on_tensorflow
def test_pooling_joins_the_last_block():
    bare, pooled = (blocks(application("VGG16", pooling=pooling)) for pooling in (None, "avg"))
    assert len(bare) == len(pooled)
    assert len(pooled[-1].layers) == len(bare[-1].layers) + 1


@on_tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_blocks_of_every_application(name):
    model = built(name, 96)
    found = check_blocks(model)
    assert 5 <= len(found) <= 120
    backbone = Backbone(model)
    for i in {1, len(found) // 2, len(found) - 1}:
        backbone.unfreeze(found[i].name)
        expected = sum(
            int(np.prod(weight.shape))
            for block in found[i:]
            for layer in block.layers
            if not isinstance(layer, layers.BatchNormalization)
            for weight in layer.weights
            if "moving" not in weight.path and "normalization/" not in weight.path.split("/")[0]
        )
        trained = sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights)
        assert trained == expected
