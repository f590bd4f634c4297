"""Which stage a model is in, for callbacks that run before StagedUnfreezing has written it to logs."""

import weakref
from typing import Any

_current: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


def current_stage(model: Any) -> int | None:
    """The index of the stage that `model` is training in; None outside of a schedule."""
    return _current.get(model)


def set_current_stage(model: Any, index: int | None) -> None:
    """Say which stage `model` is in, at the beginning of each epoch; None when its schedule has
    ended, and before a `fit` that may have none."""
    if index is None:
        _current.pop(model, None)
    else:
        _current[model] = index
