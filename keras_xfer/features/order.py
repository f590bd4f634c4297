"""`Ordered`: rows in batches, in an order that depends on a seed and the epoch alone."""

import math
from typing import Any

import keras
import numpy as np


class Ordered(keras.utils.PyDataset):
    """A dataset of rows that may be shuffled anew in each epoch, all of them and reproducibly.

    Args:
        num_samples: int, how many rows there are.
        batch_size: int, rows a batch; the last batch holds the rest.
        shuffle: bool. `True` draws a new order of all rows for every epoch.
        seed: int >= 0. The order depends on the seed and `epoch` alone.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size` of `keras.utils.PyDataset`.

    Attributes:
        order: int array, the order of this epoch.
        epoch: int, settable.

    Raises:
        ValueError: a `batch_size` below 1, or a `seed` below 0.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if batch_size < 1 or seed < 0:
            raise ValueError(
                "Expected `batch_size` of at least 1 and `seed` of at least 0. "
                f"Received: batch_size={batch_size}, seed={seed}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch whose order is in force, counted from 0."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self.shuffle:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        else:
            self.order = np.arange(self.num_samples)

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order."""
        self.epoch += 1

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def rows(self, index: int, order: np.ndarray | None = None) -> np.ndarray:
        """The rows of a batch, in the order in force or in another."""
        if not 0 <= index < len(self):
            raise IndexError(f"Expected a batch in [0, {len(self)}). Received: index={index}")
        order = self.order if order is None else order
        return order[index * self.batch_size : (index + 1) * self.batch_size]
