"""Unpacking of tar archives that writes nothing outside its folder, whatever the archive says."""

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple, cast

from keras_xfer.handles.failures import HandleError, writing
from keras_xfer.handles.saved_models import saved_model_in

_BLOCK_BYTES = 1 << 20
_COMPRESSIONS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_DAMAGES = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)

REMEDY = "Fetch the archive again, or ask its publisher for a sound one."


class NotAnArchiveError(HandleError):
    """The file is no tar archive at all.

    Example:
    >>> issubclass(NotAnArchiveError, OSError)
    True
    """


class TruncatedArchiveError(HandleError):
    """The archive ends too early or is damaged.

    Example:
    >>> issubclass(TruncatedArchiveError, OSError)
    True
    """


class Unpacked(NamedTuple):
    """A SavedModel out of an archive, ready to be moved into the cache.

    Args:
        folder: `pathlib.Path`, the folder that holds it.
        archive_sha256: String, the SHA-256 of the archive that it came from.
        files: Dict from the path of each file in it to its `"size"` and `"sha256"`.

    Example:
    >>> Unpacked(Path("m"), "0" * 64, {}).folder.name
    'm'
    """

    folder: Path
    archive_sha256: str
    files: dict[str, dict[str, Any]]


def unpack_module(archive: Path, archive_sha256: str, folder: Path) -> Unpacked:
    """Unpack the archive of a SavedModel into a new folder.

    Args:
        archive: `pathlib.Path`, the archive.
        archive_sha256: String, its SHA-256, which is passed on.
        folder: `pathlib.Path`, the folder to create.

    Returns:
        An `Unpacked`. Where the archive has a top folder, that is the module's.

    Raises:
        HandleError: as `unpack`, or there is no SavedModel in it.
    """
    members = unpack(archive, folder)
    module = saved_model_in(folder)
    if module != folder:
        top = f"{module.name}/"
        members = {
            name.removeprefix(top): file for name, file in members.items() if name.startswith(top)
        }
    return Unpacked(module, archive_sha256, members)


def unpack(archive: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Unpack a tar archive, compressed or not, into a new folder.

    Python's own filter "data" lets links inside the folder through and replaces a file by a later
    one of the same name; a SavedModel has neither. Files get the modes of any new file.

    Args:
        archive: `pathlib.Path`, the archive.
        folder: `pathlib.Path`, the folder to create. On an error it is left for the caller to
            remove, with nothing written beside it.

    Returns:
        Dict from each file's path in the folder, with slashes, to its `"size"` in bytes and its
        `"sha256"`.

    Raises:
        NotAnArchiveError: `archive` is something else.
        TruncatedArchiveError: it ends too early or is damaged.
        HandleError: a member is a link or a device, would lie outside, or replaces an earlier one; or
            the disk is full.

    Example:
    >>> import io, tempfile
    >>> there = Path(tempfile.mkdtemp())
    >>> with tarfile.open(there / "a.tar.gz", "w:gz") as tar:
    ...     tar.addfile(tarfile.TarInfo("empty.txt"), io.BytesIO())
    >>> unpack(there / "a.tar.gz", there / "a")["empty.txt"]["size"]
    0

    Reference:
        https://docs.python.org/3/library/tarfile.html#tarfile-extraction-filter
    """
    with writing(folder):
        folder.mkdir()
    with archive.open("rb") as raw:
        compression = _compression(raw)
        stream = cast(IO[bytes], raw if compression is None else compression(raw))
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - closed below
        except _DAMAGES as error:
            if compression is not None and isinstance(error, EOFError):
                raise _truncated(archive, error) from error
            raise _not_an_archive(archive) from error
        except OSError as error:  # gzip and bz2 say so where the compressed data is not theirs
            raise _not_an_archive(archive) from error
        with tar:
            files = _unpack_members(tar, archive, folder)
            _check_end(tar, stream, archive, compressed=compression is not None)
    return files


def _compression(raw: IO[bytes]) -> Any:
    start = raw.read(8)
    raw.seek(0)
    for magic, opener in _COMPRESSIONS.items():
        if start.startswith(magic):
            return opener
    return None


def _unpack_members(tar: tarfile.TarFile, archive: Path, folder: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    while True:
        try:
            member = tar.next()
        except (*_DAMAGES, OSError) as error:
            raise _truncated(archive, error) from error
        if member is None:
            return files
        path = _path_inside(member)
        target = folder.joinpath(*path.parts)
        with writing(target):
            try:
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    files[str(path)] = _unpack_file(tar, member, target, archive)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise _refusal(member, "replaces an earlier one") from error


def _path_inside(member: tarfile.TarInfo) -> PurePosixPath:
    """The member's path, if it is one that may be written."""
    path = PurePosixPath(member.name)
    if os.name == "nt" and (PureWindowsPath(member.name).anchor or "\\" in member.name):
        raise _refusal(member, "has an absolute path")
    if path.is_absolute():
        raise _refusal(member, "has an absolute path")
    if ".." in path.parts:
        raise _refusal(member, "would lie outside the folder")
    if member.issym() or member.islnk():
        raise _refusal(member, f"is a link to {member.linkname!r}")
    if not (member.isreg() or member.isdir()):
        raise _refusal(member, "is a device or a pipe")
    return path


def _unpack_file(
    tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, archive: Path
) -> dict[str, Any]:
    source = tar.extractfile(member)
    if source is None:
        raise _refusal(member, "is no file")
    digest = hashlib.sha256()
    size = 0
    with source, target.open("xb") as file:
        while True:
            try:
                block = source.read(_BLOCK_BYTES)
            except (*_DAMAGES, OSError) as error:
                raise _truncated(archive, error) from error
            if not block:
                break
            file.write(block)
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _check_end(tar: tarfile.TarFile, stream: IO[bytes], archive: Path, *, compressed: bool) -> None:
    """Read what follows the last member: tarfile takes an archive cut between two for a whole one.

    A block of zeros ends an archive. One that was written without it may pass where it is
    compressed, since the compression has an end and a checksum of its own.
    """
    try:
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
        while stream.read(_BLOCK_BYTES):
            pass
    except (*_DAMAGES, OSError) as error:
        raise _truncated(archive, error) from error
    if block != tarfile.NUL * tarfile.BLOCKSIZE and (block or not compressed):
        raise _truncated(archive, None)


def _not_an_archive(archive: Path) -> NotAnArchiveError:
    return NotAnArchiveError(
        f"Expected a tar archive (.tar.gz, .tgz or .tar), but {archive.name} is none.", REMEDY
    )


def _truncated(archive: Path, error: BaseException | None) -> TruncatedArchiveError:
    why = f": {error}" if error is not None and str(error) else ""
    return TruncatedArchiveError(
        f"Expected a whole tar archive, but {archive.name} ends too early or is damaged{why}.",
        REMEDY,
    )


def _refusal(member: tarfile.TarInfo, why: str) -> HandleError:
    return HandleError(
        f"Expected an archive of plain files and folders, but its member {member.name!r} {why}. "
        "Nothing was unpacked.",
        "Do not trust this archive; ask its publisher for one that holds the SavedModel alone.",
        of_source=False,
    )
