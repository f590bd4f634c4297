"""Nested structures of arrays: taken apart, described in JSON, and put together again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LEAF = "array"


def flatten(structure: Any) -> list[Any]:
    """The leaves of `structure`, dicts in the order of their sorted keys, without None.

    Example:

    >>> flatten({"b": [1, 2], "a": 3})
    [3, 1, 2]
    """
    if structure is None:
        return []
    if isinstance(structure, Mapping):
        return [leaf for key in sorted(structure) for leaf in flatten(structure[key])]
    if isinstance(structure, list | tuple):
        return [leaf for part in structure for leaf in flatten(part)]
    return [structure]


def describe(structure: Any) -> Any:
    """What `structure` is but for its leaves, in JSON.

    Example:

    >>> describe(({"a": 1}, None))
    {'tuple': [{'dict': [['a', 'array']]}, None]}
    """
    if structure is None:
        return None
    if isinstance(structure, Mapping):
        if not all(isinstance(key, str) for key in structure):
            raise ValueError(
                "Expected strings as the keys of a dict of arrays. "
                f"Received: keys={list(structure)!r}"
            )
        return {"dict": [[key, describe(structure[key])] for key in sorted(structure)]}
    if isinstance(structure, list | tuple):
        kind = "list" if isinstance(structure, list) else "tuple"
        return {kind: [describe(part) for part in structure]}
    return LEAF


def tuples(structure: Any) -> Any:
    """`structure` with tuples in place of lists, which tf.data takes for tensors.

    Example:

    >>> tuples({"a": [1, [2]]})
    {'a': (1, (2,))}
    """
    if isinstance(structure, Mapping):
        return {key: tuples(part) for key, part in structure.items()}
    if isinstance(structure, list | tuple):
        return tuple(tuples(part) for part in structure)
    return structure


def pack(description: Any, leaves: Sequence[Any]) -> Any:
    """The structure that `describe` described, of other leaves.

    Example:

    >>> pack(describe({"a": 1, "b": [2]}), [3, 4])
    {'a': 3, 'b': [4]}
    """
    return _pack(description, iter(leaves))


def _pack(description: Any, leaves: Iterator[Any]) -> Any:
    if description is None:
        return None
    if description == LEAF:
        return next(leaves)
    ((kind, parts),) = description.items()
    if kind == "dict":
        return {key: _pack(part, leaves) for key, part in parts}
    packed = [_pack(part, leaves) for part in parts]
    return packed if kind == "list" else tuple(packed)
