"""Which layers train: select, freeze and thaw them, hold BatchNormalization to a policy, and call a
model so that its frozen part stays in inference mode.

Pure functions over any Keras model; `Backbone` and `StagedUnfreezing` are made of them.
"""

import contextlib
import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import keras

# Functional is what `keras.Model(inputs, outputs)` makes and has no public name of its own.
# Tried on Keras 3.15.1.
from keras.src.models.functional import Functional

BatchNormPolicy = Literal["frozen", "affine", "train"]
BATCH_NORM_POLICIES: tuple[BatchNormPolicy, ...] = ("frozen", "affine", "train")
Start = str | int | float


@runtime_checkable
class Thawable(Protocol):
    """What a schedule needs of a backbone; `keras_xfer.layers.Backbone` is one."""

    name: str
    model: keras.Layer
    batch_norm: BatchNormPolicy

    @property
    def blocks(self) -> Sequence[Any]: ...

    def freeze(self) -> None: ...

    def unfreeze(self, start: Start = "all") -> None: ...


class Node(NamedTuple):
    """One call of one layer in a model's graph; tensors are known by number."""

    layer: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# --- Reading a model -------------------------------------------------------------------------


def walk(layer: keras.Layer) -> list[keras.Layer]:
    """`layer` and every layer inside it, however nested, each once."""
    # No public way reaches the sublayers of a Layer that is not a Model. Tried on Keras 3.15.1.
    return list({id(found): found for found in layer._flatten_layers()}.values())


def graph_of(layer: Any) -> Functional | None:
    """The functional graph that `layer` runs, or None where its `call` is its own code."""
    if isinstance(layer, keras.Sequential):
        # The graph of a built Sequential has no public name. Tried on Keras 3.15.1.
        layer = layer._functional if type(layer).call is keras.Sequential.call else None
    if isinstance(layer, Functional) and type(layer).call is Functional.call:
        return layer
    return None


def units(model: keras.Layer) -> list[keras.Layer]:
    """The layers that are frozen and thawed one by one, in the model's order.

    They are `model.layers`, with nested functional models opened. A layer that holds others
    (a transformer block, a wrapper) is one unit and is set as a whole.
    """
    found: dict[int, keras.Layer] = {}
    for layer in top_layers(model):
        inner = units(layer) if graph_of(layer) is not None else [layer]
        found.update({id(unit): unit for unit in inner})
    return list(found.values())


def top_layers(model: keras.Layer) -> list[keras.Layer]:
    """`model.layers`; for a layer that is no model its direct sublayers, or itself."""
    if isinstance(model, keras.Model):
        return list(model.layers)
    # See `walk` for why `_flatten_layers`.
    return list(model._flatten_layers(include_self=False, recursive=False)) or [model]


def graph_nodes(model: keras.Layer) -> tuple[list[Node], tuple[int, ...]] | None:
    """The calls of `model`'s graph in the order they run, nested functional models opened, and
    the numbers of its output tensors; None where `model` has no graph."""
    graph = graph_of(model)
    if graph is None:
        return None
    nodes: list[Node] = []
    scopes = itertools.count()
    outermost = next(scopes)
    numbers: dict[tuple[int, int], int] = {}  # (which call of the graph, KerasTensor) -> number

    def number(scope: int, tensor: Any) -> int:
        return numbers.setdefault((scope, id(tensor)), len(numbers))

    def visit(graph: Functional, scope: int) -> None:
        # The nodes of a functional model have no public name. Tried on Keras 3.15.1.
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                inner = graph_of(node.operation)
                if inner is None or node.is_input:
                    inputs = tuple(number(scope, tensor) for tensor in node.input_tensors)
                    outputs = tuple(number(scope, tensor) for tensor in node.outputs)
                    if not (node.is_input and scope != outermost):  # the inputs of an inner graph are outer tensors
                        nodes.append(Node(node.operation, inputs, outputs))
                    continue
                inner_scope = next(scopes)
                for outer, own in zip(node.input_tensors, inner.inputs, strict=True):
                    numbers[inner_scope, id(own)] = number(scope, outer)
                visit(inner, inner_scope)
                for outer, own in zip(node.outputs, inner.outputs, strict=True):
                    numbers[scope, id(outer)] = number(inner_scope, own)

    visit(graph, outermost)
    return nodes, tuple(number(outermost, tensor) for tensor in graph.outputs)


def parameters(layers: Iterable[keras.Layer], *, trainable_only: bool = False) -> int:
    """How many scalars the weights of `layers` hold, shared ones once."""
    weights = {id(weight): weight for layer in layers for weight in layer.weights}
    return sum(
        math.prod(weight.shape)
        for weight in weights.values()
        if weight.trainable or not trainable_only
    )


def find_backbone(model: keras.Layer, backbone: "Thawable | str | None" = None) -> Thawable:
    """The backbone inside `model`: by name, or the only one there is.

    Raises:
        ValueError: no backbone, several of them and no name, or none of that name.
    """
    found = {layer.name: layer for layer in walk(model) if isinstance(layer, Thawable)}
    names = ", ".join(repr(name) for name in found) or "none"
    wanted = backbone if backbone is None or isinstance(backbone, str) else backbone.name
    if wanted is not None and wanted not in found:
        raise ValueError(
            f"Expected a keras_xfer Backbone of that name inside model {model.name!r}. "
            f"Received: backbone={wanted!r}; found: {names}."
        )
    if wanted is None and len(found) != 1:
        raise ValueError(
            f"Expected exactly one keras_xfer Backbone inside model {model.name!r}; found: {names}. "
            + (
                "Name the one that is meant: backbone='…'."
                if found
                else "Wrap the pretrained model: keras_xfer.Backbone(model)."
            )
        )
    return found[wanted] if wanted is not None else next(iter(found.values()))


# --- Freezing and thawing --------------------------------------------------------------------


def set_trainable(layer: keras.Layer, value: bool) -> None:
    """Set `trainable` on `layer` and on all inside it, whatever the flags were."""
    # On TensorFlow an assignment of the value that a flag already has is dropped and never
    # reaches the children (tf.Module's AutoTrackable), so set all of them, innermost first, and
    # pass through the opposite.
    for inner in reversed(walk(layer)):
        inner.trainable = not value
        inner.trainable = value


def freeze(model: keras.Layer) -> None:
    """Freeze every layer of `model`."""
    set_trainable(model, False)


def thaw(model: keras.Layer, position: int = 0) -> None:
    """Train the units of `model` from `position` on and freeze those before it."""
    set_trainable(model, True)
    for unit in units(model)[:position]:
        set_trainable(unit, False)
    for layer in walk(model):  # a nested model of which nothing trains is frozen as a whole
        if layer is not model and graph_of(layer) is not None:
            if not any(unit.trainable for unit in units(layer)):
                set_trainable(layer, False)


def thawed(model: keras.Layer) -> dict[str, list[str]]:
    """Which layers of `model` are trainable, by paths that hold in another process; under
    `"affine"` those of which gamma and beta alone are."""
    layers = {path: layer for path, layer in _paths(model)}
    return {
        "layers": [path for path, layer in layers.items() if layer.trainable],
        "affine": [
            path
            for path, layer in layers.items()
            if isinstance(layer, keras.layers.BatchNormalization)
            and not layer.trainable
            and any(weight.trainable for weight in _affine(layer))
        ],
    }


def restore_thawed(model: keras.Layer, state: dict[str, list[str]]) -> None:
    """Set the flags inside `model` to what `thawed` said."""
    for path, layer in _paths(model):  # a layer comes before those inside it
        set_trainable(layer, path in state["layers"])
    for path, layer in _paths(model):
        if path in state["affine"]:
            for weight in _affine(layer):
                weight.trainable = True


def _paths(layer: keras.Layer, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Every layer with its path: names in a graph, where order may change on reloading, and
    places in other layers, whose sublayers are named afresh in each process."""
    yield path, layer
    by_name = graph_of(layer) is not None
    # See `walk` for why `_flatten_layers`.
    for i, inner in enumerate(layer._flatten_layers(include_self=False, recursive=False)):
        yield from _paths(inner, f"{path}/{inner.name if by_name else i}")


def _affine(layer: keras.layers.BatchNormalization) -> list[Any]:
    return [weight for weight in (layer.gamma, layer.beta) if weight is not None]


def select(
    model: keras.Layer,
    start: Start,
    *,
    batch_norm: BatchNormPolicy = "train",
    blocks: Sequence[Any] = (),
) -> int:
    """The position in `units(model)` from which `start` says that layers train.

    Args:
        model: the model that is thawed.
        start: `"all"`; an index into `model.layers`, from the end if negative; the name of a
            layer or of a block; a regular expression over layer names, of which the first full
            match counts; or a float in (0, 1), the top fraction of `model.layers`.
        batch_norm: the policy in force; under `"frozen"` a BatchNormalization trains nothing.
        blocks: what block names stand for.

    Returns:
        int, 0 for the whole model.

    Raises:
        TypeError: `start` is none of these.
        ValueError: `start` matches nothing, or only layers that have nothing to train.
    """
    all_units = units(model)
    position = _position(model, all_units, start, blocks)
    if not any(_can_train(unit, batch_norm) for unit in all_units[position:]):
        below = [unit.name for unit in all_units[:position] if _can_train(unit, batch_norm)]
        nearest = f"start at {below[-1]!r} or before it" if below else "the model has no weights"
        raise ValueError(
            "Expected a start from which at least one layer has weights to train"
            + (" (BatchNormalization is frozen by batch_norm='frozen')" * (batch_norm == "frozen"))
            + f". Received: start={start!r}, which selects "
            f"{[unit.name for unit in all_units[position:]]}; {nearest}."
        )
    return position


def _position(
    model: keras.Layer, all_units: list[keras.Layer], start: Start, blocks: Sequence[Any]
) -> int:
    layers = top_layers(model)
    if isinstance(start, str):
        return 0 if start == "all" else _named_position(all_units, start, blocks)
    if isinstance(start, float):
        if not 0.0 < start < 1.0:
            raise ValueError(
                "Expected the fraction of layers to train, a float strictly between 0 and 1 "
                f"(use 'all' for the whole model). Received: start={start!r}."
            )
        index = len(layers) - max(1, round(start * len(layers)))
    else:
        try:
            if isinstance(start, bool):
                raise TypeError
            index = operator.index(start)
        except TypeError:
            raise TypeError(
                "Expected start to be 'all', an index, a layer name, a block name, a regular "
                f"expression or a fraction in (0, 1). Received: start={start!r} of type "
                f"{type(start).__name__}."
            ) from None
        if not -len(layers) <= index < len(layers):
            raise ValueError(
                f"Expected an index into the {len(layers)} layers of model {model.name!r}, from "
                f"{-len(layers)} to {len(layers) - 1}. Received: start={start}."
            )
        index %= len(layers)
    first = layers[index]
    inner = units(first) if graph_of(first) is not None else [first]
    return next(i for i, unit in enumerate(all_units) if unit is inner[0])


def _named_position(all_units: list[keras.Layer], start: str, blocks: Sequence[Any]) -> int:
    names = [unit.name for unit in all_units]
    if start in names:
        return names.index(start)
    for block in blocks:
        if block.name == start:
            inside = {id(layer) for layer in block.layers}
            return next(i for i, unit in enumerate(all_units) if id(unit) in inside)
    try:
        pattern = re.compile(start)
    except re.error as error:
        pattern, problem = None, f" (nor is it a regular expression: {error})"
    else:
        problem = ""
    for i, name in enumerate(names):
        if pattern is not None and pattern.fullmatch(name):
            return i
    candidates = names + [block.name for block in blocks]
    near = difflib.get_close_matches(start, candidates, n=3, cutoff=0.0)
    raise ValueError(
        "Expected the name of a layer or a block, or a regular expression that matches a whole "
        f"layer name. Received: start={start!r}, which matches none of the {len(names)} layers"
        f"{problem}. Nearest: {', '.join(repr(name) for name in near) or 'none'}."
    )


def _can_train(unit: keras.Layer, batch_norm: BatchNormPolicy) -> bool:
    """Whether thawing `unit` gives the optimizer anything."""
    return any(
        # Which weights a layer meant to train, whatever its flag says now, is private.
        # Tried on Keras 3.15.1.
        layer._trainable_variables
        for layer in walk(unit)
        if not (batch_norm == "frozen" and isinstance(layer, keras.layers.BatchNormalization))
    )


# --- BatchNormalization ----------------------------------------------------------------------


def check_batch_norm(policy: str) -> BatchNormPolicy:
    """`policy`, if it is one."""
    for known in BATCH_NORM_POLICIES:
        if policy == known:
            return known
    raise ValueError(
        f"Expected batch_norm to be one of {BATCH_NORM_POLICIES}. Received: batch_norm={policy!r}."
    )


class BatchNormGuard:
    """Holds the BatchNormalization layers of one model to a policy.

    Anybody may set their flags at any time, so the policy cannot be set once: `enforce` runs
    whenever Keras is about to read the flags (collecting variables, calling the model).
    """

    def __init__(self, model: keras.Layer, policy: BatchNormPolicy) -> None:
        self.policy = policy
        self.layers = [
            layer for layer in walk(model) if isinstance(layer, keras.layers.BatchNormalization)
        ]

    def enforce(self) -> None:
        """Take back what contradicts the policy; nothing else changes."""
        if self.policy == "train":
            return
        for layer in self.layers:
            affine = _affine(layer)
            asked = [weight.trainable for weight in affine]
            if self.policy == "frozen" and (layer.trainable or any(asked)):
                set_trainable(layer, False)
            elif self.policy == "affine" and layer.trainable:
                # trainable=False alone fixes the statistics; gamma and beta keep what was asked.
                layer.trainable = False
                for weight, value in zip(affine, asked, strict=True):
                    weight.trainable = value

    def state(self, layers: Iterable[keras.Layer]) -> str:
        """What the BatchNormalization inside `layers` does now: `"frozen"`, `"affine"`,
        `"train"`, several of these joined by a comma, or `"-"` where there is none."""
        states = set()
        for layer in {id(inner): inner for unit in layers for inner in walk(unit)}.values():
            if isinstance(layer, keras.layers.BatchNormalization):
                affine = any(weight.trainable for weight in _affine(layer))
                states.add("train" if layer.trainable else "affine" if affine else "frozen")
        return ", ".join(sorted(states)) or "-"


# --- Calling a partly frozen model -----------------------------------------------------------


def call(model: keras.Layer, inputs: Any, training: bool | None) -> Any:
    """`model(inputs)`, in which `training` reaches the layers that are trainable and all others
    run in inference mode: no dropout, no noise, no moving statistics, no spectral update.

    Keras passes one `training` to all: a frozen BatchNormalization obeys its own flag, but frozen
    Dropout, stochastic depth and SpectralNormalization still act
    (https://github.com/keras-team/keras/issues/18092).
    """
    graph = graph_of(model)
    if graph is not None:
        # Functional.call gives every layer the same `training`. Tried on Keras 3.15.1.
        outputs = graph._run_through_graph(
            graph._standardize_inputs(inputs), operation_fn=lambda op: _gated(op, training)
        )
        return outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs
    if not _takes_training(model):
        return model(inputs)
    live = any(weight.trainable for weight in model.weights)
    if not (live and training):
        return model(inputs, training=False)
    with _inference_mode(layer for layer in walk(model) if not layer.trainable):
        return model(inputs, training=training)


def _takes_training(layer: Any) -> bool:
    # Keras works this out once for each layer and does not publish it. Tried on Keras 3.15.1.
    return bool(getattr(layer, "_call_has_training_arg", False))


def _gated(operation: Any, training: bool | None) -> Callable[..., Any]:
    """`operation`, told `training` only if it is trainable."""
    if not isinstance(operation, keras.Layer):
        return operation  # type: ignore[no-any-return]  # an Operation such as keras.ops.add
    if not _takes_training(operation):
        return operation  # type: ignore[no-any-return]

    def run(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("training", None)  # written into the graph: layer(x, training=False)
        wanted = training if asked is None else asked
        if graph_of(operation) is not None:
            return call(operation, *args, wanted)
        return operation(*args, training=bool(wanted) and operation.trainable, **kwargs)

    return run


@contextlib.contextmanager
def _inference_mode(layers: Iterable[keras.Layer]) -> Iterator[None]:
    """Within it the `call` of each of `layers` gets training=False, whoever calls it.

    For models whose `call` is their own code: there is no graph to walk, and an explicit
    `training` beats whatever Keras would pass on.
    """
    changed = []
    try:
        for layer in layers:
            if _takes_training(layer) and "call" not in vars(layer):
                # Past the layer's own __setattr__, which would track or refuse a function.
                object.__setattr__(layer, "call", _without_training(layer.call))
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            object.__delattr__(layer, "call")


def _without_training(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **{**kwargs, "training": False})

    return call
