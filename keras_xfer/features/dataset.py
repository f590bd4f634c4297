"""`CachedFeatures`: features that were computed once, as batches for `fit`, on every backend."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import keras
import numpy as np

from keras_xfer.features.entry import Columns
from keras_xfer.features.manifest import Manifest
from keras_xfer.features.nesting import pack
from keras_xfer.features.store import Hold


class OpenEntry(NamedTuple):
    """A complete entry that is kept from being removed."""

    folder: Path
    manifest: Manifest
    columns: Columns
    hold: Hold


class CachedFeatures(keras.utils.PyDataset):
    """Features that `FeatureCache.features` gives, as batches of `(features, *rest)`.

    A `keras.utils.PyDataset`, so it serves every backend; on TensorFlow `as_tf_dataset()` gives the
    same batches faster. As long as it is in use, no process removes what it reads.

    `fit` shuffles the batches of every `PyDataset` once more, by a random state of its own;
    `fit(..., shuffle=False)` keeps the order of this dataset.

    Args:
        entry: what `FeatureCache` has opened.
        batch_size: int, rows a batch; the last batch holds the rest.
        shuffle: bool. `True` draws a new order of all rows for every epoch.
        seed: int >= 0. The order depends on the seed and `epoch` alone.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size` of `keras.utils.PyDataset`.

    Attributes:
        num_samples: int, how many rows there are.
        views: int, how many random passes are stored; epoch `e` serves view `e % views`.
        order: int array, the order of this epoch: batch `i` holds
            `order[i * batch_size : (i + 1) * batch_size]`.
        epoch: int, the number of passes so far: of `on_epoch_end`, and of complete passes over
            `as_tf_dataset()`. A run that resumes sets it.

    Raises:
        ValueError: a `batch_size` below 1, or a `seed` below 0.

    Example:

    >>> import tempfile
    >>> from keras_xfer.features import FeatureCache
    >>> extractor = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> x, y = np.ones((5, 3), "float32"), np.arange(5)
    >>> data = FeatureCache(tempfile.mkdtemp()).features(extractor, (x, y), batch_size=2)
    >>> len(data), data.num_samples, data[0][0].shape, data[2][1].tolist()
    (3, 5, (2, 2), [4])

    Reference:
        https://keras.io/api/utils/python_utils/#pydataset-class
    """

    def __init__(
        self,
        entry: OpenEntry,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if batch_size < 1 or seed < 0:
            raise ValueError(
                "Expected `batch_size` of at least 1 and `seed` of at least 0. "
                f"Received: batch_size={batch_size}, seed={seed}"
            )
        self._entry = entry
        self.num_samples = entry.manifest.rows or 0
        self.views = entry.manifest.views
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch whose order and view are in force, counted from 0."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self.shuffle:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        else:
            self.order = np.arange(self.num_samples)

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order, and go on to the next view."""
        self.epoch += 1

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"Expected a batch in [0, {len(self)}). Received: index={index}")
        return self._batch(index, self.order, self.epoch)

    def one_pass(self) -> Iterator[tuple[Any, ...]]:
        """All batches of an epoch, in the order that is in force when the first is asked for; with
        the last one the next epoch begins."""
        order, epoch = self.order, self.epoch
        for index in range(len(self)):
            batch = self._batch(index, order, epoch)
            if index == len(self) - 1:  # whoever knows the length asks for no more
                self.on_epoch_end()
            yield batch

    def _batch(self, index: int, order: np.ndarray, epoch: int) -> tuple[Any, ...]:
        rows = order[index * self.batch_size : (index + 1) * self.batch_size]
        manifest, columns = self._entry.manifest, self._entry.columns
        view = columns.views[epoch % self.views]
        features = pack(manifest.features, [column.take(rows) for column in view])
        rest = pack(manifest.rest, [column.take(rows) for column in columns.rest])
        return (features, *rest)

    def as_tf_dataset(self) -> Any:
        """The same batches in the same order as a native `tf.data.Dataset`, which TensorFlow trains
        on faster.

        Order and view are those of `epoch` when a pass begins. A pass that has given its last
        batch advances `epoch`, as `on_epoch_end` does; one that is left before that, such as the
        look that `fit` takes at the first batch, does not.

        Returns:
            tf.data.Dataset of known cardinality.

        Raises:
            ImportError: tensorflow is not installed.

        Example:

        >>> import tempfile
        >>> from keras_xfer.features import FeatureCache
        >>> extractor = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> data = FeatureCache(tempfile.mkdtemp()).features(extractor, np.ones((5, 3)))
        >>> int(data.as_tf_dataset().cardinality())
        1

        Reference:
            https://www.tensorflow.org/guide/data
        """
        from keras_xfer.features.tf_dataset import tf_dataset

        return tf_dataset(self, self._entry.manifest, self._entry.columns)

    def arranged(
        self,
        *,
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int | None = None,
    ) -> Self:
        """The same features in other batches, or in another order.

        Args:
            batch_size: int, or None to keep it.
            shuffle: bool, or None to keep it.
            seed: int, or None to keep it.

        Returns:
            CachedFeatures, at epoch 0.

        Example:

        >>> import tempfile
        >>> from keras_xfer.features import FeatureCache
        >>> extractor = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> data = FeatureCache(tempfile.mkdtemp()).features(extractor, np.ones((5, 3)))
        >>> len(data), len(data.arranged(batch_size=2))
        (1, 3)
        """
        return type(self)(
            self._entry,
            self.batch_size if batch_size is None else batch_size,
            shuffle=self.shuffle if shuffle is None else shuffle,
            seed=self.seed if seed is None else seed,
            workers=self.workers,
            use_multiprocessing=self.use_multiprocessing,
            max_queue_size=self.max_queue_size,
        )

    # What another cache asks, where these features are in turn the inputs of an extractor.

    def fingerprint(self) -> str:
        """What tells these features from others: the key of their entry."""
        if self.views > 1:
            raise ValueError(
                "Expected features of one view to compute others of. Received: features with "
                f"views={self.views}, which differ from epoch to epoch."
            )
        return self._entry.manifest.key

    def in_order(self) -> Self:
        """The same features, not shuffled."""
        return self.arranged(shuffle=False)
