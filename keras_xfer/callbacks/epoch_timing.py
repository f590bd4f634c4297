"""EpochTiming: where the time of an epoch goes, in the logs, in History and as tables."""

import dataclasses
import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import keras
import numpy as np

from keras_xfer.stages.current import current_stage, set_current_stage

_Array = np.ndarray[Any, np.dtype[Any]]


@keras.saving.register_keras_serializable(package="keras_xfer")
class EpochTiming(keras.callbacks.Callback):
    """Adds to the logs, and so to History, where the time of each epoch went.

    Use it to compare stages, input pipelines and batch sizes. Place it first among the callbacks:
    callbacks after it then see its logs, and their work at the end of an epoch is not counted in
    the epoch.

    It logs every epoch, in seconds unless said:

    - `epoch_seconds`: from the beginning to the end of the epoch.
    - `train_seconds`: from the beginning of the epoch to the end of its last training step.
    - `validation_seconds`: from there to the end of the validation in `fit`, with the making of its
      input; 0 in an epoch without validation.
    - `first_step_seconds`: from the beginning of the epoch to the end of its first step: the first
      batch, tracing and compilation where there are any, and the step.
    - `step_seconds_median`, `step_seconds_p95`: of the steps after the first `warmup_steps`, from
      the end of one to the end of the next, so the wait for input is counted. NaN without any.
    - `samples_per_second`: the training samples after the first `warmup_steps` over the time that
      they took. The samples are those that Keras's own training loss has counted, also with sample
      weights and a ragged last batch. NaN where that count cannot be known: with a `train_step` or
      `metrics` of the model's own, when an earlier callback has evaluated the model at the end of
      an epoch, and from 2^24 samples an epoch in float32. A callback that calls `evaluate` in the
      middle of an epoch resets Keras's training metrics, and this count with them.

    A step ends when its logs are there, so that JAX and accelerators, which compute behind Python's
    back, are timed by what was computed and not by what was asked for. This waits once a step, as
    with every callback that has an `on_train_batch_end`. With `steps_per_execution=k`, k steps run
    as one: the first k are the first step, and the others count as a k-th of their execution each.

    Rows are kept over several `fit` calls. Take a new object for a new measurement.

    Args:
        warmup_steps: int >= 0, how many steps at the beginning of each epoch to leave out of the
            medians and rates.

    Attributes:
        rows: list of dicts, one an epoch: `epoch` (from 0), `stage`, and the logs above.

    Raises:
        ValueError: `warmup_steps` is not an int >= 0.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((64, 2)), np.zeros((64, 1))
    >>> timing = EpochTiming()
    >>> history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[timing])
    >>> len(history.history["step_seconds_median"])
    2
    >>> timing.rows[1]["samples_per_second"] > 0
    True

    Reference:
        https://docs.python.org/3/library/time.html#time.perf_counter
    """

    def __init__(self, *, warmup_steps: int = 1) -> None:
        super().__init__()
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ValueError(
                "EpochTiming expects warmup_steps to be an int >= 0. "
                f"Received: warmup_steps={warmup_steps!r}"
            )
        self.warmup_steps = warmup_steps
        self.rows: list[dict[str, Any]] = []
        self._epoch: _Epoch | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        set_current_stage(self.model, None)  # of a `fit` that was interrupted
        self._epoch = _Epoch(perf_counter())

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = _Epoch(perf_counter())
        if self.warmup_steps == 0:
            self._epoch.warm = _Count(samples=0.0, loss=math.nan)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._epoch is None:
            return
        self._epoch.begun = batch
        if batch >= self.warmup_steps and self._epoch.warm is None:
            began = perf_counter()
            self._epoch.warm = _counted(self.model)
            self._epoch.reading_seconds = perf_counter() - began

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._epoch is not None:
            self._epoch.ends.append((batch, perf_counter()))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Keras calls this before it resets the metrics for the validation.
        if self._epoch is not None and not self._epoch.is_tested():
            self._epoch.tested_after = self._epoch.begun
            self._epoch.total = _counted(self.model)
            self._epoch.test_end = None

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._epoch is not None and self._epoch.test_end is None:
            self._epoch.test_end = perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        now = perf_counter()
        logs = {} if logs is None else logs
        measured = self._epoch or _Epoch(now)
        if not measured.is_tested():
            measured.total = _counted(self.model)
            measured.test_end = None
        timings = self._timings(measured, now, logs.get("loss"))
        stage = logs.get("stage", current_stage(self.model))
        stage = None if stage is None else int(stage)
        self.rows.append({"epoch": int(epoch), "stage": stage, **timings})
        logs.update(timings)
        self._epoch = _Epoch(now)  # for loops driven by hand without on_epoch_begin

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._epoch = None  # an evaluate after fit is not part of it

    def table(self) -> Any:
        """Make one row an epoch: `epoch` (from 0), `stage` (missing without a schedule) and the logs.

        Returns:
            A pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _pandas()
        frame = pandas.DataFrame(self.rows, columns=["epoch", "stage", *_TIMINGS])
        return frame.astype({"epoch": "int64", "stage": "Int64"})

    def by_stage(self) -> Any:
        """Make one row a stage, in the order in which they ran; a single one without a schedule.

        `epochs` is their number; `epoch_seconds`, `train_seconds` and `validation_seconds` are sums;
        `first_step_seconds` is that of the stage's first epoch, which traces and compiles;
        `step_seconds_median`, `step_seconds_p95` and `samples_per_second` are medians over epochs;
        `slowdown` is `step_seconds_median` over that of the first stage.

        Returns:
            A pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _pandas()
        groups: dict[int | None, list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(row["stage"], []).append(row)
        stages: list[dict[str, Any]] = []
        for stage, rows in groups.items():
            total = {name: sum(row[name] for row in rows) for name in _SUMMED}
            typical = {name: _median([row[name] for row in rows]) for name in _TYPICAL}
            first = rows[0]["first_step_seconds"]
            one = {"stage": stage, "epochs": len(rows), **total, "first_step_seconds": first}
            stages.append({**one, **typical})
        for row in stages:
            row["slowdown"] = _ratio(row["step_seconds_median"], stages[0]["step_seconds_median"])
        columns = ["stage", "epochs", *_TIMINGS, "slowdown"]
        return pandas.DataFrame(stages, columns=columns).astype({"stage": "Int64"})

    def state_dict(self) -> dict[str, Any]:
        """Return what a new process needs to go on: the rows of the epochs so far."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of an interrupted run."""
        self.rows = [dict(row) for row in state["rows"]]

    def get_config(self) -> dict[str, Any]:
        return {"warmup_steps": self.warmup_steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EpochTiming":
        return cls(**config)

    def _timings(self, epoch: "_Epoch", now: float, loss: Any) -> dict[str, float]:
        begins, counts, seconds = _executions(epoch, (self.params or {}).get("steps"))
        measured = begins >= self.warmup_steps
        if epoch.reading_seconds and measured.any():
            first = int(np.argmax(measured))
            seconds[first] = max(seconds[first] - epoch.reading_seconds, 0.0)
        counts, measured_seconds = counts[measured], seconds[measured]
        step_seconds = np.repeat(measured_seconds / np.maximum(counts, 1), counts)
        samples = _samples(epoch.warm, epoch.total, loss)
        trained = max([epoch.start, *(time for _, time in epoch.ends)])
        tested = trained if epoch.test_end is None else epoch.test_end
        return {
            "epoch_seconds": now - epoch.start,
            "train_seconds": float(seconds.sum()),
            "validation_seconds": max(tested - trained, 0.0),
            "first_step_seconds": float(seconds[0]) if len(seconds) else math.nan,
            "step_seconds_median": float(np.median(step_seconds))
            if len(step_seconds)
            else math.nan,
            "step_seconds_p95": float(np.quantile(step_seconds, 0.95))
            if len(step_seconds)
            else math.nan,
            "samples_per_second": _ratio(samples, float(measured_seconds.sum())),
        }


@dataclasses.dataclass
class _Count:
    """What Keras's training loss has counted since the epoch began, and the loss itself."""

    samples: float
    loss: float


@dataclasses.dataclass
class _Epoch:
    start: float
    ends: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (last step, when)
    begun: int = -1  # the last step that has begun
    warm: _Count | None = None  # after the warm-up steps
    reading_seconds: float = 0.0  # what it took to read `warm`, which is not training
    total: _Count | None = None  # after all steps
    tested_after: int | None = None  # `begun` when the last test began
    test_end: float | None = None

    def is_tested(self) -> bool:
        """Tell whether a test has begun since the last training step, so that metrics are reset."""
        return self.tested_after == self.begun


def _executions(epoch: _Epoch, steps: int | None) -> tuple[_Array, _Array, _Array]:
    """List the calls of the train function: first step, number of steps, and seconds.

    A call runs `steps_per_execution` steps, the last one perhaps fewer, though its index says
    otherwise. Where the length of the epoch is unknown its number is given as 0.
    """
    # By index: Keras calls callbacks from several threads where it was given one outside of a list.
    ends = sorted(epoch.ends)
    last = np.array([step for step, _ in ends], dtype=np.int64)
    times = np.maximum.accumulate(np.array([epoch.start, *(time for _, time in ends)]))
    begins = np.concatenate([[0], last[:-1] + 1])[: len(last)].astype(np.int64)
    counts = np.maximum(last + 1 - begins, 0)
    if len(counts) and counts[-1] > 1:
        counts[-1] = 0 if steps is None else min(counts[-1], max(steps - begins[-1], 1))
    return begins, counts, np.diff(times)


def _counted(model: Any) -> _Count | None:
    """Read the number of samples that Keras's own loss metric has seen; None where there is none.

    Every backend's `train_step` weighs the loss of a batch by the batch's size, whatever the sample
    weights. A model with its own `train_step` or `metrics` may count batches instead.
    """
    own = (
        getattr(model.train_step, "__func__", None) is keras.Model.train_step
        and type(model).metrics is keras.Model.metrics
        and model.compiled
    )
    if not own:
        return None
    sync = getattr(model, "jax_state_sync", None)  # inside an epoch JAX's variables are elsewhere
    if sync is not None:
        sync()
    loss = model.metrics[0]
    if not isinstance(loss, keras.metrics.Mean) or loss.name != "loss":
        return None
    try:
        samples = float(loss.count.value)
    except TypeError:  # a variable of tf.distribute, whose replicas are to be added up
        samples = float(keras.ops.add(loss.count, 0))
    if samples >= _EXACT_BELOW.get(keras.backend.standardize_dtype(loss.count.dtype), 0):
        return None
    return _Count(samples, float(loss.result()))


def _samples(warm: _Count | None, total: _Count | None, loss: Any) -> float:
    """Subtract two counts; NaN unless the metric still is the one that logged `loss`."""
    if warm is None or total is None or loss is None:
        return math.nan
    logged = float(loss)
    same = math.isclose(total.loss, logged, rel_tol=1e-6) or (
        math.isnan(total.loss) and math.isnan(logged)
    )
    return total.samples - warm.samples if same and total.samples >= warm.samples else math.nan


def _ratio(dividend: float, divisor: float) -> float:
    return dividend / divisor if divisor else math.nan


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            'EpochTiming\'s tables need pandas: pip install "keras-xfer[report]". The same numbers '
            "are in its attribute `rows`."
        ) from error
    return pandas


_SUMMED = ("epoch_seconds", "train_seconds", "validation_seconds")
_TYPICAL = ("step_seconds_median", "step_seconds_p95", "samples_per_second")
_TIMINGS = (*_SUMMED, "first_step_seconds", *_TYPICAL)

# A float counts one by one up to here; beyond, samples would be lost without a word.
_EXACT_BELOW = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24, "float64": 2**53}
