"""Folders of images: splits, class names, and what was skipped and why."""

import hashlib
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_xfer.images.dataset import ImageDataset, Sample
from keras_xfer.images.pixels import Progress, Skipped, readable_images, shown

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"})

# Images that people do put into such folders and that are not read: listed as skipped, where a
# text file or Thumbs.db is passed over in silence.
_FOREIGN_SUFFIXES = frozenset(
    {".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".tga", ".dcm"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw"}  # raw pictures of cameras
)
_LITTER = frozenset({"__MACOSX", "@eaDir"})  # left by macOS archives and Synology shares
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
_SPLIT_NAMES = frozenset(alias for aliases in _SPLITS.values() for alias in aliases)


class ImageFolderError(ValueError):
    """A folder that cannot be trained on: one line that says what, where and how to mend it."""


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

    def fingerprint(self) -> str:
        """Return a sha256 over the images in their splits: names, labels, sizes, times of change.

        Returns:
            Str, 64 hexadecimal digits. The content of the files is not read: who writes another
            picture over one changes the time, and mostly the size.

        Raises:
            OSError: An image is gone.
        """
        digest = hashlib.sha256()
        for split in _SPLITS:
            for sample in getattr(self, split):
                name, file = shown(sample.path, self.folder), sample.path.stat()
                of_image = (split, name, sample.label, file.st_size, file.st_mtime_ns)
                digest.update(("\0".join(map(str, of_image)) + "\n").encode())
        return digest.hexdigest()

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

    def datasets(
        self, image_size: int | tuple[int, int], **kwargs: Any
    ) -> "tuple[ImageDataset, ImageDataset | None, ImageDataset | None]":
        """Return all three splits as `ImageDataset`s, in a new order each epoch to train on.

        Args:
            image_size: Int or `(height, width)`, in pixels.
            **kwargs: Further arguments of `ImageDataset`, such as `batch_size`; `shuffle` is of the
                first alone.

        Returns:
            A tuple `(train, validation, test)`; `None` in the place of a split without images.

        Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB", (40, 30)).save(folder / name)
        >>> train, validation, test = scan(folder).datasets(32)
        >>> train.shuffle, len(validation.files), test
        (True, 2, None)
        """
        train = self.dataset("train", image_size, **{"shuffle": True, **kwargs})
        kwargs.pop("shuffle", None)
        validation, test = (
            self.dataset(split, image_size, **kwargs) if getattr(self, split) else None
            for split in ("validation", "test")
        )
        return train, validation, test


def scan(
    folder: str | os.PathLike[str],
    *,
    validation_split: float = 0.2,
    test_split: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageFolder:
    """Find the classes and the splits in a folder of images, and the files that are no images.

    `folder` holds one folder a class, or `train/` (and `validation/` and `test/`) with one folder a
    class each; `training/`, `val/`, `valid/` and `testing/` are other names of these. Class folders
    are searched with their subfolders. Every image is decoded once, on all cores, because a
    truncated JPEG shows itself no sooner; an epoch then never meets one.

    Where no validation folder is given the split is stratified: each class gives its share,
    rounded, at least one image where it has enough, and always keeps one for training. The split
    depends on the seed, the class's name and its files' names alone: not on the file system's
    order, the machine, or the other classes.

    Hidden files and folders are ignored, and so are files whose extension is not an image's
    (`.txt`, `Thumbs.db`). Listed as skipped are unreadable images (truncated, empty, text under
    an image's name, no permission, a broken link, more than `PIL.Image.MAX_IMAGE_PIXELS`),
    images in formats that are not read (such as TIFF, HEIC, AVIF, PPM, SVG, a camera's raw ones),
    images that lie outside every class, folders named like an image, and file names that are not
    UTF-8.

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
                skipped.append(Skipped(shown(path, root), "outside every class folder"))
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
                empty.append(shown(split_folders[split] / name, root))
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
            names with an image's extension, those of formats that are not read (such as HEIC)
            among them, so that `readable_images` and `load_image` say so; hidden ones are ignored.

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
                known = IMAGE_SUFFIXES | _FOREIGN_SUFFIXES
                files = [file for file in _walk(path, path, []) if _suffix(file) in known]
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
    splits = [folder for folder in folders if folder.name.lower() in _SPLIT_NAMES]
    if named["train"] and splits == folders:
        train = named["train"][0]
        if not _subfolders(train):
            raise ImageFolderError(
                f"No class folders in {str(train)!r}: expected one folder a class with its images "
                "inside. Sort the images into such folders: a table of labels is not read."
            )
    # A class may be called "test", or "train" (beside "bus"): a folder is a split only if it holds
    # folders and no images of its own.
    elif not any(_subfolders(folder) and not _own_images(folder) for folder in splits):
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
            if not _is_utf8(str(path.relative_to(root))):
                skipped.append(Skipped(shown(path, root), "file name is not valid UTF-8"))
            elif _suffix(path) in IMAGE_SUFFIXES:
                files.append(path)
            elif _suffix(path) in _FOREIGN_SUFFIXES:
                reason = f"{_suffix(path)[1:].upper()} is not read: convert it to JPEG or PNG"
                skipped.append(Skipped(shown(path, root), reason))
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
                skipped.append(Skipped(shown(Path(parent, name), root), reason))
        folders[:] = [
            name for name in folders if _is_seen(name) and _suffix(Path(name)) not in IMAGE_SUFFIXES
        ]
        yield from (Path(parent, name) for name in files if _is_seen(name))


def _check_same_classes(
    class_names: list[str], by_class: dict[str, list[Path]], train: Path, folder: Path
) -> None:
    missing = sorted(set(class_names) - set(by_class))
    extra = sorted(set(by_class) - set(class_names))
    if not by_class:
        raise ImageFolderError(
            f"No class folders in {str(folder)!r}: expected those of {str(train)!r}. Sort its "
            "images into such folders, or move it elsewhere: what has no labels is for "
            "`keras-xfer predict`."
        )
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


# How files are named.


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
