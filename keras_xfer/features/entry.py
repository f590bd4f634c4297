"""One entry of the cache: a folder of `.npy` shards and a manifest.

Nothing is read but what the manifest names and what has the size and the SHA-256 that it says.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_xfer import files
from keras_xfer.features.manifest import FILENAME, DamagedManifestError, Leaf, Manifest, Shard

# Features that are no more than this are held in memory while they are open.
IN_MEMORY_BYTES = 2**28

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

# What this process has read and found right: (path, size, mtime_ns, inode).
_verified: set[tuple[str, int, int, int]] = set()


class Entry:
    """The files of one entry while they are written.

    Args:
        folder: `pathlib.Path`. It need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, *, announce: bool = False) -> Manifest | None:
        """What there is, without the files that are damaged, or None.

        Args:
            announce: bool, whether a warning names what is damaged.
        """
        try:
            manifest = Manifest.read(self.folder)
        except DamagedManifestError:
            if announce:
                _warn(f"{FILENAME} in {self.folder} is damaged; its features are computed again.")
            return None
        if manifest is None:
            return None
        bad = self._damaged(manifest)
        for shard in manifest.shards.values():
            shard.files = {name: file for name, file in shard.files.items() if name not in bad}
        if bad:
            manifest.complete = False
            if announce:
                _warn(
                    f"Damaged or missing in {self.folder}: {', '.join(sorted(bad))}. What they "
                    "held is computed again."
                )
        return manifest

    def _damaged(self, manifest: Manifest) -> set[str]:
        recorded = {
            name: file for shard in manifest.shards.values() for name, file in shard.files.items()
        }
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            right = pool.map(lambda name: _is_right(self.folder / name, *recorded[name]), recorded)
            return {name for name, is_right in zip(recorded, right, strict=True) if not is_right}

    def begin(self, manifest: Manifest) -> None:
        """Make the folder ready to be written by this process alone, which holds its lock."""
        with writing(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.tmp-*"):  # of a process that died: we hold the lock
                path.unlink(missing_ok=True)
            manifest.write(self.folder)

    def write_shard(
        self,
        manifest: Manifest,
        index: int,
        rows: int,
        source: str | None,
        arrays: dict[str, np.ndarray],
        needed_bytes: int,
    ) -> None:
        """Write files of one shard, and then the manifest that names them."""
        shard = manifest.shards.get(index) or Shard(rows, source, {})
        with writing(self.folder, needed_bytes):
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                content = buffer.getbuffer()
                with files.replacing(self.folder / name) as temporary:
                    temporary.write_bytes(content)
                shard.files[name] = (len(content), hashlib.sha256(content).hexdigest())
            manifest.shards[index] = shard
            manifest.write(self.folder)

    def finish(self, manifest: Manifest, rows: int) -> None:
        """Say that all rows are there."""
        manifest.rows, manifest.complete = rows, True
        with writing(self.folder, 0):
            manifest.write(self.folder)

    def discard(self) -> None:
        """Remove what there is."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Columns:
    """The arrays of a complete entry, by row.

    Why and when: made once for an entry that is opened. All files are mapped at once, so what
    another process repairs or removes later does not change what is read here.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        in_memory = manifest.num_bytes() <= IN_MEMORY_BYTES
        shards = range(len(manifest.shards))
        names = [list(manifest.names(index)) for index in shards]
        columns = [
            Column(
                [_map(folder / names[index][i], leaf) for index in shards],
                leaf,
                manifest.rows_per_shard,
                in_memory,
            )
            for i, (leaf, _) in enumerate(manifest.names(0).values())
        ]
        count = len(manifest.feature_leaves)
        self.views = [columns[view * count : (view + 1) * count] for view in range(manifest.views)]
        self.rest = columns[manifest.views * count :]


class Column:
    """One array that lies in several files."""

    def __init__(
        self, parts: list[np.ndarray], leaf: Leaf, rows_per_shard: int, in_memory: bool
    ) -> None:
        self.leaf = leaf
        self.in_memory = in_memory
        self._parts = parts
        self._rows_per_shard = rows_per_shard
        self._whole: np.ndarray | None = None

    def whole(self) -> np.ndarray:
        """All rows as they are stored, in memory."""
        if self._whole is None:
            self._whole = np.concatenate(self._parts)
            self._parts = []
        return self._whole

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, in the dtype that is served."""
        stored = np.take(self.whole(), rows, axis=0) if self.in_memory else self._read(rows)
        return served(stored, self.leaf)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as they are stored, straight out of the files."""
        shard, row = np.divmod(rows, self._rows_per_shard)
        count = len(rows)
        follow = count and shard[0] == shard[-1] and row[-1] - row[0] == count - 1
        if follow and (np.diff(rows) == 1).all():
            return self._parts[shard[0]][row[0] : row[0] + count].copy()
        stored = np.empty((len(rows), *self.leaf.shape), self.leaf.stored)
        for i, (part, at) in enumerate(zip(shard.tolist(), row.tolist(), strict=True)):
            stored[i] = self._parts[part][at]  # faster than to group them by shard
        return stored


def served(stored: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Rows as they were computed, of rows as they are stored."""
    if leaf.stored == leaf.dtype:
        return stored
    dtype = dtype_of(leaf.dtype)
    return stored.view(dtype) if leaf.stored.startswith("uint") else stored.astype(dtype)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of that name, bfloat16 among them."""
    import ml_dtypes  # here: its import tells NumPy their names  # noqa: F401

    return np.dtype(name)


def stored(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Rows as `leaf` stores them."""
    if leaf.stored == leaf.dtype:
        return array
    if leaf.stored.startswith("uint"):
        return np.ascontiguousarray(array).view(leaf.stored)
    return array.astype(leaf.stored)


@contextlib.contextmanager
def writing(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Say what to do where the disk is full or the folder cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, _full(folder, needed_bytes)) from error
        if error.errno in _READ_ONLY:
            raise OSError(
                error.errno,
                f"Expected a folder that can be written, to store features in. Received: "
                f"{folder.parent} ({error.strerror}). Make it writable, or give FeatureCache "
                "another directory; what is complete there can be read as it is.",
            ) from error
        raise


def _full(folder: Path, needed_bytes: int) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"Expected room for {needed_bytes:,} bytes of features, but the disk is full or a limit is "
        f"reached. Received: folder={folder}, {free:,} bytes free. Free some, remove features "
        "(FeatureCache.clear(), or max_bytes=…), or give FeatureCache a directory on another disk. "
        "What is complete stays, and the next run goes on from there."
    )


def _map(path: Path, leaf: Leaf) -> np.ndarray:
    empty = 0 in leaf.shape  # which cannot be mapped
    array = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    if array.shape[1:] != leaf.shape or array.dtype != leaf.stored:
        raise ValueError(
            f"Expected rows of shape {leaf.shape} and dtype {leaf.stored}. Received: {path} with "
            f"shape {array.shape} and dtype {array.dtype}. Remove its folder: FeatureCache.clear()."
        )
    return array.view(np.ndarray)  # rows of a memmap cost more to take


def _is_right(path: Path, size: int, sha256: str) -> bool:
    try:
        found = path.stat()
        if found.st_size != size:
            return False
        mark = (str(path), found.st_size, found.st_mtime_ns, found.st_ino)
        if mark not in _verified:
            if files.sha256(path) != sha256:
                return False
            _verified.add(mark)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
