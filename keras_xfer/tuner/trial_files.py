"""What a trial leaves on the disk: its best weights, and the state that a later round goes on from.

A backbone that never thawed is the same in all trials: of it nothing is copied and, where it can
be had again by building the model, nothing is written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_xfer.bundle import read_bundle, write_bundle
from keras_xfer.features import digests
from keras_xfer.files import replacing
from keras_xfer.retarget import capture, restore
from keras_xfer.retarget.callback_state import load_state, state_of
from keras_xfer.retarget.random_state import random_state, set_random_state
from keras_xfer.retarget.trainer import build_for_fit, distribution_scope, sync
from keras_xfer.retarget.training_state import as_data, values_of
from keras_xfer.running_fit import callbacks_of_fit, numbered

STATE = "training_state.zip"
WEIGHTS = "best_weights.zip"


def is_checkpoint(callback: Any) -> bool:
    """Whether a callback is the one by which KerasTuner keeps the best epoch of a trial."""
    # keras_tuner 1.4.8 does not publish the class.
    return type(callback).__name__ == "SaveBestEpoch"


def local_oracle(tuner: Any) -> Any:
    """The oracle that a tuner was made with, also in a worker, whose own asks the chief."""
    oracle = tuner.oracle
    # keras_tuner 1.4.8 does not publish what its client stands for.
    return vars(oracle).get("_oracle", oracle)


class BestEpoch(keras.callbacks.Callback):
    """KerasTuner's checkpoint of a trial, but the best epoch is kept in memory and written once.

    By itself the checkpoint writes all weights whenever an epoch is the best so far, which takes
    longer than ten epochs of a cached head (0.3 s for a MobileNetV2).

    Args:
        checkpoint: KerasTuner's `SaveBestEpoch`, which goes on telling which epoch is the best.
        model: the trial's model, before its training begins.
        backbone: the `Backbone` in the model.
        pristine: values of the backbone's variables, as building the model gives them; None: they
            are those of now.
        folder: None, or the folder of the trial, where `WEIGHTS` is written in place of the
            checkpoint: without a backbone that is as it came.
        goes_on: bool, whether the training begins where another trial left it.
    """

    def __init__(
        self,
        checkpoint: Any,
        model: keras.Model,
        backbone: Any,
        pristine: Sequence[np.ndarray] | None,
        folder: Path | None,
        *,
        goes_on: bool,
    ) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._backbone = backbone
        self._pristine = pristine
        self._folder = folder
        # Its values until it thaws.
        self._before: Sequence[np.ndarray] | None = None if goes_on else pristine
        self._has_thawed = False
        self._filepath = ""
        self._best: tuple[list[np.ndarray], Sequence[np.ndarray]] | None = None
        self._blank = _untouched(model)

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002  # Keras's signature
        """Begin with nothing kept."""
        self._checkpoint.set_model(_Recorder(self.model, self._keep))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Look at the backbone as the first epoch finds it."""
        if self._before is None:
            self._before = values_of(self._backbone.variables)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Let the checkpoint tell whether this epoch is the best."""
        self._has_thawed = self._has_thawed or self._backbone.trainable
        self._checkpoint.on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Write the best epoch, if one of these epochs was."""
        if self._best is None:
            return
        own, of_backbone = self._best
        if self._folder is not None:
            values = changes(own, of_backbone, self._pristine)
            write_bundle(self._folder / WEIGHTS, values)
            return
        variables = [*_own(self.model, self._backbone), *self._backbone.variables]
        last, optimizer = values_of(variables), self.model.optimizer
        try:
            _assign(variables, [*own, *of_backbone])
            # That of a model as it is built, so that Keras finds in the file what it expects.
            self.model.optimizer = self._blank
            with replacing(self._filepath) as temporary:
                self.model.save_weights(temporary)
        finally:
            self.model.optimizer = optimizer
            _assign(variables, last)

    def _keep(self, filepath: Any) -> None:
        sync(self.model)
        self._filepath = os.fspath(filepath)
        backbone = values_of(self._backbone.variables) if self._has_thawed else self._before
        self._best = (values_of(_own(self.model, self._backbone)), backbone or [])


def _untouched(model: keras.Model) -> Any:
    """An optimizer as that of `model`, which has not been trained yet."""
    optimizer = model.optimizer
    made = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    if optimizer.built:
        with distribution_scope(model):
            made.build(model.trainable_variables)
    return made


class _Recorder:
    """A model, but for saving."""

    def __init__(self, model: keras.Model, keep: Callable[[Any], None]) -> None:
        self._model = model
        self.save_weights = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Rounds(keras.callbacks.Callback):
    """Takes a training up where another trial left it, and leaves it to a later one.

    Hyperband and the funnel train a model for some epochs, and the best ones for more, in another
    trial, perhaps in another process. All of the training goes over: weights, the optimizer's
    state, what trains, the stage, seeds.

    Args:
        backbone: the `Backbone` in the model.
        pristine: as of `BestEpoch`.
        begin_with: None, or the file that the earlier trial left.
        leave: None, or the file to leave.
    """

    def __init__(
        self,
        backbone: Any,
        pristine: Sequence[np.ndarray] | None,
        *,
        begin_with: Path | None,
        leave: Path | None,
    ) -> None:
        super().__init__()
        self._backbone = backbone
        self._pristine = pristine
        self._begin_with = begin_with
        self._leave = leave

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002  # Keras's signature
        """Go on from the file."""
        if self._begin_with is None:
            return
        build_for_fit(self.model)
        content = read_bundle(self._begin_with)
        _check_backbone(self._backbone, content, self._begin_with)
        state = content["model"]
        now = iter(values_of(self.model.variables))
        state["variables"] = [
            value if then is None else then
            for value, then in zip(now, state["variables"], strict=True)
        ]
        restore(self.model, state)
        for name, callback in self._others():
            if name in content["callbacks"]:
                load_state(callback, content["callbacks"][name])
        set_random_state(content["random"])

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Leave the file."""
        if self._leave is None:
            return
        state = capture(self.model)
        content: dict[str, Any] = {"model": state, "random": random_state()}
        if self._pristine is not None:
            content["came_as"] = digests.of_arrays(self._pristine)
            came = dict(zip(map(id, self._backbone.variables), self._pristine, strict=True))
            state["variables"] = [
                None
                if id(variable) in came and np.array_equal(value, came[id(variable)])
                else value
                for variable, value in zip(self.model.variables, state["variables"], strict=True)
            ]
        content["callbacks"] = {name: as_data(state_of(each)) for name, each in self._others()}
        write_bundle(self._leave, content)

    def _others(self) -> list[tuple[str, Any]]:
        """The callbacks that say what they remember: the schedule, the order of the rows. Keras's
        own begin anew in each trial, as in KerasTuner."""
        return [
            (name, each)
            for name, each in numbered(callbacks_of_fit(self))
            if hasattr(each, "state_dict") and hasattr(each, "load_state_dict")
        ]


def changes(
    own: Sequence[np.ndarray], backbone: Sequence[np.ndarray], pristine: Sequence[Any] | None
) -> dict[str, Any]:
    """What has to be written of a model's values: of the backbone what is not as it came."""
    if pristine is not None:
        backbone = [
            None if np.array_equal(value, came) else value  # type: ignore[misc]  # for Sequence
            for value, came in zip(backbone, pristine, strict=True)
        ]
    told = {} if pristine is None else {"came_as": digests.of_arrays(pristine)}
    return {"own": list(own), "backbone": list(backbone), **told}


def load_weights(model: keras.Model, backbone: Any, folder: Path) -> None:
    """Give a model, as it is built, the weights that `BestEpoch` wrote into a trial's folder.

    Args:
        model: a `keras.Model`.
        backbone: the `Backbone` in it.
        folder: path of the trial's folder.

    Raises:
        FileNotFoundError: the trial has written none.
        ValueError: the file is damaged, or that of another model.
    """
    content: Mapping[str, Any] = read_bundle(folder / WEIGHTS)
    _check_backbone(backbone, content, folder / WEIGHTS)
    _assign(_own(model, backbone), content["own"])
    _assign(backbone.variables, content["backbone"])


def _check_backbone(backbone: Any, content: Mapping[str, Any], path: Path) -> None:
    """Raise if a file leaves out what another backbone than this one has."""
    came_as = content.get("came_as")
    if came_as is not None and digests.of_arrays(values_of(backbone.variables)) != came_as:
        raise ValueError(
            f"Expected the backbone with the weights that it had when {path} was written. Received: "
            "other weights. Seed what makes it at random, and give the weights file of then."
        )


def _own(model: keras.Model, backbone: Any) -> list[Any]:
    """The variables outside of the backbone."""
    inside = set(map(id, backbone.variables))
    return [variable for variable in model.variables if id(variable) not in inside]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            variable.assign(value)
