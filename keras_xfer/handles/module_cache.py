"""The cache of downloaded and unpacked SavedModels, which several processes share.

Laid out as tensorflow_hub's: the module in `<key>/`, a note for people in `<key>.descriptor.txt`.
Beside it `<key>.json` records every file, so that a damaged copy is found out. What is being
written lies in `.<key>.tmp-…/` while its process holds the lock `.<key>.filelock`; it becomes the
module by one rename, when it is whole.
"""

import contextlib
import datetime
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_xfer import files
from keras_xfer.handles.archives import Unpacked
from keras_xfer.handles.failures import shown, writing
from keras_xfer.handles.saved_models import holds_saved_model

# A wait shorter than this is not worth a line.
ANNOUNCED_AFTER_SECONDS = 1.0

_POLL_SECONDS = 0.05


def cache_folder() -> Path:
    """Return the folder of the cache: TFHUB_CACHE_DIR, or one in Keras's own folder.

    tensorflow_hub's default is a temporary folder, where the system removes single files of a
    module: https://github.com/tensorflow/hub/issues/896

    Returns:
        `pathlib.Path`, absolute. It need not exist.

    Example:
    >>> cache_folder().is_absolute()
    True

    Reference:
        https://www.tensorflow.org/hub/caching
    """
    chosen = os.environ.get("TFHUB_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    keras_home = os.environ.get("KERAS_HOME") or "~/.keras"
    return Path(keras_home).expanduser().absolute() / "tfhub_modules"


class CachedModule:
    """The place of one module in the cache.

    Why and when: `find` is cheap and needs no lock; `fill` is for what `find` has not found.

    Args:
        key: String of hexadecimal digits, the same for the same content.

    Example:
    >>> CachedModule("0" * 40).find(None) is None
    True
    """

    def __init__(self, key: str) -> None:
        cache = cache_folder()
        self.folder = cache / key
        self._record = cache / f"{key}.json"
        self._descriptor = cache / f"{key}.descriptor.txt"
        self._lock = cache / f".{key}.filelock"  # tensorflow_hub waits for a <key>.lock to go
        self._temporary_prefix = f".{key}.tmp-"

    def find(self, pin: str | None) -> str | None:
        """Return the module's folder if it is there, whole, and of the archive that is pinned.

        Args:
            pin: String, the SHA-256 of the archive, or `None`. With it all files are read again.

        Returns:
            String, or `None` if the module has to be fetched.
        """
        try:
            if not holds_saved_model(self.folder):
                return None
            record = self._read_record()
            if record is None:  # downloaded by tensorflow_hub
                return str(self.folder) if pin is None else None
            return str(self.folder) if self._matches(record, pin) else None
        except (
            FileNotFoundError,
            NotADirectoryError,
        ):  # removed or replaced while it was looked at
            return None

    def fill(self, handle: str, pin: str | None, fetch: Callable[[Path], Unpacked]) -> str:
        """Fetch the module, unless another process does so meanwhile.

        Args:
            handle: String, as the user wrote it.
            pin: As `find`.
            fetch: Function that unpacks the module somewhere in the temporary folder it is given.

        Returns:
            String, the module's folder.

        Raises:
            HandleError: the cache cannot be written, or `fetch` raises it.
        """
        with self._locked(handle):
            found = self.find(pin)
            if found is not None:
                return found
            with self._temporary_folder() as temporary:
                self._place(handle, fetch(temporary), temporary)
        return str(self.folder)

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record.read_text("utf-8"))
            # Read here, so that what is no record of ours counts as none.
            return {
                "archive_sha256": str(record["archive_sha256"]),
                "files": {
                    str(name): (int(file["size"]), str(file["sha256"]))
                    for name, file in record["files"].items()
                },
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _matches(self, record: dict[str, Any], pin: str | None) -> bool:
        recorded = record["files"]
        if any((self.folder / name).stat().st_size != size for name, (size, _) in recorded.items()):
            return False
        if pin is None:
            return True
        present = {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if not path.is_dir()
        }
        return (
            record["archive_sha256"] == pin
            and present == set(recorded)
            and all(files.sha256(self.folder / name) == sha for name, (_, sha) in recorded.items())
        )

    @contextlib.contextmanager
    def _locked(self, handle: str) -> Iterator[None]:
        """Hold the lock that the system takes back when its holder dies, however it dies."""
        import filelock  # here: the package itself is imported without it

        with writing(self.folder.parent):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self._lock)
        with writing(self._lock):
            try:
                lock.acquire(timeout=ANNOUNCED_AFTER_SECONDS, poll_interval=_POLL_SECONDS)
            except filelock.Timeout:
                if sys.stdout.isatty():
                    sys.stdout.write(f"Waiting for another process that fetches {shown(handle)}\n")
                    sys.stdout.flush()
                lock.acquire(timeout=-1, poll_interval=_POLL_SECONDS)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """A folder that goes again; those that killed processes have left go too."""
        cache = self.folder.parent
        # Whoever makes one holds the lock, and that is this process now.
        for leftover in cache.glob(f"{self._temporary_prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for file in (self._record, self._descriptor):
            files.remove_leftovers(file)
        with writing(cache):
            temporary = Path(tempfile.mkdtemp(prefix=self._temporary_prefix, dir=cache))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, handle: str, module: Unpacked, temporary: Path) -> None:
        """Move the module in, after its record: a folder is never seen under another's record."""
        former = temporary / "former"
        with writing(self.folder):
            if os.path.lexists(self.folder):
                self.folder.rename(former)
            try:
                files.write_text(self._descriptor, _described(handle))
                record = {
                    "handle": handle,
                    "archive_sha256": module.archive_sha256,
                    "files": module.files,
                }
                files.write_json(self._record, record)
                module.folder.rename(self.folder)
            except BaseException:
                if os.path.lexists(former):
                    former.rename(self.folder)
                raise


def _described(handle: str) -> str:
    """The text of tensorflow_hub's own descriptor, which tells people whose folder it is."""
    return (
        f"Module: {handle}\nDownload Time: {datetime.datetime.now()}\n"
        f"Downloader Hostname: {socket.gethostname()} (PID:{os.getpid()})"
    )
