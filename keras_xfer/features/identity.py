"""What makes two extractors give the same features: structure, weights, vocabularies.

`get_config()` of equal models differs, since Keras numbers layers as a process makes them. So names
are left out, and where a graph refers to a layer by name its place in the graph stands instead.
"""

import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_xfer import freezing
from keras_xfer.features import digests

# What a layer is called, and what of it trains, changes nothing in inference mode. The shapes that
# a layer was built for are those of its weights.
_DROPPED = {"name", "trainable", "thawed"}
_DROPPED_AROUND = {"name", "shared_object_id", "build_config", "compile_config"}


def of_extractor(extractor: Any) -> dict[str, Any]:
    """What `extractor` computes, in JSON: equal for equal models in whatever process.

    Args:
        extractor: a built `keras.Model` or `keras.layers.Layer`.

    Raises:
        TypeError: it is neither.
        ValueError: it is not built, or a layer in it does not say what it is.

    Example:

    >>> def make(units):
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, kernel_initializer="ones")])
    >>> of_extractor(make(2)) == of_extractor(make(2)), of_extractor(make(2)) == of_extractor(make(3))
    (True, False)
    """
    if not isinstance(extractor, keras.Layer):
        raise TypeError(
            "Expected extractor to be a built keras.Model or keras.layers.Layer. Received: "
            f"extractor={extractor!r} of type {type(extractor).__name__}."
        )
    layers = freezing.walk(extractor)
    # A wrapper around what is built, such as a Backbone, is built when it is first called.
    if not extractor.built and not (layers[1:] and all(layer.built for layer in layers[1:])):
        raise ValueError(
            "Expected a built extractor, so that its weights exist. Received: extractor="
            f"{extractor.name!r}, which is not built yet: call it once on an input, or "
            "extractor.build(input_shape)."
        )
    return {
        "structure": _structure(extractor, layers),
        "weights": digests.of_arrays(
            np.asarray(keras.ops.convert_to_numpy(weight)) for weight in extractor.weights
        ),
        "weight_dtypes": [keras.backend.standardize_dtype(w.dtype) for w in extractor.weights],
        "vocabularies": [
            digests.of_json([str(word) for word in layer.get_vocabulary()])
            for layer in layers
            if hasattr(layer, "get_vocabulary")
        ],
        "code": digests.of_json(_codes(layers)),
    }


def _structure(extractor: keras.Layer, layers: list[keras.Layer]) -> Any:
    try:
        config = extractor.get_config()
        return [_class_of(extractor), _Canonical(layers).config(config)]
    except Exception as error:
        layer, cause = _culprit(layers, error)
        raise ValueError(
            f"Expected layers that say by get_config() what they compute, to know their features "
            f"again. Received: extractor={extractor.name!r}, whose layer {layer.name!r} of type "
            f"{type(layer).__name__} does not ({' '.join(str(cause).split())[:200]}). Give its class a get_config() that "
            "returns its arguments as JSON can hold them."
        ) from error


def _culprit(layers: list[keras.Layer], error: Exception) -> tuple[keras.Layer, Exception]:
    """The innermost layer that fails, and why."""
    for layer in reversed(layers):
        try:
            _Canonical(layers).config(layer.get_config())
        except Exception as own:
            return layer, own
    return layers[0], error


class _Canonical:
    """Makes of configurations what equal models share."""

    def __init__(self, layers: list[keras.Layer]) -> None:
        # Names that Keras made; what a user chose may stand for something else where it occurs.
        self._automatic = {
            layer.name: f"layer {i}"
            for i, layer in enumerate(layers)
            if _is_automatic(layer.name, type(layer).__name__)
        }

    def config(self, config: Mapping[str, Any]) -> Any:
        """The configuration of a layer, without what does not matter."""
        layers = config.get("layers")
        places: dict[str, int] = {}
        if isinstance(layers, list) and "input_layers" in config:  # a graph
            places = {layer["name"]: i for i, layer in enumerate(layers)}
        return {
            key: self._value(value, places)
            for key, value in config.items()
            if key not in _DROPPED and key != "build_input_shape"
        }

    def _value(self, value: Any, places: Mapping[str, int]) -> Any:
        if isinstance(value, Mapping):
            if "class_name" in value and "config" in value:
                return self._object(value, places)
            return {str(key): self._value(item, places) for key, item in value.items()}
        if isinstance(value, list | tuple):
            if _is_tensor(value, places):
                return ["tensor", places[value[0]], *value[1:]]
            return [self._value(item, places) for item in value]
        if isinstance(value, str):
            return self._automatic.get(value, value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, set | frozenset):
            return {"set": sorted(map(str, value))}
        if hasattr(value, "__array__"):
            return {"array": digests.of_arrays([np.asarray(keras.ops.convert_to_numpy(value))])}
        return self._value(keras.saving.serialize_keras_object(value), places)

    def _object(self, value: Mapping[str, Any], places: Mapping[str, int]) -> Any:
        """What Keras writes around the configuration of an object."""
        config = value["config"]
        around = {
            key: self._value(item, places)
            for key, item in value.items()
            if key not in {*_DROPPED_AROUND, "config"}
        }
        # The name of a dtype policy says what it is.
        is_layer = isinstance(config, Mapping) and (
            "trainable" in config or "inbound_nodes" in value
        )
        around["config"] = self.config(config) if is_layer else self._value(config, places)
        return around


def _is_tensor(value: Sequence[Any], places: Mapping[str, int]) -> bool:
    """Whether it is what a graph calls one of its tensors: layer, call, number of the output."""
    return (
        len(value) == 3
        and isinstance(value[0], str)
        and value[0] in places
        and all(isinstance(each, int) for each in value[1:])
    )


def _is_automatic(name: str, class_name: str) -> bool:
    """Whether Keras has made that name of a class's."""
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in class_name)
    plain = snake.replace("_", "")
    head, _, number = name.rpartition("_")
    return name.replace("_", "") == plain or (number.isdigit() and head.replace("_", "") == plain)


def _class_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _codes(layers: Iterable[keras.Layer]) -> list[Any]:
    """What the classes of users do: a `call` that is edited gives other features under the same
    configuration. Those of Keras and of this package change with their versions."""
    codes = []
    for layer in layers:
        for cls in type(layer).__mro__:
            package = cls.__module__.partition(".")[0]
            if cls is not object and package not in {
                "keras",
                "keras_xfer",
                "tensorflow",
                "torch",
                "jax",
            }:
                functions = {
                    name: _code(inspect.unwrap(value).__code__)
                    for name, value in sorted(vars(cls).items())
                    if isinstance(value, types.FunctionType)
                }
                codes.append([cls.__qualname__, functions])
    return codes


def _code(code: types.CodeType) -> list[Any]:
    constants = [
        _code(each) if isinstance(each, types.CodeType)
        else sorted(map(repr, each)) if isinstance(each, frozenset)
        else repr(each)
        for each in code.co_consts
    ]  # fmt: skip
    return [code.co_code.hex(), constants, list(code.co_names)]
