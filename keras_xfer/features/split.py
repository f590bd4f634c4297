"""`split_model`: one model as two, below and above a cut, with the same layers."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras

from keras_xfer import freezing
from keras_xfer.blocks import blocks
from keras_xfer.features.masks import masked_tensors
from keras_xfer.freezing import Node, Start
from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.backbone_part import BackbonePart, Cut


def split_model(
    model: keras.Model, at: Start, *, backbone: Backbone | str | None = None
) -> tuple[keras.Model, keras.Model]:
    """Cut a model in two that share its layers and variables: `suffix(prefix(x))` is `model(x)`.

    What the prefix gives never changes while it is frozen, so it can be computed once
    (`keras_xfer.FeatureCache`) and the suffix trained on it. Training the suffix trains `model`.
    Several tensors may cross the cut (skip connections, further inputs of the model that the suffix
    needs): the prefix then gives a list.

    Args:
        model: a built `keras.Model` with a graph: Sequential, functional, or nested ones.
        at: `"head"`, all of the backbone is below; or any `start` of `Backbone.unfreeze`: what it
            would train is above. In a model without a `Backbone` it is looked up in the model
            itself, as if that were the backbone's.
        backbone: a `Backbone` in the model, its name, or None, the only one there is.

    Returns:
        prefix: keras.Model, from the model's inputs to what crosses the cut.
        suffix: keras.Model, from there to the model's outputs. Both are made to be called and
            trained, not saved: save `model`.

    Raises:
        TypeError: `model` is not a keras.Model, or `at` is of another type.
        ValueError: the model is not built or has no graph, it cannot be cut there, or `at` matches
            nothing; the nearest cuts are named.

    Example:

    >>> import numpy as np
    >>> from keras_xfer import Backbone
    >>> base = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(3) for _ in range(2))])
    >>> model = keras.Sequential([keras.Input((4,)), Backbone(base), keras.layers.Dense(1)])
    >>> prefix, suffix = split_model(model, "head")
    >>> prefix.output_shape, suffix.output_shape
    ((None, 3), (None, 1))
    >>> x = np.ones((2, 4), "float32")
    >>> bool(np.allclose(suffix(prefix(x)), model(x)))
    True

    Reference:
        https://keras.io/guides/transfer_learning/
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a keras.Model. Received: model={model!r} of type {type(model).__name__}."
        )
    _check_graph(model)
    found = [layer for layer in freezing.walk(model) if isinstance(layer, Backbone)]
    if not found and backbone is None:
        if at == "head":
            raise ValueError(
                "Expected a model with a keras_xfer Backbone, which says where the head begins. "
                f"Received: at='head', model={model.name!r}. Wrap the pretrained model in "
                "keras_xfer.Backbone, or name the first layer of the head."
            )
        return split_between(model, None, _units_from(model, at, "train"), at)
    body: Any = freezing.find_backbone(model, backbone)
    above = None if at == "head" else _units_from(body.model, at, body.batch_norm)
    return split_between(model, body, above, at)


def split_between(
    model: keras.Model,
    body: Backbone | None,
    above: Sequence[Any] | None,
    at: Start,
    *,
    through_pooling: bool = False,
) -> tuple[keras.Model, keras.Model]:
    """As `split_model`, with the layers of `body` (of the model where that is None) that are above;
    None: nothing of it is, and with `through_pooling` the pooling layers on top of it are below
    too. `at` is what messages call the cut."""
    _check_graph(model)
    units = None if above is None else frozenset(map(id, above))
    chosen = _Choice(body, units, through_pooling)
    try:
        halves = _halves(freezing.graph_of(model), chosen, model.name)
    except _NoCutError as error:
        nearest = difflib.get_close_matches(repr(at), _offered(model, body, at), n=3, cutoff=0.0)
        raise ValueError(
            f"Expected a place where model {model.name!r} can be cut. Received: at={at!r}: {error}. "
            f"The nearest cuts: {', '.join(nearest) or 'none'}."
        ) from None
    return halves.below, halves.above


def _check_graph(model: keras.Model) -> None:
    """Raise where there is no graph to cut."""
    if model.built and freezing.graph_of(model) is not None:
        return
    why = (
        "whose call is its own code, so that there is no graph to cut. Build it with the "
        "functional API"
        if model.built
        else "which is not built: begin it with keras.Input"
    )
    raise ValueError(
        f"Expected a built Sequential or functional model. Received: model={model.name!r}, {why}."
    )


def _offered(model: keras.Model, body: Backbone | None, at: Start) -> list[str]:
    """What `at` may be instead: the head, blocks, or layers where there is one block."""
    inside = model if body is None else body.model
    names = ["head"] if body is not None else []
    if freezing.graph_of(inside) is not None:
        names += [block.name for block in blocks(inside)[1:]] or [
            unit.name for unit in freezing.units(inside)[1:] if unit.weights
        ]
    return [repr(name) for name in names if name != at]


# They hold nothing that trains and make what is kept much smaller.
_POOLING = tuple(
    getattr(keras.layers, f"{kind}Pooling{n}D")
    for kind in ("Average", "Max", "GlobalAverage", "GlobalMax")
    for n in (1, 2, 3)
)


class _NoCutError(Exception):
    """Why there is no cut."""


class _Choice(NamedTuple):
    """Which layers are above a cut: those of `units`; and with a `body` all that is not on the way
    to it. Without `units` all of the body is below."""

    body: Backbone | None
    units: frozenset[int] | None
    through_pooling: bool


class _Halves(NamedTuple):
    """A layer in two; below gives the tensors that cross, above takes a list of them."""

    below: Any
    above: Any


def _units_from(inside: keras.Layer, at: Start, batch_norm: Any) -> list[keras.Layer]:
    """The layers that `at` would train."""
    position = freezing.select(inside, at, batch_norm=batch_norm, blocks=blocks(inside))
    return freezing.units(inside)[position:]


def _halves(graph: Any, chosen: _Choice, name: str) -> _Halves:
    """The model of `graph` in two models."""
    found = freezing.graph_nodes(graph, nested=False)
    assert found is not None  # noqa: S101  # it has a graph
    nodes, outputs = found
    sides = _sides(nodes, chosen)
    if not any(side != "above" for side in sides.values()):
        raise _NoCutError("nothing is below the cut")

    optional = {
        id(spec): getattr(node.layer, "optional", False) for node in nodes for spec in node.specs
    }
    inputs = keras.tree.map_structure(
        lambda each: _input_like(each, name=each.name, optional=optional[id(each)]), graph.input
    )
    number = freezing.spec_numbers(nodes)
    begin = [number[id(spec)] for spec in graph.inputs]
    below = dict(zip(begin, keras.tree.flatten(inputs), strict=True))
    inner: dict[int, list[Any]] = {}  # what crosses inside a layer that is cut
    for i, side in sides.items():
        if side == "below":
            nodes[i].run(below, nodes[i].layer)
        elif isinstance(side, _Halves):
            inner[i] = _given(nodes[i], below, side.below)

    above_nodes = [nodes[i] for i, side in sides.items() if side == "above"]
    crossing = _crossing(above_nodes, below, outputs)
    tensors = [below[i] for i in crossing] + [each for i in inner for each in inner[i]]
    _check_masks(nodes, crossing, masked_tensors(nodes))
    prefix = keras.Model(inputs, _one_or_list(tensors), name=f"{name}_prefix")

    begins = [_input_like(tensor) for tensor in tensors]
    above = dict(zip(crossing, begins, strict=False))
    rest = iter(begins[len(crossing) :])
    inner_begins = {i: [next(rest) for _ in inner[i]] for i in inner}
    for i, side in sides.items():
        if side == "above":
            nodes[i].run(above, nodes[i].layer)
        elif isinstance(side, _Halves):
            given = keras.tree.flatten(side.above(_one_or_list(inner_begins[i])))
            above.update(zip(nodes[i].outputs, given, strict=True))
    answer = keras.tree.pack_sequence_as(graph.output, [above[i] for i in outputs])
    return _Halves(prefix, keras.Model(_one_or_list(begins), answer, name=f"{name}_suffix"))


def _sides(nodes: Sequence[Node], chosen: _Choice) -> dict[int, Any]:
    """Which calls are "below", which "above", and which in two; the inputs left out."""
    leads = _leads_to_body(nodes, chosen.body)
    sides: dict[int, Any] = {}
    made: dict[int, Any] = {}  # a layer that is called twice is cut once
    after: set[int] = set()  # tensors that are above
    for i, node in enumerate(nodes):
        if not node.inputs:
            continue
        if after.intersection(node.inputs):
            side: Any = "above"
        else:
            if id(node.layer) not in made:
                made[id(node.layer)] = _side(node.layer, chosen, i in leads)
            side = made[id(node.layer)]
        sides[i] = side
        if side != "below":
            after.update(node.outputs)
    return sides


def _side(layer: Any, chosen: _Choice, leads: bool) -> Any:
    """Where a call belongs whose inputs are all below."""
    body, units, through_pooling = chosen
    inside = freezing.walk(layer) if isinstance(layer, keras.Layer) else []
    if body is None:
        assert units is not None  # noqa: S101  # there is no head without a body
        own = freezing.units(layer) if freezing.graph_of(layer) is not None else [layer]
        among = [id(unit) in units for unit in own]
        if not any(among):
            return "below"
        return "above" if all(among) else _cut_inside(layer, chosen)
    if layer is body:
        return "below" if units is None else _backbone_halves(body, units)
    if not leads:
        if not through_pooling:
            return "above"
        if freezing.graph_of(layer) is not None:
            return _cut_inside(layer, chosen)
        return "below" if isinstance(layer, _POOLING) else "above"
    if not any(each is body for each in inside):
        return "below"
    if freezing.graph_of(layer) is None:
        raise _NoCutError(
            f"layer {layer.name!r} ({type(layer).__name__}), which holds the backbone, runs code of "
            "its own and has no graph"
        )
    return _cut_inside(layer, chosen)


def _cut_inside(layer: Any, chosen: _Choice) -> Any:
    """A nested model in two, or on one side where all of it is."""
    graph = freezing.graph_of(layer)
    nodes, _ = freezing.graph_nodes(graph, nested=False) or ([], ())
    sides = list(_sides(nodes, chosen).values())
    if all(side == "above" for side in sides):
        return "above"
    if all(side == "below" for side in sides):
        return "below"
    return _halves(graph, chosen, layer.name)


def _leads_to_body(nodes: Sequence[Node], body: Backbone | None) -> set[int]:
    """The calls of the body, of models that hold it, and all whose results they need."""
    needed: set[int] = set()
    leads: set[int] = set()
    for i in reversed(range(len(nodes))):
        layer = nodes[i].layer
        is_body = isinstance(layer, keras.Layer) and any(
            each is body for each in freezing.walk(layer)
        )
        if is_body or needed.intersection(nodes[i].outputs):
            leads.add(i)
            needed.update(nodes[i].inputs)
    return leads


def _backbone_halves(backbone: Backbone, units: frozenset[int]) -> Any:
    """The backbone in two parts, or "above" where nothing is below."""
    found = freezing.graph_nodes(backbone.model)
    if found is None:
        raise _NoCutError(
            f"the model inside {backbone.name!r}, {backbone.model.name!r}, runs code of its own and "
            "has no graph; it can be cut at its end alone, by 'head'"
        )
    nodes, outputs = found
    below, above, crossing = cut_between(nodes, outputs, units)
    if not below:
        return "above"
    number = freezing.spec_numbers(nodes)
    masked = masked_tensors(nodes)
    if masked.intersection(outputs) and backbone.pooling is None:
        _check_masks(nodes, crossing, masked)  # where they begin above the cut, they are there
    graph: Any = freezing.graph_of(backbone.model)
    inputs = tuple(number[id(spec)] for spec in graph.inputs)
    cut = Cut(below, above, inputs, crossing, outputs)
    return _Halves(
        BackbonePart(backbone, cut, above=False), BackbonePart(backbone, cut, above=True)
    )


def cut_between(
    nodes: Sequence[Node], outputs: Sequence[int], units: frozenset[int]
) -> tuple[list[Node], list[Node], tuple[int, ...]]:
    """The calls below and above a cut under the layers with these ids and all that needs them, and
    the tensors that cross it."""
    after: set[int] = set()
    below: list[Node] = []
    above: list[Node] = []
    known: set[int] = set()
    for node in nodes:
        if id(node.layer) in units or after.intersection(node.inputs):
            above.append(node)
            after.update(node.outputs)
        else:
            known.update(node.outputs)
            if node.inputs:
                below.append(node)
    return below, above, _crossing(above, known, outputs)


def _crossing(
    above: Iterable[Node], below: Iterable[int], outputs: Iterable[int]
) -> tuple[int, ...]:
    """The tensors of `below` that are needed above, each once, in the order of their need."""
    known = set(below)
    needed = [i for node in above for i in node.inputs] + list(outputs)
    return tuple(dict.fromkeys(i for i in needed if i in known))


def _given(node: Node, values: dict[int, Any], half: Any) -> list[Any]:
    """What `half` gives, called as the graph calls the layer that it is a half of."""
    given: list[Any] = []

    def operation(*args: Any, **kwargs: Any) -> list[None]:
        given.extend(keras.tree.flatten(half(*args, **kwargs)))
        return [None] * len(node.outputs)

    node.run(dict(values), operation)
    return given


def _input_like(tensor: Any, *, name: str | None = None, optional: bool = False) -> Any:
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=name,
        optional=optional,
    )


def _one_or_list(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def _check_masks(nodes: Sequence[Node], crossing: Iterable[int], masked: set[int]) -> None:
    for i in crossing:
        if i in masked:
            layer = next(node.layer for node in nodes if i in node.outputs)
            raise _NoCutError(
                f"the mask that layer {layer.name!r} ({type(layer).__name__}) hands on would have to "
                "cross, and does not travel with features"
            )
