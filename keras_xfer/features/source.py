"""What features are computed of: arrays, or anything that gives batches of them, read row by row.

Every source gives batches as flat lists of NumPy arrays: the leaves of `(x, *rest)`, `rest` being
labels and sample weights.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_xfer.features import digests
from keras_xfer.features.nesting import describe, flatten

DEFAULT_BATCH_SIZE = 32

Leaves = list[np.ndarray]


class DataChangedError(ValueError):
    """The rows that were read are not those that the data were known by."""


class Source:
    """Rows of `(x, *rest)` in batches.

    Attributes:
        structure: what one batch is, see `nesting.describe`.
        x_structure: the same of its `x`; rest_structure: of the tuple of what comes with it.
        first: leaves of the first batch.
        x_leaves: how many of them are of `x`.
        rows_per_batch: int, rows of a batch that is computed at once.
        num_rows: int, or None where it is not known before a pass has ended.
        seeks: bool, whether `read` can begin anywhere and always gives the same.
        one_pass: bool, whether there is only one pass to be had.
        ordered: bool, whether the same rows in another order are other data.
    """

    seeks = False
    one_pass = False
    ordered = True
    num_rows: int | None = None

    def __init__(self, batch: tuple[Any, ...], rows_per_batch: int | None = None) -> None:
        self.first = leaves_of(batch)
        self.structure = describe(batch)
        self.x_structure = describe(batch[0])
        self.rest_structure = describe(batch[1:])
        self.x_leaves = len(flatten(batch[0]))
        for label in self.first[self.x_leaves :]:
            if label.dtype.kind == "U":
                raise ValueError(
                    "Expected labels and sample weights as numbers. Received: an array of "
                    f"strings, {label[:3].tolist()}…; use the index of each class."
                )
        self.rows_per_batch = rows_per_batch or len(self.first[0])
        self._specs = [_spec(leaf) for leaf in self.first]

    def content(self) -> Any:
        """What tells these data from others, in JSON."""
        raise NotImplementedError

    def read(self, first_row: int = 0) -> Iterator[Leaves]:
        """Batches from `first_row` on; 0 where the source does not seek."""
        raise NotImplementedError

    def check(self, digest: digests.RowsDigest) -> None:
        """Fail where the rows that were read are not those that `content` spoke of."""

    def _named(self, key: str) -> Any:
        """What tells data that go by a name from others of that name, in JSON."""
        named = {"key": key, "structure": self.structure, "specs": self._specs}
        return {**named, "rows": self.num_rows}

    def inputs(self) -> Any:
        """Structure, shapes and dtypes of `x`, in JSON."""
        return [self.x_structure, self._specs[: self.x_leaves]]

    def _checked(self, batch: Any) -> Leaves:
        """The leaves of a batch that is like the first but for its number of rows."""
        parts = as_tuple(batch)
        leaves = leaves_of(parts)
        specs = [_spec(leaf) for leaf in leaves]
        if describe(parts) != self.structure or specs != self._specs:
            raise ValueError(
                "Expected every batch to be like the first, but for its number of rows: "
                f"{_shown(self.structure, self._specs)}. Received: {_shown(describe(parts), specs)}."
            )
        return leaves


class _Arrays(Source):
    """Arrays in memory or mapped into it."""

    seeks = True

    def __init__(self, data: tuple[Any, ...], batch_size: int | None) -> None:
        self._leaves = leaves_of(data)
        self.num_rows = len(self._leaves[0])
        if not self.num_rows:
            raise _empty()
        super().__init__(data, batch_size or DEFAULT_BATCH_SIZE)
        self.first = next(self.read())

    def content(self) -> Any:
        return {"arrays": digests.of_arrays(self._leaves), "structure": self.structure}

    def read(self, first_row: int = 0) -> Iterator[Leaves]:
        for first in range(first_row, len(self._leaves[0]), self.rows_per_batch):
            yield [leaf[first : first + self.rows_per_batch] for leaf in self._leaves]


class _Fingerprinted(Source):
    """A `PyDataset` that tells by `fingerprint()` what it holds, and reads it `in_order()`: all
    its batches but the last are of `batch_size` rows."""

    seeks = True

    def __init__(self, data: Any, name: Callable[[], Any], key: str | None) -> None:
        self._data = data.in_order()
        self._name = name if key is None else lambda: key
        self._key = key
        self._fingerprint = self._name()
        super().__init__(as_tuple(self._data[0]), self._data.batch_size)
        last = len(self._data) - 1
        tail = len(leaves_of(as_tuple(self._data[last]))[0]) if last else len(self.first[0])
        self.num_rows = last * self._data.batch_size + tail

    def content(self) -> Any:
        if self._key is not None:
            return self._named(self._key)
        return {"fingerprint": self._fingerprint}

    def read(self, first_row: int = 0) -> Iterator[Leaves]:
        index, skipped = divmod(first_row, self.rows_per_batch)
        for i in range(index, len(self._data)):
            yield [leaf[skipped:] for leaf in self._checked(self._data[i])]
            skipped = 0

    def check(self, digest: digests.RowsDigest) -> None:  # noqa: ARG002 - rows need not be hashed
        if self._name() != self._fingerprint:
            raise DataChangedError(
                "Expected the data to stay as they are while their features are computed. "
                f"Received: data={self._data!r}, whose fingerprint() has changed meanwhile: files "
                "were written. Call again."
            )


class _Batches(Source):
    """What can be iterated again and again, such as a tf.data.Dataset."""

    def __init__(self, batches: Callable[[], Iterable[Any]], key: str | None) -> None:
        self._batches = batches
        self._key = key
        self._content: str | None = None
        for batch in batches():
            if len(leaves_of(as_tuple(batch))[0]):
                break
        else:
            raise _empty()
        super().__init__(as_tuple(batch))
        # Whoever reshuffles batches in every pass keeps labels beside their rows.
        self.ordered = self.x_leaves == len(self.first)

    def content(self) -> Any:
        if self._key is not None:
            return self._named(self._key)
        if self._content is None:
            digest = digests.RowsDigest(ordered=self.ordered)
            for leaves in self.read():
                digest.update(digests.of_rows(leaves))
            self._content, self.num_rows = digest.hexdigest(), digest.rows
        return {"rows": self._content, "structure": self.structure, "specs": self._specs}

    def read(self, first_row: int = 0) -> Iterator[Leaves]:
        assert first_row == 0  # noqa: S101 - it does not seek
        for batch in self._batches():
            leaves = self._checked(batch)
            if len(leaves[0]):
                yield leaves

    def check(self, digest: digests.RowsDigest) -> None:
        if self._content is None or digest.hexdigest() == self._content:
            return
        counts = f"{self.num_rows} rows in the first pass, {digest.rows} in the second"
        raise DataChangedError(
            "Expected data that are the same in every pass. Received: data that differ from pass "
            f"to pass ({counts}): random augmentation in the pipeline, or inputs without labels "
            "that are shuffled anew? Move the augmentation into the model and store it in views= "
            "passes, shuffle after caching (shuffle=True), or name the data with key=."
        )


class _OnePass(_Batches):
    """A generator or another iterator."""

    one_pass = True

    def __init__(self, iterator: Iterator[Any], key: str) -> None:
        first = next((batch for batch in iterator if len(leaves_of(as_tuple(batch))[0])), None)
        if first is None:
            raise _empty()
        super().__init__(lambda: [first], key)
        self._batches = lambda: itertools.chain([first], iterator)


def source_of(data: Any, *, batch_size: int | None = None, key: str | None = None) -> Source:
    """The source that reads `data`, whatever they are; see `FeatureCache.features`."""
    if key is not None and (not isinstance(key, str) or not key):
        raise TypeError(f"Expected key to be a string that names the data. Received: key={key!r}.")
    if isinstance(data, keras.utils.PyDataset):
        return _of_py_dataset(data, key)
    if is_tf_dataset(data):
        if int(data.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
            raise _infinite("tf.data.Dataset.repeat()", "take them: data.take(n) batches")
        return _Batches(data.as_numpy_iterator, key)
    if is_arrays(data):
        parts = data if isinstance(data, tuple) else (data,)
        source = _Arrays(as_tuple(parts), batch_size)
        return source if key is None else _Named(as_tuple(parts), batch_size, key)
    if isinstance(data, Iterator):
        if key is None:
            raise ValueError(
                "Expected data that can be read twice, to know them by their content. Received: "
                f"data={data!r} of type {type(data).__name__}, which is used up by one pass. Name "
                "the data, key='birds of 2024', or pass arrays, a keras.utils.PyDataset, a "
                "tf.data.Dataset or a DataLoader."
            )
        return _OnePass(data, key)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict | list | tuple):
        return _Batches(lambda: data, key)
    raise TypeError(
        "Expected arrays, a tuple (x, y) or (x, y, sample_weight) of them, a "
        "keras.utils.PyDataset, a tf.data.Dataset, a torch DataLoader or another iterable of "
        f"batches. Received: data of type {type(data).__name__}."
    )


class _Named(_Arrays):
    """Arrays that go by the name that they were given."""

    def __init__(self, data: tuple[Any, ...], batch_size: int | None, key: str) -> None:
        super().__init__(data, batch_size)
        self._key = key

    def content(self) -> Any:
        return self._named(self._key)


def _of_py_dataset(data: Any, key: str | None) -> Source:
    fingerprint = getattr(data, "fingerprint", None)
    if fingerprint is not None and hasattr(data, "in_order"):
        return _Fingerprinted(data, fingerprint, key)
    try:
        length = data.num_batches
    except NotImplementedError:
        length = None
    if length is None:
        raise _infinite("a PyDataset without an end", "give it `num_batches`, or `__len__`")
    return _Batches(lambda: (data[i] for i in range(data.num_batches)), key)


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """`(x, *rest)` of what a dataset calls a batch."""
    if isinstance(batch, list):  # as torch's DataLoader makes them
        batch = tuple(batch)
    if not isinstance(batch, tuple):
        return (batch,)
    if not 1 <= len(batch) <= 3:
        raise ValueError(
            "Expected x, (x, y) or (x, y, sample_weight). Received: a tuple of "
            f"{len(batch)} parts; several inputs go into a list or a dict."
        )
    return batch


def leaves_of(batch: tuple[Any, ...]) -> Leaves:
    """The arrays of `(x, *rest)`, all of one number of rows."""
    leaves = [to_numpy(leaf) for leaf in flatten(batch)]
    if not flatten(batch[0]):
        raise ValueError(f"Expected at least one array of inputs. Received: x={batch[0]!r}")
    if any(leaf.ndim == 0 for leaf in leaves) or len({len(leaf) for leaf in leaves}) > 1:
        raise ValueError(
            "Expected arrays of one number of rows, inputs, labels and weights alike (data that "
            "come one by one: dataset.batch(32)). Received: arrays of shapes "
            f"{', '.join(str(leaf.shape) for leaf in leaves)}."
        )
    return leaves


def to_numpy(value: Any) -> np.ndarray:
    """An array of whatever library as one of NumPy's."""
    if hasattr(value, "detach"):  # torch, on whatever device
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype == object:
        texts = [text.decode() if isinstance(text, bytes) else text for text in array.ravel()]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                "Expected arrays of numbers or strings, of one shape a row. Received: an array of "
                f"Python objects of shape {array.shape} (ragged rows?): {str(value)[:80]}"
            )
        array = np.array(texts).reshape(array.shape)
    if array.dtype.type is np.void:
        raise ValueError(
            "Expected numbers or strings as inputs, labels and sample weights. Received: an array "
            f"of dtype {array.dtype}; pass each of its fields as an array of its own."
        )
    if not array.dtype.isnative:  # JAX and torch take no other order of bytes than the machine's
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def _spec(leaf: np.ndarray) -> list[Any]:
    return [list(leaf.shape[1:]), digests.kind_of(leaf)]


def _shown(structure: Any, specs: list[list[Any]]) -> str:
    return f"{structure} of rows {', '.join(f'{dtype}{shape}' for shape, dtype in specs)}"


def is_arrays(data: Any) -> bool:
    """Whether `data` are arrays, of whatever library and however nested."""
    leaves = flatten(data)
    return bool(leaves) and all(
        hasattr(leaf, "__array__") or hasattr(leaf, "detach") for leaf in leaves
    )


def is_tf_dataset(data: Any) -> bool:
    """Whether `data` are a `tf.data.Dataset`, without importing TensorFlow."""
    tensorflow = sys.modules.get("tensorflow")  # whoever has such data has imported it
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def _empty() -> ValueError:
    return ValueError("Expected at least one row of data. Received: data without any.")


def _infinite(what: str, mend: str) -> ValueError:
    return ValueError(
        f"Expected data that end: their features are stored. Received: {what}. To mend it, {mend}."
    )
