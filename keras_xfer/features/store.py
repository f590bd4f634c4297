"""The folder of the cache: whose it is, who reads and who writes an entry, what goes to make room.

directory/
  keras_xfer_features.json    whose folder this is, and of which version
  .locks/<key>.lock           held by the process that computes the entry
  .locks/<key>.open           held, shared, by every process that reads or writes it
  <key>/                      the entry
  .removed-…/                 an entry on its way out
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from keras_xfer import files
from keras_xfer.features.entry import Entry, writing
from keras_xfer.features.manifest import FORMAT, DamagedManifestError, Manifest

try:
    import fcntl
except ImportError:  # Windows, which does not rename a folder of which a file is open
    fcntl = None  # type: ignore[assignment]  # asked for below

MARKER = "keras_xfer_features.json"
LOCKS = ".locks"
_REMOVED = ".removed-"
_POLL_SECONDS = 0.05
_ANNOUNCED_AFTER_SECONDS = 1.0
_CANNOT_BE_WRITTEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}


class Hold:
    """The promise that nobody removes an entry, until it is released or dropped."""

    def __init__(self, descriptor: int | None) -> None:
        self._release = (
            weakref.finalize(self, os.close, descriptor) if descriptor is not None else None
        )

    def release(self) -> None:
        """Give it up."""
        if self._release is not None:
            self._release()


class Stored(NamedTuple):
    """What there is of one entry."""

    key: str
    manifest: Manifest | None
    num_bytes: int
    last_used: float


class Store:
    """A folder of entries.

    Args:
        directory: str or path.
        max_bytes: int or None, what all entries together may hold.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.max_bytes = max_bytes
        self._check()

    def entry(self, key: str) -> Entry:
        """The entry of that key, whether it is there or not."""
        return Entry(self.directory / key)

    def prepare(self) -> None:
        """Make the folder and say whose it is."""
        with writing(self.directory / MARKER, 0):
            (self.directory / LOCKS).mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self.directory / MARKER)
            if not (self.directory / MARKER).exists():
                files.write_json(self.directory / MARKER, {"format": FORMAT})
            for leftover in self.directory.glob(f"{_REMOVED}*"):  # of a process that died
                shutil.rmtree(leftover, ignore_errors=True)

    # --- Reading and writing --------------------------------------------------------------------

    def hold(self, key: str) -> Hold:
        """Keep the entry from being removed."""
        descriptor = self._open_lock(key)
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return Hold(descriptor)

    @contextlib.contextmanager
    def computing(self, key: str, *, announce: bool) -> Iterator[None]:
        """Be the only process that writes the entry; wait while another is.

        The system takes the lock back when its holder dies, however it dies.
        """
        import filelock  # here: the package itself is imported without it

        self.prepare()
        lock = filelock.FileLock(self.directory / LOCKS / f"{key}.lock")
        with writing(self.directory / MARKER, 0):
            try:
                lock.acquire(timeout=_ANNOUNCED_AFTER_SECONDS, poll_interval=_POLL_SECONDS)
            except filelock.Timeout:
                if announce:
                    sys.stdout.write("Waiting for another process that computes these features\n")
                    sys.stdout.flush()
                lock.acquire(timeout=-1, poll_interval=_POLL_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def touch(self, key: str) -> None:
        """Note that the entry is in use."""
        with contextlib.suppress(OSError):  # a folder that can only be read keeps what it has
            os.utime(self.directory / key)

    # --- Room -----------------------------------------------------------------------------------

    def make_room(self, needed_bytes: int, *, total_bytes: int, key: str) -> None:
        """Remove what was not used for the longest time, until `needed_bytes` more are allowed.

        Args:
            needed_bytes: int, what is about to be written of entry `key`.
            total_bytes: int, what that entry will hold then, as far as is known.
            key: the entry, which stays.

        Raises:
            ValueError: `max_bytes` is too small, or what is open leaves too little of it.
        """
        if self.max_bytes is None:
            return
        if total_bytes > self.max_bytes:
            raise ValueError(
                f"Expected max_bytes of at least {total_bytes:,}, which these features alone take"
                f". Received: max_bytes={self.max_bytes:,}. Raise it, store them as "
                "dtype='float16', or cut the model where its output is smaller."
            )
        stored = sorted(self.stored(), key=lambda each: each.last_used)
        held = sum(each.num_bytes for each in stored)
        for each in stored:
            if held + needed_bytes <= self.max_bytes:
                return
            if each.key != key and self.remove(each.key):
                held -= each.num_bytes
        if held + needed_bytes > self.max_bytes:
            raise ValueError(
                f"Expected room for {needed_bytes:,} more bytes of features. Received: max_bytes="
                f"{self.max_bytes:,}, of which {held:,} are in use: that much is open, in this "
                "process or in others. Raise max_bytes, or drop the features that are not needed."
            )

    def remove(self, key: str) -> bool:
        """Remove an entry, unless it is open anywhere; whether it is gone."""
        folder = self.directory / key
        descriptor = self._open_lock(key)
        try:
            if descriptor is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            away = self.directory / f"{_REMOVED}{secrets.token_hex(8)}"
            try:
                folder.rename(away)  # so that nobody sees half of it
            except FileNotFoundError:
                return True
            except PermissionError:
                if fcntl is None:  # a file of it is open
                    return False
                raise
        finally:
            if descriptor is not None:
                os.close(descriptor)
        shutil.rmtree(away, ignore_errors=True)
        return True

    def stored(self) -> list[Stored]:
        """All entries, by key."""
        found = []
        for folder in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                last_used = folder.stat().st_mtime
                num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):  # removed while it was looked at
                continue
            try:
                manifest = Manifest.read(folder)
            except DamagedManifestError:
                manifest = None
            found.append(Stored(folder.name, manifest, num_bytes, last_used))
        return found

    # --- The folder -----------------------------------------------------------------------------

    def _open_lock(self, key: str) -> int | None:
        """The file that is locked while the entry is open; None where nobody could lock it."""
        if fcntl is None:
            return None
        path = self.directory / LOCKS / f"{key}.open"
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
            try:
                return os.open(path, flags, 0o666)
            except OSError as error:
                if error.errno not in _CANNOT_BE_WRITTEN:
                    raise
        return None  # in a folder that can only be read nothing is removed

    def _check(self) -> None:
        """Refuse what is no folder of this cache."""
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(
                f"Expected the folder of a cache. Received: directory={self.directory}, a file."
            )
        marker = self.directory / MARKER
        if not marker.exists():
            # Listed once: another process may be making it meanwhile.
            ours = (MARKER, f".{MARKER}.tmp-", LOCKS)
            foreign = [path.name for path in self._listed() if not path.name.startswith(ours)]
            if foreign and not marker.exists():  # nor since it was looked for
                raise ValueError(
                    "Expected an empty folder, or one that FeatureCache has made. Received: "
                    f"directory={self.directory}, which holds {sorted(foreign)[0]!r}"
                    + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                    + ". Name a new folder."
                )
            return
        try:
            version = json.loads(marker.read_text("utf-8"))["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {MARKER} as FeatureCache writes it. Received: directory="
                f"{self.directory}, in which it is damaged. Remove the folder, or choose another."
            ) from error
        if version != FORMAT:
            raise ValueError(
                f"Expected features of format {FORMAT}, which this version of keras_xfer reads. "
                f"Received: directory={self.directory}, of format {version!r}. Remove the folder, "
                "or choose another."
            )

    def _listed(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []
