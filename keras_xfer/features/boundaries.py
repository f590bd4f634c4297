"""Where each stage of a schedule is best cut: below it everything is computed once and kept."""

import dataclasses
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import keras

from keras_xfer import flops, freezing
from keras_xfer.blocks import cuts
from keras_xfer.features.entry import dtype_of
from keras_xfer.features.live import OWN_LAYERS_MAY, live_layers, own_layers, random_layers
from keras_xfer.features.split import cut_between, split_between
from keras_xfer.layers.backbone import Backbone
from keras_xfer.stages.planning import PlannedStage

BoundaryMode = Literal["auto", "always", "never"]
MODES: tuple[BoundaryMode, ...] = ("auto", "always", "never")

# A prefix that is less of the forward pass than this is not worth its place on the disk.
LEAST_SHARE = 0.1
# How many FLOPs take as long as reading a byte: some 100 GFLOP/s of a few CPU cores, 1 GB/s of a
# disk. A constant, so that the same choice is made on every machine and every run.
FLOPS_A_BYTE = 100.0


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where a stage is cut, and why.

    Attributes:
        stage: int, from 0.
        at: str, what the cut is called: "head", or the layer whose output crosses it; None where
            the stage trains on the model's own inputs.
        bytes_per_image: int or None, what is kept of an image.
        flops_share: float or None, how much of the backbone's forward pass is below the cut.
        reason: str.
    """

    stage: int
    at: str | None
    bytes_per_image: int | None
    flops_share: float | None
    reason: str
    halves: Any = dataclasses.field(default=None, repr=False, compare=False)  # as `split_model`'s

    @property
    def text(self) -> str:
        """Where and why, in words."""
        at = "at the head" if self.at == "head" else self.at
        return f"uncached, {self.reason}" if at is None else f"cached {at}, {self.reason}"

    def __str__(self) -> str:
        return f"stage {self.stage + 1}: {self.text}"


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A cut that a stage may have."""

    at: str
    above: tuple[Any, ...] | None  # the layers; None: all of the backbone is below
    share: float | None  # of the forward pass
    cost: float  # of an epoch, as far as it depends on the cut, in forward passes


def choose(
    model: keras.Model,
    backbone: Backbone,
    planned: Sequence[PlannedStage],
    *,
    epochs: int,
    images: int | None,
    budget_bytes: float,
    mode: BoundaryMode = "auto",
    augments: bool = False,
    runs: int = 1,
) -> list[Boundary]:
    """Choose the cut of each stage.

    Args:
        model: the whole model.
        backbone: the `Backbone` in it.
        planned: the stages.
        epochs: int, of all stages.
        images: int, how many images are kept, each view counted; None, not known.
        budget_bytes: how many bytes one stage's features may take.
        mode: "auto"; "always", wherever something is frozen; "never".
        augments: bool, whether random layers before the backbone are kept as views.
        runs: int, how many trainings use what is kept.

    Returns:
        list of `Boundary`, one a stage.

    Raises:
        ValueError: with "always", a stage that cannot be cut though something of it is frozen.
    """
    lasting = _epochs_at(planned, epochs)
    made: dict[int | None, Boundary] = {}
    boundaries = []
    for place in planned:
        if place.position not in made:
            made[place.position] = _choose_one(
                model,
                backbone,
                place,
                epochs=lasting[place.position] * runs,
                images=images,
                budget_bytes=budget_bytes,
                mode=mode,
                augments=augments,
            )
        boundaries.append(dataclasses.replace(made[place.position], stage=place.index))
    return boundaries


def _choose_one(
    model: keras.Model,
    backbone: Backbone,
    place: PlannedStage,
    *,
    epochs: int,
    images: int | None,
    budget_bytes: float,
    mode: BoundaryMode,
    augments: bool,
) -> Boundary:
    def uncached(reason: str) -> Boundary:
        return Boundary(place.index, None, None, None, reason)

    if mode == "never":
        return uncached("boundary='never'")
    if mode == "auto" and epochs < 2:
        return uncached("it lasts a single epoch, which would use each feature once")
    if place.position and freezing.graph_of(backbone.model) is None:
        reason = (
            f"the model inside {backbone.name!r}, {backbone.model.name!r}, runs code of its own and "
            "has no graph to cut"
        )
        if mode == "always":
            raise ValueError(
                f"Expected stages that can be cut. Received: stage {place.index + 1}: {reason}."
            )
        return uncached(reason)
    candidates = _candidates(model, backbone, place.position)
    if not candidates:
        return uncached("nothing of the backbone is frozen")
    best = min(candidates, key=lambda each: each.cost)
    if mode == "auto" and best.share is not None and best.share < LEAST_SHARE:
        return uncached(
            f"only {best.share:.0%} of the forward pass is frozen, less than {LEAST_SHARE:.0%}"
        )
    try:
        prefix, suffix = split_between(
            model, backbone, best.above, at=best.at, through_pooling=best.above is None
        )
        _check_fixed(prefix, backbone, augments)
    except ValueError as error:
        if mode == "always":
            raise
        return uncached(" ".join(str(error).split()))
    size = _bytes_of(prefix.outputs)
    if mode == "auto":
        if size is None or images is None:
            what = "the size of its features" if size is None else "the number of images"
            return uncached(f"{what} is not known beforehand")
        if size * images > budget_bytes:
            return uncached(
                f"{_readable(size * images)} of features are more than the {_readable(budget_bytes)} "
                "that the disk has for them"
            )
    share = "" if best.share is None else f"{best.share:.0%} of the forward pass done once, "
    kept = "an unknown number of bytes" if size is None else _readable(size)
    return Boundary(
        place.index, best.at, size, best.share, f"{share}{kept} an image", (prefix, suffix)
    )


def _epochs_at(planned: Sequence[PlannedStage], epochs: int) -> dict[int | None, int]:
    """How many epochs train from each position, of all stages that do."""
    found: dict[int | None, int] = {}
    for place in planned:
        begin = place.first_epoch
        left = max(0, epochs - (begin or 0))
        lasts = left if place.stage.epochs is None else min(place.stage.epochs, left)
        found[place.position] = found.get(place.position, 0) + lasts
    return found


def _candidates(model: keras.Model, backbone: Backbone, position: int | None) -> list[_Candidate]:
    """The cuts at which a stage that trains from `position` on may be cut: just below what trains,
    and wherever below a single tensor crosses."""
    if position is None:
        return [_Candidate("head", None, 1.0, 0.0)]
    found = freezing.graph_nodes(backbone.model)
    if found is None or position == 0:
        return []
    nodes, outputs = found
    shape = _input_shape(model, backbone)
    if shape is not None:
        nodes = flops.sized(nodes, shape)
    costs = flops.estimates(nodes)
    total = None if None in costs else sum(cost or 0 for cost in costs)
    flops_of = {id(node): cost or 0 for node, cost in zip(nodes, costs, strict=True)}
    specs = {i: spec for node in nodes for spec, i in zip(node.specs, node.outputs, strict=True)}

    def add(at: str, above: Sequence[Any]) -> None:
        below, _, crossing = cut_between(nodes, outputs, frozenset(map(id, above)))
        if not any(getattr(node.layer, "weights", ()) for node in below):
            return  # nothing to save
        size = _bytes_of(specs[i] for i in crossing)
        if not total or size is None:  # shapes are not known: as far up as can be
            candidates.append(_Candidate(at, tuple(above), None, float(len(candidates))))
            return
        share = sum(flops_of[id(node)] for node in below) / total
        cost = (1 - share) + FLOPS_A_BYTE * size / total
        candidates.append(_Candidate(at, tuple(above), share, cost))

    candidates: list[_Candidate] = []
    units = freezing.units(backbone.model)[position:]
    add(f"before {units[0].name}", units)
    trained = frozenset(map(id, units))
    alone = set(cuts(backbone.model))
    for i, node in enumerate(nodes[:-1]):
        if id(node.layer) in trained:
            break
        if node.layer.name in alone:
            add(f"after {node.layer.name}", [each.layer for each in nodes[i + 1 :]])
    return candidates


def _input_shape(model: keras.Model, backbone: Backbone) -> tuple[int, ...] | None:
    """The shape of what `model` gives to its backbone, where all of it is known and it is one."""
    nodes, _ = freezing.graph_nodes(model) or ([], ())
    specs = {i: spec for node in nodes for spec, i in zip(node.specs, node.outputs, strict=True)}
    given = next((node.inputs for node in nodes if node.layer is backbone), ())
    shapes = [tuple(specs[i].shape)[1:] for i in given]
    return shapes[0] if len(shapes) == 1 and None not in shapes[0] else None


def _check_fixed(prefix: keras.Model, backbone: Backbone, augments: bool) -> None:
    """Raise where what is below the cut would not stay what it is."""
    if own := own_layers(prefix):
        raise ValueError(
            f"{_named(own)} below the cut may act while training by code of their own: let them "
            f"{OWN_LAYERS_MAY} the Backbone"
        )
    random = random_layers(prefix)
    if random and not augments:
        raise ValueError(
            f"{_named(random)} below the cut act randomly while training; pass views=K to keep "
            "K augmented passes of each image"
        )
    if moving := [layer for layer in live_layers(prefix) if layer not in random]:
        raise ValueError(
            f"{_named(moving)} below the cut write to their weights while training: set their "
            "trainable to False, or put them inside the Backbone"
        )
    if losing := [layer for layer in freezing.walk(prefix) if _adds_losses(layer)]:
        raise ValueError(
            f"{_named(losing)} below the cut add to the loss, which features do not hold"
        )
    of_backbone = {id(each) for each in backbone.variables}  # the stage freezes them
    if trained := [each for each in prefix.trainable_variables if id(each) not in of_backbone]:
        raise ValueError(
            f"{trained[0].path!r} below the cut trains, so that its features change: set its "
            "layer's trainable to False, or put it above the Backbone"
        )


def _adds_losses(layer: keras.Layer) -> bool:
    """Whether a call of `layer` adds to the loss: by a regularizer of its outputs, or, as far as its
    class is not Keras's, by `add_loss`."""
    if getattr(layer, "activity_regularizer", None) is not None:
        return True
    return any(
        "add_loss" in function.__code__.co_names
        for kind in type(layer).__mro__
        if not kind.__module__.startswith("keras.")
        for function in vars(kind).values()
        if inspect.isfunction(function)
    )


def _named(layers: Iterable[keras.Layer]) -> str:
    return ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in layers)


def _bytes_of(specs: Iterable[Any]) -> int | None:
    """What the tensors take for one image; None where a dimension is not known."""
    total = 0
    for spec in specs:
        shape = tuple(spec.shape)[1:]
        if None in shape:
            return None
        total += math.prod(shape) * dtype_of(spec.dtype).itemsize
    return total


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
