"""`CachedFeatures`: features that were computed once, as batches for `fit`, on every backend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from keras_xfer.features.entry import Columns
from keras_xfer.features.manifest import Manifest
from keras_xfer.features.nesting import pack
from keras_xfer.features.order import Ordered
from keras_xfer.features.store import Hold


class OpenEntry(NamedTuple):
    """A complete entry that is kept from being removed."""

    folder: Path
    manifest: Manifest
    columns: Columns
    hold: Hold


class CachedFeatures(Ordered):
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
        epoch: int, the number of complete passes so far, of `fit` or over `as_tf_dataset()`; a
            loop of one's own over batches calls `on_epoch_end()`. A run that resumes sets it.

    Raises:
        ValueError: a `batch_size` below 1, or a `seed` below 0.

    Example:

    >>> import keras, tempfile
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
        rows = entry.manifest.rows or 0
        super().__init__(rows, batch_size, shuffle=shuffle, seed=seed, **kwargs)
        self._entry = entry
        self.views = entry.manifest.views

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.batch_of(self.rows(index), self.epoch)

    def one_pass(self) -> Iterator[tuple[Any, ...]]:
        """All batches of an epoch, in the order that is in force when the first is asked for; with
        the last one the next epoch begins."""
        order, epoch = self.order, self.epoch
        for index in range(len(self)):
            batch = self.batch_of(self.rows(index, order), epoch)
            if index == len(self) - 1:  # whoever knows the length asks for no more
                self.epoch += 1
            yield batch

    def batch_of(self, rows: np.ndarray, epoch: int) -> tuple[Any, ...]:
        """Some rows, of the view that is served in `epoch`."""
        manifest, columns = self._entry.manifest, self._entry.columns
        view = columns.views[epoch % self.views]
        features = pack(manifest.features, [column.take(rows) for column in view])
        return (features, *self.rest_of(rows))

    def rest_of(self, rows: np.ndarray) -> tuple[Any, ...]:
        """What comes with the features of some rows, such as labels, without reading these."""
        columns = self._entry.columns.rest
        rest: tuple[Any, ...] = pack(
            self._entry.manifest.rest, [column.take(rows) for column in columns]
        )
        return rest

    def as_tf_dataset(self, *, prefetch: bool = False) -> Any:
        """The same batches in the same order as a native `tf.data.Dataset`, which TensorFlow trains
        on faster.

        Order and view are those of `epoch` when a pass begins. A pass that has given its last
        batch advances `epoch`; one that is left before that, such as the
        look that `fit` takes at the first batch, does not.

        Args:
            prefetch: bool, whether TensorFlow gathers batches while steps run; every pass then
                begins some milliseconds later. For large features and steps that take long.
                Defaults to `False`.

        Returns:
            tf.data.Dataset of known cardinality.

        Raises:
            ImportError: tensorflow is not installed.

        Example:

        >>> import keras, tempfile
        >>> from keras_xfer.features import FeatureCache
        >>> extractor = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> data = FeatureCache(tempfile.mkdtemp()).features(extractor, np.ones((5, 3)))
        >>> int(data.as_tf_dataset().cardinality())
        1

        Reference:
            https://www.tensorflow.org/guide/data
        """
        from keras_xfer.features.tf_dataset import tf_dataset

        return tf_dataset(self, self._entry.manifest, prefetch=prefetch)

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

        >>> import keras, tempfile
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
