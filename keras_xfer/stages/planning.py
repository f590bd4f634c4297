"""Stages placed in the epochs of a fit and in the layers of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_xfer import freezing
from keras_xfer.retarget import StageRate
from keras_xfer.stages.stage import PARTS, Stage


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage placed in the epochs of a fit and in the layers of a model.

    Args:
        index: int, from 0.
        stage: the `Stage` as it was written.
        first_epoch: int, its first epoch, counted from 0, if no stage ends early; None where the
            one before it lasts as long as it improves.
        end_epoch: int or None, the epoch after its last; None if that is not known.
        position: int or None, where in `keras_xfer.freezing.units(backbone.model)` training
            begins; None while the backbone is frozen.
    """

    index: int
    stage: Stage
    first_epoch: int | None
    end_epoch: int | None
    position: int | None

    @property
    def label(self) -> str:
        """How messages call the stage, counted from 1."""
        return f"stage {self.index + 1}" + (f" ({self.stage.name})" if self.stage.name else "")


def resolve(stages: Sequence[Stage], backbone: freezing.Thawable) -> tuple[PlannedStage, ...]:
    """Place `stages` in the epochs and in the layers of `backbone`.

    Raises:
        TypeError: something in `stages` is not a Stage.
        ValueError: no stages; a stage that can never begin; a stage that thaws something
            without a rate of its own or freezes what an earlier one trained; a selection that
            matches nothing.
    """
    check(stages)
    blocks = backbone.blocks
    planned: list[PlannedStage] = []
    epoch: int | None = 0
    for index, stage in enumerate(stages):
        position = None
        if stage.unfreeze is not None:
            try:
                position = freezing.select(
                    backbone.model, stage.unfreeze, batch_norm=backbone.batch_norm, blocks=blocks
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"Stage {index + 1}: {error}") from None
        end = None if stage.epochs is None or epoch is None else epoch + stage.epochs
        place = PlannedStage(index, stage, epoch, end, position)
        _check_against(place, planned[-1] if planned else None)
        planned.append(place)
        epoch = end
    return tuple(planned)


def check(stages: Sequence[Stage]) -> None:
    """What can be said of a schedule without a model; raises TypeError or ValueError."""
    if isinstance(stages, Stage) or not all(isinstance(stage, Stage) for stage in stages):
        raise TypeError(f"Expected a list of keras_xfer.Stage. Received: stages={stages!r}.")
    if not stages:
        raise ValueError("Expected at least one stage. Received: stages=[].")
    for index, stage in enumerate(stages[:-1]):
        if stage.epochs is None and stage.patience is None:
            raise ValueError(
                f"Expected every stage but the last to say its epochs or its patience, or the next "
                f"one can never begin. Received: epochs=None, patience=None in stage {index + 1} "
                f"of {len(stages)}."
            )


def _check_against(place: PlannedStage, before: PlannedStage | None) -> None:
    position, last = place.position, before.position if before else None
    if position is None and last is None:
        return
    if last is not None and (position is None or position > last):
        raise ValueError(
            "Expected each stage to train at least what the one before it trains. Received: "
            f"unfreeze={place.stage.unfreeze!r} in {place.label}, which freezes again what "
            f"unfreeze={before.stage.unfreeze!r} trained."  # type: ignore[union-attr]
        )
    if position != last and place.stage.learning_rate is None:
        raise ValueError(
            "Expected a learning_rate on a stage that thaws something: the head's rate would "
            "spoil the pretrained weights. Received: learning_rate=None with "
            f"unfreeze={place.stage.unfreeze!r} in {place.label}. A tenth of the head's rate is "
            "the usual start."
        )


def stage_at(planned: Sequence[PlannedStage], epoch: int) -> PlannedStage:
    """The stage that `epoch` (from 0) belongs to if none ends early; the last one after all."""
    return next((p for p in planned if p.end_epoch is None or epoch < p.end_epoch), planned[-1])


def begin_stage(stage: Stage, backbone: freezing.Thawable) -> None:
    """Let exactly what `stage` says train inside `backbone`."""
    if stage.unfreeze is None:
        backbone.freeze()
    else:
        backbone.unfreeze(stage.unfreeze)


def gradual(
    backbone: freezing.Thawable,
    *,
    blocks_per_stage: int = 1,
    epochs_per_stage: int | None = 1,
    num_stages: int | None = None,
    **stage: Any,
) -> list[Stage]:
    """Gradual unfreezing: the head alone, then block after block from the top.

    Args:
        backbone: a `keras_xfer.Backbone`.
        blocks_per_stage: int, how many more blocks each stage thaws.
        epochs_per_stage: int, the epochs of each stage; None needs a `patience`.
        num_stages: int, how many stages in all, the head's among them; None goes on until
            everything is thawed.
        **stage: further arguments of each `Stage`; `learning_rate` is needed.

    Returns:
        list of `Stage`, named after what they thaw.

    Raises:
        ValueError: a count below 1, no `learning_rate`, or neither epochs nor a patience.

    Example:

    >>> import keras_xfer
    >>> base = keras_xfer.Backbone.from_application("VGG16", weights=None)
    >>> [each.unfreeze for each in gradual(base, learning_rate=1e-4, num_stages=3)]
    [None, 'block5', 'block4']

    Reference:
        https://arxiv.org/abs/1801.06146
    """
    check_gradual(
        stage.get("learning_rate"),
        blocks_per_stage,
        num_stages,
        epochs_per_stage,
        stage.get("patience"),
    )
    blocks = backbone.blocks
    stages = [Stage(None, epochs=epochs_per_stage, **{"name": "head", **stage})]
    first = len(blocks)
    while first > 0 and (num_stages is None or len(stages) < num_stages):
        first = max(first - blocks_per_stage, 0)
        start = _start_of(backbone, blocks, first)
        name = f"from {blocks[first].name}" if first else "everything"
        stages.append(Stage(start, epochs=epochs_per_stage, **{"name": name, **stage}))
    return stages


def check_gradual(
    learning_rate: Any,
    blocks_per_stage: int,
    num_stages: int | None,
    epochs_per_stage: int | None,
    patience: int | None,
) -> None:
    """What can be said of gradual unfreezing without a model."""
    for name, value in (("blocks_per_stage", blocks_per_stage), ("num_stages", num_stages)):
        if name == "num_stages" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Expected {name} to be an int. Received: {name}={value!r}.")
        if value < 1:
            raise ValueError(f"Expected {name} of at least 1. Received: {name}={value}.")
    if learning_rate is None:
        raise ValueError(
            "Expected a learning_rate for gradual unfreezing, such as "
            "{'head': 1e-3, 'backbone': 1e-4}. Received: learning_rate=None."
        )
    if epochs_per_stage is None and patience is None:
        raise ValueError(
            "Expected epochs_per_stage or a patience for gradual unfreezing, or the second stage "
            "can never begin. Received: epochs_per_stage=None, patience=None."
        )


def _start_of(backbone: freezing.Thawable, blocks: Sequence[Any], first: int) -> freezing.Start:
    """How a stage says that training begins with block `first`."""
    if first == 0:
        return "all"
    name: str = blocks[first].name
    units = freezing.units(backbone.model)
    begin = next(i for i, unit in enumerate(units) if unit is blocks[first].layers[0])
    if freezing.select(backbone.model, name, blocks=blocks) == begin:
        return name
    return units[begin].name  # a layer somewhere else has the block's name


# --- Rates -----------------------------------------------------------------------------------


class RateGroup(NamedTuple):
    """Variables that train at one rate.

    Attributes:
        name: what messages call them: "head", "backbone", "all", or a block's name.
        variables: the variables, those that are frozen too.
        rate: the `StageRate`, from the stage's first step.
    """

    name: str
    variables: list[Any]
    rate: StageRate


def group_rates(
    stage: Stage,
    model: keras.Model,
    backbone: freezing.Thawable,
    *,
    steps_per_epoch: int | None = None,
) -> list[RateGroup] | None:
    """The rate of each group of variables of `model` in `stage`, the head first and then from the
    top down; None where the stage keeps what is in force.

    Raises:
        ValueError: the stage warms up over epochs of unknown length.
    """
    rates = stage.learning_rate
    if rates is None:
        return None
    warmup_steps = 0
    if stage.warmup_epochs:
        if steps_per_epoch is None:
            raise ValueError(
                "Expected a known number of steps an epoch for the warm-up of a stage: pass "
                f"steps_per_epoch to fit. Received: warmup_epochs={stage.warmup_epochs} with data "
                "of unknown length."
            )
        warmup_steps = round(stage.warmup_epochs * steps_per_epoch)

    def rate(base: Any, scale: float = 1.0) -> StageRate:
        return StageRate(base, scale=scale, warmup_steps=warmup_steps)

    is_split = isinstance(rates, Mapping)
    of: Any = rates if is_split else dict.fromkeys(PARTS, rates)
    if not is_split and stage.layer_decay == 1:
        return [RateGroup("all", list(model.weights), rate(rates))]
    inside = {id(weight) for weight in backbone.model.weights}
    head = [weight for weight in model.weights if id(weight) not in inside]
    groups = [RateGroup("head", head, rate(of["head"]))]
    if stage.layer_decay == 1:
        return [*groups, RateGroup("backbone", list(backbone.model.weights), rate(of["backbone"]))]
    left = {id(weight): weight for weight in backbone.model.weights}
    for below, block in enumerate(reversed(backbone.blocks)):
        inside_block = {id(weight) for layer in block.layers for weight in layer.weights}
        weights = [left.pop(key) for key in list(left) if key in inside_block]
        scale = stage.layer_decay ** (below if is_split else below + 1)
        groups.append(RateGroup(block.name, weights, rate(of["backbone"], scale)))
    groups[-1].variables.extend(left.values())  # in no layer, as the class token of a transformer
    return groups
