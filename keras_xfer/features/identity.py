"""What makes two extractors give the same features: structure, weights, vocabularies.

`get_config()` of equal models differs, since Keras numbers layers as a process makes them. So names
are left out, and where a graph refers to a layer by name its place in the graph stands instead.
"""

import base64
import marshal
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_xfer import files, freezing, handles
from keras_xfer.features import code, digests, own_code
from keras_xfer.features.unchanged import once
from keras_xfer.layers.hub_module import HubModule

# What a layer is called, and what of it trains, changes nothing in inference mode. The shapes that
# a layer was built for are those of its weights.
_DROPPED = {"name", "trainable", "thawed"}
_DROPPED_OF_OURS = {*_DROPPED, "batch_norm"}  # a policy of training
# Under what a layer keeps where its SavedModel lies, and what goes with that.
_PLACES = ("handle", "filepath")
_PIN = "sha256"
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
    return once(extractor, "identity", lambda: _of_extractor(extractor))


def _of_extractor(extractor: Any) -> dict[str, Any]:
    if not isinstance(extractor, keras.Layer):
        raise TypeError(
            "Expected extractor to be a built keras.Model or keras.layers.Layer. Received: "
            f"extractor={extractor!r} of type {type(extractor).__name__}."
        )
    layers = freezing.walk(extractor)
    canonical = _Canonical(layers)
    # A wrapper around what is built, such as a Backbone, is built when it is first called.
    if not extractor.built and not (layers[1:] and all(layer.built for layer in layers[1:])):
        raise ValueError(
            "Expected a built extractor, so that its weights exist. Received: extractor="
            f"{extractor.name!r}, which is not built yet: call it once on an input, or "
            "extractor.build(input_shape)."
        )
    return {
        "structure": _structure(extractor, layers, canonical),
        "weights": digests.of_arrays(
            np.asarray(keras.ops.convert_to_numpy(weight)) for weight in extractor.weights
        ),
        "weight_dtypes": [keras.backend.standardize_dtype(w.dtype) for w in extractor.weights],
        "vocabularies": [
            [digests.of_json([str(word) for word in layer.get_vocabulary()]), _word_weights(layer)]
            for layer in layers
            if hasattr(layer, "get_vocabulary")
        ],
        "code": digests.of_json(
            own_code.of_layers(layers, lambda each: canonical.config(each.get_config()))
        ),
        # What pools or slices without saying where the channels are goes by this.
        "image_data_format": keras.config.image_data_format(),
    }


def _structure(extractor: keras.Layer, layers: list[keras.Layer], canonical: "_Canonical") -> Any:
    try:
        own = [_class_of(extractor), canonical.of_layer(extractor)]
    except Exception as error:
        layer, cause = _culprit(layers, error)
        raise ValueError(
            f"Expected layers that say by get_config() what they compute, to know their features "
            f"again. Received: extractor={extractor.name!r}, whose layer {layer.name!r} of type "
            f"{type(layer).__name__} does not ({' '.join(str(cause).split())[:200]}). Give its class a get_config() that "
            "returns its arguments as JSON can hold them."
        ) from error
    # A model whose class makes its layers, for one, says nothing of them; a graph, of its own.
    graph = freezing.graph_of(extractor)
    told = set() if graph is None else set(map(id, graph.layers))
    inside = [layer for layer in layers[1:] if id(layer) not in told]
    return [*own, [_inside(layer, canonical) for layer in inside]]


def _inside(layer: keras.Layer, canonical: "_Canonical") -> Any:
    """A layer inside the extractor."""
    if freezing.graph_of(layer) is not None:
        return [_class_of(layer)]  # its layers follow
    try:
        return [_class_of(layer), canonical.of_layer(layer)]
    except Exception:  # of a layer that what is around it makes from a configuration of its own
        plain = {
            name: value
            for name, value in vars(layer).items()
            if not name.startswith("_") and isinstance(value, bool | int | float | str)
        }
        return [_class_of(layer), canonical.config(plain)]


def _word_weights(layer: keras.Layer) -> Any:
    """The inverse document frequencies of a vocabulary."""
    lookup = getattr(layer, "_lookup_layer", layer)  # of TextVectorization. Tried on Keras 3.15.1.
    weights = getattr(lookup, "idf_weights", None)
    return None if weights is None else digests.of_arrays([np.asarray(weights)])


def _saved_models(layers: Iterable[keras.Layer]) -> dict[str, Any]:
    """Digests of the SavedModels that layers run, by where they lie: their variables are weights,
    but their graphs and tables are not."""
    found = {}
    for layer in layers:
        place = None
        if isinstance(layer, HubModule) and isinstance(layer.handle, str):
            place = layer.handle
            folder = Path(handles.resolve(place, sha256=layer.get_config().get(_PIN)))
        elif isinstance(layer, keras.layers.TFSMLayer):
            place = str(layer.filepath)
            folder = Path(place)
        if place is not None and folder.is_dir():
            content = [*folder.glob("saved_model.pb*"), *folder.glob("assets/**/*")]
            found[place] = sorted(
                [path.relative_to(folder).as_posix(), files.sha256(path)]
                for path in content
                if path.is_file()
            )
    return found


def _culprit(layers: list[keras.Layer], error: Exception) -> tuple[keras.Layer, Exception]:
    """The innermost layer that fails, and why."""
    for layer in reversed(layers):
        try:
            _Canonical(layers).of_layer(layer)
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
        self._saved_models = _saved_models(layers)

    def of_layer(self, layer: keras.Layer) -> Any:
        """The configuration of a layer that exists."""
        ours = type(layer).__module__.partition(".")[0] == "keras_xfer"
        return self.config(layer.get_config(), ours=ours)

    def config(self, config: Mapping[str, Any], *, ours: bool = False) -> Any:
        """The configuration of a layer, without what does not matter."""
        for place in _PLACES:
            if isinstance(config.get(place), str) and config[place] in self._saved_models:
                content = self._saved_models[config[place]]
                config = {**config, place: {"saved_model": content}, _PIN: None}
        layers = config.get("layers")
        places: dict[str, int] = {}
        if isinstance(layers, list) and "input_layers" in config:  # a graph
            places = {layer["name"]: i for i, layer in enumerate(layers)}
        return {
            key: self._value(value, places)
            for key, value in config.items()
            if key not in (_DROPPED_OF_OURS if ours else _DROPPED) and key != "build_input_shape"
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
        if isinstance(value, types.FunctionType):
            return {"function": value.__name__}  # see `own_code`
        return self._value(keras.saving.serialize_keras_object(value), places)

    def _object(self, value: Mapping[str, Any], places: Mapping[str, int]) -> Any:
        """What Keras writes around the configuration of an object."""
        config = value["config"]
        if value["class_name"] == "__lambda__":
            return {"lambda": _lambda(config)}
        around = {
            key: self._value(item, places)
            for key, item in value.items()
            if key not in {*_DROPPED_AROUND, "config"}
        }
        # The name of a dtype policy says what it is.
        is_layer = isinstance(config, Mapping) and (
            "trainable" in config or "inbound_nodes" in value
        )
        ours = str(around.get("registered_name")).startswith("keras_xfer>")
        around["config"] = (
            self.config(config, ours=ours) if is_layer else self._value(config, places)
        )
        return around


def _lambda(config: Mapping[str, Any]) -> Any:
    """What Keras writes of a lambda, without the file and the line that it stands on."""
    written = config.get("value") or (config["code"], config["defaults"], config["closure"])
    dumped, defaults, closure = written
    fingerprint = code.Fingerprints(lambda thing: thing.get_config())
    content = marshal.loads(base64.b64decode(dumped))  # noqa: S302  # Keras has just written it
    return [code.of_code(content), fingerprint((defaults, closure))]


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
