"""A log that is compared over epochs: its direction, whether a value is better, whether it may come."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_xfer.running_fit import locals_of_fit


class Monitor:
    """A log to compare over the epochs of a `fit`, for a callback that has `monitor` and `mode`.

    The callback calls `begin` in `on_train_begin`, `validated` in `on_test_end`, and `value` at the
    end of every epoch. Nothing of the model is kept, so the callback can be deep-copied.

    Args:
        owner: str, the callback's class, for messages.
        monitor: str, the log to compare, with `val_` for that of the validation data.
        mode: `"max"`, `"min"`, or `"auto"`: by the metric that the model was compiled with, else by
            its name.
        min_delta: float >= 0, a value must be better by more than this.

    Attributes:
        direction: `"max"` or `"min"`; None before `begin`, and until the first step where only the
            metrics that it builds can tell.
        seen: bool, whether an epoch of this `fit` has had the log; None until one has ended.

    Raises:
        ValueError: an argument is wrong; the direction cannot be told; the log is not there, or is
            not one number.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> monitor = Monitor("BestCheckpoint", "val_loss", min_delta=0.1)
    >>> monitor.begin(model)
    >>> monitor.direction
    'min'
    >>> best = monitor.value(model, {"loss": 1.0, "val_loss": 0.5})
    >>> monitor.is_better(0.45, than=best), monitor.is_better(0.25, than=best)
    (False, True)
    """

    def __init__(
        self, owner: str, monitor: str, mode: str = "auto", min_delta: float = 0.0
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(
                f"{owner} expects monitor to be the name of a log, such as 'val_accuracy'. "
                f"Received: monitor={monitor!r}"
            )
        if mode not in ("auto", "min", "max"):
            raise ValueError(
                f"{owner} expects mode to be 'auto', 'min' or 'max'. Received: mode={mode!r}"
            )
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(
                f"{owner} expects min_delta to be a finite number >= 0, in both modes. "
                f"Received: min_delta={min_delta!r}"
            )
        self.owner = owner
        self.name = monitor
        self.mode = mode
        self.min_delta = float(min_delta)
        self.direction: str | None = None
        self.seen: bool | None = None
        self._validated = False
        self._metrics_told = False

    def begin(self, model: Any) -> None:
        """Begin a `fit` of `model`; raise if the direction cannot be told even by the first step."""
        self.seen = None
        self._validated = False
        self.direction = self._find_direction(model)
        self._metrics_told = _is_built(model)
        if self._metrics_told:
            self.settle(model)

    def settle(self, model: Any) -> None:
        """Tell the direction now, once the first step is over, or raise."""
        if not self._metrics_told:  # the name alone has, and the class of a metric goes before it
            self.direction = self._find_direction(model)
            self._metrics_told = _is_built(model)
        if self.direction is None:
            raise ValueError(
                f"{self.owner} cannot tell whether a higher or a lower value of this metric is "
                f"better. Received: monitor={self.name!r}, mode='auto'. Pass mode='max' or "
                "mode='min'."
            )

    def validated(self) -> None:
        """Note that the epoch has had a validation, so that its logs are all there."""
        self._validated = True

    def value(self, model: Any, logs: Mapping[str, Any]) -> float | None:
        """Take the value from the logs of an epoch, once; None where it lacks a validation.

        Raises:
            ValueError: the log is missing though nothing suggests that it may come, or it is not
                one number.
        """
        self.settle(model)
        validated, self._validated = self._validated, False
        self.seen = bool(self.seen) or self.name in logs
        if self.name not in logs:
            self._check_still_to_come(model, logs, validated)
            return None
        value = as_float(logs[self.name])
        if value is None:
            raise ValueError(
                f"{self.owner} expects the monitored log to be one number. "
                f"Received: {self.name}={logs[self.name]!r}. Monitor another log."
            )
        return value

    def is_better(self, value: float, than: float | None) -> bool:
        """Tell whether `value` is finite and better by more than `min_delta`, or the first."""
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        if self.direction == "max":
            return value - self.min_delta > than
        return value + self.min_delta < than

    def _find_direction(self, model: Any) -> str | None:
        return self.mode if self.mode != "auto" else direction_of(self.name, model)

    def _check_still_to_come(self, model: Any, logs: Mapping[str, Any], validated: bool) -> None:
        """Let an epoch without validation lack the monitor, and no other epoch."""
        # Without it, a run that has no validation data would be found out when it is over.
        fit = locals_of_fit(model)
        without_data = bool(fit) and fit["validation_data"] is None
        validation_may_come = self.name.startswith("val_") and not (
            validated
            or without_data
            or (not fit and any(name.startswith("val_") for name in logs))
            or (_tests_what_it_trains(model) and self.name.removeprefix("val_") not in logs)
        )
        if validation_may_come:
            return
        hint = ""
        if self.name.startswith("val_") and without_data:
            hint = "fit was given no validation_data. "
        raise ValueError(
            f"{self.owner} expects a log that every epoch (every epoch with validation) has. "
            f"Received: monitor={self.name!r}, while the logs are {sorted(logs)}. {hint}Choose "
            "one of these, or, if another callback logs it, place that callback before this one "
            "and let it log NaN where it computes nothing."
        )


def direction_of(monitor: str, model: Any) -> str | None:
    """Tell whether more is better: `"max"` or `"min"`; None where nothing tells.

    The compiled metric of that name decides by its class, else the name itself.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> direction_of("val_accuracy", model), direction_of("quality", model)
    ('max', None)
    """
    name = monitor.removeprefix("val_")
    for metric in _compiled_metrics(model):
        if name == metric.name or name.endswith(f"_{metric.name}"):
            if isinstance(metric, _HIGHER_IS_BETTER):
                return "max"
            if isinstance(metric, _LOWER_IS_BETTER):
                return "min"
    name = re.sub(r"_\d+$", "", name.lower())  # Keras numbers metrics of one name: auc_1
    if re.search(rf"(^|_)({_LOWER_NAMES})$", name):
        return "min"
    if re.search(rf"(^|_)({_HIGHER_NAMES})$", name):
        return "max"
    return None


def as_float(value: Any) -> float | None:
    """Turn one number of Python, NumPy or a backend into a float; None for all else.

    Example:
    >>> as_float(keras.ops.ones(())), as_float([0.5, 0.7]), as_float("0.5")
    (1.0, None, None)
    """
    if isinstance(value, (int, float)):  # a backend would round it to float32
        return float(value)
    if isinstance(value, str):
        return None
    try:
        array = keras.ops.convert_to_numpy(value)
        return float(array.item()) if array.size == 1 else None
    except (TypeError, ValueError):
        return None


def _is_built(model: Any) -> bool:
    # TensorFlow builds metrics, and models without an Input, in the first step.
    return model.built and all(getattr(metric, "built", True) for metric in model.metrics)


def _compiled_metrics(model: Any) -> Iterator[Any]:
    """Yield metrics as objects of their own; Keras holds those given to `compile` in one container."""
    for metric in model.metrics:
        yield from getattr(metric, "metrics", [metric])


def _tests_what_it_trains(model: Any) -> bool:
    """Tell whether both of the model's steps are Keras's, so that validation logs the same metrics."""
    return all(
        getattr(getattr(model, step), "__func__", None) is getattr(keras.Model, step)
        for step in ("train_step", "test_step")
    )


# Keras knows the direction of its metrics in a private attribute only, so it is written down here.
_HIGHER_IS_BETTER = tuple(
    getattr(keras.metrics, name)
    for name in (
        "AUC",
        "Accuracy",
        "BinaryAccuracy",
        "BinaryIoU",
        "CategoricalAccuracy",
        "ConcordanceCorrelation",
        "CosineSimilarity",
        "F1Score",
        "FBetaScore",
        "IoU",
        "MeanIoU",
        "OneHotIoU",
        "OneHotMeanIoU",
        "PearsonCorrelation",
        "Precision",
        "PrecisionAtRecall",
        "R2Score",
        "Recall",
        "RecallAtPrecision",
        "SensitivityAtSpecificity",
        "SparseCategoricalAccuracy",
        "SparseTopKCategoricalAccuracy",
        "SpecificityAtSensitivity",
        "TopKCategoricalAccuracy",
        "TrueNegatives",
        "TruePositives",
    )
)
_LOWER_IS_BETTER = tuple(
    getattr(keras.metrics, name)
    for name in (
        "BinaryCrossentropy",
        "CategoricalCrossentropy",
        "CategoricalHinge",
        "FalseNegatives",
        "FalsePositives",
        "Hinge",
        "KLDivergence",
        "LogCoshError",
        "MeanAbsoluteError",
        "MeanAbsolutePercentageError",
        "MeanSquaredError",
        "MeanSquaredLogarithmicError",
        "Poisson",
        "RootMeanSquaredError",
        "SparseCategoricalCrossentropy",
        "SquaredHinge",
    )
)
_HIGHER_NAMES = (
    "acc|accuracy|auc|auroc|precision|recall|sensitivity|specificity|f1|f1_?score|fbeta_score|"
    "f_?score|io_?u|miou|dice|dice_score|jaccard|r2|r2_score|correlation|cosine_similarity|"
    "true_(positives|negatives)|precision_at_recall|recall_at_precision|"
    "sensitivity_at_specificity|specificity_at_sensitivity|psnr|ssim|bleu"
)
_LOWER_NAMES = (
    "loss|error|mse|mae|mape|msle|rmse|mean_(squared|absolute|absolute_percentage|"
    "squared_logarithmic)_error|cross_?entropy|kl_divergence|kld|divergence|poisson|hinge|"
    "log_?cosh|perplexity|nll|false_(positives|negatives)|wer|cer"
)
