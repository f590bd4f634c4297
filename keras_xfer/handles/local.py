"""Handles that name what lies on this machine: folders and archives."""

import re
import urllib.request
from pathlib import Path

from keras_xfer import files
from keras_xfer.handles import archives
from keras_xfer.handles.failures import HandleError
from keras_xfer.handles.module_cache import CachedModule
from keras_xfer.handles.saved_models import FILES, saved_model_in


def path_of(handle: str) -> Path:
    """Return the path that a path or a `file://` address names, absolute, `~` expanded.

    Args:
        handle: String, a path or a `file://` address.

    Returns:
        `pathlib.Path`.

    Raises:
        ValueError: the address names another machine.

    Example:
    >>> path_of("file:///data/my%20model").name
    'my model'

    Reference:
        https://www.rfc-editor.org/rfc/rfc8089
    """
    if handle[:5].lower() != "file:":
        return Path(handle).expanduser().absolute()
    rest = handle[5:]
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise ValueError(
                f"Expected a file:// address of a path on this machine, but it names {host!r}. "
                f"Received: handle={handle!r}. Three slashes begin a path: file:///folder."
            )
        rest = slash + tail
    return Path(urllib.request.url2pathname(rest)).absolute()


def resolve_local(handle: str, path: Path, pin: str | None) -> str:
    """Return the folder of a SavedModel that lies on this machine.

    Args:
        handle: String, as the user wrote it.
        path: `pathlib.Path`, a folder or an archive.
        pin: String, the SHA-256 that the archive must have, or `None`.

    Returns:
        String: the folder itself, or that in the cache which the archive is unpacked to.

    Raises:
        HandleError: there is nothing, or something else.
        ValueError: `pin` is given with a folder.
    """
    if path.is_dir():
        if pin is not None:
            raise ValueError(
                "`sha256` pins an archive, and this is a folder. "
                f"Received: handle={handle!r}, sha256={pin!r}. Leave `sha256` out."
            )
        return str(saved_model_in(path))
    if not path.exists():
        raise HandleError(f"Expected a SavedModel at {path}, but there is nothing.", _hint(handle))
    if path.name in FILES:
        raise HandleError(
            f"Expected the folder of a SavedModel, but {path} is a file in it.",
            f"Give its folder, {path.parent}.",
        )
    sha256 = files.sha256(path)
    if pin is not None and sha256 != pin:
        raise HandleError(
            f"Expected an archive whose SHA-256 is {pin}, but that of {path} is {sha256}.",
            "Fetch the archive again, or give its number as `sha256`.",
        )
    # Kept under its content, so that an archive that was edited is unpacked anew.
    module = CachedModule(sha256)
    return module.find(pin) or module.fill(
        handle, pin, lambda temporary: archives.unpack_module(path, sha256, temporary / "content")
    )


def _hint(handle: str) -> str:
    if re.match(r"[A-Za-z]+:/[^/]", handle) and handle[:5].lower() != "file:":
        return "Give an address as a string: pathlib.Path takes one of its slashes away."
    return "Check the path: it must name a folder that holds a SavedModel, or an archive of one."
