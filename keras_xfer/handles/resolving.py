"""One function for every form of handle."""

import hashlib
import os
import re

from keras_xfer.handles import addresses, downloads, elsewhere, local
from keras_xfer.handles.failures import HandleError, without_secret
from keras_xfer.handles.module_cache import CachedModule, cache_folder

_FORMS = (
    "a folder that holds a SavedModel; a .tar.gz, .tgz or .tar archive of one; a file://, http:// "
    f"or https:// address; {elsewhere.KAGGLE_FORM}; or an address of "
    f"{', '.join(f'{scheme}://' for scheme in elsewhere.FILE_SYSTEMS)}"
)


def resolve(handle: str | os.PathLike[str], *, sha256: str | None = None) -> str:
    """Return the folder of the SavedModel that `handle` names, downloaded and unpacked once.

    Why and when: `tensorflow_hub.resolve` keeps downloads in a temporary folder, takes neither `~`
    nor a `pathlib.Path` nor a local archive nor one with a top folder, waits up to ten minutes for
    a process that was killed, and never looks again at what it has kept. Here a copy is kept in
    `TFHUB_CACHE_DIR`, by default in `~/.keras/tfhub_modules`, where copies of tensorflow_hub are
    found too; it appears there whole or not at all; several processes that want it wait for one
    download; and one that lost a file is fetched again.

    Args:
        handle: String or path. A folder that holds a SavedModel, or one subfolder that does; a
            `.tar.gz`, `.tgz` or `.tar` archive of such a folder; a `file://` address of either; an `http://` or `https://` address that answers
            `?tf-hub-format=compressed` with such an archive, as those of Kaggle Models and
            tfhub.dev do; `kaggle://owner/model/framework/variation`, with `/version` or without;
            or an address of a file system that TensorFlow knows, such as `gs://`.
        sha256: String of 64 hexadecimal digits, the SHA-256 that the archive must have. It is
            compared before anything is unpacked, and a kept copy is read through again. Defaults
            to `None`: any.

    Returns:
        String, the path of the folder that holds `saved_model.pb`.

    Raises:
        OSError: It cannot be had, is no SavedModel, or cannot be kept. The message says what
            happened, what was received, where the cache is, and what to do.
        ValueError: The handle has none of these forms, or `sha256` is no such number or is given
            where there is no archive.
        TypeError: The handle is neither a string nor a path.
        ImportError: A `kaggle://` handle without `keras-xfer[kaggle]`.

    Example:
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> folder.mkdir()
    >>> _ = (folder / "saved_model.pb").write_bytes(b"")
    >>> resolve(folder) == str(folder)
    True

    Reference:
        https://www.tensorflow.org/hub/hosting
    """
    text = os.fspath(handle) if isinstance(handle, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(
            "`handle` must be a string or a path. "
            f"Received: handle={handle!r} (of type {type(handle).__name__})"
        )
    pin = _checked(sha256)
    try:
        return _resolve(text, pin)
    except HandleError as failure:
        raise failure.told(text, cache_folder()) from (failure.__cause__ or failure)
    except OSError as error:
        unreadable = HandleError(
            f"Cannot read {error.filename or 'a file'} ({error.strerror or error}).",
            "Make it readable, or give another handle or another TFHUB_CACHE_DIR.",
            errno=error.errno,
        )
        raise unreadable.told(text, cache_folder()) from error


def _checked(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9A-Fa-f]{64}", sha256):
        raise ValueError(
            "`sha256` must be 64 hexadecimal digits, as `sha256sum` prints them. "
            f"Received: sha256={sha256!r}"
        )
    return sha256.lower()


def _resolve(handle: str, pin: str | None) -> str:
    scheme = scheme_of(handle)
    if handle and scheme in ("", "file"):
        return local.resolve_local(handle, local.path_of(handle), pin)
    if scheme in ("http", "https"):
        return _resolve_http(handle, pin)
    if scheme != "kaggle" and scheme not in elsewhere.FILE_SYSTEMS:
        raise ValueError(f"Expected one of: {_FORMS}. Received: handle={without_secret(handle)!r}")
    _refuse_pin(handle, pin)
    if scheme == "kaggle":
        return elsewhere.resolve_with_kagglehub(elsewhere.kaggle_name(handle))
    return elsewhere.resolve_with_tensorflow_hub(handle)


def scheme_of(handle: str) -> str:
    """Return the scheme of an address, in lower case; a path (and a drive of Windows) has none.

    Example:
    >>> scheme_of("HTTPS://example.com/model"), scheme_of("~/model")
    ('https', '')
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(file):", handle, re.IGNORECASE)
    return (match[1] or match[2]).lower() if match else ""


def _resolve_http(handle: str, pin: str | None) -> str:
    addresses.addresses(handle)  # raises where it is malformed
    if elsewhere.is_left_to_tensorflow_hub():
        _refuse_pin(handle, pin)
        return elsewhere.resolve_with_tensorflow_hub(handle)
    # tensorflow_hub's key: the handle as it was written, see its compressed_module_resolver.py.
    module = CachedModule(hashlib.sha1(handle.encode()).hexdigest())  # noqa: S324 - not for safety
    found = module.find(pin)
    if found is not None:
        return found
    kaggle = elsewhere.kaggle_name_of_page(handle)
    if kaggle is not None and pin is None and elsewhere.kagglehub_if_installed() is not None:
        return elsewhere.resolve_with_kagglehub(kaggle)
    return module.fill(handle, pin, lambda temporary: downloads.fetch(handle, pin, temporary))


def _refuse_pin(handle: str, pin: str | None) -> None:
    if pin is not None:
        raise ValueError(
            "`sha256` pins an archive, and what this handle names is not fetched as one. "
            f"Received: handle={without_secret(handle)!r}, sha256={pin!r}. Leave `sha256` out."
        )
