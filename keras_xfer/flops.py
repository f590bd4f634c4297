"""How much arithmetic the forward pass of one image takes, estimated from a model's graph.

An estimate for choosing where to cache features, not a profile: it counts the multiply-adds that
papers quote (two FLOPs each) and one FLOP for each element of everything else.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.freezing import Node

_Shape = tuple[Any, ...]  # without the batch
# One multiply-add an element, however many weights: the statistics fold into scale and offset.
_ELEMENTWISE = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.PReLU,
)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)


def forward(model: keras.Layer, input_shape: Sequence[int] | None = None) -> int:
    """The FLOPs of the forward pass of one image, two for each multiply-add.

    Papers quote multiply-adds, half of it.

    Args:
        model: a functional or Sequential model.
        input_shape: tuple such as `(height, width, channels)`, for a model that takes more than
            one; None for its own.

    Returns:
        int.

    Raises:
        ValueError: `model` has no graph or does not take that shape, or not all that must be known
            of a layer is known.

    Example:

    >>> forward(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)]))
    8064

    Reference:
        https://arxiv.org/abs/1704.04861
    """
    found = freezing.graph_nodes(model)
    if found is None:
        raise ValueError(
            "Expected a functional or Sequential model, whose layers' shapes are known. Received: "
            f"model={model.name!r}, whose `call` is its own code."
        )
    return sum(by_node(found[0] if input_shape is None else sized(found[0], input_shape)))


def sized(nodes: Sequence[Node], input_shape: Sequence[int]) -> list[Node]:
    """`nodes` with the shapes that they have for an input of that shape.

    Args:
        nodes: what `freezing.graph_nodes` gives, whole; of a model with one input.
        input_shape: tuple of int such as `(height, width, channels)`.

    Returns:
        list of nodes, the same but for their `specs`.

    Raises:
        ValueError: the model has several inputs, or does not take that shape.

    Example:

    >>> model = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)])
    >>> sized(freezing.graph_nodes(model)[0], (8, 8, 3))[-1].specs[0].shape
    (None, 6, 6, 4)

    Reference:
        https://keras.io/api/models/model/
    """
    shapes = [_shape(spec) for node in nodes if not node.inputs for spec in node.specs]
    fits = len(shapes) == 1 and len(shapes[0]) == len(input_shape)
    if not fits or any(
        own not in (None, size) for own, size in zip(shapes[0], input_shape, strict=True)
    ):
        raise ValueError(
            "Expected the shape of one image, without the batch, for a model with one input that "
            f"takes it. Received: input_shape={tuple(input_shape)!r}; the model's inputs are of "
            f"shape {', '.join(map(str, shapes))}."
        )
    values: dict[int, Any] = {}
    found = []
    for node in nodes:
        if node.inputs:
            node.run(values, node.layer.compute_output_spec)
        else:
            values.update(dict.fromkeys(node.outputs, keras.KerasTensor((None, *input_shape))))
        for number, spec in zip(node.outputs, node.specs, strict=True):  # of the dtype it had
            values[number] = keras.KerasTensor(values[number].shape, spec.dtype)
        specs = tuple(values[number] for number in node.outputs)
        found.append(Node(node.layer, node.inputs, node.outputs, specs, node.run))
    return found


def by_node(nodes: Sequence[Node]) -> list[int]:
    """The FLOPs of each of `nodes` for one image, see `estimates`.

    Args:
        nodes: what `freezing.graph_nodes` gives, whole.

    Returns:
        list of int, one for each of `nodes`.

    Raises:
        ValueError: not all that must be known of a layer is known; it is named.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.ReLU()])
    >>> by_node(freezing.graph_nodes(model)[0])
    [0, 20, 2]

    Reference:
        https://arxiv.org/abs/1704.04861
    """
    known = []
    for node, cost in zip(nodes, estimates(nodes), strict=True):
        if cost is None:
            shapes = ", ".join(str(tuple(spec.shape)) for spec in node.specs)
            raise ValueError(
                "Expected layers whose FLOPs can be counted: no SavedModel, and shapes that are "
                f"known but for the batch. Received: layer {node.layer.name!r} with output {shapes}"
                ". Say the shape of an image: input_shape=(224, 224, 3)."
            )
        known.append(cost)
    return known


def estimates(nodes: Sequence[Node]) -> list[int | None]:
    """The FLOPs of each of `nodes` for one image; None where a shape is not known, and for a
    SavedModel, which does not say where its weights are applied.

    A layer with weights takes two FLOPs a weight and position: of its output, of its input where
    it is transposed, at each step where it is recurrent. Normalization takes two an element,
    attention its two products besides, a look-up and what has no weights one an element. A layer
    that holds others and whose `call` is its own code (a transformer block) goes by all its
    weights, as if each were applied at the positions of the output.
    """
    specs = {
        number: spec
        for node in nodes
        for number, spec in zip(node.outputs, node.specs, strict=True)
    }
    return [_estimate(node, specs) for node in nodes]


def _estimate(node: Node, specs: Mapping[int, Any]) -> int | None:
    if not node.inputs:
        return 0  # what comes in is there
    outputs = [_shape(spec) for spec in node.specs]
    inputs = [_shape(specs[number]) for number in node.inputs if number in specs]
    if len(inputs) < len(node.inputs) or any(None in shape for shape in (*inputs, *outputs)):
        return None
    if not isinstance(node.layer, keras.layers.Layer):
        return sum(map(_size, outputs))  # an Operation such as keras.ops.add
    return _of_layer(node.layer, inputs, outputs)


def _of_layer(
    layer: keras.Layer, inputs: Sequence[_Shape], outputs: Sequence[_Shape]
) -> int | None:
    output, elements = outputs[0], sum(map(_size, outputs))
    if any(freezing.is_saved_model(inner) for inner in freezing.walk(layer)):
        return None
    if isinstance(layer, keras.layers.TimeDistributed):
        once = _of_layer(
            layer.layer, [shape[1:] for shape in inputs], [shape[1:] for shape in outputs]
        )
        return None if once is None else once * _size(output[:1])
    model = layer.model if isinstance(layer, freezing.Thawable) else layer
    if freezing.graph_of(model):
        return _of_graph(model, inputs)
    if isinstance(layer, keras.layers.Attention):
        return _attention(layer, inputs, output) + elements
    if isinstance(layer, (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)):
        return _multi_head_attention(layer, inputs, output)
    if isinstance(layer, _ELEMENTWISE) and layer.weights:
        return 2 * elements
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum(layer, output)
    if isinstance(layer, _TRANSPOSED):
        bias = _size(output) if layer.use_bias else 0
        return 2 * (_size(layer.kernel.shape) * _positions(layer, inputs[0]) + bias)
    positions = _positions(layer, output)
    if isinstance(layer, _RECURRENT) and not layer.return_sequences:
        positions *= _size(inputs[0][:1])
    cost = 2 * _applied_weights(layer) * positions + _attention_inside(layer, output)
    return cost or elements


def _of_graph(model: keras.Layer, inputs: Sequence[_Shape]) -> int | None:
    """What a functional model takes that is inside a layer."""
    nodes, _ = freezing.graph_nodes(model) or ([], ())
    own = [_shape(spec) for node in nodes if not node.inputs for spec in node.specs]
    if len(own) == len(inputs) == 1 and None in own[0]:
        nodes = sized(nodes, inputs[0])
    costs = estimates(nodes)
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def _shape(spec: Any) -> _Shape:
    return tuple(spec.shape[1:])


def _size(shape: Sequence[Any]) -> int:
    return math.prod(shape)


def _positions(layer: Any, shape: _Shape) -> int:
    """How often the weights of `layer` are applied to give, or to read, one image of `shape`."""
    while isinstance(layer, keras.layers.Wrapper):
        layer = layer.layer
    dimensions = list(shape)
    if dimensions:
        first = getattr(layer, "data_format", None) == "channels_first"
        spatial = len(getattr(layer, "kernel_size", ()))
        dimensions.pop(-1 - spatial if first else -1)
    return _size(dimensions)


def _applied_weights(layer: keras.Layer) -> int:
    """How many multiply-adds `layer` and all inside it take at a position; look-ups take none."""
    inside = freezing.walk(layer)
    normalization = [inner for inner in inside if isinstance(inner, _ELEMENTWISE) and inner.weights]
    embeddings = [inner for inner in inside if isinstance(inner, keras.layers.Embedding)]
    apart = {id(weight) for inner in normalization + embeddings for weight in inner.weights}
    return sum(inner.weights[0].shape[-1] for inner in normalization) + sum(
        _size(weight.shape) for weight in layer.weights if id(weight) not in apart
    )


def _einsum(layer: Any, output: _Shape) -> int:
    """An output element takes a multiply-add for each place of the kernel that is summed over."""
    given, letters = layer.equation.split("->")
    kernel = zip(given.split(",")[1].strip(), layer.kernel.shape, strict=True)
    summed = math.prod(size for letter, size in kernel if letter not in letters)
    return 2 * _size(output) * (summed + (layer.bias is not None))


def _attention(layer: Any, inputs: Sequence[_Shape], output: _Shape) -> int:
    """Query by key and score by value, of the layers that project nothing."""
    queries, values = _positions(layer, output), _other_positions(layer, inputs, output)
    width = _size(inputs[0][-1:]) + _size(output[-1:])
    return 2 * queries * values * width


def _multi_head_attention(layer: Any, inputs: Sequence[_Shape], output: _Shape) -> int:
    """The projections, and within each head query by key and score by value."""
    queries, values = _positions(layer, output), _other_positions(layer, inputs, output)
    axes = getattr(layer, "attention_axes", None) or range(1, len(output))
    attended = _size([output[axis - 1] for axis in axes])
    projected = sum(
        _applied_weights(inner) * (values if inner.name in ("key", "value") else queries)
        for inner in freezing.walk(layer)
        if isinstance(inner, keras.layers.EinsumDense)
    )
    return 2 * (projected + values * attended * _head_width(layer))


def _other_positions(layer: Any, inputs: Sequence[_Shape], output: _Shape) -> int:
    """How many keys and values there are. In whatever order they come (Keras sorts keyword
    arguments by name), the queries alone are as many as the outputs."""
    queries = _positions(layer, output)
    others = (_positions(layer, shape) for shape in inputs if len(shape) == len(output))
    return next((positions for positions in others if positions != queries), queries)


def _head_width(layer: Any) -> int:
    """The multiply-adds of a pair of query and value, over all heads."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return int(layer.num_heads * (layer.key_dim + layer.value_dim))
    return int(layer.num_query_heads * 2 * layer.head_dim)


def _attention_inside(layer: keras.Layer, output: _Shape) -> int:
    """The products of self-attention in a block that gives a sequence."""
    if len(output) != 2:
        return 0  # over a feature map it is mostly windowed, which nothing says
    kinds = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
    widths = [_head_width(inner) for inner in freezing.walk(layer) if isinstance(inner, kinds)]
    return 2 * sum(widths) * _size(output[:1]) ** 2
