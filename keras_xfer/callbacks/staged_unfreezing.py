"""`StagedUnfreezing`: a fine-tuning schedule inside one `model.fit`."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import keras

from keras_xfer import freezing
from keras_xfer.freezing import Thawable, find_backbone, parameters
from keras_xfer.monitor import Monitor
from keras_xfer.retarget import capture, restore, retarget
from keras_xfer.retarget.carrying import (
    check_known,
    head_learning_rate_of,
    kind_of,
    learning_rate_of,
    steps_of,
    uses_ema,
)
from keras_xfer.retarget.grouped_optimizer import number
from keras_xfer.retarget.trainer import build_for_fit
from keras_xfer.retarget.training_state import as_data
from keras_xfer.running_fit import callbacks_of_fit, stand_before
from keras_xfer.stages import Stage, planning
from keras_xfer.stages.current import set_current_stage
from keras_xfer.stages.dry_run import plan_table
from keras_xfer.tables import Table

# They read the logs or the rate that a stage sets, so they come after it whatever the list says.
_AFTER = (
    keras.callbacks.CSVLogger,
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.SwapEMAWeights,
    keras.callbacks.TensorBoard,
)


@dataclasses.dataclass
class _Progress:
    """How far a schedule has come."""

    stage: int
    first_epoch: int  # of the stage
    next_epoch: int
    waited: int = 0  # epochs without improvement
    best: float | None = None  # of the stage
    is_over: bool = False  # ended by its patience


@keras.saving.register_keras_serializable(package="keras_xfer")
class StagedUnfreezing(keras.callbacks.Callback):
    """Runs a schedule of stages inside ONE `model.fit`: head first, then more of the backbone.

    The classic recipe stops, sets `trainable`, compiles again and starts a second `fit`, and so
    loses the optimizer's state, the best checkpoint's memory and the history. Here variables that
    already train keep their optimizer untouched; newly thawed ones start with a step count of
    their own. With any Keras optimizer, on TensorFlow, JAX and torch.

    A stage ends after its `epochs`, or after `patience` epochs without improvement of `monitor`
    within the stage; those after it then begin earlier. When the last stage is over, training
    stops. A second `fit` that goes on where the first one ended (`initial_epoch`) goes on in its
    stage; any other begins in the stage that its first epoch belongs to.

    Every epoch it adds to `logs` and so to History: `stage` (from 0), `trainable_params`,
    `learning_rate` (the head's) and `backbone_learning_rate` (that of the lowest thawed block, 0.0
    while the backbone is frozen), both of the epoch's last step; of a schedule that the model was
    compiled with, and no stage has replaced, of the step after it, as Keras reads it.

    Keras's loggers and rate callbacks keep working beside it wherever they stand in the list: they
    run after it. ReduceLROnPlateau and LearningRateScheduler scale all groups until the next stage
    that has a rate of its own.

    Args:
        stages: list of `keras_xfer.Stage`.
        backbone: a `keras_xfer.Backbone` in the model, its name, or None, the only one there is.
            Defaults to `None`.
        monitor: str, the log that `patience` and `restore_best` compare. Defaults to `"val_loss"`.
        mode: `"max"`, `"min"`, or `"auto"`: by the metric that the model was compiled with, else by
            its name. Defaults to `"auto"`.
        min_delta: float >= 0, an improvement is more than this. Defaults to 0.
        restore_best: bool, go back to the best epoch so far, its weights and its optimizer's state,
            before the next stage begins and at the end of `fit`. A copy is kept in memory.
            Defaults to `False`.
        verbose: 0 or 1, whether to print what each stage trains as it begins. Defaults to 0.

    Raises:
        TypeError: `stages` is not a list of stages.
        ValueError: the schedule contradicts itself or, at the start of `fit`, the model; `monitor`
            is needed and not among the logs, or its direction cannot be told.

    Example:

    >>> import numpy as np
    >>> from keras_xfer import Backbone, Stage
    >>> base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model = keras.Sequential([Backbone(base), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> schedule = StagedUnfreezing(
    ...     [Stage(epochs=1, learning_rate=1e-3), Stage("all", epochs=1, learning_rate=1e-4)]
    ... )
    >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    >>> history = model.fit(x, y, epochs=5, callbacks=[schedule], verbose=0).history
    >>> history["stage"], history["trainable_params"]
    ([0, 1], [4, 19])

    Reference:
        https://arxiv.org/abs/1801.06146 (gradual unfreezing)
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        backbone: Thawable | str | None = None,
        monitor: str = "val_loss",
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 0.0,
        restore_best: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        planning.check(stages)
        self.stages: tuple[Stage, ...] | None = tuple(stages)
        # A name, not the layer: callbacks are deep-copied (KerasTuner, for each trial).
        self.backbone = backbone if backbone is None or isinstance(backbone, str) else backbone.name
        self.monitor = monitor
        self.mode = mode
        self.min_delta = float(min_delta)
        self.restore_best = bool(restore_best)
        self.verbose = verbose
        self._gradual: dict[str, Any] | None = None
        self._monitor = Monitor("StagedUnfreezing", monitor, mode, min_delta)
        self._planned: tuple[planning.PlannedStage, ...] = ()
        self._progress: _Progress | None = None
        self._in_force = False  # whether this `fit` has begun its stage
        self._model_seen: Callable[[], Any] = _nothing
        self._optimizer_seen: Callable[[], Any] = _nothing  # the one that the stage was given
        self._swapping: list[keras.callbacks.SwapEMAWeights] = []  # in this `fit`
        self._steps_before = 0
        self._steps_per_epoch: int | None = None
        self._best: float | None = None  # of all stages, with its state
        self._best_epoch: int | None = None
        self._best_state: dict[str, Any] | None = None

    @classmethod
    def gradual(
        cls,
        *,
        learning_rate: Any,
        backbone: Thawable | str | None = None,
        blocks_per_stage: int = 1,
        epochs_per_stage: int | None = 1,
        num_stages: int | None = None,
        layer_decay: float = 1.0,
        warmup_epochs: float = 0,
        patience: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Gradual unfreezing: the head alone, then block after block from the top, of the model
        that the callback meets.

        Args:
            learning_rate: of each stage, as `keras_xfer.Stage` takes it.
            backbone: as of the callback.
            blocks_per_stage: int, how many more blocks each stage thaws. Defaults to 1.
            epochs_per_stage: int, the epochs of each stage, at most with a `patience`; None, only
                with a `patience`. Defaults to 1.
            num_stages: int, how many stages in all, the head's among them; None, until everything
                is thawed. Defaults to `None`.
            layer_decay: as of each `keras_xfer.Stage`.
            warmup_epochs: as of each `keras_xfer.Stage`.
            patience: as of each `keras_xfer.Stage`.
            **kwargs: further arguments of the callback.

        Returns:
            StagedUnfreezing.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: an argument out of its range.

        Example:

        >>> from keras_xfer import Backbone
        >>> backbone = Backbone.from_application("VGG16", weights=None, input_shape=(32, 32, 3))
        >>> model = keras.Sequential([keras.Input((32, 32, 3)), backbone, keras.layers.Dense(2)])
        >>> rates = {"head": 1e-3, "backbone": 1e-4}
        >>> schedule = StagedUnfreezing.gradual(learning_rate=rates, num_stages=3)
        >>> [stage.unfreeze for stage in schedule.stages_for(model)]
        [None, 'block5', 'block4']

        Reference:
            https://arxiv.org/abs/1801.06146
        """
        stage = {
            "learning_rate": learning_rate,
            "layer_decay": layer_decay,
            "warmup_epochs": warmup_epochs,
            "patience": patience,
        }
        # A stage that is never run: it says now what would be wrong with each.
        made = cls([Stage(epochs=epochs_per_stage, **stage)], backbone=backbone, **kwargs)
        planning.check_gradual(
            learning_rate, blocks_per_stage, num_stages, epochs_per_stage, patience
        )
        made.stages = None
        made._gradual = {
            "blocks_per_stage": blocks_per_stage,
            "epochs_per_stage": epochs_per_stage,
            "num_stages": num_stages,
            **stage,
        }
        return made

    def stages_for(self, model: keras.Model) -> list[Stage]:
        """The stages that run in `model`: those given, or those that `gradual` makes for it.

        Args:
            model: a built `keras.Model` with the backbone inside.

        Returns:
            list of `keras_xfer.Stage`, which `keras_xfer.stages.stages_to_yaml` writes.

        Raises:
            ValueError: there is no such backbone in the model.
        """
        if self._gradual is None:
            return list(self.stages or ())
        return planning.gradual(find_backbone(model, self.backbone), **self._gradual)

    def plan(self, model: keras.Model) -> Table:
        """The dry run: what each stage trains in `model`, at which rate, for how long.

        Args:
            model: a built `keras.Model` with the backbone inside; it is left as it was.

        Returns:
            A table that prints itself, one row a stage: its epochs (from 1), the blocks and layers
            of the backbone that train, all parameters and those that train, what
            BatchNormalization does, and the rate of each group.

        Raises:
            ValueError: the schedule contradicts the model.

        Example:

        >>> from keras_xfer import Backbone
        >>> base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
        >>> model = keras.Sequential([keras.Input((4,)), Backbone(base), keras.layers.Dense(1)])
        >>> schedule = StagedUnfreezing([Stage(epochs=2), Stage("all", learning_rate=1e-4)])
        >>> print(schedule.plan(model))
        stage  epochs  unfreeze  blocks  layers  parameters  trainable  batch_norm  learning_rate
        1      1 to 2  -         0 of 1  0 of 1          19          4  -           as before
        2      from 3  all       1 of 1  1 of 1          19         19  -           0.0001
        """
        backbone = find_backbone(model, self.backbone)
        return plan_table(planning.resolve(self.stages_for(model), backbone), model, backbone)

    def get_config(self) -> dict[str, Any]:
        """The configuration, stages as plain data."""
        return {
            "stages": None if self.stages is None else [each.get_config() for each in self.stages],
            "gradual": self._gradual
            and {
                **self._gradual,
                **Stage(learning_rate=self._gradual["learning_rate"]).get_config(),
            },
            "backbone": self.backbone,
            "monitor": self.monitor,
            "mode": self.mode,
            "min_delta": self.min_delta,
            "restore_best": self.restore_best,
            "verbose": self.verbose,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A callback from `get_config`."""
        config = dict(config)
        given, gradual = config.pop("stages"), config.pop("gradual")
        if gradual is None:
            return cls([Stage.from_config(each) for each in given], **config)
        gradual = dict(gradual)
        gradual.pop("unfreeze")
        stage = Stage.from_config({"learning_rate": gradual["learning_rate"]})
        return cls.gradual(**{**gradual, "learning_rate": stage.learning_rate}, **config)

    # --- The hooks ---------------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Place the schedule in the model, before anything trains."""
        check_known(self.model.optimizer)
        build_for_fit(self.model)
        stand_before(self, _AFTER)
        self._swapping = [
            each
            for each in callbacks_of_fit(self)
            if isinstance(each, keras.callbacks.SwapEMAWeights)
        ]
        backbone = find_backbone(self.model, self.backbone)
        self._planned = planning.resolve(self.stages_for(self.model), backbone)
        if getattr(self.model, "history", None) is not None:  # for plots: logs hold numbers alone
            self.model.history.stage_names = [
                place.stage.name or f"stage {place.index + 1}" for place in self._planned
            ]
        if self._needs_monitor():
            self._monitor.begin(self.model)
        if self._model_seen() is not self.model:
            self._forget()
            self._model_seen = weakref.ref(self.model)
            self._steps_per_epoch = None
        self._in_force = False
        # Of data of unknown length, what the last epoch had.
        self._steps_per_epoch = self._told_steps() or self._steps_per_epoch

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin the stage that `epoch` belongs to, if it is another."""
        progress = self._progress
        self._steps_per_epoch = self._told_steps() or self._steps_per_epoch
        if progress is None or progress.next_epoch != epoch:
            self._begin_at(epoch)
        elif self._is_over(progress):
            self._begin_next(progress)
        elif not self._in_force and self._optimizer_seen() is not self.model.optimizer:
            self._begin_afresh(progress)
        elif not self._in_force:
            self._begin(progress)
        self._in_force = True
        self._steps_before = self._steps()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Note that the epoch has had a validation."""
        self._monitor.validated()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Say what trained, look whether it improved, and stop after the last stage."""
        progress = self._progress
        assert progress is not None  # noqa: S101  # on_epoch_begin has run
        progress.next_epoch = epoch + 1
        if self._told_steps() is None:
            self._steps_per_epoch = self._steps() - self._steps_before
        if logs is not None:
            self._add_logs(logs, self._planned[progress.stage])
        if self._needs_monitor():
            self._compare(progress, self._monitor.value(self.model, logs or {}), epoch)
        if progress.stage + 1 == len(self._planned) and self._is_over(progress):
            self.model.stop_training = True
            # SwapEMAWeights keeps the averages after what it takes for the last epoch only.
            for each in self._swapping:
                each.params = {**each.params, "epochs": epoch + 1}

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Go back to the best epoch, if asked to."""
        if self.restore_best and self._progress is not None:
            if self._go_back(self._progress):
                self._optimizer_seen = _nothing  # a `fit` that goes on sets the rates again
            if uses_ema(self.model.optimizer):  # `fit` has put the averages in before this
                self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        self._swapping = []
        set_current_stage(self.model, None)

    def stage_at(self, epoch: int) -> planning.PlannedStage:
        """Within a `fit`, the stage that `epoch` (from 0) will be in, by what is known now.

        Args:
            epoch: int, the next epoch, or any that it may begin with.

        Returns:
            A `keras_xfer.stages.planning.PlannedStage`; the last stage after the schedule's end.
        """
        progress = self._progress
        if progress is None or progress.next_epoch != epoch:
            return planning.stage_at(self._planned, epoch)
        over = self._is_over(progress) and progress.stage + 1 < len(self._planned)
        return self._planned[progress.stage + over]

    # --- Resuming ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule has come, for `keras_xfer.callbacks.BackupAndRestore`."""
        return {
            "told": self._told(),
            "optimizer": kind_of(self.model.optimizer),
            "progress": None if self._progress is None else dataclasses.asdict(self._progress),
            "steps_per_epoch": self._steps_per_epoch,
            "best": self._best,
            "best_epoch": self._best_epoch,
            "best_state": as_data(self._best_state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` said. Under another schedule only the epoch counts."""
        self._forget()
        if self.differences(state):
            return
        self._progress = None if state["progress"] is None else _Progress(**state["progress"])
        self._steps_per_epoch = self._told_steps() or state["steps_per_epoch"]
        self._best, self._best_epoch = state["best"], state["best_epoch"]
        self._best_state = state["best_state"]
        if kind_of(self.model.optimizer) == state["optimizer"]:  # else it has come through no stage
            self._optimizer_seen = weakref.ref(self.model.optimizer)

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """In words, how this schedule is another than the one that `state` comes from."""
        then, now = state["told"], self._told()
        found = [
            f"{name} was {then.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if name != "stages" and then.get(name) != value
        ]
        old, new = then["stages"], now["stages"]
        if len(old) != len(new):
            found.append(f"the schedule had {len(old)} stages and has {len(new)}")
        for index, (one, other) in enumerate(zip(old, new, strict=False)):
            # Layers may be numbered otherwise: what is thawed counts, not what it is called.
            names = {*one, *other} - {"position"}
            if one["position"] == other["position"]:
                names -= {"unfreeze", "name"}
            found += [
                f"{name} of stage {index + 1} was {one.get(name)!r} and is {other.get(name)!r}"
                for name in sorted(names)
                if one.get(name) != other.get(name)
            ]
        return found

    def _told(self) -> dict[str, Any]:
        """The schedule as plain data."""
        return {
            "stages": [
                {**_read_back(place.stage), "position": place.position} for place in self._planned
            ],
            "monitor": self.monitor,
            "mode": self.mode,
            "min_delta": self.min_delta,
            "restore_best": self.restore_best,
        }

    # --- Stages ------------------------------------------------------------------------------

    def _needs_monitor(self) -> bool:
        return self.restore_best or any(place.stage.patience for place in self._planned)

    def _forget(self) -> None:
        self._progress = self._best = self._best_epoch = self._best_state = None
        self._optimizer_seen = _nothing

    def _begin_at(self, epoch: int) -> None:
        """Begin in the stage that `epoch` belongs to if none ends early."""
        planned = planning.stage_at(self._planned, epoch)
        if planned.end_epoch is not None and epoch >= planned.end_epoch:
            raise ValueError(
                f"Expected an epoch of the schedule, which has {planned.end_epoch}. Received: "
                f"epoch={epoch} (from 0) to begin with. Give the last stage more epochs, or None."
            )
        self._forget()
        first_epoch = epoch if planned.first_epoch is None else planned.first_epoch
        self._progress = _Progress(planned.index, first_epoch, epoch)
        self._begin_afresh(self._progress)

    def _begin_afresh(self, progress: _Progress) -> None:
        """Begin in a stage with an optimizer that has not come through the schedule: what would be
        in force by now is the rate of the last stage that has one."""
        epochs_before = progress.next_epoch - progress.first_epoch
        for planned in reversed(self._planned[: progress.stage + 1]):
            if planned.stage.learning_rate is not None:
                self._begin(progress, rates_of=planned.stage, epochs_before=epochs_before)
                return
            if planned.index:
                epochs_before += self._planned[planned.index - 1].stage.epochs or 0
        self._begin(progress)

    def _is_over(self, progress: _Progress) -> bool:
        epochs = self._planned[progress.stage].stage.epochs
        lasted = progress.next_epoch - progress.first_epoch
        return progress.is_over or (epochs is not None and lasted >= epochs)

    def _begin_next(self, progress: _Progress) -> None:
        epoch = progress.next_epoch
        if progress.stage + 1 == len(self._planned):
            raise ValueError(
                f"Expected an epoch of the schedule, which ended after {epoch}. Received: "
                f"epoch={epoch} (from 0) to begin with. Give the last stage more epochs, or None."
            )
        # At an epoch's end SwapEMAWeights puts the averages into the model; back, before anything
        # else is put there. It does so once, so that its own turn then changes nothing.
        for each in self._swapping:
            each.on_epoch_begin(epoch)
        is_of_another_stage = self.restore_best and self._go_back(progress)
        self._progress = _Progress(progress.stage + 1, epoch, epoch)
        if is_of_another_stage:
            self._begin_afresh(self._progress)
        else:
            self._begin(self._progress, rates_of=self._planned[progress.stage + 1].stage)

    def _begin(
        self, progress: _Progress, *, rates_of: Stage | None = None, epochs_before: int = 0
    ) -> None:
        """Let the model train what the stage says.

        `rates_of`: the stage whose rates it gets; None keeps what is in force.
        `epochs_before`: how many epochs of it are over, for rates that change in it.
        """
        planned = self._planned[progress.stage]
        backbone = find_backbone(self.model, self.backbone)
        groups = None
        if rates_of is not None:
            groups = planning.group_rates(
                rates_of, self.model, backbone, steps_per_epoch=self._steps_per_epoch
            )
        rates = None
        if groups is not None:
            before = self._steps_of(epochs_before, groups)
            rates = [(each.variables, each.rate.beginning_at(-before)) for each in groups]
        retarget(
            self.model, lambda: planning.begin_stage(planned.stage, backbone), learning_rate=rates
        )
        self._optimizer_seen = weakref.ref(self.model.optimizer)
        set_current_stage(self.model, planned.index)
        if self.verbose:
            unfreeze = planned.stage.unfreeze
            what = "the head" if unfreeze is None else f"unfreeze={unfreeze!r}"
            print(  # noqa: T201  # what verbose asks for, as Keras's own callbacks do
                f"\nEpoch {progress.next_epoch + 1}: {planned.label} of {len(self._planned)} "
                f"trains {what}, {parameters([self.model], trainable_only=True):,} parameters "
                f"at learning rate {number(self.model.optimizer.learning_rate):.3g}"
            )

    def _steps_of(self, epochs: int, groups: Sequence[planning.RateGroup]) -> int:
        """How many steps of changing rates `epochs` had that ran without this callback."""
        if not epochs or all(group.rate.is_constant for group in groups):
            return 0
        if self._steps_per_epoch is None:
            raise ValueError(
                "Expected a known number of steps an epoch to go on in the middle of a stage whose "
                "learning rate changes from step to step: pass steps_per_epoch to fit. Received: "
                f"data of unknown length, {epochs} epochs into the stage."
            )
        return epochs * self._steps_per_epoch

    def _compare(self, progress: _Progress, value: float | None, epoch: int) -> None:
        """Count the epochs without improvement, and keep the best."""
        if value is None:  # an epoch without validation
            return
        if self._monitor.is_better(value, than=progress.best):
            progress.best, progress.waited = value, 0
        else:
            progress.waited += 1
        patience = self._planned[progress.stage].stage.patience
        progress.is_over = patience is not None and progress.waited >= patience
        if self.restore_best and self._monitor.is_better(value, than=self._best):
            self._best, self._best_epoch = value, epoch
            self._best_state = None  # the old copy makes room for the new one
            self._best_state = capture(self.model, live_rates=True)

    def _go_back(self, progress: _Progress) -> bool:
        """Restore the best epoch, unless it was the last; say whether that went back to an earlier
        stage, with its rates."""
        last_epoch = progress.next_epoch - 1
        if self._best_state is None or self._best_epoch is None or self._best_epoch == last_epoch:
            return False
        restore(self.model, self._best_state)
        if self.verbose:
            print(  # noqa: T201  # as above
                f"\nBack to epoch {self._best_epoch + 1}, the best so far: "
                f"{self.monitor} = {self._best:.5g}"
            )
        return self._best_epoch < progress.first_epoch

    def _add_logs(self, logs: dict[str, Any], planned: planning.PlannedStage) -> None:
        optimizer = self.model.optimizer
        logs["stage"] = planned.index
        logs["trainable_params"] = parameters([self.model], trainable_only=True)
        logs["learning_rate"] = head_learning_rate_of(optimizer)
        logs["backbone_learning_rate"] = 0.0
        if planned.position is not None:
            lowest = freezing.lowest_trainable(find_backbone(self.model, self.backbone).model)
            logs["backbone_learning_rate"] = learning_rate_of(optimizer, lowest)

    def _told_steps(self) -> int | None:
        """The steps of an epoch, if `fit` knows them."""
        return (self.params or {}).get("steps")

    def _steps(self) -> int:
        return steps_of(self.model.optimizer)


def _read_back(stage: Stage) -> dict[str, Any]:
    """The configuration of `stage`, which another process could read."""
    try:
        config = stage.get_config()
        Stage.from_config(config)
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            "Expected learning rate schedules that can be saved. Received: learning_rate="
            f"{stage.learning_rate!r}: {error}. Give its class get_config, and register it with "
            "keras.saving.register_keras_serializable."
        ) from error
    return config


def _nothing() -> None:
    """What a weak reference to nothing answers."""
