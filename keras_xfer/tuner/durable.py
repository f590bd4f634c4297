"""A KerasTuner search that survives: kills at any moment, failing trials, a chief that comes back.

The one module that touches what KerasTuner does not publish. Tried on keras-tuner 1.4.8, in which
- the JSON files are not written atomically, and a search whose file is half written cannot go on;
- a trial that ended is in the file as if it still ran until the next one begins, so a search that
  goes on runs it again;
- a chief that comes back gives trials away that its workers are still at;
- a call that finds the chief gone fails the trial, and error messages never reach the chief (see
  `client`);
- an error in a call to the oracle leaves it locked for ever;
- `overwrite=True` in a worker deletes what all the others have done;
- a trial that is run again is scored by what its earlier attempt told;
- a grid search does not know how far it came;
- a build that fails with the first values of the space ends the search before its first trial;
- a worker whose oracle is waiting asks it again without a pause (Hyperband).
https://github.com/keras-team/keras-tuner/issues/1055 is the one of these that is known there.
"""

import contextlib
import datetime
import functools
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_xfer import freezing
from keras_xfer.files import remove_leftovers, write_text
from keras_xfer.tuner import client, records, trial_files

_IDLE_SECONDS = 0.2
# How long a worker may be silent before a chief that came back gives its trial to another, once
# nothing else is left to do.
GRACE_SECONDS = 6 * client.BEAT_SECONDS
# How many workers a trial may take with it: memory that is not enough, a library that crashes.
MOST_DEATHS = 3
_NO_LIMIT = 10**9
_OVER = ("COMPLETED", "FAILED")


class _Seed(int):
    """A seed that KerasTuner does not take for None where it is 0."""

    def __bool__(self) -> bool:
        return True


def _synchronized(method: Callable[..., Any]) -> Callable[..., Any]:
    """KerasTuner's decorator, which leaves the lock taken where the method raises."""

    @keras_tuner.synchronized
    @functools.wraps(method)
    def caught(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs), None
        except BaseException as error:  # raised again once the lock is released
            return None, error

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result, error = caught(*args, **kwargs)
        if error is not None:
            raise error
        return result

    return call


class DurableOracle:
    """What makes an oracle of KerasTuner durable; `durable` mixes it in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A failing trial is recorded, and the search goes on.
        kwargs.setdefault("max_consecutive_failed_trials", _NO_LIMIT)
        if kwargs.get("seed") is not None:
            kwargs["seed"] = _Seed(kwargs["seed"])
        super().__init__(*args, **kwargs)
        self._reserved: dict[str, str] = {}  # worker -> trial that it had before the chief was gone
        self._heard: dict[str, float] = {}  # trial -> when a worker last said that it is at it
        self._deaths: dict[str, int] = {}  # trial -> workers that died of it

    # --- Files -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state, atomically."""
        _write(self._get_oracle_fname(), self.get_state())  # type: ignore[attr-defined]

    def get_state(self) -> dict[str, Any]:
        """Return the state as plain data: what is kept for its worker is ongoing as before."""
        state: dict[str, Any] = super().get_state()  # type: ignore[misc]
        state["ongoing_trials"] = {**self._reserved, **state["ongoing_trials"]}
        return state

    def _save_trial(self, trial: Any) -> None:
        folder = Path(self._get_trial_dir(trial.trial_id))  # type: ignore[attr-defined]
        _write(folder / "trial.json", trial.get_state())

    def reload(self) -> None:
        """Read the state, and put right what was cut off."""
        oracle: Any = self
        running: dict[str, str] = {}
        set_state = oracle.set_state

        def remembered(state: dict[str, Any]) -> None:
            running.update(state["ongoing_trials"])
            state["ongoing_trials"] = {
                worker: trial for worker, trial in running.items() if trial in oracle.trials
            }
            set_state(state)

        oracle.set_state = remembered
        try:
            super().reload()  # type: ignore[misc]
        finally:
            del oracle.set_state
        begun = set(oracle.start_order)
        # Cut off between the two files that a beginning trial is written to: as if it had not been.
        oracle.trials = {k: v for k, v in oracle.trials.items() if k in begun}
        # Cut off between these two when it ended: the trial's own file holds.
        over = [each for each in oracle.start_order if oracle.trials[each].status in _OVER]
        known = [each for each in oracle.end_order if each in over]
        oracle.end_order = [*known, *(each for each in over if each not in known)]
        waiting = dict.fromkeys([*oracle._retry_queue, *oracle.start_order])
        oracle._retry_queue = [each for each in waiting if each not in over]
        if isinstance(oracle, keras_tuner.oracles.GridSearchOracle):
            _find_place(oracle)
        # What begins is shown after it is saved, so the last one's beginning is not known.
        for number, each in enumerate(oracle.start_order, 1):
            oracle._display.trial_start.setdefault(each, datetime.datetime.now())
            oracle._display.trial_number.setdefault(each, number)
        if oracle._display.search_start is None:
            oracle._display.search_start = datetime.datetime.now()
        if is_chief():  # the workers may be at it still
            self._reserved = {
                worker: trial for worker, trial in running.items() if trial in oracle._retry_queue
            }
            kept = set(self._reserved.values())
            oracle._retry_queue = [each for each in oracle._retry_queue if each not in kept]
            self._heard = {}

    # --- Trials ------------------------------------------------------------------------------

    @_synchronized
    def create_trial(self, tuner_id: str) -> Any:
        """Give a worker its trial: the one that it had, if it was not over."""
        oracle: Any = self
        for reserved in self._reserved.values():  # since now at the latest they can be heard
            self._heard.setdefault(reserved, time.monotonic())
        if tuner_id in self._reserved:
            return self._resume(tuner_id, self._reserved.pop(tuner_id))
        if tuner_id in oracle.ongoing_trials:  # it was cut off in it, and begins it anew
            trial = oracle.ongoing_trials[tuner_id]
            trial.metrics = type(trial.metrics)()
            if is_chief():
                self._count_death(trial)
        trial = self._next(tuner_id)
        if not self._reserved or trial.status not in ("IDLE", "STOPPED"):
            return trial
        for worker, reserved in self._reserved.items():
            if time.monotonic() - self._heard[reserved] > GRACE_SECONDS:  # it does not come back
                del self._reserved[worker]
                return self._resume(tuner_id, reserved)
        trial.status = "IDLE"
        oracle.tuner_ids.add(tuner_id)
        return trial

    def _count_death(self, trial: Any) -> None:
        """A worker asks again, that had this trial: give up what kills all who run it."""
        deaths = self._deaths[trial.trial_id] = self._deaths.get(trial.trial_id, 0) + 1
        if deaths >= MOST_DEATHS:
            trial.status = "FAILED"
            trial.message = f"The process that ran it died, {deaths} times."
            folder = Path(self._get_trial_dir(trial.trial_id))  # type: ignore[attr-defined]
            records.write_failure(folder, trial, 0.0, trial.message)
            self.end_trial(trial)

    def _resume(self, tuner_id: str, trial_id: str) -> Any:
        oracle: Any = self
        oracle._retry_queue.append(trial_id)
        return self._next(tuner_id)  # which takes the last of them

    def _next(self, tuner_id: str) -> Any:
        oracle: Any = self
        if oracle._retry_queue and tuner_id not in oracle.ongoing_trials:
            # KerasTuner would take what an earlier attempt told for the metrics of this one.
            again = oracle.trials[oracle._retry_queue[-1]]
            again.metrics = type(again.metrics)()
        return super().create_trial(tuner_id)  # type: ignore[misc]

    def get_trial(self, trial_id: str) -> Any:
        """Return a trial. A worker that is at it asks for it again and again."""
        self._heard[trial_id] = time.monotonic()
        return super().get_trial(trial_id)  # type: ignore[misc]

    @_synchronized
    def update_trial(self, trial_id: str, metrics: Any, step: int = 0) -> Any:
        """Take a trial's metrics, unless it has ended."""
        oracle: Any = self
        if trial_id in oracle.end_order:
            return oracle.trials[trial_id]
        return super().update_trial(trial_id, metrics, step)  # type: ignore[misc]

    @_synchronized
    def end_trial(self, trial: Any) -> None:
        """Take a trial's end, once."""
        oracle: Any = self
        self._reserved = {k: v for k, v in self._reserved.items() if v != trial.trial_id}
        if trial.trial_id in oracle.end_order:
            # Told again by a worker that did not hear the answer, or by another that had it too.
            for worker, running in list(oracle.ongoing_trials.items()):
                if running.trial_id == trial.trial_id:
                    del oracle.ongoing_trials[worker]
            return
        super().end_trial(trial)  # type: ignore[misc]


def durable(oracle: type) -> type:
    """Make an oracle of KerasTuner durable.

    What it writes is complete at any moment. A search that goes on, also under a chief that came
    back, loses no trial that was over, runs none twice, and runs those again that were cut off.
    Failing trials do not end it.

    Args:
        oracle: a class, such as `keras_tuner.oracles.BayesianOptimizationOracle`.

    Returns:
        A class that takes the same arguments.

    Example:

    >>> oracle = durable(keras_tuner.oracles.RandomSearchOracle)(objective="val_loss", max_trials=3)
    >>> isinstance(oracle, keras_tuner.Oracle)
    True

    Reference:
        https://keras.io/keras_tuner/api/oracles/
    """
    return type(f"Durable{oracle.__name__}", (DurableOracle, oracle), {})


class DurableTuner(keras_tuner.Tuner):
    """A KerasTuner tuner for a `HyperTransfer` and any durable oracle.

    Beside what KerasTuner keeps, each trial's folder has its metrics by epoch, its seconds, and the
    error that it failed with. A checkpoint holds what differs from the model as it is built: a head,
    mostly. Trials that go on from others (Hyperband, the funnel) do so from their whole state.

    With KerasTuner's environment variables it is a chief or a worker, see
    https://keras.io/guides/keras_tuner/distributed_tuning/: a worker waits for a chief that is
    gone, and never overwrites. Where the chief stays away, or that of another search has come in its
    place, `search` ends with a `keras_tuner.errors.FatalError`, and the trial is run again later.

    Args:
        oracle: of `durable`, or a `FunnelOracle`.
        hypermodel: a `keras_xfer.HyperTransfer`.
        directory: str or path of the search's folder, which all workers share.
        project_name: str, a folder in it. Defaults to `"search"`.
        overwrite: bool, whether to begin anew where there is a search. Defaults to `False`.
        seed: int or None: each trial's seeds follow from it and its number, whichever worker runs
            it.
        **kwargs: as of `keras_tuner.Tuner`, such as `executions_per_trial`.

    Raises:
        ValueError: `overwrite=True` in a worker.

    Example:

    >>> import tempfile
    >>> from keras_xfer.tuner import HyperTransfer
    >>> base = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    >>> hypermodel = HyperTransfer(3, backbones={"base": base}, input_shape=(8, 8, 3))
    >>> oracle = durable(keras_tuner.oracles.RandomSearchOracle)(
    ...     objective="val_accuracy", max_trials=1
    ... )
    >>> tuner = DurableTuner(oracle, hypermodel, directory=tempfile.mkdtemp())
    >>> tuner.remaining_trials
    1

    Reference:
        https://keras.io/keras_tuner/api/tuners/base_tuner/
    """

    # For HyperTransfer: `load_model` builds the model and needs what differs from that alone.
    builds_what_is_pristine = True

    def __init__(
        self,
        oracle: keras_tuner.Oracle,
        hypermodel: keras_tuner.HyperModel,
        *,
        directory: str | os.PathLike[str],
        project_name: str = "search",
        overwrite: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        tuner_id = os.environ.get("KERASTUNER_TUNER_ID", "tuner0")
        if overwrite and is_worker():
            raise ValueError(
                f"Expected overwrite=False in a worker ({tuner_id!r}): it would delete what the "
                "other workers have done. Received: overwrite=True. Pass it to the chief alone."
            )
        folder = Path(directory) / project_name
        for name in ("oracle.json", f"{tuner_id}.json"):
            remove_leftovers(folder / name)
        if (folder / "oracle.json").exists() and not overwrite:
            # KerasTuner looks for the file of this worker, to tell whether there is a search.
            own = folder / f"{tuner_id}.json"
            if not _is_json(own):
                _write(own, {})
        super().__init__(
            oracle=oracle,
            hypermodel=hypermodel,
            directory=os.fspath(directory),
            project_name=project_name,
            overwrite=overwrite,
            **kwargs,
        )
        self.seed = seed
        self.after_each_trial: Callable[[], None] = _nothing
        self._waits = False
        if self._is_worker():
            self.oracle: Any = client.PatientClient(self.oracle)

    def _activate_all_conditions(self) -> None:
        # Builds the hypermodel again and again to find what its builds declare, from the first
        # values of the space on. One that fails is a trial's to record: what it declared until then,
        # and what `declare_hyperparameters` did, is in the space. (keras-tuner 1.4.8)
        hypermodel: Any = self.hypermodel
        self.hypermodel: Any = _Exploring(hypermodel)
        try:
            super()._activate_all_conditions()
        except _NothingNewError:
            pass
        finally:
            self.hypermodel = hypermodel

    def save(self) -> None:
        """Write the state, atomically."""
        if not self._is_worker():
            self.oracle.save()
        _write(self._get_tuner_fname(), self.get_state())

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Run the trials, as KerasTuner does."""
        # KerasTuner collects garbage before each trial, twice: of what is there before the first,
        # TensorFlow mostly, there will be none. A quarter of the time of a cached head.
        gc.collect()
        gc.freeze()
        try:
            super().search(*args, **kwargs)
        finally:
            gc.unfreeze()

    def pre_create_trial(self) -> None:
        """Pause where the oracle had nothing to do yet."""
        if self._waits:
            time.sleep(_IDLE_SECONDS)
        self._waits = True

    def on_trial_begin(self, trial: Any) -> None:
        """There is something to do."""
        self._waits = False
        super().on_trial_begin(trial)

    def on_trial_end(self, trial: Any) -> None:
        """Tell the oracle, and whoever wants to know."""
        super().on_trial_end(trial)
        self.after_each_trial()

    def _try_run_and_update_trial(self, trial: Any, *args: Any, **kwargs: Any) -> None:
        # As KerasTuner's, which prints the traceback too: here it is kept, see `run_trial`.
        is_worker = self._is_worker()
        telling = self.oracle.at_work(trial.trial_id) if is_worker else contextlib.nullcontext()
        try:
            with telling:
                self._run_and_update_trial(trial, *args, **kwargs)
        except keras_tuner.errors.FatalError:
            raise
        except keras_tuner.errors.FailedTrialError:
            trial.status, trial.message = "FAILED", traceback.format_exc()
        except Exception:
            trial.status, trial.message = "INVALID", traceback.format_exc()
        else:
            trial.status = "COMPLETED"

    def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a trial, and keep what it did or why it failed."""
        values = trial.hyperparameters.values
        if "tuner/epochs" in values:
            kwargs["epochs"] = values["tuner/epochs"]
            kwargs["initial_epoch"] = values["tuner/initial_epoch"]
        folder = Path(self.get_trial_dir(trial.trial_id))
        given = dict(values)
        if self._is_worker():
            client.check_given(folder / "trial.json", given)
        for name in (trial_files.STATE, trial_files.WEIGHTS, *records.FILES):
            (folder / name).unlink(missing_ok=True)  # of an attempt that was cut off
        for name in (trial_files.STATE, trial_files.WEIGHTS, *records.FILES, "trial.json"):
            remove_leftovers(folder / name)
        if self.seed is not None:
            keras.utils.set_random_seed(self.seed + int(trial.trial_id))
        began = time.perf_counter()
        try:
            results = super().run_trial(trial, *args, **kwargs)
            seconds = time.perf_counter() - began
            self._ask_about(trial, given)
            records.write_success(folder, trial, self.oracle.objective, results, seconds)
        except keras_tuner.errors.FatalError:  # which is not the trial's failure
            raise
        except Exception:
            seconds, error = time.perf_counter() - began, traceback.format_exc()
            if self._ask_about(trial, given) not in _OVER:
                records.write_failure(folder, trial, seconds, error)
            raise
        return results

    def _ask_about(self, trial: Any, given: dict[str, Any]) -> str:
        """The status of a trial that was run: over, where another worker had it too."""
        known = self.oracle.get_trial(trial.trial_id)
        if self._is_worker():
            client.check_known(known, given)
        status: str = known.status
        return status

    def load_model(self, trial: Any) -> keras.Model:
        """Build the model of a trial with the weights of its best epoch."""
        model = self.hypermodel.build(trial.hyperparameters)
        backbone = freezing.find_backbone(model, "backbone")
        trial_files.load_weights(model, backbone, Path(self.get_trial_dir(trial.trial_id)))
        return model


class _Exploring:
    """A hypermodel whose builds may fail, each with the same values once."""

    def __init__(self, hypermodel: Any) -> None:
        self._hypermodel = hypermodel
        self._failed: list[dict[str, Any]] = []

    def build(self, hp: Any) -> None:
        try:
            self._hypermodel.build(hp)
        except keras_tuner.errors.FatalError:
            raise
        except Exception as error:
            if hp.values in self._failed:
                # KerasTuner tries on for a condition that this build never comes to.
                raise _NothingNewError from error
            self._failed.append(dict(hp.values))


class _NothingNewError(Exception):
    """There is no more to be found of a space."""


def _nothing() -> None:
    """What is done after a trial where nobody asks."""


def _write(filepath: str | os.PathLike[str], value: Any) -> None:
    # KerasTuner reads NaN, which JSON as `files.write_json` writes it does not have.
    write_text(filepath, json.dumps(value, default=float))


def _find_place(oracle: Any) -> None:
    """Give a grid search, which writes none of it down, its place back."""
    # https://github.com/keras-team/keras-tuner/issues/1055
    values = {each: oracle.trials[each].hyperparameters.values for each in oracle.start_order}
    by_values = functools.cmp_to_key(lambda a, b: oracle._compare(values[a], values[b]))
    for trial_id in sorted(values, key=by_values):
        oracle._ordered_ids.insert(trial_id)
    oracle._populate_next = list(values)


def _is_json(filepath: Path) -> bool:
    try:
        json.loads(filepath.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def is_chief() -> bool:
    """Whether this process is the chief of a search, by KerasTuner's environment variables."""
    is_shared = "KERASTUNER_ORACLE_IP" in os.environ
    return is_shared and "chief" in os.environ.get("KERASTUNER_TUNER_ID", "")


def is_worker() -> bool:
    """Whether this process is a worker of a search, by KerasTuner's environment variables."""
    return "KERASTUNER_ORACLE_IP" in os.environ and not is_chief()
