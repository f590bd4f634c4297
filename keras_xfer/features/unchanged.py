"""What is made once of an extractor, for as long as nothing trains it."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

# What was made, by its name, by the id of an extractor that does not change now.
_made: dict[int, dict[Hashable, Any]] = {}


@contextlib.contextmanager
def unchanged(extractor: Any) -> Iterator[None]:
    """Within the block nothing trains `extractor`."""
    _made[id(extractor)] = {}
    try:
        yield
    finally:
        del _made[id(extractor)]


def once(extractor: Any, name: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives of `extractor`: made once where that is unchanged, else in every call."""
    made = _made.get(id(extractor))
    if made is None:
        return make()
    if name not in made:
        made[name] = make()
    return made[name]
