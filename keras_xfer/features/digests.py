"""SHA-256 of arrays and of their rows."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_CHUNK_BYTES = 2**24


def of_json(value: Any) -> str:
    """The digest of a value of JSON, whatever the order of its dicts."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """The digest of the content of arrays, with their shapes and dtypes.

    Example:

    >>> of_arrays([np.zeros(3)]) == of_arrays([np.zeros(3)])
    True
    >>> of_arrays([np.zeros(4)]) == of_arrays([np.zeros((2, 2))])
    False
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps([kind_of(array), list(array.shape)]).encode())
        row_bytes = max(1, array.nbytes // max(1, len(array))) if array.ndim else 1
        step = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, len(array), step) if array.ndim else ():
            digest.update(_bytes(array[first : first + step]))
        if not array.ndim:
            digest.update(_bytes(array))
    return digest.hexdigest()


def of_rows(leaves: Sequence[np.ndarray]) -> list[bytes]:
    """One digest for each row, which all `leaves` share.

    Example:

    >>> first, second = of_rows([np.array([[1, 2], [1, 2]]), np.array([0, 0])])
    >>> first == second
    True
    """
    digests = []
    for row in range(len(leaves[0])):
        digest = hashlib.sha256()
        for leaf in leaves:
            digest.update(_bytes(leaf[row]))
        digests.append(digest.digest())
    return digests


class RowsDigest:
    """The digest of rows that arrive in batches of whatever size.

    Args:
        ordered: bool. `False` counts the same rows in another order as the same.

    Example:

    >>> forth, back = RowsDigest(ordered=False), RowsDigest(ordered=False)
    >>> forth.update(of_rows([np.array([1, 2])]))
    >>> back.update(of_rows([np.array([2, 1])]))
    >>> forth.hexdigest() == back.hexdigest()
    True
    """

    def __init__(self, *, ordered: bool) -> None:
        self.rows = 0
        self._ordered = hashlib.sha256() if ordered else None
        self._sum = 0

    def update(self, digests: Sequence[bytes]) -> None:
        """Add rows, by what `of_rows` gives."""
        self.rows += len(digests)
        if self._ordered is not None:
            self._ordered.update(b"".join(digests))
        else:
            self._sum += sum(int.from_bytes(digest) for digest in digests)

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        if self._ordered is not None:
            return self._ordered.hexdigest()
        # The sum of what nobody can choose: a multiset hash.
        return f"{self._sum % 2**256:064x}-{self.rows}"


def kind_of(array: np.ndarray) -> str:
    """The dtype of `array` by name; strings of whatever length are one dtype."""
    return "str" if array.dtype.kind == "U" else array.dtype.name


def _bytes(array: Any) -> bytes:
    if array.dtype.kind == "U":  # an array of strings is as wide as its longest
        return json.dumps(np.asarray(array).tolist()).encode()
    return array.tobytes()
