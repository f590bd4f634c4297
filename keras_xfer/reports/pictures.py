"""Small pictures of images in files and in arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

from keras_xfer.images.pixels import FORMATS, rgb, upright
from keras_xfer.reports.batches import batches, count, to_numpy


def thumbnail(path: Path, side: int) -> Image.Image | None:
    """Read an image no larger than `side` pixels; `None` where there is none that can be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (side, side))
            small = rgb(upright(image))
            small.thumbnail((side, side))
            return small
    except Exception:  # a damaged file can raise anything; a report is made without its picture
        return None


def from_arrays(
    images: Any, files: Sequence[str], positions: Sequence[int], side: int
) -> list[Image.Image]:
    """Take the images of some rows out of arrays, no larger than `side` pixels.

    Args:
        images: A mapping by `file`, or a sequence, or batches, by number: that of the file where it
            is one, or that of the row.
        files: What the rows have in the column `file`.
        positions: Numbers of the rows.
        side: Int, in pixels.
    """
    arrays = []
    keys: list[Any] = list(files)
    if not isinstance(images, Mapping):
        pairs = zip(files, positions, strict=True)
        keys = [int(file) if file.isdecimal() else position for file, position in pairs]
    if _comes_in_batches(images):
        images = _picked(images, set(keys))
    for file, key in zip(files, keys, strict=True):
        try:
            array = to_numpy(images[key])
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"Expected an image for each row. Received: images without {key!r}, the file "
                f"{file!r}. Give those that the predictions were made of."
            ) from error
        arrays.append(_with_channels_last(array))
    # One range for all of them: a dark image alone may look like one in [0, 1].
    values = [array for array in arrays if array.size]
    low = min((float(np.nanmin(array)) for array in values), default=0.0)
    high = max((float(np.nanmax(array)) for array in values), default=0.0)
    if low < 0 or high > 255:
        raise ValueError(
            "Expected images in [0, 1] or [0, 255]. Received: values from "
            f"{low:.3g} to {high:.3g}. Give them as they were before preprocessing, or scale them: "
            "(images + 1) / 2 for [-1, 1]."
        )
    is_whole = any(array.dtype.kind in "iu" for array in arrays)
    scale = 1 if is_whole or high > 1 else 255
    pictures = []
    for array in arrays:
        pixels = np.rint(np.nan_to_num(array.astype("float32")) * scale).astype("uint8")
        picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        picture = picture.convert("RGB")
        picture.thumbnail((side, side))
        pictures.append(picture)
    return pictures


def _comes_in_batches(images: Any) -> bool:
    return isinstance(images, keras.utils.PyDataset) or not hasattr(images, "__getitem__")


def _picked(data: Any, rows: set[int]) -> dict[int, Any]:
    """The images of some rows of data that come in batches, by number, in one pass."""
    found: dict[int, Any] = {}
    first = 0
    for inputs, _ in batches(data):
        last = first + count(inputs)
        found |= {row: inputs[row - first] for row in rows if first <= row < last}
        first = last
    return found


def _with_channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(
            "Expected images (height, width), (height, width, channels) or (channels, height, "
            f"width) of one or three channels. Received: an image of the shape {array.shape}"
        )
    return array
