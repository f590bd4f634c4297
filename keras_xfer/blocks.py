"""Where a model's graph can be cut, and the blocks that people mean by the word."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Self

import keras

from keras_xfer import flops
from keras_xfer.freezing import Node, graph_nodes, is_batch_norm, is_saved_model, units, walk
from keras_xfer.variable_group import VariableGroup

_JOINS = {"Add", "Concatenate"}  # layers, and the operations behind `a + b` and keras.ops
# "block_3_expand", "conv2_block1_1_conv", "block1a_se_reduce", "bert/encoder/layer_11/output"
_NUMBERED_SCOPE = re.compile(r".*?(?:block|layer|cell|stage|unit)s?[_/]?\d+[a-z]?(?=[_/]|$)")
_AUTOMATIC_NAME = re.compile(r"(add|concatenate)(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of layers that people name, freeze and thaw together.

    Args:
        name: str, unique in the model; `Backbone.unfreeze(name)` trains from here on.
        layers: the layers of the block in the order in which they run.

    Example:

    >>> found = blocks(keras.applications.VGG16(weights=None, include_top=False))
    >>> found[-1].name, len(found[-1].layers)
    ('block5', 4)

    Reference:
        https://keras.io/guides/transfer_learning/
    """

    name: str
    layers: tuple[keras.Layer, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Cut(str):
    """The name of a layer whose output alone crosses to what comes after it, and what it costs and
    saves to keep that output; everywhere else it is a str.

    Args:
        name: str, the layer's name, which is the value.
        shape: tuple of int, the output of one image; None for a dimension that is not known.
        bytes_per_image: int, the size of that output; None where it is not known.
        flops: int, the estimated FLOPs of one image up to here, two for each multiply-add; None
            where they are not known (see `keras_xfer.flops`).
        flops_share: float in [0, 1], that part of the whole model's; None where it is not known.

    Example:

    >>> cut = cuts(keras.applications.VGG16(weights=None))[-1]
    >>> cut, cut.shape, cut.bytes_per_image, cut.flops_share
    ('predictions', (1000,), 4000, 1.0)

    Reference:
        https://en.wikipedia.org/wiki/Biconnected_component
    """

    name: dataclasses.InitVar[str]
    shape: tuple[int | None, ...]
    bytes_per_image: int | None = None
    flops: int | None = None
    flops_share: float | None = None

    def __new__(cls, name: str, *_: Any, **__: Any) -> Self:  # noqa: D102  # the str that it is
        return super().__new__(cls, name)


def cuts(model: keras.Layer, input_shape: Sequence[int] | None = None) -> list[Cut]:
    """The layers whose output alone crosses to what comes after them, in order, for an input of
    that shape (without the batch; None for the model's own)."""
    nodes, found = _flow(model)
    if nodes and input_shape is not None:
        nodes = flops.sized(nodes, input_shape)
    costs = flops.estimates(nodes)
    total = _sum(costs)
    made = []
    for i, tensor in found:
        spec = nodes[i].specs[nodes[i].outputs.index(tensor)]
        so_far = _sum(costs[: i + 1])
        share = None if so_far is None or total is None else so_far / total if total else 1.0
        made.append(Cut(nodes[i].layer.name, tuple(spec.shape[1:]), _bytes(spec), so_far, share))
    return made


def blocks(model: keras.Layer) -> tuple[Block, ...]:
    """The blocks of `model`; together they hold each of its units once, in order.

    A block ends where a residual or concatenating join begins or ends, or after a layer with
    strides, at a point where one tensor alone crosses; each holds weights other than
    BatchNormalization's. A graph that has no such points (NASNet) ends its blocks at the
    concatenations that carry a name of their own, a SavedModel where the number in its scopes
    changes, and a model without a graph has one block for each of its layers that hold weights.
    """
    layers = units(model)
    ends = _ends(model, layers)
    bounds = [0]
    for end in ends:
        if any(_has_own_weights(layer) for layer in layers[bounds[-1] : end]):
            bounds.append(end)
    if len(bounds) > 1 and not any(_has_own_weights(layer) for layer in layers[bounds[-1] :]):
        bounds.pop()  # a head without weights (pooling) belongs to the last block
    bounds.append(len(layers))
    runs = [layers[begin:end] for begin, end in itertools.pairwise(bounds)]
    return tuple(
        Block(name, tuple(run)) for name, run in zip(_names(runs), runs, strict=True) if run
    )


def _sum(costs: Sequence[int | None]) -> int | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def _bytes(spec: Any) -> int | None:
    """The size of what `spec` says of one image, None where it does not say it."""
    shape, dtype = spec.shape[1:], keras.backend.standardize_dtype(spec.dtype)
    bits = re.search(r"\d+", dtype)  # NumPy does not know bfloat16
    if None in shape or (bits is None and dtype != "bool"):
        return None
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _flow(model: keras.Layer) -> tuple[list[Node], list[tuple[int, int]]]:
    """The nodes of the model's graph, and where among them it can be cut: position and tensor."""
    found = graph_nodes(model)
    if found is None:
        return [], []
    nodes, outputs = found
    last_use = {tensor: i for i, node in enumerate(nodes) for tensor in node.inputs}
    last_use.update(dict.fromkeys(outputs, len(nodes)))
    # The inputs are there from the start: several of them are no cut, one after the other.
    live = {tensor for node in nodes if not node.inputs for tensor in node.outputs}
    found_cuts = []
    for i, node in enumerate(nodes):
        live.update(node.outputs)
        live = {tensor for tensor in live if last_use.get(tensor, -1) > i}
        if len(live) == 1 and live <= set(node.outputs):
            found_cuts.append((i, next(iter(live))))
    return nodes, found_cuts


def _ends(model: keras.Layer, layers: Sequence[keras.Layer]) -> list[int]:
    """Positions in `layers` before which a block may end."""
    nodes, found_cuts = _flow(model)
    if not nodes:
        return _scope_ends(layers)
    segments = [
        nodes[begin + 1 : end + 1]
        for begin, end in itertools.pairwise([-1, *(i for i, _ in found_cuts)])
    ]
    hardly_cut = max(map(len, segments), default=0) * 2 >= len(nodes)
    if hardly_cut and (named := _named_concatenations(layers)):
        return named
    joins = [any(_is_join(node) for node in segment) for segment in segments]
    ends: set[int] = set()
    strided: int | None = None  # the last end, if it is there for its strides alone
    for i, segment in enumerate(segments):
        if joins[i]:
            if strided is not None and strided < i - 1:
                ends.discard(strided)  # the strided convolution of an inverted bottleneck
            ends.update({i - 1, _past(segments, joins, i, batch_norm=False)} - {-1})
            strided = None
        elif any(_has_strides(node.layer) for node in segment):
            strided = _past(segments, joins, i, batch_norm=True)
            ends.add(strided)
    position = {id(layer): i for i, layer in enumerate(layers)}
    inner: set[int] = set()
    for module in filter(is_saved_model, walk(model)):  # one node, of many units
        groups = units(module)
        begin = position[id(groups[0])]
        inner.update(begin + end for end in _scope_ends(groups))
        position[id(module)] = position[id(groups[-1])]
    return sorted(
        inner
        | {
            1
            + max(
                position.get(id(node.layer), -1)
                for segment in segments[: end + 1]
                for node in segment
            )
            for end in ends
        }
    )


def _named_concatenations(layers: Sequence[keras.Layer]) -> list[int]:
    """Positions after the concatenations that carry a name of their own."""
    return [
        i + 1
        for i, layer in enumerate(layers)
        if isinstance(layer, keras.layers.Concatenate) and not _AUTOMATIC_NAME.fullmatch(layer.name)
    ]


def _scope_ends(layers: Sequence[keras.Layer]) -> list[int]:
    """Positions before which a block may end, in layers that no graph connects: where, in a
    SavedModel, the number in the scope changes, or else before each layer that holds weights."""
    scopes = [
        _NUMBERED_SCOPE.match(layer.aliases[0]) if isinstance(layer, VariableGroup) else None
        for layer in layers
    ]
    if sum(scope is not None for scope in scopes) * 2 < len(layers):
        return [i for i, layer in enumerate(layers) if i and _has_own_weights(layer)]
    keys = [scope and scope[0] for scope in scopes]
    return [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]


def _past(
    segments: Sequence[Sequence[Node]], joins: Sequence[bool], i: int, *, batch_norm: bool
) -> int:
    """The last segment after `i` that only finishes what `i` began: activation, pooling, and
    with `batch_norm` the normalization of a strided convolution."""
    while i + 1 < len(segments) and not joins[i + 1]:
        following = [node.layer for node in segments[i + 1]]
        if any(_has_own_weights(layer) for layer in following) or (
            not batch_norm and any(getattr(layer, "weights", ()) for layer in following)
        ):
            break
        i += 1
    return i


def _is_join(node: Node) -> bool:
    return type(node.layer).__name__ in _JOINS and len(set(node.inputs)) > 1


def _has_own_weights(layer: Any) -> bool:
    """Whether anything in `layer` other than BatchNormalization holds weights."""
    if not isinstance(layer, keras.Layer):
        return False
    normalization = {
        id(weight) for inner in walk(layer) if is_batch_norm(inner) for weight in inner.weights
    }
    return any(id(weight) not in normalization for weight in layer.weights)


def _has_strides(layer: Any) -> bool:
    strides = getattr(layer, "strides", 1)
    return max(strides if isinstance(strides, (tuple, list)) else (strides or 1,)) > 1


def _names(runs: Sequence[Sequence[keras.Layer]]) -> list[str]:
    """A unique name for each run: the prefix most of its layers share, or its last layer's.

    `unfreeze` looks a name up among the layers first; so that it begins where the block does, no
    block is called as a layer is that has weights of the block below it.
    """
    every_layer = {layer.name for run in runs for layer in run}
    names: list[str] = []
    for run in runs:
        ending = next((each for each in reversed(run) if type(each).__name__ in _JOINS), run[-1])
        name = _shared_prefix([layer.name for layer in run]) or ending.name
        first = next((i for i, layer in enumerate(run) if layer.weights), len(run))
        misleading = every_layer - {layer.name for layer in run[: first + 1]}
        if name in misleading:
            name = f"{name}_block"
        numbered = (f"{name}_{n}" for n in itertools.count(2))
        names.append(
            next(
                each
                for each in itertools.chain([name], numbered)
                if each not in names and each not in misleading
            )
        )
    return names


def _shared_prefix(names: Sequence[str]) -> str:
    """The longest prefix of whole `_`-separated words that most of `names` begin with."""
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        words = name.split("_")
        counts.update("_".join(words[:n]) for n in range(1, len(words) + 1))
    common = [prefix for prefix, count in counts.items() if count > len(names) / 2]
    return max(common, key=len, default="")
