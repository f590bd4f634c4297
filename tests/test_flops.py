"""FLOPs against what papers publish and what is counted by hand."""

import keras
import numpy as np
import pytest

import keras_xfer
from keras_xfer import Backbone
from keras_xfer.flops import by_node, estimates, forward, sized
from keras_xfer.freezing import graph_nodes
from tests import saved_models

layers = keras.layers
core = pytest.mark.core
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs do not depend on the backend"
)
takes_channels_first = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="no such convolution on TensorFlow's CPU"
)


def flops(model):
    nodes, _ = graph_nodes(model)
    return {node.layer.name: cost for node, cost in zip(nodes, by_node(nodes), strict=True) if cost}


def of(layer, *shapes, **kwargs):
    """The FLOPs of one layer on inputs of those shapes, without the batch."""
    inputs = [keras.Input(shape, **kwargs) for shape in shapes]
    return forward(keras.Model(inputs, layer(*inputs)))


# --- Published ------------------------------------------------------------------------------------


@on_tensorflow
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [  # millions of multiply-adds for an image of 224 x 224
        ("MobileNet", 569, 569),  # table 4 of https://arxiv.org/abs/1704.04861
        ("MobileNetV2", 300, 300),  # table 4 of https://arxiv.org/abs/1801.04381
        ("EfficientNetB0", 390, 390),  # table 2 of https://arxiv.org/abs/1905.11946
        ("ResNet50", 3800, 4100),  # table 1 of https://arxiv.org/abs/1512.03385, v1 and v1.5
        ("ResNet152", 11300, 11300),  # table 1 of https://arxiv.org/abs/1512.03385
        ("VGG16", 15300, 15500),  # https://arxiv.org/abs/1409.1556, by its table 1
        ("ConvNeXtTiny", 4500, 4500),  # table 1 of https://arxiv.org/abs/2201.03545
    ],
)
def test_published_multiply_adds(name, low, high):
    model = getattr(keras.applications, name)(weights=None, input_shape=(224, 224, 3))
    assert 0.95 * low < forward(model) / 2e6 < 1.05 * high


# --- By hand --------------------------------------------------------------------------------------


@core
@pytest.mark.parametrize(
    ("layer", "multiply_adds"),
    [
        # kernel + bias at each place of the output
        (layers.Conv2D(4, 3), 6 * 8 * (3 * 3 * 2 * 4 + 4)),
        (layers.Conv2D(4, 3, padding="same", use_bias=False), 8 * 10 * 3 * 3 * 2 * 4),
        (layers.Conv2D(4, 3, strides=2, padding="same"), 4 * 5 * (3 * 3 * 2 * 4 + 4)),
        (layers.Conv2D(4, 3, dilation_rate=2), 4 * 6 * (3 * 3 * 2 * 4 + 4)),
        (layers.Conv2D(4, (1, 5), use_bias=False), 8 * 6 * 5 * 2 * 4),
        # each output channel sees the channels of its group
        (layers.Conv2D(4, 3, groups=2, use_bias=False), 6 * 8 * 3 * 3 * 1 * 4),
        (layers.DepthwiseConv2D(3, use_bias=False), 6 * 8 * 3 * 3 * 2),
        (layers.DepthwiseConv2D(3, depth_multiplier=3), 6 * 8 * (3 * 3 * 2 * 3 + 2 * 3)),
        (
            layers.SeparableConv2D(4, 3, use_bias=False, strides=2, padding="same"),
            4 * 5 * (3 * 3 * 2 + 2 * 4),
        ),
        # each place of the input is spread over a kernel; the bias comes at each of the output
        (
            layers.Conv2DTranspose(4, 3, strides=2, padding="same"),
            8 * 10 * 3 * 3 * 2 * 4 + 16 * 20 * 4,
        ),
        (layers.Conv2DTranspose(4, 3, use_bias=False), 8 * 10 * 3 * 3 * 2 * 4),
        (layers.Dense(5), 8 * 10 * (2 * 5 + 5)),
        (layers.EinsumDense("abcd,de->abce", (8, 10, 5)), 8 * 10 * 2 * 5),
        (layers.EinsumDense("abcd,cde->abe", (8, 5), bias_axes="e"), 8 * (10 * 2 * 5 + 5)),
        # scale and offset, into which the statistics fold
        (layers.BatchNormalization(), 8 * 10 * 2),
        (layers.LayerNormalization(), 8 * 10 * 2),
        (layers.PReLU(), 8 * 10 * 2),
        (layers.PReLU(shared_axes=(1, 2)), 8 * 10 * 2),
        (layers.TimeDistributed(layers.Dense(3)), 8 * 10 * (2 * 3 + 3)),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_multiply_adds_of_a_layer_on_8_by_10_by_2(layer, multiply_adds):
    assert of(layer, (8, 10, 2)) == 2 * multiply_adds


@core
@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds"),
    [
        (layers.Dense(3), (7,), 7 * 3 + 3),
        (layers.Conv1D(4, 3, use_bias=False), (9, 2), 7 * 3 * 2 * 4),
        (layers.Conv3D(4, 2, use_bias=False), (4, 4, 4, 1), 27 * 8 * 4),
        # at each of the six steps four gates, from input, state and bias
        (layers.LSTM(3), (6, 5), 6 * 4 * 3 * (5 + 3 + 1)),
        (layers.LSTM(3, return_sequences=True), (6, 5), 6 * 4 * 3 * (5 + 3 + 1)),
        (layers.Bidirectional(layers.SimpleRNN(3)), (6, 5), 2 * 6 * 3 * (5 + 3 + 1)),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_multiply_adds_in_one_and_three_dimensions(layer, shape, multiply_adds):
    assert of(layer, shape) == 2 * multiply_adds


@core
@takes_channels_first
@pytest.mark.parametrize(
    ("layer", "multiply_adds"),
    [
        (layers.Conv2D(4, 3, data_format="channels_first"), 6 * 8 * (3 * 3 * 2 * 4 + 4)),
        (layers.DepthwiseConv2D(3, data_format="channels_first", use_bias=False), 6 * 8 * 9 * 2),
        (
            layers.Conv2DTranspose(4, 2, strides=2, data_format="channels_first"),
            8 * 10 * 2 * 2 * 2 * 4 + 16 * 20 * 4,
        ),
        (layers.BatchNormalization(axis=1), 8 * 10 * 2),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_channels_may_come_first(layer, multiply_adds):
    assert of(layer, (2, 8, 10)) == 2 * multiply_adds
    if layer.weights[0].ndim > 1:
        again = layers.TimeDistributed(type(layer).from_config(layer.get_config()))
        assert of(again, (5, 2, 8, 10)) == 5 * 2 * multiply_adds


@core
@pytest.mark.parametrize(
    ("layer", "elements"),
    [
        (layers.ReLU(), 8 * 10 * 2),
        (layers.MaxPooling2D(), 4 * 5 * 2),
        (layers.GlobalAveragePooling2D(), 2),
        (layers.UpSampling2D(), 16 * 20 * 2),
    ],
    ids=lambda value: value.name if isinstance(value, keras.Layer) else None,
)
def test_what_has_no_weights_takes_one_an_element(layer, elements):
    assert of(layer, (8, 10, 2)) == elements


@core
def test_looking_up_takes_no_multiply_adds():
    assert of(layers.Embedding(1000, 8), (5,), dtype="int32") == 5 * 8


@core
def test_a_skip_connection_counts_each_branch_and_the_sum():
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same", name="long")(inputs)
    x = layers.Add(name="sum")([x, layers.Conv2D(4, 1, use_bias=False, name="short")(inputs)])
    costs = flops(keras.Model(inputs, layers.ReLU(name="relu")(x)))
    assert costs == {
        "long": 2 * 64 * (3 * 3 * 4 * 4 + 4),
        "short": 2 * 64 * 4 * 4,
        "sum": 64 * 4,
        "relu": 64 * 4,
    }
    assert forward(keras.Model(inputs, x + inputs)) == sum(costs.values())


@core
def test_a_shared_layer_counts_each_time_and_a_nested_model_goes_by_its_layers():
    shared = layers.Dense(3)
    inside = keras.Input((3,))
    nested = keras.Model(inside, layers.Dense(3)(shared(inside)))
    inputs = keras.Input((3,))
    assert forward(keras.Model(inputs, nested(shared(inputs)))) == 3 * 2 * (3 * 3 + 3)


@core
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("values", [5, 7])
def test_attention_takes_its_projections_and_two_products(values, by_name):
    """Queries of width 8 to values of width 6, in two heads of width 4 for keys and 3 for values."""
    layer = layers.MultiHeadAttention(2, 4, value_dim=3)
    query, value = keras.Input((5, 8)), keras.Input((values, 6))
    given = {"query": query, "value": value, "key": value}
    output = layer(**given) if by_name else layer(query, value)
    projections = 5 * (8 * 8 + 8) + values * (6 * 8 + 8) + values * (6 * 6 + 6) + 5 * (6 * 8 + 8)
    products = 2 * 5 * values * 4 + 2 * 5 * values * 3
    assert forward(keras.Model([query, value], output)) == 2 * (projections + products)


@core
def test_attention_along_one_axis_and_with_shared_keys():
    layer = layers.MultiHeadAttention(2, 4, use_bias=False, attention_axes=(2,))
    x = keras.Input((3, 5, 8))  # three times five, which meet among themselves
    expected = 2 * (4 * 15 * 8 * 8 + 3 * 2 * 2 * 5 * 5 * 4)
    assert forward(keras.Model(x, layer(x, x))) == expected
    layer = layers.GroupQueryAttention(4, 6, 2, use_bias=False)
    x = keras.Input((5, 8))
    expected = 2 * (2 * 5 * 8 * 24 + 2 * 5 * 8 * 8 + 6 * 2 * 5 * 5 * 4)
    assert forward(keras.Model(x, layer(x, x))) == expected


@core
def test_attention_without_projections():
    query, value = keras.Input((5, 8)), keras.Input((7, 8))
    model = keras.Model([query, value], layers.Attention()([query, value]))
    assert forward(model) == 2 * (5 * 7 * 8 + 5 * 7 * 8) + 5 * 8


class Transformer(layers.Layer):
    """A block whose `call` is its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4, use_bias=False)
        self.norm = layers.LayerNormalization()
        self.up, self.down = layers.Dense(16, use_bias=False), layers.Dense(8, use_bias=False)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.norm.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], 16))
        self.built = True

    def call(self, inputs):
        x = inputs + self.attention(inputs, inputs)
        return x + self.down(self.up(self.norm(x)))


@core
def test_a_block_of_ones_own_goes_by_its_weights():
    weights = 4 * 8 * 8 + 2 * 8 * 16 + 8  # projections, the two layers, normalization
    assert of(Transformer(), (5, 8)) == 2 * (5 * weights + 2 * 2 * 5 * 5 * 4)


@core
def test_a_model_at_each_step_and_a_backbone_inside_are_counted_within():
    inside = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(4, 3), layers.GlobalMaxPooling2D()]
    )
    within = 2 * 16 * (3 * 3 * 2 * 4 + 4) + 4
    assert of(layers.TimeDistributed(inside), (5, 6, 6, 2)) == 5 * within
    assert of(Backbone(inside), (6, 6, 2)) == within
    any_size = keras.Sequential([keras.Input((None, None, 2)), *inside.layers])
    assert of(layers.TimeDistributed(any_size), (5, 6, 6, 2)) == 5 * within
    assert of(Backbone(any_size), (6, 6, 2)) == within
    steps = 4 * 6 * 4 * 3 * (5 + 3 + 1)  # four times six steps of an LSTM
    assert of(layers.TimeDistributed(layers.LSTM(3)), (4, 6, 5)) == 2 * steps


# --- Models of any size ---------------------------------------------------------------------------


def of_any_size(shape):
    """A strided stem, a model inside, an operation, a classifier."""
    inside = keras.Input((None, None, 4))
    nested = keras.Model(inside, layers.SeparableConv2D(4, 3, padding="same")(inside))
    inputs = keras.Input(shape)
    x = layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    x = layers.GlobalAveragePooling2D()(x + nested(x))
    return keras.Model(inputs, layers.Dense(2)(x))


@core
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_shape_that_is_said_is_the_shape_of_the_input(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = of_any_size((None, None, 3))
    finally:
        keras.config.set_dtype_policy(before)
    stem, inner = 4 * 5 * (3 * 3 * 3 * 4 + 4), 4 * 5 * (3 * 3 * 4 + 4 * 4 + 4)
    expected = 2 * stem + 2 * inner + 4 * 5 * 4 + 4 + 2 * (4 * 2 + 2)
    assert forward(model, (8, 9, 3)) == expected
    nodes, _ = graph_nodes(model)
    specs = [spec for node in sized(nodes, (8, 9, 3)) for spec in node.specs]
    assert [spec.shape for spec in specs] == [
        *((None, 8, 9, 3), (None, 4, 5, 4), (None, 4, 5, 4), (None, 4, 5, 4), (None, 4), (None, 2))
    ]
    assert [spec.dtype for spec in specs] == [spec.dtype for node in nodes for spec in node.specs]


@core
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3, 1)])
def test_a_shape_that_the_model_does_not_take_is_refused(shape):
    with pytest.raises(ValueError, match=r"input_shape=.*of shape \(None, None, 3\)"):
        forward(of_any_size((None, None, 3)), shape)
    two = [keras.Input((None, 3)), keras.Input((None, 3))]
    with pytest.raises(ValueError, match="one input"):
        forward(keras.Model(two, layers.Add()(two)), (8, 3))


@on_tensorflow
@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNetB0", "ConvNeXtTiny"])
def test_an_application_of_any_size_counts_as_that_of_one(name):
    function = getattr(keras.applications, name)
    one = function(weights=None, include_top=False, input_shape=(96, 96, 3))
    assert forward(function(weights=None, include_top=False), (96, 96, 3)) == forward(one)


# --- What is not known ----------------------------------------------------------------------------


@core
def test_unknown_shapes_are_told():
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="stem")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(x))
    assert estimates(graph_nodes(model)[0]) == [0, None, None, 2 * (4 * 2 + 2)]
    with pytest.raises(ValueError, match="known but for the batch.*'stem'.*None, None, None, 4"):
        forward(model)


@core
def test_a_model_without_a_graph_is_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="functional or Sequential.*'own'"):
        forward(model)


@on_tensorflow
def test_a_saved_model_does_not_say(tmp_path):
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, keras_xfer.HubModule(saved_models.text(tmp_path / "text"))(inputs))
    with pytest.raises(ValueError, match="no SavedModel"):
        forward(model)
