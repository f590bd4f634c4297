"""A tree of plain data and arrays as one file: written whole or not at all, read whole or not at all.

The file is a zip archive: `content.json`, in which each array is a number, and the arrays as
`.npy`. Nothing in it is code, and every part carries a checksum.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_xfer.files import replacing

_FORMAT = "keras_xfer bundle 1"
_CONTENT = "content.json"
_ARRAY = "keras_xfer array"  # the key that marks the place of an array in the JSON


def write_bundle(filepath: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a tree of plain data and arrays, atomically.

    Args:
        filepath: str or path, the file to write.
        content: dicts with str keys, lists, str, numbers, bool, None and NumPy arrays. Tuples come
            back as lists, NumPy scalars as numbers of Python.

    Raises:
        OSError: as `keras_xfer.files.replacing`.
        TypeError: there is something else in `content`; its place is named.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "state.zip"
    >>> write_bundle(path, {"epoch": 3, "weights": [np.ones(2)]})
    >>> read_bundle(path)
    {'epoch': 3, 'weights': [array([1., 1.])]}
    """
    arrays: list[np.ndarray] = []
    plain = {"format": _FORMAT, "content": _to_plain(content, arrays, "content")}
    with replacing(filepath) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_CONTENT, json.dumps(plain))
        for number, array in enumerate(arrays):
            with archive.open(f"{number}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_bundle(filepath: str | os.PathLike[str], *, arrays: bool = True) -> dict[str, Any]:
    """Read what `write_bundle` wrote.

    Args:
        filepath: str or path, the file to read.
        arrays: bool, whether to read the arrays; without, None stands in their places.

    Returns:
        dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no bundle.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "state.zip"
    >>> write_bundle(path, {"epoch": 3, "weights": np.ones(2)})
    >>> read_bundle(path, arrays=False)
    {'epoch': 3, 'weights': None}
    """
    path = Path(filepath)
    if not path.stat().st_size:
        raise ValueError(f"it is empty: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            plain = json.loads(archive.read(_CONTENT))
            if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
                raise ValueError(f"it is no {_FORMAT!r}")
            content: dict[str, Any] = _from_plain(plain["content"], archive if arrays else None)
            return content
    except KeyError as error:  # zipfile's, over a name that is not in the archive
        raise ValueError(f"{error.args[0]}: {path}") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{error}: {path}") from None


def _to_plain(value: Any, arrays: list[np.ndarray], where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"Expected str keys in {where}. Received: {list(value)!r}.")
        return {key: _to_plain(each, arrays, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(each, arrays, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "biufcV"
        and value.dtype.fields is None
    ):
        # Types that NumPy does not know by itself (bfloat16) are written as the bytes they are.
        own = value.dtype.kind != "V"
        arrays.append(value if own else np.frombuffer(value.tobytes(), "uint8"))
        place: dict[str, Any] = {_ARRAY: len(arrays) - 1}
        return place if own else {**place, "dtype": value.dtype.name, "shape": list(value.shape)}
    raise TypeError(
        "Expected dicts, lists, str, numbers, bool, None and NumPy arrays. Received: "
        f"{type(value).__name__} in {where}."
    )


def _from_plain(value: Any, archive: zipfile.ZipFile | None) -> Any:
    if isinstance(value, list):
        return [_from_plain(each, archive) for each in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY not in value:
        return {key: _from_plain(each, archive) for key, each in value.items()}
    if archive is None:
        return None
    with archive.open(f"{value[_ARRAY]}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if "dtype" in value:
        import ml_dtypes  # Keras's own requirement, for these types

        array = array.view(getattr(ml_dtypes, value["dtype"])).reshape(value["shape"])
    return array
