"""Callbacks: `StagedUnfreezing`, `BestCheckpoint` and `EpochTiming`."""

from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing

__all__ = ["StagedUnfreezing"]
