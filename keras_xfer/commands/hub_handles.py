"""SavedModels that `train --hub` names and that a run's model holds, looked at without a framework."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from keras_xfer import handles
from keras_xfer.commands.recipe import UsageError
from keras_xfer.handles.failures import shown
from keras_xfer.handles.local import path_of
from keras_xfer.handles.resolving import scheme_of

# All that `train --hub` writes. With `safe_mode=False` Keras runs whatever code a file holds, and
# what a file calls Dense need be none: https://github.com/keras-team/keras/blob/v3.15.1/keras/src/saving/serialization_lib.py
_OF_KERAS = {
    *("Functional", "InputLayer", "Dropout", "Dense", "Softmax"),
    *("DTypePolicy", "GlorotUniform", "Zeros"),
}
_OF_KERAS_XFER = {"Backbone", "BackbonePreprocessing", "HubModule"}
_REGISTERED = "keras_xfer>"

_MOST_CHARACTERS = 60


class Held(NamedTuple):
    """A SavedModel that a model holds.

    Attributes:
        handle: Str, where it is.
        sha256: Str, the SHA-256 that its archive must have, or None.
    """

    handle: str
    sha256: str | None


def located(handle: str) -> str:
    """Return a handle that means the same in every folder: a local path is made absolute.

    Args:
        handle: Str, a path, or an address.

    Returns:
        Str.

    Raises:
        UsageError: It is empty, or a `file://` address of another machine.

    Example:
    >>> located("https://example.com/model/1")
    'https://example.com/model/1'
    >>> located("/models/flowers")
    '/models/flowers'
    """
    if not handle.strip():
        raise UsageError(
            "--hub: expected the folder, the archive or the address of a SavedModel. Received: ''"
        )
    if scheme_of(handle) not in ("", "file"):
        return handle
    try:
        return str(path_of(handle))
    except ValueError as error:
        raise UsageError(f"--hub: {error}") from error


def look(handle: str, sha256: str | None) -> None:
    """Refuse early what is not there; a download is kept, and found again when it is loaded.

    Args:
        handle: Str, as `located` returns it.
        sha256: Str, the SHA-256 that its archive must have, or None.

    Raises:
        UsageError: There is no SavedModel, or it cannot be had.
    """
    if scheme_of(handle) not in ("", "http", "https"):  # others load what takes seconds
        return
    try:
        handles.resolve(handle, sha256=sha256)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--hub: {said(error)}") from error


def trusted(path: Path, *, trust: bool, hub: str | None) -> list[Held]:
    """List the SavedModels that a model file holds, if the user has said to trust them.

    Args:
        path: `pathlib.Path` of the file.
        trust: Bool, whether the user has said so.
        hub: None, or a handle that the user has given to load in their place.

    Returns:
        List of `Held`; empty where there are none, or the file is damaged.

    Raises:
        UsageError: It holds some and `trust` is False, it holds what `train --hub` never writes, or
            there is none that `hub` could take the place of.
    """
    nodes = list(_objects(_config(path)))
    modules = [node for node in nodes if "HubModule" in _names(node)]
    if not modules:  # Keras loads it in its safe mode, in which none is made under any name
        if hub is not None:
            raise UsageError(f"--hub: {str(path)!r} holds no SavedModel. Leave it out")
        return []
    if strange := sorted({_described(node) for node in nodes if not _is_of_train(node)}):
        raise UsageError(
            f"{str(path)!r} would run code of its own too, or may: it holds "
            f"{', '.join(strange[:3])}, which keras-xfer train --hub never writes. Do not trust it; "
            "train again, or load what you have made yourself in Python"
        )
    held = sorted(
        {Held(node["config"]["handle"], node["config"].get("sha256")) for node in modules}, key=str
    )
    if not trust:
        named = " and ".join(repr(each.handle) for each in held)
        raise UsageError(
            f"{str(path)!r} runs the code of the SavedModel {named}. Add --trust if you trust "
            "where it comes from"
        )
    return held


def places(held: list[Held], hub: str | None) -> dict[str, str]:
    """Find the SavedModels of a model, as `HubModule.relocated` takes them.

    Args:
        held: What `trusted` returned.
        hub: None, or a handle that the user has given to load in their place.

    Returns:
        Dict of each handle to that which is to be loaded.

    Raises:
        UsageError: One cannot be had.
    """
    found = {}
    for each in held:
        handle = each.handle if hub is None else located(hub)
        try:
            handles.resolve(handle, sha256=each.sha256)
        except (OSError, ValueError, ImportError) as error:
            if hub is not None and each.sha256 is not None:
                remedy = "The run has pinned an archive (--hub-sha256): give that archive"
            elif hub is not None:
                remedy = f"It takes the place of {each.handle!r}"
            else:
                remedy = "If it is elsewhere now, say where: --hub HANDLE"
            option = "" if hub is None else "--hub: "
            raise UsageError(f"{option}{said(error).rstrip('.')}. {remedy}") from error
        found[each.handle] = handle
    return found


def said(error: Exception) -> str:
    """Return what an error says, in terms of the command.

    Args:
        error: Of `keras_xfer.handles` or `keras_xfer.HubModule`.

    Returns:
        Str.

    Example:
    >>> said(OSError("Leave `sha256` out."))
    'Leave --hub-sha256 out.'
    """
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return shown(text).replace("`sha256`", "--hub-sha256")


def _config(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("config.json"))
    except Exception:  # a damaged file can raise anything; loading it says so
        return None


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """What Keras makes objects of, however deep."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if "class_name" in node:  # with it Keras makes an object, with or without the rest
                yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _names(node: dict[str, Any]) -> set[str]:
    """All names by which Keras may look for the class of an object."""
    names = (node["class_name"], node.get("registered_name"))
    return {name.removeprefix(_REGISTERED) for name in names if isinstance(name, str)}


def _is_of_train(node: dict[str, Any]) -> bool:
    """Whether it is of a class that `train --hub` writes, under all of its names."""
    name, config = node["class_name"], node.get("config")
    module, registered = node.get("module"), node.get("registered_name")
    if not (isinstance(name, str) and isinstance(config, dict)):
        return False
    if name == "__keras_tensor__":
        return module is None and registered is None
    package = module.partition(".")[0] if isinstance(module, str) else None
    if name in _OF_KERAS_XFER:
        if name == "HubModule" and not _is_handle(config):
            return False
        return package == "keras_xfer" and registered == _REGISTERED + name
    return name in _OF_KERAS and package == "keras" and registered in (None, name)


def _is_handle(config: dict[str, Any]) -> bool:
    return isinstance(config.get("handle"), str) and isinstance(config.get("sha256"), str | None)


def _described(node: dict[str, Any]) -> str:
    """What it says it is, for a message."""
    said_of_it = {key: node.get(key) for key in ("class_name", "registered_name", "module")}
    told = {key: value for key, value in said_of_it.items() if value is not None}
    return " ".join(f"{key}={repr(value)[:_MOST_CHARACTERS]}" for key, value in told.items())
