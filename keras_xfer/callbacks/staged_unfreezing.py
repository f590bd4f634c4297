"""`StagedUnfreezing`: a fine-tuning schedule inside one `model.fit`."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_xfer.freezing import Thawable, find_backbone, parameters
from keras_xfer.retarget import retarget
from keras_xfer.stages import (
    PlannedStage,
    Stage,
    check,
    resolve,
    set_current_stage,
    stage_at,
)


class StagedUnfreezing(keras.callbacks.Callback):
    """Runs a schedule of stages inside ONE `model.fit`: head first, then more of the backbone.

    The classic recipe stops, sets `trainable`, compiles again and starts a second `fit`, and so
    loses the optimizer's state, the best checkpoint's memory and the history. Here variables that
    already train keep their optimizer untouched; newly thawed ones start with a step count of
    their own. With any Keras optimizer, on TensorFlow, JAX and torch.

    Every epoch it adds to `logs` and so to History: `stage` (from 0), `trainable_params`,
    `learning_rate` and `backbone_learning_rate` (0.0 while the backbone is frozen). When the last
    stage's `epochs` are over, training stops. Which stage an epoch belongs to follows from its
    number alone, so `initial_epoch` goes on in the right one.

    Args:
        stages: list of `keras_xfer.Stage`.
        backbone: a `keras_xfer.Backbone` in the model, its name, or None, the only one there is.
            Defaults to `None`.
        verbose: 0 or 1, whether to print what each stage trains as it begins. Defaults to 0.

    Raises:
        TypeError: `stages` is not a list of stages.
        ValueError: the schedule contradicts itself or, at the start of `fit`, the model.

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
        verbose: int = 0,
    ) -> None:
        super().__init__()
        check(stages)
        self.stages = tuple(stages)
        # A name, not the layer: callbacks are deep-copied (KerasTuner, for each trial).
        self.backbone = backbone if backbone is None or isinstance(backbone, str) else backbone.name
        self.verbose = verbose
        self._planned: tuple[PlannedStage, ...] = ()
        self._running: PlannedStage | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Place the schedule in the model, before anything trains."""
        self._planned = resolve(self.stages, find_backbone(self.model, self.backbone))
        self._running = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin the stage that `epoch` belongs to, if it is another."""
        planned = stage_at(self._planned, epoch)
        if planned.end_epoch is not None and epoch >= planned.end_epoch:
            raise ValueError(
                f"Expected an epoch of the schedule, which has {planned.end_epoch}. Received: "
                f"epoch={epoch} (from 0) to begin with. Give the last stage more epochs, or None."
            )
        if planned is not self._running:
            self._begin(planned)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Say what trained, and stop after the last stage."""
        planned = self._running
        assert planned is not None  # noqa: S101  # on_epoch_begin has run
        if logs is not None:
            rate = float(self.model.optimizer.learning_rate)
            logs["stage"] = planned.index
            logs["trainable_params"] = parameters([self.model], trainable_only=True)
            logs["learning_rate"] = rate
            logs["backbone_learning_rate"] = 0.0 if planned.position is None else rate
        if planned is self._planned[-1] and epoch + 1 == planned.end_epoch:
            self.model.stop_training = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Forget the stage: a later `fit` begins again by its epoch."""
        self._running = None
        set_current_stage(self.model, None)

    def _begin(self, planned: PlannedStage) -> None:
        backbone = find_backbone(self.model, self.backbone)
        stage = planned.stage

        def change() -> None:
            if stage.unfreeze is None:
                backbone.freeze()
            else:
                backbone.unfreeze(stage.unfreeze)

        retarget(self.model, change, learning_rate=stage.learning_rate)
        self._running = planned
        set_current_stage(self.model, planned.index)
        if self.verbose:
            what = "the head" if stage.unfreeze is None else f"unfreeze={stage.unfreeze!r}"
            print(  # noqa: T201  # what verbose asks for, as Keras's own callbacks do
                f"\nEpoch {planned.first_epoch + 1}: {planned.label} of {len(self._planned)} "
                f"trains {what}, {parameters([self.model], trainable_only=True):,} parameters "
                f"at learning rate {float(self.model.optimizer.learning_rate):.3g}"
            )
