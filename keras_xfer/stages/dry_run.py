"""What a schedule would do: a table, before anything trains."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.retarget import StageRate
from keras_xfer.stages.planning import PlannedStage, begin_stage, group_rates
from keras_xfer.stages.stage import SCHEDULE, Stage
from keras_xfer.tables import Table


def plan_table(
    planned: Sequence[PlannedStage], model: keras.Model, backbone: freezing.Thawable
) -> Table:
    """What each stage trains, at which rate, for how long. The model is left as it was.

    Raises:
        ValueError: the model is not built.
    """
    if not model.built:
        raise ValueError(
            f"Expected a built model to plan for. Received: model={model.name!r}, whose weights do "
            "not exist yet: begin it with keras.Input, call model.build(input_shape), or call it on "
            "a batch."
        )
    state = freezing.thawed(model, by_place=True)
    try:
        return Table(
            ("stage", "epochs", "unfreeze", "blocks", "layers", "parameters", "trainable",
             "batch_norm", "learning_rate"),
            [_plan_row(place, model, backbone) for place in planned],
        )  # fmt: skip
    finally:
        freezing.restore_thawed(model, state, by_place=True)


def _plan_row(
    place: PlannedStage, model: keras.Model, backbone: freezing.Thawable
) -> tuple[Any, ...]:
    begin_stage(place.stage, backbone)
    units = freezing.units(backbone.model)
    thawed = [] if place.position is None else units[place.position :]
    inside = set(map(id, thawed))
    blocks = [
        block for block in backbone.blocks if any(id(layer) in inside for layer in block.layers)
    ]
    return (
        f"{place.index + 1}" + (f" {place.stage.name}" if place.stage.name else ""),
        _epochs_in_words(place),
        "-" if place.stage.unfreeze is None else str(place.stage.unfreeze),
        f"{len(blocks)} of {len(backbone.blocks)}",
        f"{len(thawed)} of {len(units)}",
        freezing.parameters([model]),
        freezing.parameters([model], trainable_only=True),
        freezing.batch_norm_state(units, backbone.batch_norm),
        _rates_in_words(place.stage, model, backbone, [block.name for block in blocks]),
    )


def _epochs_in_words(place: PlannedStage) -> str:
    """Epochs as messages count them, from 1."""
    first, end = place.first_epoch, place.end_epoch
    if first is None:
        words = f"up to {place.stage.epochs}" if place.stage.epochs else "as many as help"
        if not (place.stage.epochs or place.stage.patience):
            words = "to the end"
    elif end is None:
        words = f"from {first + 1}"
    else:
        words = f"{first + 1}" if end == first + 1 else f"{first + 1} to {end}"
    return words + (f", patience {place.stage.patience}" if place.stage.patience else "")


def _rates_in_words(
    stage: Stage, model: keras.Model, backbone: freezing.Thawable, thawed: Sequence[str]
) -> str:
    groups = group_rates(stage, model, backbone, steps_per_epoch=1)
    if groups is None:
        return "as before"
    shown = {"all", "head", *thawed, *(["backbone"] if thawed else [])}
    words = [f"{g.name} {_rate_in_words(g.rate)}" for g in groups if g.name in shown]
    if len(words) > 3:
        words = [*words[:2], f"... {words[-1]}"]
    text = ", ".join(words).removeprefix("all ")
    if stage.warmup_epochs:
        text += f", warm-up {stage.warmup_epochs:g} epochs"
    return text


def _rate_in_words(rate: StageRate) -> str:
    if isinstance(rate.learning_rate, SCHEDULE):
        scale = "" if rate.scale == 1 else f" x {rate.scale:.3g}"
        return f"{type(rate.learning_rate).__name__}{scale}"
    return f"{rate.learning_rate * rate.scale:.3g}"
