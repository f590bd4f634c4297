"""What makes two models the same: `structure` sums it up, `differences` says it in words."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import keras


def structure(model: Any) -> dict[str, Any]:
    """Sum up what makes two models the same: classes of layers, and the weights in their order.

    Names are left out but those of the variables: Keras numbers layers by the order in which a
    process makes them, and a reloaded model may have other paths. What trains is left out too: a
    stage is not another model.

    Args:
        model: a built `keras.Model`.

    Returns:
        dict of the numbers of `layers`, `weights` and `parameters`, and a `sha256` over it all.
        It goes through JSON unchanged.

    Example:
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> structure(model)["parameters"]
    8
    """
    weights = [
        (w.name, tuple(w.shape), keras.backend.standardize_dtype(w.dtype)) for w in model.weights
    ]
    layers = [type(layer).__name__ for layer in _layers(model)]
    digest = hashlib.sha256(json.dumps([layers, weights]).encode()).hexdigest()
    return {
        "layers": len(layers),
        "weights": len(weights),
        "parameters": sum(math.prod(shape) for _, shape, _ in weights),
        "sha256": digest,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Say in words what differs between two structures.

    Args:
        one: dict that `structure` returned.
        other: dict that `structure` returned.

    Returns:
        list of str, empty where they are the same.

    Example:
    >>> def made(units):
    ...     return structure(keras.Sequential([keras.Input((3,)), keras.layers.Dense(units)]))
    >>> differences(made(1), made(2))
    ['4 and 8 parameters']
    >>> differences(made(1), made(1))
    []
    """
    counted = [
        f"{one[name]:,} and {other[name]:,} {name}"
        for name in ("layers", "weights", "parameters")
        if one[name] != other[name]
    ]
    if counted or one["sha256"] == other["sha256"]:
        return counted
    return ["classes of layers, or names, shapes or dtypes of weights"]


def _layers(model: Any) -> Iterator[Any]:
    for layer in getattr(model, "layers", []):
        yield layer
        yield from _layers(layer)
