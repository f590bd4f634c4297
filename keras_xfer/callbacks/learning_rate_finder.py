"""find_learning_rate: the loss at every learning rate, from a few steps that leave no trace."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_xfer.extras import require
from keras_xfer.retarget.rehearsal import batches, build_from, kept_random_state, rehearsal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Array = np.ndarray[Any, np.dtype[Any]]


def find_learning_rate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.98,
    divergence: float | None = 4.0,
    verbose: int = 0,
) -> "LearningRateCurve":
    """Train one step at each of many learning rates, from tiny to huge, and see how the loss fares.

    Call it on a compiled model before `fit`, or between two, with the data of that `fit`: where the
    loss falls is where to train. It stops early where the loss diverges.

    The model is afterwards as it was, to the bit, also after an exception: weights, BatchNormalization
    statistics, seeds, metrics, the optimizer and the random state of Python, NumPy and torch. The
    steps are taken by a fresh optimizer with the configuration of the model's, which is not touched.
    A schedule is replaced by the rates searched; gradients are not accumulated; the groups of a
    `StagedUnfreezing` keep their proportion, and the rate is that of the head. A model that is not
    built yet is built from the first batch and stays so.

    The data is gone through again where it is shorter than `steps`; a generator ends the search. A
    generator, and a tf.data.Dataset that shuffles itself anew on every pass, have moved on
    afterwards, as after any other pass through them.

    Args:
        model: a compiled `keras.Model`, outside of `fit`.
        x: arrays, also dicts or lists of them; or, without `y`, a tf.data.Dataset, a
            `keras.utils.PyDataset`, a torch DataLoader, or a generator or other iterable of batches
            `(x, y)` or `(x, y, sample_weight)`, which are tuples.
        y: the targets, where `x` is arrays.
        sample_weight: array, where `x` is arrays.
        class_weight: dict of class to float, as for `fit`.
        batch_size: int, where `x` is arrays. Defaults to 32.
        shuffle: bool, whether arrays and the batches of a PyDataset come in random order.
        start: float > 0, the first rate.
        end: float > `start`, the last.
        steps: int >= 2, the number of rates, each the same multiple of the one before.
        smoothing: float >= 0 and < 1, the weight of the past in the moving average of the losses.
        divergence: float > 1, the smoothed loss over its best at which to stop; None goes on to
            `end`, or to a loss that is not finite.
        verbose: 0 is silent, 1 shows a progress bar.

    Returns:
        A `LearningRateCurve`. The loss of each step is that of its batch before its update: it shows
        what the rates before it have done.

    Raises:
        ValueError: the model is not compiled, nothing of it is trainable, there is no data, an
            argument is out of its range, or the loss is not finite from the beginning.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 2))
    >>> curve = find_learning_rate(model, x, x.sum(axis=1), batch_size=16, end=100.0)
    >>> model.optimizer.learning_rate = curve.suggestion
    >>> 1e-7 < curve.suggestion < 100
    True

    Reference:
        https://arxiv.org/abs/1506.01186
    """
    _check(start, end, steps, smoothing, divergence)
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "find_learning_rate expects a compiled model. Received: model="
            f"{model.name!r}, which has no optimizer: call model.compile(...) first."
        )
    data = batches(x, y, sample_weight, batch_size, shuffle)
    with kept_random_state():
        batch = next(data, None)
    if batch is None:
        raise ValueError("find_learning_rate expects data. Received: x without a single batch.")
    build_from(model, batch)
    if not model.trainable_variables:
        raise ValueError(
            "find_learning_rate expects something to train. Received: model="
            f"{model.name!r}, of which every layer is frozen."
        )
    rates = np.geomspace(start, end, steps)
    losses: list[float] = []
    average = _Average(smoothing)
    smoothed: list[float] = []
    bar = keras.utils.Progbar(steps, stateful_metrics=["learning_rate", "loss"], verbose=verbose)
    with rehearsal(model, start) as step:
        for done, rate in enumerate(rates, start=1):
            loss = _loss_of(step(float(rate), (*batch, class_weight)))
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed.append(average.add(loss))
            bar.update(done, [("learning_rate", rate), ("loss", smoothed[-1])], finalize=False)
            if divergence is not None and _diverges(smoothed, divergence):
                break
            batch = next(data, None) if done < steps else None
            if batch is None:
                break
    if not losses:
        raise ValueError(
            "find_learning_rate expects a finite loss to begin with. Received: a loss of "
            f"{loss} on the first batch. Look for NaN in the data, and for targets out of range."
        )
    bar.update(len(losses), finalize=True)
    return LearningRateCurve(rates[: len(losses)], np.array(losses), np.array(smoothed))


@dataclasses.dataclass(frozen=True, eq=False)
class LearningRateCurve:
    """The loss by learning rate, as `find_learning_rate` has found it, and what to make of it.

    Look at `plot()` before trusting a number: on a model that learns nothing the loss falls by
    chance, and so somewhere. The suggestions leave out the first tenth of the steps, where the
    average still is of few batches.

    Args:
        learning_rates: array of the rates, rising.
        losses: array of the loss of the batch of each step.
        smoothed_losses: array of their bias-corrected exponential moving average.

    Raises:
        ValueError: the arrays differ in length, or are empty.

    Example:
    >>> rates = np.geomspace(1e-4, 1.0, 5)
    >>> losses = np.array([2.0, 1.9, 1.4, 1.2, 3.0])
    >>> curve = LearningRateCurve(rates, losses, losses)
    >>> print(curve)
    5 learning rates from 0.0001 to 1: valley 0.01, steepest 0.01

    Reference:
        https://docs.fast.ai/callback.schedule.html#learner.lr_find
    """

    learning_rates: _Array
    losses: _Array
    smoothed_losses: _Array

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = np.array(getattr(self, field.name), dtype=float)
            value.setflags(write=False)
            object.__setattr__(self, field.name, value)
        shapes = {self.learning_rates.shape, self.losses.shape, self.smoothed_losses.shape}
        if len(shapes) != 1 or self.losses.ndim != 1 or not len(self.losses):
            raise ValueError(
                "LearningRateCurve expects three arrays of one axis and of one length. "
                f"Received: shapes {sorted(shapes)}."
            )

    @property
    def suggestion(self) -> float:
        """The rate to train with: `valley`, which looks at the whole way down and moves little from
        run to run; `steepest` goes by a single slope, and by noise where there is some.

        Raises:
            ValueError: the loss never falls.
        """
        return self.valley

    @property
    def valley(self) -> float:
        """The rate two thirds down the longest descent of the smoothed loss. See `longest_valley`.

        Raises:
            ValueError: the loss never falls.
        """
        return self._found(longest_valley(*self._settled()))

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest. See `steepest_descent`.

        Raises:
            ValueError: the loss never falls.
        """
        return self._found(steepest_descent(*self._settled()))

    def plot(self) -> "Figure":
        """Draw the losses over the rates, on a log axis, and mark `valley` and `steepest`.

        Returns:
            A `matplotlib.figure.Figure`; no window opens. Nothing is marked where the loss never
            falls.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure: Figure = require("matplotlib.figure").Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.learning_rates, self.losses, color="#BBBBBB", linewidth=1, label="batch")
        axes.plot(self.learning_rates, self.smoothed_losses, color="#0072B2", label="smoothed")
        for name, rate, marker in (
            ("valley", longest_valley(*self._settled()), "o"),
            ("steepest", steepest_descent(*self._settled()), "v"),
        ):
            if rate is not None:
                loss = self.smoothed_losses[self.learning_rates == rate]
                label = f"{name}: {rate:.2g}"
                axes.plot([rate], loss[:1], marker, color="#D55E00", linestyle="", label=label)
        # The loss of the last steps, where it diverges, would press all else flat.
        low, high = self.smoothed_losses.min(), np.median(self.losses)
        high = max(high, self.smoothed_losses[0], self.losses[: 1 + len(self.losses) // 2].max())
        margin = 0.1 * (high - low) or 1.0
        axes.set_ylim(min(low, self.losses.min()) - margin, high + margin)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend(frameon=False)
        return figure

    def __str__(self) -> str:
        first, last = self.learning_rates[0], self.learning_rates[-1]
        text = f"{len(self.losses)} learning rates from {first:.3g} to {last:.3g}: "
        try:
            return text + f"valley {self.valley:.3g}, steepest {self.steepest:.3g}"
        except ValueError:
            return text + "the loss never falls"

    def _settled(self) -> tuple[_Array, _Array]:
        begin = len(self.losses) // 10
        return self.learning_rates[begin:], self.smoothed_losses[begin:]

    def _found(self, rate: float | None) -> float:
        if rate is None:
            raise ValueError(
                "Expected a loss that falls somewhere, to suggest a learning rate. Received: "
                f"{len(self.losses)} losses from {self.losses[0]:.4g} to {self.losses[-1]:.4g}, at "
                f"rates from {self.learning_rates[0]:.3g} to {self.learning_rates[-1]:.3g}, that "
                "never do. Take a larger `end` if they stay the same, a smaller `start` if they "
                "rise, more data or `steps` if there are few; and look at `plot()`."
            )
        return rate


def steepest_descent(learning_rates: _Array, losses: _Array) -> float | None:
    """The rate at which the loss falls fastest over the logarithm of the rate.

    Only on the way to its minimum: a loss that diverges swings, and falls faster than any that
    learns. None where the loss never falls.
    """
    way = slice(0, int(np.argmin(losses)) + 1)
    if way.stop < 2:
        return None
    slopes = np.gradient(losses[way], np.log(learning_rates[way]))
    return float(learning_rates[way][np.argmin(slopes)])


def longest_valley(learning_rates: _Array, losses: _Array) -> float | None:
    """The rate two thirds down the longest descent of the loss; None where the loss never falls.

    The longest descent is the longest sequence of points that each lie below the one before; what
    lies higher between them is passed over. Two thirds is what fastai says of its `valley`; its code
    takes the middle, of as many steps as the sequence has points.
    """
    lengths = np.ones(len(losses), dtype=int)
    before = np.full(len(losses), -1)
    for i in range(1, len(losses)):
        reached = np.where(losses[:i] > losses[i], lengths[:i], 0)
        if reached.max():
            before[i] = np.flatnonzero(reached == reached.max())[-1]  # the nearest
            lengths[i] = reached.max() + 1
    last = first = int(lengths.argmax())
    if lengths[last] < 2:
        return None
    while before[first] >= 0:
        first = int(before[first])
    return float(learning_rates[first + 2 * (last - first) // 3])


class _Average:
    """An exponential moving average whose weights sum to 1 from the first value on."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.total, self.weight = 0.0, 0.0

    def add(self, value: float) -> float:
        self.total = self.smoothing * self.total + (1 - self.smoothing) * value
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)
        return self.total / self.weight


def _diverges(smoothed: Sequence[float], divergence: float) -> bool:
    best = min(smoothed)
    return smoothed[-1] > best + (divergence - 1) * abs(best)  # a loss may be negative


def _loss_of(logs: Mapping[str, Any]) -> float:
    if "loss" not in logs:
        raise ValueError(
            "find_learning_rate expects the model's train_step to log 'loss'. "
            f"Received: {sorted(logs)}."
        )
    return float(logs["loss"])


def _check(start: Any, end: Any, steps: Any, smoothing: Any, divergence: Any) -> None:
    for right, expected, name, value in (
        (_is_number(start) and start > 0, "a finite float > 0", "start", start),
        (
            _is_number(end) and _is_number(start) and end > start,
            f"a finite float > start={start!r}",
            "end",
            end,
        ),
        (
            isinstance(steps, int) and not isinstance(steps, bool) and steps >= 2,
            "an int >= 2",
            "steps",
            steps,
        ),
        (_is_number(smoothing) and 0 <= smoothing < 1, ">= 0 and < 1", "smoothing", smoothing),
        (
            divergence is None or (_is_number(divergence) and divergence > 1),
            "a finite float > 1, or None",
            "divergence",
            divergence,
        ),
    ):
        if not right:
            raise ValueError(
                f"find_learning_rate expects {name} to be {expected}. Received: {name}={value!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
