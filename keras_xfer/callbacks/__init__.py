"""Callbacks: `StagedUnfreezing`, `BestCheckpoint` and `EpochTiming`."""
