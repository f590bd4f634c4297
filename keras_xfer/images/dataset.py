"""Image files as batches for `fit`, `evaluate` and `predict`, on every backend."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import keras
import numpy as np

from keras_xfer import files
from keras_xfer.images.pixels import RESIZES, in_threads, load_image, shown, size_in_pixels


class Sample(NamedTuple):
    """One image file and the index of its class."""

    path: Path
    label: int


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
        if resize not in RESIZES:
            raise ValueError(f"Expected `resize` in {list(RESIZES)}. Received: resize={resize!r}")
        self.paths: list[Path] = []
        labels: list[int] = []
        for sample in samples:
            if isinstance(sample, Sample):
                self.paths.append(sample.path)
                labels.append(sample.label)
            else:
                self.paths.append(Path(sample))
        self.files = [shown(path, root) for path in self.paths]
        self.labels = np.array(labels, "int32") if labels else None
        self.image_size = size_in_pixels(image_size)
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

    def fingerprint(self, content: bool = False) -> str:
        """What tells this dataset from others: its images and their labels, in this order.

        It depends on neither `shuffle`, `seed` nor `epoch`.

        Args:
            content: Bool. `False` knows a file by its path, size and time of change, which is
                read in no time; `True` by its content, wherever it lies. Defaults to `False`.

        Returns:
            String, a SHA-256.

        Raises:
            OSError: A file is not there any more.
        """
        known: list[Any] = [list(self.image_size), self.resize, content]
        for row, path in enumerate(self.paths):
            label = None if self.labels is None else int(self.labels[row])
            if content:
                known.append([files.sha256(path), label])
            else:
                found = path.stat()
                known.append([str(path.absolute()), found.st_size, found.st_mtime_ns, label])
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def in_order(self) -> Self:
        """The same images in the order of `samples`, and the same memory of those decoded."""
        other = copy.copy(self)
        other.shuffle = False
        other.epoch = 0
        return other

    def _images(self, rows: np.ndarray) -> np.ndarray:
        if self._cache is None:
            return np.stack(list(in_threads(self._load, rows)))
        missing = rows[~self._cached[rows]]
        if len(missing):
            for row, image in zip(missing, in_threads(self._load, missing), strict=True):
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
