"""Which layers train: select, freeze and thaw them, hold BatchNormalization to a policy, and call a
model so that its frozen part stays in inference mode.

Pure functions over any Keras model; `Backbone` and `StagedUnfreezing` are made of them.
"""

import contextlib
import difflib
import functools
import inspect
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

from keras_xfer.variable_group import VariableGroup

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
    def blocks(self) -> Sequence[Any]:
        """The runs of layers that thaw together, in order."""

    def freeze(self) -> None:
        """Freeze every layer."""

    def unfreeze(self, start: Start = "all") -> None:
        """Train from `start` on, freeze what is before it."""


class Node(NamedTuple):
    """One call of one layer in a model's graph; tensors are known by number.

    Attributes:
        layer: what is called: a layer, or an operation such as the one behind `a + b`.
        inputs: the numbers of the tensors it is given.
        outputs: the numbers of those it gives.
        specs: the KerasTensors of the outputs.
        run: `run(values, operation)` calls `operation` as the graph calls `layer`, on the tensors
            in `values` by number, and adds those it gives.
    """

    layer: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    specs: tuple[Any, ...]
    run: Callable[[dict[int, Any], Callable[..., Any]], None]


class ExactTrainable:
    """Mixed into a layer: an assignment to its `trainable` always arrives."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainable":
            # On TensorFlow, AutoTrackable drops the assignment of the value that an attribute
            # already has; a partly thawed layer is `trainable` and must still obey.
            object.__setattr__(self, name, value)  # straight to the property
        else:
            super().__setattr__(name, value)


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

    They are `model.layers`, with nested functional models and SavedModels opened. A layer that
    holds others (a transformer block, a wrapper) is one unit and is set as a whole.
    """
    found: dict[int, keras.Layer] = {}
    for layer in top_layers(model):
        inner = units(layer) if _is_opened(layer) else [layer]
        found.update({id(unit): unit for unit in inner})
    return list(found.values())


def is_saved_model(layer: keras.Layer) -> bool:
    """Whether the direct sublayers of `layer` are the variables of a SavedModel."""
    return any(
        isinstance(inner, VariableGroup) for inner in top_layers(layer) if inner is not layer
    )


def _is_opened(layer: keras.Layer) -> bool:
    return graph_of(layer) is not None or is_saved_model(layer)


def top_layers(model: keras.Layer) -> list[keras.Layer]:
    """`model.layers`; for a layer that is no model its direct sublayers, or itself."""
    if isinstance(model, keras.Model):
        return list(model.layers)
    # See `walk` for why `_flatten_layers`.
    return list(model._flatten_layers(include_self=False, recursive=False)) or [model]


def spec_numbers(nodes: Iterable[Node]) -> dict[int, int]:
    """The number of each tensor that `nodes` give, by the id of its symbol."""
    return {id(spec): i for node in nodes for spec, i in zip(node.specs, node.outputs, strict=True)}


def graph_nodes(
    model: keras.Layer, *, nested: bool = True
) -> tuple[list[Node], tuple[int, ...]] | None:
    """The calls of `model`'s graph in the order they run, with `nested` those inside nested
    functional models in place of theirs, and the numbers of its output tensors; None where `model`
    has no graph."""
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
                inner = graph_of(node.operation) if nested else None
                if inner is None or node.is_input:
                    inputs = tuple(number(scope, tensor) for tensor in node.input_tensors)
                    outputs = tuple(number(scope, tensor) for tensor in node.outputs)
                    if not (
                        node.is_input and scope != outermost
                    ):  # the inputs of an inner graph are outer tensors
                        run = functools.partial(_run, node, inputs, outputs)
                        specs = tuple(node.outputs)
                        nodes.append(Node(node.operation, inputs, outputs, specs, run))
                    continue
                inner_scope = next(scopes)
                for outer, own in zip(node.input_tensors, inner.inputs, strict=False):
                    numbers[inner_scope, id(own)] = number(scope, outer)
                visit(inner, inner_scope)
                # What came besides the inputs (a mask) is in use to the end.
                besides = node.input_tensors[len(inner.inputs) :]
                extra = tuple(number(scope, tensor) for tensor in besides)
                nodes[-1] = nodes[-1]._replace(inputs=nodes[-1].inputs + extra)
                for outer, own in zip(node.outputs, inner.outputs, strict=True):
                    numbers[scope, id(outer)] = number(inner_scope, own)

    visit(graph, outermost)
    return nodes, tuple(number(outermost, tensor) for tensor in graph.outputs)


@contextlib.contextmanager
def calls_forgotten(model: keras.Layer) -> Iterator[None]:
    """After it the layers of `model` have forgotten by which graphs they were called within, for
    models that are made of them and dropped again."""
    # Keras keeps every call of a layer for ever, with all that was made. Tried on Keras 3.15.1.
    lists = [
        calls for layer in walk(model) for calls in (layer._inbound_nodes, layer._outbound_nodes)
    ]
    before = [len(calls) for calls in lists]
    try:
        yield
    finally:
        for calls, count in zip(lists, before, strict=True):
            del calls[count:]


def _run(
    node: Any,
    inputs: Sequence[int],
    outputs: Sequence[int],
    values: dict[int, Any],
    operation: Callable[..., Any],
) -> None:
    # How a functional model calls its layers. Tried on Keras 3.15.1.
    own = {id(tensor): values[i] for tensor, i in zip(node.input_tensors, inputs, strict=True)}
    args, kwargs = node.arguments.fill_in(own)
    given = keras.tree.flatten(operation(*args, **kwargs))
    values.update(zip(outputs, given, strict=True))


def parameters(layers: Iterable[keras.Layer], *, trainable_only: bool = False) -> int:
    """How many scalars the weights of `layers` hold, shared ones once."""
    weights = {id(weight): weight for layer in layers for weight in layer.weights}
    return sum(
        math.prod(weight.shape)
        for weight in weights.values()
        if weight.trainable or not trainable_only
    )


def lowest_trainable(model: keras.Layer) -> Any:
    """The first weight that trains, in the order of `units(model)`."""
    weights = (weight for unit in units(model) for weight in unit.weights)
    return next(weight for weight in weights if weight.trainable)


def find_backbone(model: keras.Layer, backbone: "Thawable | str | None" = None) -> Thawable:
    """The backbone inside `model`: by name, or the only one there is.

    Raises:
        ValueError: no backbone, several of them and no name, or none of that name.
    """
    found = [layer for layer in walk(model) if isinstance(layer, Thawable)]
    names = ", ".join(repr(layer.name) for layer in found) or "none"
    wanted = backbone if backbone is None or isinstance(backbone, str) else backbone.name
    matching = [layer for layer in found if wanted in (None, layer.name)]
    if wanted is not None and len(matching) != 1:
        raise ValueError(
            f"Expected {'a' if not matching else 'only one'} keras_xfer Backbone of that name "
            f"inside model {model.name!r}. Received: backbone={wanted!r}; found: {names}."
        )
    if len(matching) != 1:
        raise ValueError(
            f"Expected exactly one keras_xfer Backbone inside model {model.name!r}; found: {names}. "
            + (
                "Name the one that is meant: backbone='…'."
                if found
                else "Wrap the pretrained model: keras_xfer.Backbone(model)."
            )
        )
    return matching[0]


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
        nested = layer is not model and _is_opened(layer)
        if nested and not any(unit.trainable for unit in units(layer)):
            set_trainable(layer, False)


def thawed(model: keras.Layer, *, by_place: bool = False) -> dict[str, list[str]]:
    """Which layers of `model` are trainable, and which of their weights are not what their layer is
    (gamma alone, say): by paths that hold for a copy of the model in another process, or, with
    `by_place`, for a model that the same code makes again, whatever its layers' names."""
    layers = dict(_paths(model, by_place=by_place))
    return {
        "layers": [path for path, layer in layers.items() if layer.trainable],
        "weights": [
            f"{path}:{i}"
            for path, layer in layers.items()
            for i, weight in enumerate(_own_trainable(layer))
            if weight.trainable != layer.trainable
        ],
    }


def restore_thawed(
    model: keras.Layer, state: dict[str, list[str]], *, by_place: bool = False
) -> None:
    """Set the flags inside `model` to what `thawed` said."""
    for path, layer in _paths(model, by_place=by_place):  # a layer comes before those inside it
        set_trainable(layer, path in state["layers"])
    for path, layer in _paths(model, by_place=by_place):
        for i, weight in enumerate(_own_trainable(layer)):
            if f"{path}:{i}" in state["weights"]:
                weight.trainable = not layer.trainable


def _paths(
    layer: keras.Layer, path: str = "", *, by_place: bool = False
) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer with its path: names in a graph, where order may change on reloading, and
    places in other layers, whose sublayers are named afresh in each process."""
    yield path, layer
    by_name = not by_place and graph_of(layer) is not None
    # See `walk` for why `_flatten_layers`.
    for i, inner in enumerate(layer._flatten_layers(include_self=False, recursive=False)):
        place = f"{path}/{inner.name if by_name else i}"
        yield from _paths(inner, place, by_place=by_place)


def _own_trainable(layer: keras.Layer) -> list[Any]:
    """The weights of `layer` itself that it made to be trained, whatever its flag says now."""
    # No public way tells them from the others of a frozen layer. Tried on Keras 3.15.1.
    return list(layer._trainable_variables)


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
            match counts; or a float in (0, 1), the top fraction of `model.layers` (of a
            SavedModel's trainable variables). The layers of a SavedModel go by their scopes and
            by the names of their variables too.
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
        why_not = getattr(model, "why_not_trainable", None) or "the model has nothing to train"
        nearest = f"start at {below[-1]!r} or before it" if below else why_not
        raise ValueError(
            "Expected a start from which at least one layer has weights to train"
            + (" (BatchNormalization is frozen by batch_norm='frozen')" * (batch_norm == "frozen"))
            + f". Received: start={start!r}, which selects "
            f"{[unit.name for unit in all_units[position:]]}; {nearest.removesuffix('.')}."
        )
    return position


def _position(
    model: keras.Layer, all_units: list[keras.Layer], start: Start, blocks: Sequence[Any]
) -> int:
    layers = top_layers(model)
    if isinstance(start, str):
        return 0 if start == "all" else _named_position(model, all_units, start, blocks)
    if isinstance(start, float):
        if not 0.0 < start < 1.0:
            raise ValueError(
                "Expected the fraction of layers to train, a float strictly between 0 and 1 "
                f"(use 'all' for the whole model). Received: start={start!r}."
            )
        index = _fraction_begins(layers, start)
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
    inner = units(first) if _is_opened(first) else [first]
    return next(i for i, unit in enumerate(all_units) if unit is inner[0])


def _fraction_begins(layers: Sequence[keras.Layer], fraction: float) -> int:
    """Where among `layers` the top `fraction` of them begins; of a SavedModel's variables, where
    layers are no more than what share a scope."""
    sizes = [
        len(_own_trainable(layer)) if isinstance(layer, VariableGroup) else 1 for layer in layers
    ]
    left = max(1, round(fraction * sum(sizes)))
    index = len(layers)
    while left > 0 and index > 0:
        index -= 1
        left -= sizes[index]
    return index


def _named_position(
    model: keras.Layer, all_units: list[keras.Layer], start: str, blocks: Sequence[Any]
) -> int:
    at = {id(unit): i for i, unit in enumerate(all_units)}
    names: dict[str, int] = {}
    for layer in walk(model):
        # A nested model begins where its first layer is.
        first = units(layer)[0] if id(layer) not in at and _is_opened(layer) else layer
        if layer is not model and id(first) in at:
            aliases = layer.aliases if isinstance(layer, VariableGroup) else ()
            for name in (layer.name, *aliases):
                names[name] = min(at[id(first)], names.get(name, len(at)))
    if start in names:
        return names[start]
    for block in blocks:
        if block.name == start:
            return min(at[id(layer)] for layer in block.layers)
    try:
        pattern = re.compile(start)
    except re.error as error:
        pattern, problem = None, f" (nor is it a regular expression: {error})"
    else:
        problem = ""
    matches = [i for name, i in names.items() if pattern is not None and pattern.fullmatch(name)]
    if matches:
        return min(matches)
    candidates = list(dict.fromkeys([*names, *(block.name for block in blocks)]))
    near = difflib.get_close_matches(start, candidates, n=3, cutoff=0.0)
    raise ValueError(
        "Expected the name of a layer or a block, or a regular expression that matches a whole "
        f"layer name. Received: start={start!r}, which matches none of the {len(names)} names"
        f"{problem}. Nearest: {', '.join(repr(name) for name in near) or 'none'}."
    )


def _can_train(unit: keras.Layer, batch_norm: BatchNormPolicy) -> bool:
    """Whether thawing `unit` gives the optimizer anything."""
    return any(
        _own_trainable(layer)
        for layer in walk(unit)
        if not (batch_norm == "frozen" and is_batch_norm(layer))
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


def is_batch_norm(layer: Any) -> bool:
    """Whether `layer` is a BatchNormalization, or holds the variables of one."""
    if isinstance(layer, VariableGroup):
        return layer.is_batch_norm
    return isinstance(layer, keras.layers.BatchNormalization)


class BatchNormGuard:
    """Holds the BatchNormalization layers of one model to a policy.

    Statistics move where a layer is called: there it is told once, for good, that nobody trains.
    What trains is said by flags, which anybody may set at any time: `enforce` runs whenever Keras
    is about to read them.
    """

    def __init__(self, model: keras.Layer, policy: BatchNormPolicy) -> None:
        self.policy = policy
        inside = walk(model)
        self.layers = [layer for layer in inside if is_batch_norm(layer)]
        # The statistics inside a SavedModel move where the whole of it is called.
        modules = [layer for layer in inside if is_saved_model(layer)]
        for layer in self.layers + modules:
            vars(layer).pop("call", None)  # an earlier guard's: the last one counts
            if policy != "train":
                _call_without_training(layer)

    def enforce(self) -> None:
        """Take back what contradicts the policy; nothing else changes."""
        if self.policy != "frozen":
            return
        for layer in self.layers:
            if layer.trainable or any(weight.trainable for weight in _own_trainable(layer)):
                set_trainable(layer, False)


def batch_norm_state(layers: Iterable[keras.Layer], policy: BatchNormPolicy) -> str:
    """What the BatchNormalization inside `layers` does under `policy`: `"frozen"`, `"affine"`,
    `"train"`, several of these joined by a comma, or `"-"` where there is none."""
    states = set()
    for layer in {id(inner): inner for unit in layers for inner in walk(unit)}.values():
        if is_batch_norm(layer):
            affine = any(weight.trainable for weight in _own_trainable(layer))
            group = isinstance(layer, VariableGroup)
            moves = policy == "train" and (layer.statistics_move() if group else layer.trainable)
            states.add("train" if moves else "affine" if affine else "frozen")
    return ", ".join(sorted(states)) or "-"


# --- Calling a partly frozen model -----------------------------------------------------------


def call(model: keras.Layer, inputs: Any, training: bool | None) -> Any:
    """`model(inputs)`, in which `training` reaches the layers that are trainable and all others
    run in inference mode: no dropout, no noise, no moving statistics, no spectral update.

    Keras passes one `training` to all: a frozen BatchNormalization obeys its own flag, but frozen
    Dropout, stochastic depth and SpectralNormalization still act
    (https://keras.io/api/layers/regularization_layers/dropout/).
    """
    live = bool(training) and any(weight.trainable for weight in model.weights)
    outputs = _call(model, (inputs,), {}, live)
    return say_training(outputs, training)


def say_training(outputs: Any, training: bool | None) -> Any:
    """`outputs`, after which the word is `training` again.

    In Keras an explicit `training` also reaches the layers that are called after this one, in a
    `call` that somebody wrote by hand: a head's dropout would not act above a frozen backbone.
    So the last word is the `training` that came. Tried on Keras 3.15.1.
    """
    return _SAY_TRAINING(outputs, training=training)


_SAY_TRAINING = keras.layers.Identity(name="say_training", autocast=False)


def output_spec(model: keras.Layer, inputs: Any) -> Any:
    """The shapes and dtypes that `call` gives, without running the model."""
    outputs = model.compute_output_spec(inputs)
    return outputs if graph_of(model) is None else unpacked(outputs)


def standard_inputs(graph: Functional, inputs: Any) -> list[Any]:
    """`inputs` as the list of tensors that `graph` begins with, in its dtypes and ranks."""
    # What Functional.call does first. Tried on Keras 3.15.1.
    return list(graph._standardize_inputs(inputs))


def unpacked(outputs: Any) -> Any:
    """As a functional model does: a single output in a list is that output."""
    return outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs


def _call(layer: keras.Layer, args: Any, kwargs: Any, training: bool) -> Any:
    """`layer(*args, **kwargs)`, told `training` where it and what is in it is trainable."""
    inside = walk(layer)
    # Keras takes `training` for every layer, and hands it on to those inside that ask for it.
    if not (training and any(inner.trainable for inner in inside)):
        return layer(*args, **kwargs, training=False)
    graph = graph_of(layer)
    if graph is None or len(args) != 1 or kwargs:
        still = [inner for inner in inside if not any(each.trainable for each in walk(inner))]
        with _inference_mode(still):
            return layer(*args, **kwargs, training=True)
    return run_graph(graph, args[0], gated)


def run_graph(graph: Functional, inputs: Any, each: Callable[[Any], Callable[..., Any]]) -> Any:
    """What `graph` gives for `inputs` with `each(layer)` called in place of each layer."""
    # Functional.call gives every layer the same `training`. Tried on Keras 3.15.1.
    outputs = graph._run_through_graph(standard_inputs(graph, inputs), operation_fn=each)
    return unpacked(outputs)


def gated(operation: Any) -> Callable[..., Any]:
    """`operation`, which trains if it is trainable and was not told otherwise in the graph."""
    if not isinstance(operation, keras.Layer):
        return operation  # an Operation such as keras.ops.add

    def run(*args: Any, **kwargs: Any) -> Any:
        said = kwargs.pop("training", None)
        return _call(operation, args, kwargs, said is not False or _is_default(operation, said))

    return run


def in_inference_mode(operation: Any) -> Callable[..., Any]:
    """`operation`, told that nobody trains."""
    if not isinstance(operation, keras.Layer):
        return operation
    return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": False})


def _is_default(layer: keras.Layer, training: bool) -> bool:
    """Whether `training` may be the default of the layer's `call`, which Keras writes into the
    graph as if it had been asked for."""
    parameter = inspect.signature(layer.call).parameters.get("training")
    return parameter is not None and parameter.default is training


@contextlib.contextmanager
def _inference_mode(layers: Iterable[keras.Layer]) -> Iterator[None]:
    """Within it the `call` of each of `layers` gets training=False, whoever calls it.

    For layers whose `call` is their own code: there is no graph to walk, and an explicit
    `training` beats whatever Keras would pass on.
    """
    changed = [layer for layer in layers if "call" not in vars(layer)]
    try:
        for layer in changed:
            _call_without_training(layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("call", None)


def holds_back_training(value: Any) -> bool:
    """Whether `value` is the `call` that a layer has got so that it never hears of training."""
    # Its names and its module are those of the layer's own.
    return getattr(value, "__globals__", None) is globals()


def _call_without_training(layer: keras.Layer) -> None:
    """Let the `call` of `layer`, this one object, get training=False whatever it is given."""
    method = layer.call
    if "training" not in inspect.signature(method).parameters:
        return

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **{**kwargs, "training": False})

    # Past the layer's own __setattr__, which would track or refuse a function.
    vars(layer)["call"] = call
