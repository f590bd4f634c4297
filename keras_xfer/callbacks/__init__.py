"""Callbacks: `StagedUnfreezing`, `BestCheckpoint` and `EpochTiming`."""

from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing

__all__ = ["BestCheckpoint", "EpochTiming", "StagedUnfreezing"]
