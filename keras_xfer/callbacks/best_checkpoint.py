"""BestCheckpoint: the best model of a run in one file, over stages, `fit` calls, restarts and kills."""

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import keras

from keras_xfer.files import (
    check_writable,
    remove_leftovers,
    replacing_all,
    sha256,
    temporaries,
    to_json,
)
from keras_xfer.monitor import Monitor, as_float
from keras_xfer.stages.current import current_stage, set_current_stage
from keras_xfer.structure import structure

_RECORD_FORMAT = 1


@keras.saving.register_keras_serializable(package="keras_xfer")
class BestCheckpoint(keras.callbacks.Callback):
    """Keeps the best model of a run, over stages, over several `fit` calls and over restarts.

    Use it in place of `keras.callbacks.ModelCheckpoint(save_best_only=True)` wherever a run may be
    interrupted, or is made of several `fit` calls: ModelCheckpoint forgets its best in a new
    process and lets a worse model overwrite the file, writes in place, and keeps a first NaN for
    ever. Here `filepath` always loads, whenever the process is killed.

    Beside the model, `<filepath>.json` holds `monitor`, `mode`, `best`, `epoch` (from 0), `stage`
    (None without a schedule), `logs` (every log of that epoch that is a number, as floats), the
    `structure` of the model and the `sha256` of the model file. Both files are complete before
    either is replaced; a process that is killed between the two replacements is made good at the
    next start.

    A run that goes on from a backup of its whole state, `state_dict` among it, needs no `resume`:
    the file must then be the one that this run wrote, up to one epoch after the backup.

    Only finite values can be best. Of equal values the earlier one stays.

    Args:
        filepath: str or path, ends in `.keras`, or in `.weights.h5` with `save_weights_only=True`.
            One file, not a pattern. Its folder is created.
        monitor: str, the log to compare, with `val_` for that of the validation data.
        mode: `"max"`, `"min"`, or `"auto"`: by the metric that the model was compiled with, else by
            its name.
        min_delta: float >= 0, a value must be better by more than this.
        save_weights_only: bool, `model.save_weights` in place of `model.save`.
        restore_best_weights: bool, at the end of `fit` give the model the weights in `filepath`,
            also where they come from an earlier `fit` or process. The optimizer keeps its state,
            since its variables may by then be those of another stage.
        resume: bool, go on from what `filepath` holds. It must have been written for the same
            monitor, mode and structure. With False the first model that is any good replaces it;
            later `fit` calls of the same callback with the same model still go on.
        verbose: 0 or 1, print what is saved, resumed and restored.

    Attributes:
        best: float, or None as long as there is none.
        best_epoch: int from 0, or None.
        best_logs: dict of floats, or None.

    Raises:
        ValueError: an argument is wrong; `monitor` is not among the logs; its direction cannot be
            told; with `resume=True`, what is at `filepath` belongs to something else; with a loaded
            state, what is there is gone or not of that run.
        OSError: `filepath` cannot be written (at the start of `fit`, before any training), or a
            save has failed. The files and `best` are then those of the last save that succeeded.

    Example:
    >>> import tempfile, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 2)), np.zeros((8, 1))
    >>> filepath = tempfile.mkdtemp() + "/best.keras"
    >>> best = BestCheckpoint(filepath, monitor="val_loss")
    >>> _ = model.fit(x, y, validation_data=(x, y), epochs=3, verbose=0, callbacks=[best])
    >>> loaded = keras.models.load_model(filepath)
    >>> bool(np.isclose(loaded.evaluate(x, y, verbose=0), best.best))
    True

    Reference:
        https://keras.io/api/callbacks/model_checkpoint/
        https://github.com/keras-team/keras/issues/17012
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_accuracy",
        *,
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 0.0,
        save_weights_only: bool = False,
        restore_best_weights: bool = False,
        resume: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        _check_filepath(filepath, save_weights_only)
        self.filepath = os.fspath(filepath)
        self.monitor = monitor
        self.mode = mode
        self.min_delta = float(min_delta)
        self.save_weights_only = bool(save_weights_only)
        self.restore_best_weights = bool(restore_best_weights)
        self.resume = bool(resume)
        self.verbose = verbose
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.best_logs: dict[str, float] | None = None
        self._path = Path(self.filepath).expanduser().absolute()
        self._record_path = Path(f"{self._path}.json")
        self._monitor = Monitor("BestCheckpoint", monitor, mode, min_delta)
        self._model_of_best: Any = None
        self._begun = False
        self._loaded = False
        self._ahead: dict[str, Any] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._begun = False
        set_current_stage(self.model, None)  # of a `fit` that was interrupted
        self._prepare_files()
        self._monitor.begin(self.model)
        if self.model.built and self._monitor.direction:
            self._begin()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # TensorFlow builds metrics, and models without an Input, in the first step.
        if batch > 0 and not self._begun:
            self._begin()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self._monitor.validated()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        if not self._begun:
            self._begin()
        value = self._monitor.value(self.model, logs)
        if value is None:
            return
        if self._monitor.is_better(value, than=self.best):
            self._save(value, epoch, logs)
        else:
            wanted = "finite" if self.best is None else f"better than {self.best:.5g}"
            self._say(f"Epoch {epoch + 1}: {self.monitor} = {value:.5g} is not {wanted}")
            if self._ahead and epoch >= self._ahead["epoch"]:
                # Run again, this epoch came out worse: what its first run saved is still the best.
                self._take(self._ahead)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._monitor.seen is False and self.best is None:
            raise ValueError(
                f"BestCheckpoint has saved nothing: {self.monitor!r} was not logged in any epoch. "
                f"Received: monitor={self.monitor!r}. Lower validation_freq, pass validation_data "
                "to fit, or monitor a log of the training data. The trained model is unharmed: "
                "catch this error and save it."
            )
        if self.restore_best_weights and self.best is not None:
            self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Return what a new process needs to go on as if the old one had never died."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_logs": None if self.best_logs is None else dict(self.best_logs),
            "seen": self._monitor.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of an interrupted run, with the file that it wrote."""
        best, epoch, logs = state["best"], state["best_epoch"], state["best_logs"]
        self.best = None if best is None else float(best)
        self.best_epoch = None if epoch is None else int(epoch)
        self.best_logs = None if logs is None else {name: float(logs[name]) for name in logs}
        self._monitor.seen = state["seen"]
        self._loaded = True
        if self._begun:
            self._begin()

    def get_config(self) -> dict[str, Any]:
        return {
            "filepath": self.filepath,
            "monitor": self.monitor,
            "mode": self.mode,
            "min_delta": self.min_delta,
            "save_weights_only": self.save_weights_only,
            "restore_best_weights": self.restore_best_weights,
            "resume": self.resume,
            "verbose": self.verbose,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BestCheckpoint":
        return cls(**config)

    def _prepare_files(self) -> None:
        """Fail now where a save would fail, and end what a killed process had begun."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"BestCheckpoint cannot create the folder {self._path.parent} ({error.strerror}). "
                f"Choose another path. Received: filepath={self.filepath}",
            ) from error
        check_writable(self._path, self._record_path)
        left = temporaries(self._record_path)
        if left and self._path.exists():
            digest = sha256(self._path)
            for record in left:
                if (_read_record(record) or {}).get("sha256") == digest:
                    record.replace(self._record_path)
                    break
        remove_leftovers(self._path)
        remove_leftovers(self._record_path)

    def _begin(self) -> None:
        """Find out what needs the built model: the direction, and whether the record belongs to it."""
        self._monitor.settle(self.model)
        self._ahead = None
        loaded, self._loaded = self._loaded, False
        if loaded:
            self._check_loaded()
        else:
            same_run = self.best is not None and self._model_of_best is self.model
            self.best = self.best_epoch = self.best_logs = None
            if (self.resume or same_run) and self._path.exists():
                self._go_on()
        self._model_of_best = self.model
        self._begun = True

    def _go_on(self) -> None:
        record = self._record_of_this_run(
            "BestCheckpoint(resume=True)",
            "Choose another filepath, pass resume=False to replace it by the best of this run, "
            f"or delete it. Received: filepath={self.filepath}",
        )
        self._take(record)
        self._say(
            f"BestCheckpoint goes on from {self.filepath}: {self.monitor} = {self.best:.5g} "
            f"of epoch {record['epoch'] + 1}"
        )

    def _check_loaded(self) -> None:
        """Check that the files are those of the state that was loaded, or of the epoch after it."""
        if self.best is None or self.best_epoch is None:
            return
        state = f"{self.monitor} = {self.best:.5g} of epoch {self.best_epoch + 1}"
        mend = (
            f"Put back this file and {self._record_path.name} as that run wrote them, or begin "
            f"afresh, without its backup. Received: filepath={self.filepath}"
        )
        if not self._path.exists():
            raise ValueError(
                "BestCheckpoint cannot go on with the interrupted run: its best model "
                f"({state}) is gone. {mend}"
            )
        record = self._record_of_this_run("BestCheckpoint, going on with an interrupted run,", mend)
        found = float(record["best"])
        if (found, int(record["epoch"])) == (self.best, self.best_epoch):
            return
        if not self._monitor.is_better(found, than=self.best):
            raise ValueError(
                "BestCheckpoint cannot go on with the interrupted run: its best model "
                f"({state}) has been replaced by one of {self.monitor} = {found:.5g}. {mend}"
            )
        # The run was killed after this save and before its state was saved: that epoch comes again.
        self._ahead = record

    def _record_of_this_run(self, who: str, mend: str) -> dict[str, Any]:
        """Read the record of the model at `filepath`; raise if either is not of this run."""
        record = _read_record(self._record_path)
        if record is None:
            raise ValueError(
                f"{who} found a model without its record: {self._record_path.name} is missing or "
                f"is not a record of BestCheckpoint. {mend}"
            )
        if record["sha256"] != sha256(self._path):
            raise ValueError(
                f"{who} found a model that is not the one described in {self._record_path.name}: "
                f"something else has written it since. {mend}"
            )
        expected = {
            "monitor": self.monitor,
            "mode": self._monitor.direction,
            "structure": structure(self.model),
        }
        different = [
            f"{name} was {record[name]!r} and is {value!r}"
            for name, value in expected.items()
            if record[name] != value
        ]
        if different:
            raise ValueError(
                f"{who} found the model of another run: {'; '.join(different)}. {mend}"
            )
        return record

    def _take(self, record: dict[str, Any]) -> None:
        self.best = float(record["best"])
        self.best_epoch = int(record["epoch"])
        self.best_logs = {name: float(value) for name, value in record["logs"].items()}
        self._ahead = None

    def _save(self, value: float, epoch: int, logs: dict[str, Any]) -> None:
        numbers = {name: as_float(log) for name, log in logs.items()}
        best_logs = {name: number for name, number in numbers.items() if number is not None}
        stage = logs.get("stage", current_stage(self.model))
        with replacing_all(self._path, self._record_path) as (model_file, record_file):
            if self.save_weights_only:
                self.model.save_weights(model_file)
            else:
                self.model.save(model_file)
            record = {
                "format": _RECORD_FORMAT,
                "monitor": self.monitor,
                "mode": self._monitor.direction,
                "best": value,
                "epoch": int(epoch),
                "stage": None if stage is None else int(stage),
                "logs": best_logs,
                "structure": structure(self.model),
                "sha256": sha256(model_file),
            }
            record_file.write_text(to_json(record), encoding="utf-8")
        before = "" if self.best is None else f", better than {self.best:.5g}"
        self._take(record)
        self._say(f"Epoch {epoch + 1}: {self.monitor} = {value:.5g}{before}; saved {self.filepath}")

    def _restore(self) -> None:
        # The optimizer is set aside: Keras would load its variables by position, and those of
        # another stage fit by number without being the same.
        optimizer = getattr(self.model, "optimizer", None)
        self.model.optimizer = None
        try:
            with _weights_file(self._path) as path:
                self.model.load_weights(path)
        finally:
            self.model.optimizer = optimizer
        self._say(
            f"Restored the weights of epoch {(self.best_epoch or 0) + 1} from {self.filepath}"
        )

    def _say(self, message: str) -> None:
        if self.verbose > 0:
            print(f"\n{message}")  # noqa: T201 - as Keras's own callbacks do when asked to


@contextlib.contextmanager
def _weights_file(path: Path) -> Iterator[Path]:
    """The file with the weights alone.

    Keras 3.15.1 reads them inside of a `.keras` archive by small pieces, which took six times as
    long as unpacking them first (5.6 s against 0.9 s for an InceptionV3).
    """
    if path.suffix != ".keras":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        yield Path(archive.extract("model.weights.h5", folder))


def _read_record(path: Path) -> dict[str, Any] | None:
    """Read a complete record of this format; None where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    needed = {"format", "monitor", "mode", "best", "epoch", "logs", "structure", "sha256"}
    if not isinstance(record, dict) or not needed <= record.keys():
        return None
    return record if record["format"] == _RECORD_FORMAT else None


def _check_filepath(filepath: str | os.PathLike[str], save_weights_only: bool) -> None:
    suffix = ".weights.h5" if save_weights_only else ".keras"
    if not os.fspath(filepath).endswith(suffix):
        raise ValueError(
            f"BestCheckpoint expects a filepath that ends in {suffix!r} with "
            f"save_weights_only={save_weights_only} (a whole model is '.keras', weights are "
            f"'.weights.h5'). Received: filepath={os.fspath(filepath)!r}"
        )
    if re.search(r"\{\w+(:[^}]*)?\}", os.fspath(filepath)):
        raise ValueError(
            "BestCheckpoint keeps one file and expects its path, not a pattern. "
            f"Received: filepath={os.fspath(filepath)!r}. The epoch and the logs of the best are in "
            "the JSON file beside it."
        )
