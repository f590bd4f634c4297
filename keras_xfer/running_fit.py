"""What a callback may ask of the `fit` that runs it, beyond the number of epochs and steps.

Keras tells callbacks no more than that (https://keras.io/guides/writing_your_own_callbacks/), so
the names inside `fit` are read from its frame. Tried on Keras 3.15.1.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras

_told: "weakref.WeakKeyDictionary[Any, dict[str, Any]]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def fitting(model: keras.Model, **names: Any) -> Iterator[None]:
    """Within it `model` is trained by something else than its own `fit`, in which these names would
    be, `validation_data` among them."""
    _told[model] = names
    try:
        yield
    finally:
        del _told[model]


def locals_of_fit(model: keras.Model) -> dict[str, Any]:
    """The names inside the `fit` of `model` that is running, `validation_data` among them; empty
    where the callbacks are driven by hand."""
    if model in _told:
        return dict(_told[model])
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "fit":
            names = frame.f_locals
            if names.get("self") is model and "validation_data" in names:
                return dict(names)
        frame = frame.f_back
    return {}


def callbacks_of_fit(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """From `on_train_begin`: the callbacks that begin together with `callback`, the very list that
    `fit`, or a loop of one's own, goes through; an empty one where `callback` is driven alone."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, keras.callbacks.CallbackList) and callback in found.callbacks:
            callbacks: list[keras.callbacks.Callback] = found.callbacks
            return callbacks
        frame = frame.f_back
    return []


def numbered(
    callbacks: Iterable[keras.callbacks.Callback],
) -> Iterator[tuple[str, keras.callbacks.Callback]]:
    """Each callback with its class and its number among those of it, by which another process that
    makes the same callbacks finds it again."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] = counts.get(name, 0) + 1
        yield f"{name} {counts[name]}", callback


def stand_before(callback: keras.callbacks.Callback, kinds: tuple[type, ...]) -> None:
    """From `on_train_begin`: let `callback` run before all of `kinds` in this `fit`, wherever it
    was in the list."""
    callbacks = callbacks_of_fit(callback)
    first = next((i for i, each in enumerate(callbacks) if isinstance(each, kinds)), None)
    if callback in callbacks and first is not None and first < callbacks.index(callback):
        # The loop that runs is at `callback`: those it has passed change places, the others stay.
        callbacks.remove(callback)
        callbacks.insert(first, callback)


def stands_last(callback: keras.callbacks.Callback) -> bool:
    """From `on_train_begin`: whether `callback` is the last of this `fit`, but for others of its
    kind. If not it becomes so, and its `on_train_begin` is called again when all others have had
    theirs."""
    callbacks = callbacks_of_fit(callback)
    if callback not in callbacks:
        return True
    after = callbacks[callbacks.index(callback) + 1 :]
    if all(isinstance(each, type(callback)) for each in after):
        return True
    callbacks[callbacks.index(callback)] = (
        keras.callbacks.Callback()
    )  # the others keep their places
    callbacks.append(callback)
    return False
