"""A fine-tuning schedule: what each stage trains, at which rate, for how long."""

import dataclasses
import math
import weakref
from collections.abc import Sequence
from typing import Any

from keras_xfer import freezing


@dataclasses.dataclass(frozen=True)
class Stage:
    """A period of training with one set of trainable layers and one learning rate.

    A schedule is a list of stages: the head first, then more and more of the backbone at a
    fraction of the rate. `keras_xfer.callbacks.StagedUnfreezing` runs it inside one `fit`.

    Args:
        unfreeze: None (the backbone is frozen), `"all"`, or any `start` that
            `keras_xfer.layers.Backbone.unfreeze` takes. Defaults to `None`.
        epochs: int, how many epochs the stage lasts; None, on the last stage only, means to the
            end of `fit`. Defaults to `None`.
        learning_rate: float, the rate of everything that trains in this stage; None keeps what
            is in force, and is refused where the stage thaws something new. Defaults to `None`.
        name: str or None, a name for printing.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: epochs below 1 or a learning rate that is not a positive finite number.

    Example:

    >>> [Stage(epochs=5, learning_rate=1e-3), Stage(-20, learning_rate=1e-4)][1].unfreeze
    -20

    Reference:
        https://keras.io/guides/transfer_learning/
    """

    unfreeze: freezing.Start | None = None
    _: dataclasses.KW_ONLY
    epochs: int | None = None
    learning_rate: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and (
            isinstance(self.epochs, bool) or not isinstance(self.epochs, int)
        ):
            raise TypeError(
                f"Expected epochs of a stage to be an int or None. Received: epochs={self.epochs!r}."
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(
                f"Expected a stage of at least one epoch. Received: epochs={self.epochs}."
            )
        rate = self.learning_rate
        if rate is None:
            return
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(
                "Expected learning_rate of a stage to be a float or None. "
                f"Received: learning_rate={rate!r}."
            )
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(
                "Expected learning_rate of a stage to be positive and finite. "
                f"Received: learning_rate={rate!r}."
            )


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage placed in the epochs of a fit and in the layers of a model.

    Args:
        index: int, from 0.
        stage: the `Stage` as it was written.
        first_epoch: int, its first epoch, counted from 0.
        end_epoch: int or None, the epoch after its last; None if it lasts to the end of `fit`.
        position: int or None, where in `keras_xfer.freezing.units(backbone.model)` training
            begins; None while the backbone is frozen.
    """

    index: int
    stage: Stage
    first_epoch: int
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
    epoch = 0
    for index, stage in enumerate(stages):
        position = None
        if stage.unfreeze is not None:
            try:
                position = freezing.select(
                    backbone.model, stage.unfreeze, batch_norm=backbone.batch_norm, blocks=blocks
                )
            except ValueError as error:
                raise ValueError(f"Stage {index + 1}: {error}") from None
        end = None if stage.epochs is None else epoch + stage.epochs
        place = PlannedStage(index, stage, epoch, end, position)
        _check_against(place, planned[-1] if planned else None)
        planned.append(place)
        epoch = end if end is not None else epoch
    return tuple(planned)


def check(stages: Sequence[Stage]) -> None:
    """What can be said of a schedule without a model; raises TypeError or ValueError."""
    if isinstance(stages, Stage) or not all(isinstance(stage, Stage) for stage in stages):
        raise TypeError(f"Expected a list of keras_xfer.Stage. Received: stages={stages!r}.")
    if not stages:
        raise ValueError("Expected at least one stage. Received: stages=[].")
    for index, stage in enumerate(stages[:-1]):
        if stage.epochs is None:
            raise ValueError(
                f"Expected every stage but the last to say its epochs, or the next one can never "
                f"begin. Received: epochs=None in stage {index + 1} of {len(stages)}."
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
    """The stage that `epoch` (from 0) belongs to; the last one after all of them."""
    return next((p for p in planned if p.end_epoch is None or epoch < p.end_epoch), planned[-1])


# Which stage a model is in, for callbacks that run before StagedUnfreezing has written it to logs.
_current: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


def current_stage(model: Any) -> int | None:
    """The index of the stage that `model` is training in; None outside of a schedule."""
    return _current.get(model)


def set_current_stage(model: Any, index: int | None) -> None:
    """Say which stage `model` is in; None when its schedule has ended."""
    if index is None:
        _current.pop(model, None)
    else:
        _current[model] = index
