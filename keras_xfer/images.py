"""Folders of images: splits, class names, and what was skipped and why.

`scan` looks once at every file, `ImageDataset` feeds the readable ones to `model.fit`, and
`load_image` is how each of them is decoded. Pillow alone reads images, so all backends see the
same pixels.
"""

import os
import stat
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"})

# Images that people do put into such folders and that are not read: listed as skipped, where a
# text file or Thumbs.db is passed over in silence.
_FOREIGN_SUFFIXES = frozenset({".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg"})
# Only these decoders run. Pillow would otherwise go by a file's content, and an EPS file named
# .jpg would start Ghostscript.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "WEBP")
_LITTER = frozenset({"__MACOSX", "@eaDir"})  # left by macOS archives and Synology shares
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
_SPLIT_NAMES = frozenset(alias for aliases in _SPLITS.values() for alias in aliases)
_RESIZES = ("crop", "stretch", "pad")

Progress = Callable[[int, int], None]


class ImageFolderError(ValueError):
    """A folder that cannot be trained on: one line that says what, where and how to mend it."""


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


class Sample(NamedTuple):
    """One image file and the index of its class."""

    path: Path
    label: int


class Skipped(NamedTuple):
    """One file that is left out, and why. `file` is relative to the scanned folder."""

    file: str
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """What `scan` found in a folder of images.

    Attributes:
        folder: The scanned folder, a `pathlib.Path`.
        class_names: Tuple of the class names in index order: the folders' names, in Unicode's
            composed form (NFC), sorted by code point.
        train: Tuple of `Sample`.
        validation: Tuple of `Sample`; empty where none was asked for.
        test: Tuple of `Sample`; empty where none was asked for.
        skipped: Tuple of `Skipped`, sorted by file.
    """

    folder: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]

    def counts(self) -> dict[str, list[int]]:
        """Count the images in each split, class by class.

        Returns:
            A dict of `"train"`, `"validation"` and `"test"` to a list with one count a class.
        """
        return {
            split: np.bincount(
                [sample.label for sample in getattr(self, split)],
                minlength=len(self.class_names),
            ).tolist()
            for split in _SPLITS
        }

    def dataset(
        self, split: str, image_size: int | tuple[int, int], **kwargs: Any
    ) -> "ImageDataset":
        """Return one split as an `ImageDataset` whose files are named relative to this folder.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            image_size: Int or `(height, width)`, in pixels.
            **kwargs: Further arguments of `ImageDataset`.

        Returns:
            An `ImageDataset`.

        Raises:
            ValueError: `split` is not one of the three, or holds no image.
        """
        if split not in _SPLITS:
            raise ValueError(f"Expected a split in {list(_SPLITS)}. Received: split={split!r}")
        return ImageDataset(getattr(self, split), image_size, root=self.folder, **kwargs)


def scan(
    folder: str | os.PathLike[str],
    *,
    validation_split: float = 0.2,
    test_split: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageFolder:
    """Find the classes and the splits in a folder of images, and the files that are no images.

    `folder` holds one folder a class, or `train/` (and `validation/`, also called `val/` or
    `valid/`, and `test/`) with one folder a class each. Class folders are searched with their
    subfolders. Every image is decoded once, on all cores, because a truncated JPEG shows itself
    no sooner; an epoch then never meets one.

    Where no validation folder is given the split is stratified: each class gives its share,
    rounded, at least one image where it has enough, and always keeps one for training. The split
    depends on the seed, the class's name and its files' names alone: not on the file system's
    order, the machine, or the other classes.

    Hidden files and folders are ignored, and so are files whose extension is not an image's
    (`.txt`, `Thumbs.db`). Listed as skipped are unreadable images (truncated, empty, text under
    an image's name, no permission, a broken link, more than `PIL.Image.MAX_IMAGE_PIXELS`),
    images in formats that are not read (TIFF, HEIC, AVIF, JPEG 2000, JPEG XL, SVG), images that
    lie outside every class, folders named like an image, and file names that are not UTF-8.

    Args:
        folder: Path of the folder.
        validation_split: Float in [0, 1), the fraction of `train` held out for validation where
            `folder` has no validation folder; ignored where it has one. Defaults to 0.2.
        test_split: The same for the test split. Defaults to 0: no test split.
        seed: Int >= 0, the seed of the split. Defaults to 0.
        progress: `None` or a function of (files looked at, files in all), called for each file.

    Returns:
        An `ImageFolder`.

    Raises:
        ImageFolderError: The folder is missing, cannot be read, holds no images, one class
            only, a class without readable images, or splits with different classes.
        ValueError: The two fractions are not in [0, 1) or leave nothing to train on.

    Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     for i in range(5):
    ...         Image.new("RGB", (40, 30)).save(folder / name / f"{i}.jpg")
    >>> _ = (folder / "dog" / "5.jpg").write_text("no image")
    >>> found = scan(folder)
    >>> found.class_names, found.counts()
    (('cat', 'dog'), {'train': [4, 4], 'validation': [1, 1], 'test': [0, 0]})
    >>> found.skipped[0]
    Skipped(file='dog/5.jpg', reason='not a JPEG, PNG, BMP, GIF or WebP image')

    Reference:
        https://keras.io/api/data_loading/image/
    """
    if min(validation_split, test_split) < 0 or validation_split + test_split >= 1:
        raise ValueError(
            "Expected `validation_split` and `test_split` of at least 0 that together are less "
            f"than 1. Received: validation_split={validation_split}, test_split={test_split}"
        )
    root = Path(folder)
    skipped: list[Skipped] = []
    try:
        _check_folder(root)
        split_folders = _split_folders(root)
        for place in {root, *split_folders.values()}:
            for path in _own_images(place):
                skipped.append(Skipped(_shown(path, root), "outside every class folder"))
        listed = {
            split: _class_files(root, split_folder, skipped)
            for split, split_folder in split_folders.items()
        }
    except OSError as error:
        raise ImageFolderError(
            f"Cannot read {str(error.filename)!r}: {error.strerror}. Make it readable, or move "
            "it elsewhere."
        ) from error

    class_names = sorted(listed["train"])
    for split, by_class in listed.items():
        _check_same_classes(class_names, by_class, split_folders["train"], split_folders[split])

    every_path = [
        path for by_class in listed.values() for paths in by_class.values() for path in paths
    ]
    readable, unreadable = readable_images(every_path, root=root, progress=progress)
    skipped += unreadable
    good = set(readable)

    found: dict[str, list[Sample]] = {split: [] for split in _SPLITS}
    empty: list[str] = []
    for split, by_class in listed.items():
        for label, name in enumerate(class_names):
            paths = [path for path in by_class[name] if path in good]
            if not paths:
                empty.append(_shown(split_folders[split] / name, root))
            found[split] += [Sample(path, label) for path in paths]
    _check_classes(root, class_names, empty, skipped)

    drawn = {
        "validation": 0.0 if "validation" in listed else validation_split,
        "test": 0.0 if "test" in listed else test_split,
    }
    if any(drawn.values()):
        train, validation, test = _draw(found["train"], class_names, seed, **drawn)
        found["train"] = train
        found["validation"] += validation
        found["test"] += test
        for split, fraction in drawn.items():
            if fraction and not found[split]:
                raise ImageFolderError(
                    f"No image is left for the {split} split: each class in {str(root)!r} has "
                    f"too few images. Add images, or set {split}_split to 0."
                )
    return ImageFolder(
        folder=root,
        class_names=tuple(class_names),
        train=tuple(found["train"]),
        validation=tuple(found["validation"]),
        test=tuple(found["test"]),
        skipped=tuple(sorted(skipped)),
    )


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the image files under some files and folders, each once.

    Args:
        paths: Files, taken whatever their name, and folders, searched with their subfolders for
            names with an image's extension; hidden ones are ignored.

    Returns:
        A list of `pathlib.Path`: the arguments in the order given, each folder's files sorted.

    Raises:
        ImageFolderError: A path is missing or cannot be read, or a folder holds no image.

    Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "b.PNG").touch(), (folder / "a.jpg").touch(), (folder / "notes.txt").touch()
    (None, None, None)
    >>> [path.name for path in list_images([folder])]
    ['a.jpg', 'b.PNG']
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        try:
            if path.is_dir():
                files = [file for file in _walk(path, path, []) if _suffix(file) in IMAGE_SUFFIXES]
                if not files:
                    raise ImageFolderError(
                        f"No image in {str(path)!r}: expected files that end in "
                        f"{', '.join(sorted(IMAGE_SUFFIXES))}."
                    )
                found.update(dict.fromkeys(sorted(files, key=lambda file: _order(file, path))))
            elif path.is_symlink() or path.exists():
                found[path] = None
            else:
                raise ImageFolderError(f"No such file or folder: {str(path)!r}. Check the path.")
        except OSError as error:
            raise ImageFolderError(
                f"Cannot read {str(error.filename)!r}: {error.strerror}. Make it readable."
            ) from error
    return list(found)


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
        for done, (path, why) in enumerate(zip(paths, _in_threads(reason, paths), strict=True), 1):
            if why is None:
                readable.append(path)
            else:
                skipped.append(Skipped(_shown(path, root), why))
            if progress is not None:
                progress(done, len(paths))
    return readable, skipped


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
    if resize not in _RESIZES:
        raise ValueError(f"Expected `resize` in {list(_RESIZES)}. Received: resize={resize!r}")
    if image_size is None:
        return np.array(_decode(Path(path)))
    size = _size(image_size)
    image = _decode(Path(path), lambda full: _reduction(full, 2 * max(size)))
    return np.array(_resized(image, size, resize))


class ImageDataset(keras.utils.PyDataset):
    """Image files as batches of `(images, labels)` for `fit`, `evaluate` and `predict`.

    A `keras.utils.PyDataset`, so it serves every backend. A batch is decoded on all cores, once:
    decoded and resized images stay in memory where all of them fit in `max_cache_bytes`, so later
    epochs cost a copy.

    Args:
        samples: Sequence of `Sample` (from `scan`), or of paths: then a batch is `(images,)`.
        image_size: Int or `(height, width)`, in pixels.
        batch_size: Int, images a batch; the last batch holds the rest. Defaults to 32.
        shuffle: Bool. `True` draws a new order for every epoch. Defaults to `False`.
        seed: Int >= 0. The order depends on the seed and `epoch` alone. Defaults to 0.
        resize: `"crop"`, `"stretch"` or `"pad"`, as in `load_image`.
        max_cache_bytes: Int, the most bytes of memory that decoded images may hold. 0 decodes
            anew in every epoch. Defaults to 1 GiB.
        root: Folder that `files` are named relative to. `None` names them as given.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size` of `keras.utils.PyDataset`.

    Attributes:
        paths: List of `pathlib.Path`, in the order of `samples`.
        files: List of str, the same relative to `root`.
        labels: int32 array in the order of `samples`, or `None` without labels.
        order: Int array, the order of this epoch: batch `i` holds
            `order[i * batch_size : (i + 1) * batch_size]`.
        epoch: Int, the number of `on_epoch_end` so far (`fit` calls it once before the first epoch
            of a model that is not yet built). A run that resumes sets it.

    Output shape:
        uint8 images `(batch, height, width, 3)` in [0, 255], int32 labels `(batch,)`.

    Raises:
        ValueError: No samples, a `batch_size` below 1, a `seed` below 0, or an unknown `resize`.
        ImageReadError: When a batch is read: a file is no readable image.

    Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> samples = []
    >>> for i in range(5):
    ...     Image.new("RGB", (40, 30)).save(folder / f"{i}.png")
    ...     samples.append(Sample(folder / f"{i}.png", i % 2))
    >>> data = ImageDataset(samples, image_size=32, batch_size=2, root=folder)
    >>> len(data), data.files[:2]
    (3, ['0.png', '1.png'])
    >>> images, labels = data[0]
    >>> images.shape, labels.tolist()
    ((2, 32, 32, 3), [0, 1])

    Reference:
        https://keras.io/api/utils/python_utils/#pydataset-class
    """

    def __init__(
        self,
        samples: Sequence[Sample] | Sequence[Path],
        image_size: int | tuple[int, int],
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        seed: int = 0,
        resize: str = "crop",
        max_cache_bytes: int = 2**30,
        root: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not samples:
            raise ValueError("Expected at least one image. Received: samples=[]")
        if batch_size < 1 or seed < 0:
            raise ValueError(
                "Expected `batch_size` of at least 1 and `seed` of at least 0. "
                f"Received: batch_size={batch_size}, seed={seed}"
            )
        if resize not in _RESIZES:
            raise ValueError(f"Expected `resize` in {list(_RESIZES)}. Received: resize={resize!r}")
        self.paths: list[Path] = []
        labels: list[int] = []
        for sample in samples:
            if isinstance(sample, Sample):
                self.paths.append(sample.path)
                labels.append(sample.label)
            else:
                self.paths.append(Path(sample))
        self.files = [_shown(path, root) for path in self.paths]
        self.labels = np.array(labels, "int32") if labels else None
        self.image_size = _size(image_size)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.resize = resize
        self.epoch = 0

        shape = (len(self.paths), *self.image_size, 3)
        # Pages of an empty array take no memory before they are written.
        self._cache = np.empty(shape, "uint8") if np.prod(shape) <= max_cache_bytes else None
        self._cached = np.zeros(len(self.paths), bool)

    @property
    def epoch(self) -> int:
        """The epoch whose order is in force, counted from 0."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self.shuffle:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))
        else:
            self.order = np.arange(len(self.paths))

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order."""
        self.epoch += 1

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"Expected a batch in [0, {len(self)}). Received: index={index}")
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self._images(rows)
        return (images,) if self.labels is None else (images, self.labels[rows])

    def _images(self, rows: np.ndarray) -> np.ndarray:
        if self._cache is None:
            return np.stack(list(_in_threads(self._load, rows)))
        missing = rows[~self._cached[rows]]
        if len(missing):
            for row, image in zip(missing, _in_threads(self._load, missing), strict=True):
                self._cache[row] = image
                self._cached[row] = True
        return self._cache[rows]

    def _load(self, row: int) -> np.ndarray:
        return load_image(self.paths[row], self.image_size, resize=self.resize)


def class_weights(labels: Sequence[int] | np.ndarray) -> dict[int, float]:
    """Weights that let every class count alike, for `model.fit(class_weight=...)`.

    Args:
        labels: Class indices of the training images.

    Returns:
        A dict of class index to weight: images / (classes * images of the class).

    Example:
    >>> class_weights([0, 0, 0, 1])
    {0: 0.6666666666666666, 1: 2.0}

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.utils.class_weight.compute_class_weight.html
    """
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    weights = counts.sum() / (len(classes) * counts)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


# How a folder is read.


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise ImageFolderError(f"No such folder: {str(root)!r}. Check the path.")
    if not root.is_dir():
        raise ImageFolderError(
            f"Expected a folder of images, but {str(root)!r} is a file. Give the folder that holds "
            "one folder a class."
        )


def _split_folders(root: Path) -> dict[str, Path]:
    """Find the folder of each split: `{"train": root}` where `root` itself holds the classes."""
    folders = _subfolders(root)
    if not folders:
        raise ImageFolderError(
            f"No class folders in {str(root)!r}: expected one folder a class with its images "
            "inside. Sort the images into such folders."
        )
    named: dict[str, list[Path]] = {
        split: [folder for folder in folders if folder.name.lower() in aliases]
        for split, aliases in _SPLITS.items()
    }
    # A class may be called "test", or "train" (beside "bus"): a folder is a split only if it holds
    # folders and no images of its own.
    splits = [folder for folder in folders if folder.name.lower() in _SPLIT_NAMES]
    if not any(_subfolders(folder) and not _own_images(folder) for folder in splits):
        return {"train": root}
    others = [folder for folder in folders if folder not in splits and _holds_images(folder)]
    if not named["train"]:
        if others:
            return {"train": root}
        raise ImageFolderError(
            f"{str(root)!r} holds {splits[0].name!r} but no 'train': expected train/, and beside it "
            "validation/ and test/ if there are any, with one folder a class each."
        )
    if others:
        raise ImageFolderError(
            f"{str(root)!r} holds both {named['train'][0].name!r} and {others[0].name!r}, each with "
            "images: expected one folder a class, or train/, validation/ and test/ alone. Move "
            f"{others[0].name!r} elsewhere."
        )
    for split, found in named.items():
        if len(found) > 1:
            raise ImageFolderError(
                f"{str(root)!r} holds several folders for the {split} split: "
                f"{', '.join(repr(folder.name) for folder in found)}. Keep one of them."
            )
    return {split: found[0] for split, found in named.items() if found}


def _class_files(root: Path, folder: Path, skipped: list[Skipped]) -> dict[str, list[Path]]:
    """List the files with an image's extension by class, sorted; skip what is none."""
    by_class: dict[str, list[Path]] = {}
    for class_folder in _subfolders(folder):
        name = unicodedata.normalize("NFC", class_folder.name)
        if not _is_utf8(name):
            raise ImageFolderError(
                f"The name of the class folder {str(class_folder)!r} is not valid UTF-8. Rename it."
            )
        if name in by_class:
            raise ImageFolderError(
                f"Two class folders in {str(folder)!r} are called {name!r} (one writes its accents "
                "as separate characters). Merge them, or rename one."
            )
        files = []
        for path in _walk(class_folder, root, skipped):
            if not _is_utf8(path.name):
                skipped.append(Skipped(_shown(path, root), "file name is not valid UTF-8"))
            elif _suffix(path) in IMAGE_SUFFIXES:
                files.append(path)
            elif _suffix(path) in _FOREIGN_SUFFIXES:
                reason = f"{_suffix(path)[1:].upper()} is not read: convert it to JPEG or PNG"
                skipped.append(Skipped(_shown(path, root), reason))
        by_class[name] = sorted(files, key=lambda path: _order(path, root))
    return by_class


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_seen(path.name) and path.is_dir())


def _own_images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if _is_seen(path.name) and _suffix(path) in IMAGE_SUFFIXES and not path.is_dir()
    )


def _holds_images(folder: Path) -> bool:
    return any(_suffix(path) in IMAGE_SUFFIXES for path in _walk(folder, folder, []))


def _walk(folder: Path, root: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Every visible file below `folder`, through links to folders too."""

    def stop(error: OSError) -> None:
        raise error

    seen: set[str] = set()  # a link to a folder above it would never end
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in folders:
            if _is_seen(name) and _suffix(Path(name)) in IMAGE_SUFFIXES:
                reason = "a folder, not an image"
                skipped.append(Skipped(_shown(Path(parent, name), root), reason))
        folders[:] = [
            name for name in folders if _is_seen(name) and _suffix(Path(name)) not in IMAGE_SUFFIXES
        ]
        yield from (Path(parent, name) for name in files if _is_seen(name))


def _check_same_classes(
    class_names: list[str], by_class: dict[str, list[Path]], train: Path, folder: Path
) -> None:
    missing = sorted(set(class_names) - set(by_class))
    extra = sorted(set(by_class) - set(class_names))
    if missing or extra:
        differences = [
            f"{text} {', '.join(map(repr, names))}"
            for text, names in (("lacks", missing), ("has besides", extra))
            if names
        ]
        raise ImageFolderError(
            f"Expected the same classes in {str(train)!r} and {str(folder)!r}, but the second "
            f"{' and '.join(differences)}. Give both the same folders."
        )


def _check_classes(
    root: Path, class_names: list[str], empty: list[str], skipped: list[Skipped]
) -> None:
    if len(class_names) == 1:
        raise ImageFolderError(
            f"Only one class in {str(root)!r}: {class_names[0]!r}. Expected at least two folders, "
            "one a class: add another class, or give the folder that holds the class folders."
        )
    if empty:
        why = ""
        if skipped:
            why = f" ({len(skipped)} skipped, such as {skipped[0].file!r}: {skipped[0].reason})"
        raise ImageFolderError(
            f"No readable image in {', '.join(map(repr, empty))} of {str(root)!r}"
            f"{why}. Add images to it, or remove the folder."
        )


# How a class is split.


def _draw(
    samples: list[Sample],
    class_names: list[str],
    seed: int,
    validation: float,
    test: float,
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Split each class by its own random order, so that a new class moves no other's images."""
    parts: tuple[list[Sample], list[Sample], list[Sample]] = ([], [], [])
    for label, name in enumerate(class_names):
        own = [sample for sample in samples if sample.label == label]
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(own))
        for_validation, for_test = _held_out(len(own), validation, test)
        ends = (len(own) - for_validation - for_test, len(own) - for_test, len(own))
        for part, start, end in zip(parts, (0, *ends), ends, strict=False):
            part += [own[i] for i in sorted(order[start:end])]
    return parts


def _held_out(count: int, validation: float, test: float) -> tuple[int, int]:
    """How many of `count` images go to validation and test: each within one of its share."""
    shares = (count * validation, count * test)
    held = [max(1, int(share + 0.5)) if share else 0 for share in shares]
    while sum(held) >= count:
        # The one most above its share gives way; at a tie, test.
        held[0 if held[0] - shares[0] > held[1] - shares[1] else 1] -= 1
    return held[0], held[1]


# How an image is read.


def _decode(path: Path, reduction: Callable[[tuple[int, int]], int] = lambda _: 1) -> Image.Image:
    """Decode the file to an upright RGB image, a JPEG at 1/`reduction(size)` of its size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for ever.
            raise ImageReadError(path, "not a regular file")
        if status.st_size == 0:
            raise ImageReadError(path, "empty file")
        with Image.open(path, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ImageReadError(
                    path, f"{image.width}x{image.height}: more than {limit} pixels"
                )
            divisor = reduction(image.size)
            if divisor > 1:
                image.draft(None, (image.width // divisor or 1, image.height // divisor or 1))
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
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


def _rgb(image: Image.Image) -> Image.Image:
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


# Small things.


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            "Expected `image_size` to be an int or (height, width), in pixels. "
            f"Received: image_size={image_size!r}"
        )
    return size


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name not in _LITTER


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _order(path: Path, root: Path) -> tuple[str, str]:
    """Sort alike on file systems that compose accents and on those that take them apart."""
    name = path.relative_to(root).as_posix()
    return unicodedata.normalize("NFC", name), name


def _shown(path: Path, root: Path | None) -> str:
    """Write the path relative to `root`, with `/`, in valid UTF-8."""
    name = path.relative_to(root) if root is not None and path.is_relative_to(root) else path
    return name.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` on all cores: Pillow's decoders let other threads run."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(function, items)
