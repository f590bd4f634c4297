"""Atomic files: a reader finds the old content or the new, never a part, whatever dies and when.

Everything is written to a temporary beside its target, flushed to the disk, and moved over it by
one `os.replace`. A process that is killed leaves a temporary, never a damaged target;
`remove_leftovers` tells its temporaries from those of a process at work.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What another machine left on a shared folder cannot be asked whether it lives: it is given a day.
_FOREIGN_LEFTOVER_SECONDS = 24 * 60 * 60

_in_progress: set[str] = set()  # tokens of the temporaries that this very process is writing


@contextlib.contextmanager
def replacing(filepath: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes `filepath` when the block ends without an exception.

    The temporary lies in the same folder and has the same full suffix, since Keras tells formats
    apart by it. On an exception it is removed, and what `filepath` held stays as it was.

    Args:
        filepath: str or path, the file to write. A symbolic link is followed.

    Returns:
        A context manager that gives a `pathlib.Path` to write to. Nothing exists there yet.

    Raises:
        OSError: the folder does not exist or cannot be written, `filepath` is a folder, or the
            block has written nothing.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "labels.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("cat dog")
    >>> target.read_text()
    'cat dog'

    Reference:
        https://docs.python.org/3/library/os.html#os.replace
    """
    with replacing_all(filepath) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(*filepaths: str | os.PathLike[str]) -> Iterator[tuple[Path, ...]]:
    """Do as `replacing` for several files, moved in this order with nothing in between.

    No file system replaces two files at once. All temporaries are complete and on the disk before
    the first is moved, so a process killed between two moves leaves the later ones complete beside
    their targets: `temporaries` finds them. An error between two moves leaves them too.

    Args:
        *filepaths: str or path, the files to write.

    Returns:
        A context manager that gives one `pathlib.Path` to write to for each file.

    Raises:
        OSError: as `replacing`.

    Example:
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing_all(folder / "a.txt", folder / "b.txt") as (a, b):
    ...     _ = a.write_text("1"), b.write_text("2")
    >>> sorted(file.name for file in folder.iterdir())
    ['a.txt', 'b.txt']

    Reference:
        https://docs.python.org/3/library/os.html#os.replace
    """
    targets = [_target(filepath) for filepath in filepaths]
    token = secrets.token_hex(8)
    news = [_temporary(target, token) for target in targets]
    is_moving = False
    _in_progress.add(token)
    try:
        for target, new in zip(targets, news, strict=True):
            _check_writable(target, new)
        yield tuple(news)
        for target, new in zip(targets, news, strict=True):
            _flush_file(target, new)
        is_moving = True
        for target, new in zip(targets, news, strict=True):
            os.replace(new, target)  # noqa: PTH105 - the atomic call itself, by its own name
        for folder in {target.parent for target in targets}:
            _flush_folder(folder)
    finally:
        _in_progress.discard(token)
        # Asked of the disk, since Ctrl-C may come between a move and what would count it.
        if not is_moving or all(new.exists() for new in news):
            for new in news:
                new.unlink(missing_ok=True)


def check_writable(*filepaths: str | os.PathLike[str]) -> None:
    """Fail now where `replacing` would fail later, after hours of work.

    Args:
        *filepaths: str or path, the files that are to be written.

    Raises:
        OSError: the folder does not exist or cannot be written, or there is a folder of that name.

    Example:
    >>> import tempfile
    >>> check_writable(Path(tempfile.mkdtemp()) / "best.keras")
    """
    for filepath in filepaths:
        target = _target(filepath)
        token = secrets.token_hex(8)
        _in_progress.add(token)
        try:
            _check_writable(target, _temporary(target, token))
        finally:
            _in_progress.discard(token)


def write_text(filepath: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `filepath` in UTF-8, atomically.

    Args:
        filepath: str or path, the file to write.
        text: str, its whole content.

    Raises:
        OSError: as `replacing`.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_text(target, "done")
    >>> target.read_text()
    'done'
    """
    with replacing(filepath) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(filepath: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `filepath` as JSON, atomically.

    Args:
        filepath: str or path, the file to write.
        value: what to write, see `to_json`.

    Raises:
        OSError: as `replacing`.
        TypeError: a part of `value` is of a type that JSON does not have.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "metrics.json"
    >>> write_json(target, {"val_loss": 0.5})
    >>> json.loads(target.read_text())
    {'val_loss': 0.5}
    """
    write_text(filepath, to_json(value))


def to_json(value: Any) -> str:
    """Turn `value` into JSON that every parser reads: no bare NaN, which the standard does not know.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity", as in the
    JSON of protocol buffers; `float` reads them back. NumPy's and the backends' scalars and arrays
    become numbers and lists, paths become strings.

    Args:
        value: dicts, lists, strings, numbers, booleans, None, and what is named above.

    Returns:
        str, indented, with a newline at its end.

    Raises:
        TypeError: a part of `value` is of a type that JSON does not have.

    Example:
    >>> print(to_json({"loss": float("nan"), "epoch": 3}), end="")
    {
      "loss": "NaN",
      "epoch": 3
    }
    >>> float(json.loads(to_json(float("-inf"))))
    -inf

    Reference:
        https://protobuf.dev/programming-guides/json/
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256(filepath: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file's content.

    Args:
        filepath: str or path, the file to read.

    Returns:
        str, 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "empty"
    >>> write_text(target, "")
    >>> sha256(target)[:8]
    'e3b0c442'
    """
    with Path(filepath).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporaries(filepath: str | os.PathLike[str]) -> list[Path]:
    """List the temporaries of `filepath`, of whatever process, at work or dead, sorted by name.

    Args:
        filepath: str or path, the file that they were to become.

    Returns:
        List of `pathlib.Path`.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("1")
    ...     temporaries(target) == [temporary.resolve()]
    True
    """
    target = _target(filepath)
    pattern = _temporary_pattern(target)
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def remove_leftovers(filepath: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed processes left of `filepath`, and nothing that a process is writing.

    Call it where a program starts, before it writes `filepath` for the first time.

    Args:
        filepath: str or path, the file whose temporaries are looked at.

    Returns:
        List of the `pathlib.Path` that were removed.

    Example:
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("1")
    ...     remove_leftovers(target)
    []
    """
    removed = [path for path in temporaries(filepath) if _is_leftover(path, _target(filepath))]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def _target(filepath: str | os.PathLike[str]) -> Path:
    return Path(filepath).expanduser().resolve()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _temporary(target: Path, token: str) -> Path:
    name = f".{target.name}.tmp-{_host()}-{os.getpid()}-{token}{''.join(target.suffixes)}"
    return target.with_name(name)


def _temporary_pattern(target: Path) -> re.Pattern[str]:
    return re.compile(
        rf"\.{re.escape(target.name)}\.tmp-(?P<host>[0-9a-f]+)-(?P<pid>\d+)-(?P<token>[0-9a-f]+)"
        + re.escape("".join(target.suffixes))
    )


def _is_leftover(path: Path, target: Path) -> bool:
    match = _temporary_pattern(target).fullmatch(path.name)
    if match is None:
        return False
    if match["host"] != _host():
        try:
            return time.time() - path.stat().st_mtime > _FOREIGN_LEFTOVER_SECONDS
        except FileNotFoundError:
            return False
    pid = int(match["pid"])
    if pid == os.getpid():  # in a container every run may have the same pid: the token decides
        return match["token"] not in _in_progress
    return not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # os.kill(pid, 0) ends the process on Windows
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _check_writable(target: Path, new: Path) -> None:
    """Fail before anything is computed, and names the target instead of the temporary."""
    if target.is_dir():
        raise IsADirectoryError(
            f"Expected the path of a file, but there is a folder. Received: filepath={target}. "
            "Name a file inside it."
        )
    try:
        new.open("xb").close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write in the folder {target.parent} ({error.strerror}). Create it, make it "
            f"writable, or choose another path. Received: filepath={target}",
        ) from error
    new.unlink()


def _flush_file(target: Path, new: Path) -> None:
    if not new.exists():
        raise FileNotFoundError(
            f"Expected the new content of {target.name} at the temporary path, but nothing was "
            f"written there. Received: filepath={target}. Write to the path that was yielded."
        )
    with new.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the move itself survive a power cut; Windows cannot and need not."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, JAX and torch
        return _plain(value.tolist())
    if hasattr(value, "numpy"):  # TensorFlow
        return _plain(value.numpy())
    return value
