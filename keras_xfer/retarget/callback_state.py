"""The state of callbacks as plain data: those that offer it, and Keras's own, which do not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

# What Keras 3.15.1's callbacks remember from epoch to epoch; by attribute, since they offer nothing.
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.History: ("epoch", "history"),
}


def state_of(callback: keras.callbacks.Callback) -> dict[str, Any] | None:
    """The state of `callback` as dicts, lists, numbers, str and NumPy arrays; None where it has
    none. One that has `state_dict` and `load_state_dict` says it itself."""
    if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
        state = callback.state_dict()
        if not isinstance(state, dict):
            raise TypeError(
                f"Expected {type(callback).__name__}.state_dict() to return a dict. Received: "
                f"{state!r}."
            )
        return state
    if isinstance(callback, keras.callbacks.CSVLogger):
        return {"text": _text_of(callback)}
    names = _attributes(callback)
    return {name: _plain(name, getattr(callback, name)) for name in names} if names else None


def load_state(callback: keras.callbacks.Callback, state: Mapping[str, Any]) -> None:
    """Give `callback` the state that `state_of` found."""
    if hasattr(callback, "load_state_dict"):
        callback.load_state_dict(state)
        return
    if isinstance(callback, keras.callbacks.CSVLogger):
        _go_on_with(callback, state["text"])
        return
    for name in _attributes(callback):
        setattr(callback, name, state[name])


def _attributes(callback: keras.callbacks.Callback) -> tuple[str, ...]:
    return next((names for kind, names in _ATTRIBUTES.items() if isinstance(callback, kind)), ())


def _plain(name: str, value: Any) -> Any:
    """Numbers of a backend as numbers of Python, its arrays as NumPy's."""
    if isinstance(value, Mapping):
        return {key: _plain(name, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    array = np.array(keras.ops.convert_to_numpy(value), copy=True)
    # A weight without axes is an array all the same.
    return array.item() if array.ndim == 0 and name != "best_weights" else array


def _text_of(logger: keras.callbacks.CSVLogger) -> str:
    """What the file of `logger` holds by now."""
    return Path(logger.filename).read_text(encoding="utf-8")


def _go_on_with(logger: keras.callbacks.CSVLogger, text: str) -> None:
    """Let `logger`, which has just begun its file, go on after `text`."""
    logger.csv_file.close()
    Path(logger.filename).write_text(text, encoding="utf-8")
    append, logger.append = logger.append, True
    logger.on_train_begin()
    logger.append = append
