"""`Ordered`: rows in batches, in an order that depends on a seed and the epoch alone."""

import inspect
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
        self._asked: set[int] = set()  # which batches of this epoch were asked for
        if self.shuffle:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        else:
            self.order = np.arange(self.num_samples)

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order, where a pass has ended.

        Keras calls it too when it has looked at the first batch, and once more before every
        validation; and where `steps_per_epoch` ends an epoch in the middle of a pass. Those are
        not counted.
        """
        if _is_reset():
            self._asked.clear()
        elif len(self._asked) in (0, len(self)) or (self.workers and self.use_multiprocessing):
            self.epoch += 1  # whoever has asked for nothing has asked another process, or says so

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def rows(self, index: int, order: np.ndarray | None = None) -> np.ndarray:
        """The rows of a batch, in the order in force or in another."""
        if not 0 <= index < len(self):
            raise IndexError(f"Expected a batch in [0, {len(self)}). Received: index={index}")
        if order is None:
            self._asked.add(index)
            order = self.order
        return order[index * self.batch_size : (index + 1) * self.batch_size]


def _is_reset() -> bool:
    """Whether Keras's trainer calls to begin anew, and not since an epoch has ended, of which it
    says nothing. Tried on Keras 3.15.1."""
    frame = inspect.currentframe()
    for _ in range(3):  # `on_epoch_end`, Keras's adapter that calls it, and what calls that
        frame = frame and frame.f_back
    return (
        frame is not None
        and frame.f_code.co_name == "reset"
        and frame.f_globals.get("__name__", "").endswith(".trainers.epoch_iterator")
    )
