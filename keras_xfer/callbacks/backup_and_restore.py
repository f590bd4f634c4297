"""`BackupAndRestore`: a training that goes on, after it was killed, as if it had not been."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from keras_xfer import retarget, structure
from keras_xfer.bundle import read_bundle, write_bundle
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.files import check_writable, remove_leftovers
from keras_xfer.retarget.callback_state import load_state, state_of
from keras_xfer.retarget.carrying import check_known
from keras_xfer.retarget.random_state import random_state, set_random_state
from keras_xfer.retarget.trainer import begin_at, build_for_fit, is_chief
from keras_xfer.retarget.training_state import as_data, compiled_rate, optimizer_differences
from keras_xfer.running_fit import callbacks_of_fit, numbered, stands_last

_FILE = "training_state.zip"
_PARTS = {"epoch", "is_over", "structure", "compiled_rate", "model", "callbacks", "random"}


class BackupError(ValueError):
    """What was found is no backup, or not that of this training."""


@keras.saving.register_keras_serializable(package="keras_xfer")
class BackupAndRestore(keras.callbacks.Callback):
    """Saves the whole state of a training at the end of each epoch, and goes on from it.

    Keras's own by name and purpose, but complete and safe. A run that is killed at any moment, also
    during a save, and started again by the same command goes on at the epoch that was cut off: with
    the weights, the optimizer's state by the variable that it belongs to, what trains, the stage
    and rates of `StagedUnfreezing`, the History, the state of Keras's own callbacks and of every
    callback that offers `state_dict` and `load_state_dict`, and the seed generators. A run that
    stopped early stays stopped.

    On the same machine the result is that of the run that was never interrupted, if the data of an
    epoch depend on the seed and the epoch alone: see `next_epoch`. (Data from tf.data that are
    shuffled anew in each epoch begin with their first order in each process.)

    It acts after all other callbacks wherever it stands in the list. All is in one file,
    `training_state.zip` in `backup_dir`, which is replaced when the next one is complete. The file
    is plain data, nothing of it is executed.

    Args:
        backup_dir: str or path, a folder for this run alone. It is created.
        save_freq: `"epoch"`. Nothing else: `fit` cannot begin within an epoch.
        delete_checkpoint: bool, whether to delete the backup when `fit` has come to its end. Keep it
            where what follows `fit` must survive a kill too. Defaults to `True`.
        accept_changes: bool, whether to go on under another schedule or another optimizer than the
            backup was made with; what does not fit begins afresh. Defaults to `False`: an error
            that names the differences.
        verbose: 0 or 1, whether to print what is restored. Defaults to 0.

    Attributes:
        filepath: `pathlib.Path` of the backup.
        next_epoch: int from 0, the epoch at which a `fit` would begin: 0 without a backup.

    Raises:
        ValueError: `save_freq` is something else.
        BackupError: (a ValueError) at the start of `fit`, the backup is damaged, or is that of another
            model, schedule or optimizer, or the model cannot be built.
        OSError: the backup cannot be written (at the start of `fit`, before any training).
        TypeError: the `state_dict` of a callback holds something else than plain data and arrays.

    Example:

    >>> import tempfile, numpy as np
    >>> def train(epochs):
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    ...     model.compile("adam", "mse")
    ...     backup = BackupAndRestore(folder, delete_checkpoint=False)
    ...     x, y = np.ones((8, 2)), np.zeros((8, 1))
    ...     return model.fit(x, y, epochs=epochs, verbose=0, callbacks=[backup])
    >>> folder = tempfile.mkdtemp()
    >>> first = train(epochs=2)
    >>> second = train(epochs=5)  # in another process, say
    >>> second.epoch, second.history["loss"][:2] == first.history["loss"]
    ([0, 1, 2, 3, 4], True)

    Reference:
        https://keras.io/api/callbacks/backup_and_restore/
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        *,
        save_freq: str = "epoch",
        delete_checkpoint: bool = True,
        accept_changes: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        if not os.fspath(backup_dir):
            raise ValueError("Expected the path of a folder. Received: backup_dir=''.")
        if save_freq != "epoch":
            raise ValueError(
                "Expected save_freq='epoch': a fit can only begin at the beginning of an epoch, so "
                "a backup within one would be of no use. Received: "
                f"save_freq={save_freq!r}. For shorter epochs pass steps_per_epoch to fit."
            )
        self.backup_dir = os.fspath(backup_dir)
        self.save_freq = save_freq
        self.delete_checkpoint = bool(delete_checkpoint)
        self.accept_changes = bool(accept_changes)
        self.verbose = verbose
        self._callbacks: list[Any] = []  # of the running `fit`
        self._compiled_rate: Any = None

    @property
    def filepath(self) -> Path:
        """The file that the state is kept in."""
        return Path(self.backup_dir).expanduser().absolute() / _FILE

    @property
    def next_epoch(self) -> int:
        """The epoch, from 0, at which a `fit` with this callback begins."""
        return self._read(arrays=False)["epoch"] + 1 if self.filepath.exists() else 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not stands_last(self):
            return  # until all others have begun, whose state would be reset by it
        check_known(self.model.optimizer)
        self._callbacks = callbacks_of_fit(self)
        self._compiled_rate = compiled_rate(self.model)
        self._states()  # what cannot be saved is told now, and not after an epoch
        self.filepath.parent.mkdir(parents=True, exist_ok=True)
        if is_chief(self.model):
            check_writable(self.filepath)
            remove_leftovers(self.filepath)
        if self.filepath.exists():
            self._restore(self._read())

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        begin_at(self.model, None)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not is_chief(self.model):
            return
        content = {
            "epoch": int(epoch),
            "is_over": bool(self.model.stop_training),
            "structure": structure.structure(self.model),
            "compiled_rate": self._compiled_rate,
            "model": retarget.capture(self.model),
            "callbacks": self._states(),
            "random": random_state(),
        }
        write_bundle(self.filepath, content)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        begin_at(self.model, None)
        self._callbacks = []
        if self.delete_checkpoint and is_chief(self.model):
            self.delete()

    def delete(self) -> None:
        """Delete the backup, and its folder if that is empty then."""
        self.filepath.unlink(missing_ok=True)
        remove_leftovers(self.filepath)
        if self.filepath.parent.is_dir() and not any(self.filepath.parent.iterdir()):
            self.filepath.parent.rmdir()

    def get_config(self) -> dict[str, Any]:
        return {
            "backup_dir": self.backup_dir,
            "save_freq": self.save_freq,
            "delete_checkpoint": self.delete_checkpoint,
            "accept_changes": self.accept_changes,
            "verbose": self.verbose,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BackupAndRestore":
        return cls(**config)

    def _others(self) -> Iterator[tuple[str, Any]]:
        """The other callbacks of this `fit`, by their class and their number among those of it."""
        return numbered(callback for callback in self._callbacks if callback is not self)

    def _states(self) -> dict[str, Any]:
        """The states of the other callbacks."""
        states = {name: state_of(callback) for name, callback in self._others()}
        return {name: as_data(state) for name, state in states.items() if state is not None}

    def _read(self, *, arrays: bool = True) -> dict[str, Any]:
        try:
            content = read_bundle(self.filepath, arrays=arrays)
            if missing := _PARTS - content.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return content
        except ValueError as error:
            raise BackupError(
                f"Expected a backup that BackupAndRestore wrote in {self.filepath}. Received: a file "
                f"that is damaged or something else's ({error}). Put back a good copy of it, or "
                "delete it to begin from the first epoch."
            ) from None

    def _restore(self, content: Mapping[str, Any]) -> None:
        build_for_fit(self.model)
        if not self.model.built:
            raise BackupError(
                f"Expected a built model to restore {self.filepath} into. Received: model="
                f"{self.model.name!r}, whose weights do not exist yet: begin it with keras.Input."
            )
        changed = self._check(content)
        if self._compiled_rate is None:  # the same model goes on: `compile` was not called again
            self._compiled_rate = content["compiled_rate"]
        retarget.restore(self.model, content["model"])
        states = content["callbacks"]
        for name, callback in self._others():
            if name in states:
                load_state(callback, states[name])
        set_random_state(content["random"])
        epoch = content["epoch"] + 1
        # A run that was over has no more epochs, whatever `fit` was told, unless another one goes on.
        is_over = content["is_over"] and not changed
        begin_at(self.model, max(epoch, self.params["epochs"]) if is_over else epoch)
        if self.verbose:
            print(  # noqa: T201  # what verbose asks for, as Keras's own callbacks do
                f"\nGoing on after epoch {epoch} from {self.filepath}"
            )

    def _check(self, content: Mapping[str, Any]) -> bool:
        """Raise if the backup is that of another training; say whether one is that was accepted."""
        mend = f"Choose another backup_dir, or delete {self.filepath} to begin from the first epoch"
        models = structure.differences(content["structure"], structure.structure(self.model))
        if models:
            raise BackupError(
                "Expected the model that the backup was made of. Received: another one; then and "
                f"now it has {'; '.join(models)}. {mend}."
            )
        found = optimizer_differences(self.model, content["model"])
        then, now = content["compiled_rate"], self._compiled_rate
        if None not in (now, then) and now != then:
            found.append(f"the learning rate of compile was {then!r} and is {now!r}")
        schedules = {n: each for n, each in self._others() if isinstance(each, StagedUnfreezing)}
        for name, schedule in schedules.items():
            if name in content["callbacks"]:
                found += schedule.differences(content["callbacks"][name])
            else:
                found.append("there was no StagedUnfreezing")
        found += [
            "there is no StagedUnfreezing any more"
            for name in content["callbacks"]
            if name.startswith("StagedUnfreezing ") and name not in schedules
        ]
        if found and not self.accept_changes:
            raise BackupError(
                f"Expected the schedule and the optimizer that the backup was made with. Received: "
                f"{'; '.join(found)}. {mend}, or pass accept_changes=True to go on all the same."
            )
        return bool(found)
