"""Which tensors of a graph carry a mask when it runs.

Keras writes the mask of a tensor on its symbol, but not on what a nested model or a `Backbone`
gives, whose own layers make the masks while they run.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.backbone_part import arguments_of


def masked_tensors(nodes: Sequence[freezing.Node], given: Iterable[int] = ()) -> set[int]:
    """The numbers of the tensors of `nodes` that carry a mask, where those of `given` do.

    Example:

    >>> words = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(9, 2, mask_zero=True)])
    >>> model = keras.Sequential([keras.Input((3,)), Backbone(words), keras.layers.LSTM(2)])
    >>> nodes, _ = freezing.graph_nodes(model)
    >>> [nodes[i].layer.name for i in sorted(masked_tensors(nodes))] == [model.layers[0].name]
    True
    """
    masked = set(given)
    specs = {i: spec for node in nodes for spec, i in zip(node.specs, node.outputs, strict=True)}
    for node in nodes:
        marked = [getattr(spec, "_keras_mask", None) is not None for spec in node.specs]
        masked.update(i for i, mark in zip(node.outputs, marked, strict=True) if mark)
        inside = _graph_of(node.layer)
        if inside is not None:
            inner_nodes, begin, end = inside
            pairs = zip(begin, node.inputs, strict=False)
            inner = masked_tensors(inner_nodes, [i for i, outer in pairs if outer in masked])
            pairs = zip(end, node.outputs, strict=True)
            masked.update(outer for i, outer in pairs if i in inner)
        elif masked.intersection(node.inputs) and _hands_on(node, specs):
            masked.update(node.outputs)
    return masked


def _graph_of(layer: Any) -> tuple[list[freezing.Node], list[int], Sequence[int]] | None:
    """The calls inside a nested model or a backbone, and the numbers of its inputs and outputs;
    None where there are none, or no mask comes out of it."""
    if isinstance(layer, Backbone):
        if layer.pooling is not None:
            return None
        layer = layer.model
    graph = freezing.graph_of(layer)
    if graph is None:
        return None
    nodes, outputs = freezing.graph_nodes(graph, nested=False) or ([], ())
    number = freezing.spec_numbers(nodes)
    return nodes, [number[id(spec)] for spec in graph.inputs], outputs


def _hands_on(node: freezing.Node, specs: dict[int, Any]) -> bool:
    """Whether the layer of `node` hands on a mask that comes with what it is given."""
    if not getattr(node.layer, "supports_masking", False):
        return False
    args, _ = arguments_of(node, specs)
    try:
        mask = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape[:2], "bool"), args[:1])
        found = node.layer.compute_mask(*args[:1], *mask)
    except Exception:  # it cannot tell by symbols
        return True
    return any(each is not None for each in keras.tree.flatten(found))
