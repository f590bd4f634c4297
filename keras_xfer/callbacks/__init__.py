"""Callbacks: `StagedUnfreezing`, `BestCheckpoint`, `BackupAndRestore` and `EpochTiming`; and, before
`fit`, `find_learning_rate`."""

from keras_xfer.callbacks.backup_and_restore import BackupAndRestore
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.callbacks.learning_rate_finder import LearningRateCurve, find_learning_rate
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing

__all__ = [
    "BackupAndRestore",
    "BestCheckpoint",
    "EpochTiming",
    "LearningRateCurve",
    "StagedUnfreezing",
    "find_learning_rate",
]
