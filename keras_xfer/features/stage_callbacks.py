"""The callbacks of a training that is one to them, and several `fit` calls to Keras."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.retarget.random_state import random_state, set_random_state
from keras_xfer.retarget.stand_in import StandIn


class StageCallbacks(keras.callbacks.CallbackList):
    """Callbacks of `model`, which the `fit` of its stand-ins drive one after the other.

    Their training begins with `begin` and ends with `end`; that of each stage they do not see. A
    `fit` ends where its stage does.

    Attributes:
        next_epoch: int, the epoch after the last that has ended.
        stage_is_over: bool, whether the last `fit` ended for its stage, and another one follows.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        model: keras.Model,
        schedule: StagedUnfreezing,
        *,
        epochs: int,
        verbose: Any,
        steps: int | None,
        boundaries: list[Any],
    ) -> None:
        super().__init__(
            list(callbacks),
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=steps,
            boundaries=boundaries,
        )
        self.next_epoch = 0
        self.stage_is_over = False
        self._schedule = schedule
        self._stand_in: StandIn | None = None
        self._index = 0
        self._last_logs: Any = None
        self._stops_at_once = False
        self._random: Any = None

    def begin(self) -> None:
        """Begin the training."""
        self.model.stop_training = False
        super().on_train_begin()
        self._stops_at_once = bool(self.model.stop_training)
        self._random = random_state()

    def end(self) -> None:
        """End the training."""
        super().on_train_end(self._last_logs)

    def stage(self, stand_in: StandIn, index: int, steps: int | None) -> None:
        """Prepare for the `fit` of `stand_in`, which is of the stage `index`."""
        self._stand_in, self._index = stand_in, index
        self.stage_is_over = False
        if steps is not None:
            self.set_params({**self.params, "steps": steps})

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002  # Keras's signature
        """A stage's `fit` begins, which is not the training, and has forgotten a wish to stop."""
        if self._stops_at_once and self._stand_in is not None:
            self._stand_in.stop_training = True
        # What is drawn to compute features and to begin a `fit` is not drawn where they are found,
        # as in a run that goes on from its backup.
        set_random_state(self._random)

    def on_train_end(self, logs: Any = None) -> None:
        """A stage's `fit` ends, which is not the training."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell the callbacks, and end the `fit` where the next epoch is one of another stage."""
        super().on_epoch_end(epoch, logs)
        self.next_epoch = epoch + 1
        self._last_logs = logs
        stand_in = self._stand_in
        assert stand_in is not None  # noqa: S101  # its fit is running
        if self.next_epoch < self.params["epochs"] and not stand_in.stop_training:
            self.stage_is_over = self._schedule.stage_at(self.next_epoch).index != self._index
            stand_in.stop_training = self.stage_is_over
        self._random = random_state()
        if stand_in.stop_training or self.next_epoch == self.params["epochs"]:
            stand_in.end()
