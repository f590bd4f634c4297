"""The features that `keras-xfer train` keeps, and `keras-xfer cache`, which looks after them."""

import errno
import os
import shutil
import time
from typing import Any

import keras

from keras_xfer.commands.recipe import UsageError
from keras_xfer.commands.runs import FEATURES, RunFolder
from keras_xfer.commands.screen import Screen, counted
from keras_xfer.features import CachedFeatures, FeatureCache

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class RunCache(FeatureCache):
    """The cache of a run: shows on its screen that features are computed, and how long it took.

    Args:
        directory: Path of its folder.
        screen: A `Screen`.

    Attributes:
        seconds: Float, the time that features took, to compute or to find.
    """

    def __init__(self, directory: str | os.PathLike[str], screen: Screen) -> None:
        super().__init__(directory)
        self.seconds = 0.0
        self._screen = screen

    def features(self, *args: Any, **kwargs: Any) -> CachedFeatures:
        """Return what `FeatureCache.features` returns."""
        began = time.perf_counter()
        self._screen.passing("")  # progress has a line of its own
        try:
            return super().features(*args, **{**kwargs, "verbose": "auto"})
        except OSError as error:
            if error.errno in _FULL:
                raise UsageError(
                    f"The disk is full, of which {str(self.directory)!r} keeps features. Free some "
                    "space, give a --cache elsewhere, or --no-cache. What is complete is found again"
                ) from error
            if error.errno in _READ_ONLY:
                raise UsageError(
                    f"Features cannot be written in {str(self.directory)!r} ({error.strerror}). "
                    "Make it writable, give a --cache elsewhere, or --no-cache"
                ) from error
            raise
        finally:
            self.seconds += time.perf_counter() - began


class FeatureSeconds(keras.callbacks.Callback):
    """Keeps the time that a run's features took, with what the run needs to go on."""

    def __init__(self, cache: RunCache) -> None:
        super().__init__()
        self._cache = cache

    def state_dict(self) -> dict[str, Any]:
        """Return the time until now."""
        return {"seconds": self._cache.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the time of before."""
        self._cache.seconds += state["seconds"]


def given(directory: str | os.PathLike[str], screen: Screen) -> RunCache:
    """Open the cache of `--cache`.

    Args:
        directory: Path of its folder, which need not exist.
        screen: A `Screen`.

    Returns:
        A `RunCache`.

    Raises:
        UsageError: It is something else, or that of another version.
    """
    try:
        return RunCache(directory, screen)
    except (ValueError, NotADirectoryError) as error:
        raise UsageError(f"--cache: {_one_line(error)}") from error


def own(run: RunFolder, screen: Screen) -> RunCache:
    """Open the cache that lies in a run's folder until the run has ended.

    Args:
        run: A `RunFolder` that is being written.
        screen: A `Screen`.

    Returns:
        A `RunCache`.
    """
    try:
        return RunCache(run / FEATURES, screen)
    except ValueError:  # half removed, or left by another version: nobody else's
        shutil.rmtree(run / FEATURES)
        return RunCache(run / FEATURES, screen)


def info(directory: str | os.PathLike[str], screen: Screen) -> None:
    """Show what a cache holds.

    Args:
        directory: Path of its folder.
        screen: A `Screen`.

    Raises:
        UsageError: It is no cache, or that of another version.
    """
    found = _there(directory).info()
    rows = found.table.rows
    if not rows:
        screen.line(f"No features are kept in {directory}")
        return
    screen.line(str(found.table))
    screen.line(f"{counted(len(rows), 'entry', 'entries')}, {found.total_bytes:,} bytes")


def clear(directory: str | os.PathLike[str], screen: Screen) -> None:
    """Remove what no process has open of a cache, and say what went and what stayed.

    Args:
        directory: Path of its folder.
        screen: A `Screen`.

    Raises:
        UsageError: It is no cache, or that of another version.
        OSError: It cannot be removed.
    """
    cleared = _there(directory).clear()
    screen.line(f"Removed {counted(cleared.num_bytes, 'byte')}")
    if cleared.kept:
        screen.line(
            f"{counted(len(cleared.kept), 'entry', 'entries')} stayed, open in another process: "
            f"{', '.join(key[:12] for key in cleared.kept)}"
        )


def _there(directory: str | os.PathLike[str]) -> FeatureCache:
    try:
        return FeatureCache(directory)
    except (ValueError, NotADirectoryError) as error:
        raise UsageError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
