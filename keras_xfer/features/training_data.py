"""What `fit_staged` trains on: as it came, or as cached features, one order for both."""

import difflib
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.dataset import CachedFeatures
from keras_xfer.features.live import Still
from keras_xfer.features.nesting import describe, pack
from keras_xfer.features.order import Ordered
from keras_xfer.features.source import as_tuple, is_arrays, leaves_of, source_of
from keras_xfer.features.unchanged import unchanged

# Of `Model.fit`, with its defaults.
_ARGUMENTS: dict[str, Any] = {
    "batch_size": None,
    "class_weight": None,
    "initial_epoch": 0,
    "sample_weight": None,
    "shuffle": True,
    "steps_per_epoch": None,
    "validation_batch_size": None,
    "validation_freq": 1,
    "validation_split": 0.0,
    "validation_steps": None,
}


class TrainingData:
    """The data of one `fit_staged`.

    Attributes:
        validation: what `fit` calls validation_data.
        initial_epoch: int.
        clock: `Clock`, the callback that sets the order of each epoch.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        validation_data: Any,
        arguments: dict[str, Any],
        *,
        views: int,
        seed: int | None,
        key: str | None,
        verbose: Any,
    ) -> None:
        for name in arguments:
            if name not in _ARGUMENTS:
                near = difflib.get_close_matches(name, _ARGUMENTS, n=1, cutoff=0)[0]
                raise TypeError(
                    f"Expected arguments of Model.fit. Received: {name}={arguments[name]!r}; "
                    f"nearest is {near!r}."
                )
        given = {**_ARGUMENTS, **arguments}
        self.initial_epoch: int = given.pop("initial_epoch")
        self.batch_size: int | None = given.pop("batch_size")
        self.validation_batch_size: int | None = given.pop("validation_batch_size")
        self.shuffle = bool(given.pop("shuffle"))
        weights, split = given.pop("sample_weight"), given.pop("validation_split")
        self._arguments = given  # as they are, for every `fit`
        self._views = views
        self._key = key
        self._verbose = 0 if verbose == 0 else "auto"
        self._train: Any = x
        self._is_arrays = is_arrays(x)
        if self._is_arrays:
            self._train = (
                (x, y, weights) if weights is not None else (x, y) if y is not None else (x,)
            )
        elif isinstance(x, Iterator) and given["steps_per_epoch"] is None:
            raise TypeError(
                "Expected data that can be read in every epoch: arrays, a keras.utils.PyDataset, a "
                f"tf.data.Dataset, a DataLoader. Received: x={x!r} of type {type(x).__name__}, "
                "which is used up by one."
            )
        elif y is not None or weights is not None:
            raise ValueError(
                "Expected arrays, or labels and weights inside a dataset. Received: "
                f"{'y' if y is not None else 'sample_weight'} with x of type {type(x).__name__}. "
                "Make lists of numbers arrays: numpy.asarray(x)."
            )
        self.validation = validation_data
        if split and validation_data is None:
            self._split(split)
        if seed is None and self._orders_itself():
            seed = x.seed
        if seed is None:
            seed = random.randrange(2**31)  # noqa: S311  # an order, no secret
        self.clock = Clock(seed)
        self._fed: Any = None

    def images(self) -> int:
        """How many rows are kept: those of all views, and those of the validation."""
        rows = _num_rows(self._train, self.batch_size) * self._views
        return (
            rows if self.validation is None else rows + _num_rows(self.validation, self.batch_size)
        )

    def steps(self) -> int | None:
        """How many batches an epoch has, as far as it is known by now."""
        if self._arguments["steps_per_epoch"] is not None:
            return int(self._arguments["steps_per_epoch"])
        if self._fed is not None:
            return _num_batches(self._fed)
        if self._is_arrays:
            return -(-len(leaves_of(self._train)[0]) // (self.batch_size or 32))
        return _num_batches(self._train)

    def plain(self) -> dict[str, Any]:
        """Arguments of `fit` for the data as they came."""
        train, shuffle = self._train, self.shuffle
        if self._is_arrays:
            train = _ArrayBatches(
                self._train, self.batch_size or 32, shuffle=shuffle, seed=self.clock.seed
            )
            shuffle = False  # they are, row by row
        elif self._orders_itself():
            train = self._train.in_order()
            train.shuffle, train.seed = shuffle, self.clock.seed
            shuffle = False  # Keras would shuffle its batches once more
        return self._feeding(train, train, self.validation, shuffle=shuffle)

    def cached(self, cache: FeatureCache, prefix: keras.Model, *, prefetch: bool) -> dict[str, Any]:
        """Arguments of `fit` for what `prefix` makes of the data."""
        with unchanged(prefix):
            train = cache.features(
                prefix,
                self._train,
                views=self._views,
                key=self._key,
                batch_size=self.batch_size if self._is_arrays else None,
                shuffle=self.shuffle,
                seed=self.clock.seed,
                verbose=self._verbose,
            )
            validation = None
            if self.validation is not None:
                still: Any = Still(prefix) if self._views > 1 else prefix
                validation = _readable(
                    cache.features(
                        still,
                        _validation_tuple(self.validation),
                        key=self._key and f"{self._key} (validation)",
                        batch_size=(self.validation_batch_size or self.batch_size)
                        if is_arrays(self.validation)
                        else None,
                        verbose=self._verbose,
                    ),
                    prefetch,
                )
        fed = self._feeding(train, _readable(train, prefetch), validation, shuffle=False)
        if fed["class_weight"]:
            fed["class_weight"] = _of_every_class(fed["class_weight"], train)
        return fed

    def _feeding(
        self, ordered: Any, train: Any, validation: Any, *, shuffle: bool
    ) -> dict[str, Any]:
        orders = isinstance(ordered, Ordered) or self._orders_itself()
        self.clock.data = ordered if orders else None
        self._fed = train
        arguments = {**self._arguments, "shuffle": shuffle, "initial_epoch": self.initial_epoch}
        if is_arrays(validation):  # datasets come in batches
            arguments["validation_batch_size"] = self.validation_batch_size or self.batch_size
        return {"x": train, "validation_data": validation, **arguments}

    def _orders_itself(self) -> bool:
        """Whether the data are rows in an order by seed and epoch, as `keras_xfer.images` has them."""
        return all(hasattr(self._train, name) for name in ("in_order", "seed", "epoch", "shuffle"))

    def _split(self, split: float) -> None:
        """As `fit` does it: the last rows, before any order is drawn."""
        if not self._is_arrays or not 0 < split < 1:
            raise ValueError(
                "Expected validation_split in (0, 1), of arrays. Received: "
                f"validation_split={split!r} with x of type {type(self._train).__name__}."
            )
        structure, leaves = describe(self._train), leaves_of(self._train)
        at = int(len(leaves[0]) * (1 - split))
        if not 0 < at < len(leaves[0]):
            raise ValueError(
                "Expected validation_split to leave rows to train and to validate on. Received: "
                f"validation_split={split!r} with {len(leaves[0])} rows."
            )
        self.validation = pack(structure, [leaf[at:] for leaf in leaves])
        self._train = pack(structure, [leaf[:at] for leaf in leaves])


class Clock(keras.callbacks.Callback):
    """Sets the epoch of the data that are trained on, by which they draw their order and view; the
    seed survives an interrupted run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.data: Any = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002  # Keras's signature
        """Set the epoch."""
        if self.data is not None:
            self.data.seed = self.seed
            self.data.epoch = epoch  # last: it draws the order

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the seed of the interrupted run."""
        self.seed = state["seed"]


class _ArrayBatches(Ordered):
    """Arrays as batches, in the order in which their features would come."""

    def __init__(
        self, arrays: tuple[Any, ...], batch_size: int, *, shuffle: bool, seed: int
    ) -> None:
        self._structure = describe(arrays)
        self._leaves = leaves_of(arrays)
        super().__init__(len(self._leaves[0]), batch_size, shuffle=shuffle, seed=seed)

    def __getitem__(self, index: int) -> Any:
        rows = self.rows(index)
        return pack(self._structure, [leaf[rows] for leaf in self._leaves])


def _readable(features: Any, prefetch: bool) -> Any:
    """On TensorFlow native tf.data, which is faster."""
    if keras.backend.backend() != "tensorflow":
        return features
    return features.as_tf_dataset(prefetch=prefetch)


def _of_every_class(class_weight: dict[int, float], features: CachedFeatures) -> dict[int, float]:
    """With 1 for each class that is left out, as Keras counts it where it weighs arrays; over tf.data
    it looks such a class up beyond the end of the others (keras 3.15.1)."""
    count = 0
    for begin in range(0, features.num_samples, features.batch_size):
        end = min(begin + features.batch_size, features.num_samples)
        rest = features.rest_of(np.arange(begin, end))
        if len(rest) != 1 or not isinstance(rest[0], np.ndarray):  # which Keras refuses
            return class_weight
        is_one_hot = rest[0].ndim > 1 and rest[0].shape[-1] > 1
        last = rest[0].shape[-1] - 1 if is_one_hot else int(np.round(rest[0].max()))
        count = max(count, last + 1)
    return {**dict.fromkeys(range(count), 1.0), **class_weight}


def _validation_tuple(data: Any) -> Any:
    return as_tuple(data) if is_arrays(data) else data


def _num_rows(data: Any, batch_size: int | None) -> int:
    """The rows of `data`, at most; counted where nothing tells."""
    source = source_of(data, batch_size=batch_size, key="counting")
    if source.num_rows is not None:
        return source.num_rows
    batches = _num_batches(data)
    if batches is not None:
        return batches * source.rows_per_batch
    return sum(len(leaves[0]) for leaves in source.read())


def _num_batches(data: Any) -> int | None:
    if isinstance(data, keras.utils.PyDataset):
        return int(data.num_batches)
    if hasattr(data, "cardinality"):  # tf.data
        count = int(data.cardinality())
        return count if count >= 0 else None
    return len(data) if hasattr(data, "__len__") else None
