"""What can be told before the first trial: that a hypermodel and what it is given do not fit."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import keras_tuner
import numpy as np

from keras_xfer.features.nesting import flatten
from keras_xfer.features.source import as_tuple, is_arrays, is_tf_dataset, leaves_of, to_numpy
from keras_xfer.features.training_data import TrainingData
from keras_xfer.tuner.backbones import Shape

if TYPE_CHECKING:
    from keras_xfer.tuner.hyper_transfer import HyperTransfer

# What a schedule logs beside the losses and metrics, and its times.
_OF_SCHEDULE = ("stage", "trainable_params", "learning_rate", "backbone_learning_rate")
_OF_TIMES = "second"


def check_search(
    hypermodel: "HyperTransfer",
    objectives: Iterable[str],
    x: Any,
    y: Any,
    validation_data: Any,
    callbacks: Iterable[Any],
    arguments: Mapping[str, Any],
) -> None:
    """Raise where every trial of a search would fail, or learn from wrong labels.

    Of data that come in batches the first is looked at, where that uses none up.

    Args:
        hypermodel: a `HyperTransfer`.
        objectives: names of what the search compares trials by.
        x: as of `Model.fit`.
        y: as of `Model.fit`.
        validation_data: as of `Model.fit`.
        callbacks: of each trial.
        arguments: mapping, further arguments of `Model.fit`.

    Raises:
        TypeError: there is no such argument, or the data are of a kind that `fit` does not take.
        ValueError: the data, or the objective, do not do.
    """
    if validation_data is None and not arguments.get("validation_split"):
        raise ValueError(
            "Expected validation_data, on which the trials are compared. Received: "
            "validation_data=None. Keep some of the images for it."
        )
    for name in objectives:
        _check_objective(hypermodel, name, callbacks)
    check_validation_freq(arguments.get("validation_freq"))
    check_batch_size(hypermodel.takes_batch_size(), x)
    TrainingData(x, y, validation_data, dict(arguments), views=1, seed=0, key=None, verbose=0)
    if is_arrays(x):
        if y is not None and not is_arrays(y):
            raise ValueError(
                f"Expected labels as an array. Received: y of type {type(y).__name__}. Pass "
                "numpy.asarray(y)."
            )
        leaves_of((x, y, arguments.get("sample_weight")))
        _check_has_labels(hypermodel, (x, y), "arrays x")
    else:
        _check_batches(hypermodel, x, "x")
    if is_arrays(validation_data):
        parts = as_tuple(validation_data)
        leaves_of(parts)
        _check_has_labels(hypermodel, parts, "arrays validation_data")
    elif validation_data is not None:
        _check_batches(hypermodel, validation_data, "validation_data")
    check_arrays(hypermodel, y, validation_data)


def check_arrays(hypermodel: "HyperTransfer", y: Any, validation_data: Any) -> None:
    """Raise where labels in arrays are not those of the loss, see `check_labels`.

    Args:
        hypermodel: a `HyperTransfer`.
        y: as of `Model.fit`.
        validation_data: as of `Model.fit`; what is no arrays is left alone.
    """
    check_labels(hypermodel, y, "y")
    if validation_data is not None and is_arrays(validation_data):
        check_labels(hypermodel, _labels(as_tuple(validation_data)), "validation_data")


def check_labels(hypermodel: "HyperTransfer", labels: Any, name: str) -> None:
    """Raise where labels are not those of the loss: what it does not refuse, it learns from.

    Args:
        hypermodel: a `HyperTransfer`; with a loss of its own it takes any labels, with a head of its
            own any shape.
        labels: array; what is none is left to `fit`.
        name: str, what they were given as.

    Raises:
        ValueError: they are of another kind, shape or range.
    """
    leaves = flatten(labels)
    if hypermodel.loss is not None or len(leaves) != 1 or not is_arrays(labels):
        return
    array, count = to_numpy(leaves[0]), hypermodel.num_classes
    shape, is_free = array.shape[1:], hypermodel.head is not None
    single = shape in ((), (1,))
    if array.dtype.kind == "U":
        raise ValueError(
            f"Expected labels as numbers. Received: {name} with strings, "
            f"{array.ravel()[:3].tolist()}…; use the index of each class."
        )
    if hypermodel.task == "regression":
        if not (is_free or shape == (count,) or (single and count == 1)):
            raise _wrong_shape(f"{count} numbers an image (num_classes={count})", name, array)
        return
    if count > 1 and hypermodel.label_mode == "categorical":
        if single:
            raise _other_mode(hypermodel, name, array, "integers", "int")
        if not (is_free or shape == (count,)):
            raise _wrong_shape(f"one-hot labels of {count} classes", name, array)
        return
    if shape == (count,) and count > 1:
        raise _other_mode(hypermodel, name, array, "one-hot labels", "categorical")
    if not (is_free or single):
        raise _wrong_shape(f"one label an image (num_classes={count})", name, array)
    _check_range(name, array, count)


def check_validation_freq(validation_freq: Any) -> None:
    """Raise where not every epoch of a trial is validated.

    Args:
        validation_freq: as of `Model.fit`, or None.

    Raises:
        keras_tuner.errors.FatalValueError: a ValueError that ends a search, since all of its trials
            would fail.
    """
    if validation_freq not in (None, 1):
        raise keras_tuner.errors.FatalValueError(
            "Expected validation_freq=1, since the epochs of a trial are compared by what the "
            f"validation says. Received: validation_freq={validation_freq!r}. Leave it out."
        )


def check_batch_size(is_asked: bool, x: Any) -> None:
    """Raise where `batch_size` is a hyperparameter of data that come in batches.

    Args:
        is_asked: bool, whether it is one.
        x: as of `Model.fit`.

    Raises:
        ValueError: they do.
    """
    if is_asked and not is_arrays(x):
        raise ValueError(
            "Expected arrays, where batch_size is a hyperparameter. Received: data that come in "
            f"batches, x={type(x).__name__}. Leave batch_size out of tune and space."
        )


def check_image_size(backbone: str, takes: Shape, image_size: int) -> None:
    """Raise if a backbone cannot be given images of the size that the search says.

    Args:
        backbone: str, its name.
        takes: height and width of the images that it takes, None for any.
        image_size: int, the hyperparameter.

    Raises:
        ValueError: it takes another size.
    """
    if any(side not in (None, image_size) for side in takes):
        raise ValueError(
            f"Expected a backbone that takes images of any size, or of image_size={image_size}. "
            f"Received: backbone {backbone!r}, which takes images of {takes[0]} x {takes[1]} pixels "
            "alone. Leave image_size out of space, and they are resized to that; or give a function "
            "of input_shape that builds the backbone for it."
        )


def _check_range(name: str, array: np.ndarray, count: int) -> None:
    if not array.size:
        return
    values = array if array.dtype.kind in "biuf" else array.astype("float32")  # such as bfloat16
    low, high, most = values.min(), values.max(), max(count, 2) - 1
    is_whole = values.dtype.kind in "biu" or bool(np.all(values == np.floor(values)))
    if is_whole and low >= 0 and high <= most:
        return
    expected = f"labels from 0 to {most}" if count > 1 else "labels 0 and 1"
    got = f"from {low} to {high}" if is_whole else f"such as {_first_fraction(values)}"
    raise ValueError(
        f"Expected {expected} (num_classes={count}). Received: {name} with values {got}. Number the "
        "classes from 0, or give HyperTransfer another num_classes, task or loss."
    )


def _first_fraction(values: np.ndarray) -> Any:
    return values[values != np.floor(values)].ravel()[0]


def _check_batches(hypermodel: "HyperTransfer", data: Any, name: str) -> None:
    batch = _first_batch(data)
    if batch is None:
        return
    leaves_of(batch)
    _check_has_labels(hypermodel, batch, f"batches of {name}")
    check_labels(hypermodel, _labels(batch), f"batches of {name}")


def _labels(parts: tuple[Any, ...]) -> Any:
    return parts[1] if len(parts) > 1 else None


def _first_batch(data: Any) -> tuple[Any, ...] | None:
    """The first batch of what gives it again; None of what does not, or starts processes for it."""
    if isinstance(data, keras.utils.PyDataset):
        return as_tuple(data[0])
    if is_tf_dataset(data):
        for batch in data.take(1):
            return as_tuple(batch)
        raise ValueError("Expected at least one row of data. Received: a tf.data.Dataset of none.")
    return None


def _check_has_labels(hypermodel: "HyperTransfer", parts: tuple[Any, ...], name: str) -> None:
    if hypermodel.loss is None and _labels(parts) is None:
        raise ValueError(
            f"Expected labels beside the images. Received: {name} without any. Pass both, (x, y), or "
            "give HyperTransfer a loss that needs none."
        )


def _check_objective(hypermodel: "HyperTransfer", name: str, callbacks: Iterable[Any]) -> None:
    known = _logged(hypermodel)
    if known is None or any(_may_log(each) for each in callbacks):
        return
    own = name.removeprefix("val_")
    if own not in known and own not in _OF_SCHEDULE and _OF_TIMES not in own:
        raise ValueError(
            "Expected an objective that the trials log, one of "
            f"{', '.join(f'val_{each}' for each in known)}. Received: objective={name!r}. Give "
            "objective= one of these, or HyperTransfer this metric."
        )
    _check_is_a_number(hypermodel, name)


def _check_is_a_number(hypermodel: "HyperTransfer", name: str) -> None:
    """Of the metrics of Keras that may be one number for each class."""
    metrics, several = keras.metrics, hypermodel.num_classes > 1
    for metric in hypermodel.metrics or ():
        is_vector = (isinstance(metric, metrics.FBetaScore) and metric.average is None) or (
            isinstance(metric, metrics.R2Score) and metric.class_aggregation is None
        )
        if several and is_vector and metric.name == name.removeprefix("val_"):
            raise ValueError(
                f"Expected an objective that is one number. Received: objective={name!r}, of which "
                f"{type(metric).__name__} gives one for each class. Tell the metric how to bring "
                "them together, such as average='macro'."
            )


def _logged(hypermodel: "HyperTransfer") -> list[str] | None:
    """The names of the loss and the metrics; None where there may be others (several outputs)."""
    if isinstance(hypermodel.loss, list | tuple | Mapping):
        return None
    metrics = hypermodel.metrics
    if metrics is None:
        return ["loss", "mae" if hypermodel.task == "regression" else "accuracy"]
    names = list(_names(metrics))
    return None if None in names else ["loss", *map(str, names)]


def _names(metrics: Any) -> Iterator[str | None]:
    if not isinstance(metrics, list | tuple):
        yield None
        return
    for each in metrics:
        # As Keras calls them in the logs.
        named = getattr(each, "name", None) or getattr(each, "__name__", None)
        yield each if isinstance(each, str) else named


def _may_log(callback: Any) -> bool:
    """Whether a callback may add to the logs: one of the user's own."""
    is_keras = type(callback).__module__.partition(".")[0] == "keras"
    return not is_keras or isinstance(callback, keras.callbacks.LambdaCallback)


def _other_mode(
    hypermodel: "HyperTransfer", name: str, array: np.ndarray, kind: str, mode: str
) -> ValueError:
    return ValueError(
        f"Expected labels of label_mode={hypermodel.label_mode!r}. Received: {name} of shape "
        f"{array.shape}, which looks like {kind}: pass label_mode={mode!r} to HyperTransfer."
    )


def _wrong_shape(expected: str, name: str, array: np.ndarray) -> ValueError:
    return ValueError(
        f"Expected {expected}. Received: {name} of shape {array.shape}. Give HyperTransfer another "
        "num_classes, or labels of that shape."
    )
