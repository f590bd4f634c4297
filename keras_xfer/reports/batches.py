"""Any labelled data that Keras takes, as batches of NumPy arrays in one pass."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

BATCH_SIZE = 32  # of arrays: Keras's own default

_INFINITE = -1  # tf.data.INFINITE_CARDINALITY


def batches(data: Any) -> Iterator[tuple[Any, np.ndarray | None]]:
    """Go through `data` once.

    Each batch is the inputs, structured as the model takes them, and the class indices of its
    rows, or `None` without labels.
    """
    for x, y in _arrays(data) if _holds_arrays(data) else _iterated(data):
        inputs = _mapped(x, to_numpy)
        rows = count(inputs)
        labels = None if y is None else _class_indices(y)
        if labels is not None and len(labels) != rows:
            raise ValueError(
                "Expected one label for each row of the inputs. Received: "
                f"{rows} rows and {len(labels)} labels"
            )
        if rows:
            yield inputs, labels


def count(inputs: Any) -> int:
    """Count the rows of a batch."""
    sizes = [int(leaf.shape[0]) if len(leaf.shape) else -1 for leaf in keras.tree.flatten(inputs)]
    if len(set(sizes)) != 1 or sizes[0] < 0:
        raise ValueError(
            "Expected batches, whose arrays have as many rows each. Received: arrays of the shapes "
            f"{[tuple(leaf.shape) for leaf in keras.tree.flatten(inputs)]}. Batch a dataset with "
            "its `batch(32)`."
        )
    return sizes[0]


def filled(inputs: Any, rows: int) -> Any:
    """Repeat the last row of a batch until there are `rows`."""

    def fill(leaf: Any) -> Any:
        return np.concatenate([leaf, np.repeat(leaf[-1:], rows - len(leaf), axis=0)])

    whole = all(isinstance(leaf, np.ndarray) for leaf in keras.tree.flatten(inputs))
    return _mapped(inputs, fill) if whole else inputs


def to_numpy(value: Any) -> Any:
    """Make an array of what Keras takes for one; a tf.RaggedTensor stays what it is."""
    if hasattr(value, "flat_values"):
        return value
    if hasattr(value, "toarray"):  # of scipy.sparse
        return value.toarray()
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    if hasattr(value, "numpy"):  # a tensor of another backend, such as a batch of tf.data
        return value.numpy()
    return np.asarray(value)


def _holds_arrays(data: Any) -> bool:
    """Tell arrays, what `evaluate` takes as `x, y, sample_weight`, from batches of them."""
    return isinstance(data, tuple | Mapping) or hasattr(data, "shape")


def _arrays(data: Any) -> Iterator[tuple[Any, Any]]:
    x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
    x = _mapped(x, _sliceable)
    y = None if y is None else _sliceable(_only(y))
    rows = count(x)
    if y is not None and len(y) != rows:
        raise ValueError(
            "Expected arrays (x, y) with one label for each row. Received: "
            f"{rows} rows and {len(y)} labels"
        )
    for start in range(0, rows, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        yield _mapped(x, operator.itemgetter(part)), None if y is None else y[part]


def _iterated(data: Any) -> Iterator[tuple[Any, Any]]:
    endless = isinstance(data, keras.utils.PyDataset) and data.num_batches is None
    if hasattr(data, "cardinality"):
        endless = int(data.cardinality()) == _INFINITE
    if endless or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ValueError(
            "Expected data that end: arrays (x, y), a PyDataset, tf.data.Dataset, DataLoader or "
            f"generator of batches. Received: data={data!r}"
            + (", which has no end: give it one with `take(...)`." if endless else "")
        )
    for batch in data:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        yield x, None if y is None else _only(y)


def _mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to each array; a list of numbers or strings is one."""
    if isinstance(x, Mapping):
        return {name: _mapped(value, function) for name, value in x.items()}
    if isinstance(x, list | tuple) and not any(np.isscalar(each) for each in x):
        mapped = [_mapped(each, function) for each in x]
        return mapped if isinstance(x, list) else tuple(mapped)
    return function(x)


def _only(y: Any) -> Any:
    """Take the labels of a model's one output out of the dict that names it."""
    if not isinstance(y, Mapping):
        return y
    if len(y) != 1:
        raise ValueError(
            "Expected the labels of one output. Received: labels of the outputs "
            f"{list(y)}. Give those of the output to report on alone."
        )
    return next(iter(y.values()))


def _sliceable(value: Any) -> Any:
    # Slices of a JAX array would each be compiled.
    return value.tocsr() if hasattr(value, "tocsr") else to_numpy(value)


def _class_indices(y: Any) -> np.ndarray:
    labels = np.asarray(to_numpy(y))
    if labels.ndim == 2 and labels.shape[1] > 1:
        highest = labels == labels.max(axis=1, keepdims=True)
        several = highest.sum(axis=1) != 1
        if several.any():
            raise ValueError(
                "Expected one class for each row: class indices, or one-hot rows. Received: "
                f"the row {labels[several][0].tolist()}"
            )
        return labels.argmax(axis=1)
    if labels.ndim not in (1, 2):
        raise ValueError(
            "Expected labels of the shape (batch,), (batch, 1) or (batch, classes). Received: "
            f"labels of the shape {labels.shape}. Batch a dataset with its `batch(32)`."
        )
    labels = labels.reshape(-1)
    if labels.dtype.kind not in "biuf" or not np.array_equal(labels, np.floor(labels)):
        raise ValueError(
            "Expected class indices, or one-hot rows. Received: labels "
            f"{labels[:5].tolist()} of dtype {labels.dtype}"
        )
    return labels.astype(int)
