"""One image file: decoded, upright, RGB, of the size that a model takes.

Pillow alone reads images, so all backends see the same pixels.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

RESIZES = ("crop", "stretch", "pad")

# Only these decoders run. Pillow would otherwise go by a file's content, and an EPS file named
# .jpg would start Ghostscript.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "WEBP")

_ORIENTATION = 0x0112  # the tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Progress = Callable[[int, int], None]


class ImageReadError(ValueError):
    """A file that is no readable image.

    Attributes:
        path: The file, a `pathlib.Path`.
        reason: Why it cannot be read, one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"Expected a readable image. Received: path={str(path)!r} ({reason})")
        self.path = path
        self.reason = reason


class Skipped(NamedTuple):
    """One file that is left out, and why. `file` is relative to the scanned folder."""

    file: str
    reason: str


def load_image(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    *,
    resize: str = "crop",
) -> np.ndarray:
    """Read an image file as the RGB array that a model is trained on.

    The picture is turned as its EXIF data says. Of an animation the first frame counts.
    Transparent parts are laid on white. CMYK, palette and grayscale images become RGB; 16 bits a
    channel are scaled to 8 over their full range. Colour profiles are not applied.

    Resizing equals `keras.layers.Resizing(..., antialias=True)` to within rounding, so a model
    whose `BackbonePreprocessing` has the same `resize` and `antialias=True` sees the same picture
    in training as when it is given a whole photograph. (A large JPEG is decoded at half, a
    quarter or an eighth of its size, never below twice `image_size`: several times faster, and on
    average less than two of 255 levels away.)

    Args:
        path: The file: JPEG, PNG, BMP, GIF or WebP.
        image_size: Int or `(height, width)`, in pixels. `None` keeps the picture's own size.
        resize: `"crop"` keeps the proportions and the centre, `"stretch"` neither, `"pad"` keeps
            all of the picture between black borders.

    Returns:
        A uint8 array `(height, width, 3)` in [0, 255].

    Raises:
        ImageReadError: The file is no readable image.
        ValueError: `image_size` or `resize` is not one of those above.

    Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> path = tempfile.mkdtemp() + "/gray.png"
    >>> Image.new("L", (40, 30), 128).save(path)
    >>> image = load_image(path, 16)
    >>> image.shape, image.dtype.name, int(image.max())
    ((16, 16, 3), 'uint8', 128)

    Reference:
        https://keras.io/api/layers/preprocessing_layers/image_preprocessing/resizing/
    """
    if resize not in RESIZES:
        raise ValueError(f"Expected `resize` in {list(RESIZES)}. Received: resize={resize!r}")
    if image_size is None:
        return np.array(_decode(Path(path)))
    size = size_in_pixels(image_size)
    image = _decode(Path(path), lambda full: _reduction(full, 2 * max(size)))
    return np.array(_resized(image, size, resize))


def readable_images(
    paths: Sequence[Path], *, root: Path | None = None, progress: Progress | None = None
) -> tuple[list[Path], list[Skipped]]:
    """Sort files into readable images and others, by decoding each, on all cores.

    Args:
        paths: The files.
        root: Folder that the skipped files are named relative to. `None` names them as given.
        progress: `None` or a function of (files looked at, files in all), called for each file.

    Returns:
        A list of the readable paths and a list of `Skipped`, both in the order given.

    Example:
    >>> readable_images([Path("missing.jpg")])
    ([], [Skipped(file='missing.jpg', reason='No such file or directory')])
    """

    def reason(path: Path) -> str | None:
        try:
            # An eighth of the size skips most of a JPEG's work and still reads all of its data.
            _decode(path, lambda _: 8)
        except ImageReadError as error:
            return error.reason
        return None

    readable: list[Path] = []
    skipped: list[Skipped] = []
    with warnings.catch_warnings():
        # Pillow warns of large images, which are skipped here, and of odd EXIF data.
        warnings.simplefilter("ignore")
        for done, (path, why) in enumerate(zip(paths, in_threads(reason, paths), strict=True), 1):
            if why is None:
                readable.append(path)
            else:
                skipped.append(Skipped(shown(path, root), why))
            if progress is not None:
                progress(done, len(paths))
    return readable, skipped


def _decode(path: Path, reduction: Callable[[tuple[int, int]], int] = lambda _: 1) -> Image.Image:
    """Decode the file to an upright RGB image, a JPEG at 1/`reduction(size)` of its size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for ever.
            raise ImageReadError(path, "not a regular file")
        if status.st_size == 0:
            raise ImageReadError(path, "empty file")
        with Image.open(path, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ImageReadError(
                    path, f"{image.width}x{image.height}: more than {limit} pixels"
                )
            divisor = reduction(image.size)
            if divisor > 1:
                image.draft(None, (image.width // divisor or 1, image.height // divisor or 1))
            image.load()
            return rgb(upright(image))
    except ImageReadError:
        raise
    except Exception as error:  # a damaged file can raise anything in a decoder
        raise ImageReadError(path, _reason(path, error)) from error


def _reduction(size: tuple[int, int], smallest: int) -> int:
    """Choose how far a JPEG may be reduced while decoding, no side going below `smallest`."""
    for divisor in (8, 4, 2):
        # A side that does not divide would be padded, which shifts the picture.
        if all(side % divisor == 0 and side // divisor >= smallest for side in size):
            return divisor
    return 1


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, BMP, GIF or WebP image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return "broken link" if path.is_symlink() and not path.exists() else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged: {text}"


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data says; as it is, where these are damaged.

    `ImageOps.exif_transpose` writes all EXIF data anew for the picture that it turns, and refuses
    good pixels where it cannot: https://github.com/python-pillow/Pillow/issues/4238
    """
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged data can raise anything; viewers show such a picture unturned
        return image
    return image if turn is None else image.transpose(turn)


def rgb(image: Image.Image) -> Image.Image:
    """Bring a picture of any mode to RGB: 16 bits scaled to 8, what is transparent on white."""
    if image.mode.startswith("I"):  # 16 bits a pixel
        gray = np.asarray(image).clip(0, 65535)
        return Image.fromarray((gray / 257).round().astype("uint8")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """Resize as `keras.layers.Resizing` does: its windows are whole pixels, cut before scaling."""
    height, width = size
    if resize == "crop":
        kept_height = max(1, min(image.height, image.width * height // width))
        kept_width = max(1, min(image.width, image.height * width // height))
        top, left = (image.height - kept_height) // 2, (image.width - kept_width) // 2
        image = image.crop((left, top, left + kept_width, top + kept_height))
    elif resize == "pad":
        border_y = max(0, image.width * height // width - image.height) // 2
        border_x = max(0, image.height * width // height - image.width) // 2
        image = ImageOps.expand(image, (border_x, border_y))
    return image.resize((width, height), Image.Resampling.BILINEAR)


def size_in_pixels(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """`image_size` as (height, width)."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            "Expected `image_size` to be an int or (height, width), in pixels. "
            f"Received: image_size={image_size!r}"
        )
    return size


def shown(path: Path, root: Path | None) -> str:
    """Write the path relative to `root`, with `/`, in valid UTF-8."""
    name = path.relative_to(root) if root is not None and path.is_relative_to(root) else path
    return name.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` on all cores: Pillow's decoders let other threads run."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(function, items)
