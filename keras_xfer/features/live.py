"""What in an extractor acts otherwise while training, so that its features are not fixed."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_xfer import freezing
from keras_xfer.features.own_training import acts_by_own_code
from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.backbone_part import BackbonePart

# They act on what a layer has computed; features are taken without them, as `predict` does.
_REGULARIZERS = (
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.GaussianNoise,
)


# What the user may do about `own_layers`, in a message.
OWN_LAYERS_MAY = (
    "draw from a keras.random.SeedGenerator that they keep, which views=K can repeat, leave "
    "`training` out of a call that does not need it, or put them inside"
)


class Still(keras.layers.Layer):
    """`layer` as `predict` runs it: augmentation inside does nothing, also where it is stored."""

    def __init__(self, layer: keras.Layer) -> None:
        super().__init__(autocast=False)
        self.layer = layer
        self.built = True

    def call(self, inputs: Any) -> Any:
        """What the layer answers."""
        return self.layer(inputs, training=False)

    def get_config(self) -> dict[str, Any]:
        """What is still."""
        return {"layer": keras.saving.serialize_keras_object(self.layer)}


def live_layers(extractor: keras.Layer) -> list[keras.Layer]:
    """The layers of `extractor` that act otherwise while training: augmentation, dropout and noise,
    BatchNormalization whose statistics move, and what may by code of its user's own.

    What a `Backbone` holds is not among them: what is frozen there runs in inference mode. In an
    extractor without one, which as a whole is a pretrained model, only augmentation is: nobody
    extracts features with dropout.
    """
    if isinstance(extractor, Still):
        return []
    outside = _outside_of_backbones(extractor)
    if len(outside) == len(freezing.walk(extractor)):
        return [layer for layer in outside if _draws(layer) and not _regularizes(layer)]
    return [layer for layer in outside if _draws(layer) or _moves(layer) or acts_by_own_code(layer)]


def random_layers(extractor: keras.Layer) -> list[keras.Layer]:
    """Those of `live_layers` that draw random numbers, which `views` can store."""
    return [layer for layer in live_layers(extractor) if _is_random(layer)]


def own_layers(extractor: keras.Layer) -> list[keras.Layer]:
    """Those of `live_layers` of which only their user knows what they do: they take `training`, or
    draw from what no seed repeats."""
    return [layer for layer in live_layers(extractor) if not (_is_random(layer) or _moves(layer))]


def generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """What `layer` itself draws from."""
    found = {
        id(each): each
        for each in _values(vars(layer))
        if isinstance(each, keras.random.SeedGenerator)
    }
    return list(found.values())


def call(extractor: keras.Layer, inputs: Any, *, augment: bool) -> Any:
    """The features of `inputs`: everything in inference mode, but with `augment` random layers act
    as they do while training."""
    if not augment:
        return extractor(inputs, training=False)
    random = {id(layer) for layer in random_layers(extractor)}
    return _augmented(extractor, random)(inputs)


def _augmented(operation: Any, random: set[int]) -> Callable[..., Any]:
    """`operation`, in which the layers of `random` act."""
    if not isinstance(operation, keras.Layer):
        return operation
    if not any(id(inner) in random for inner in freezing.walk(operation)):
        return freezing.in_inference_mode(operation)
    graph = freezing.graph_of(operation)
    if graph is None:
        return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": True})
    return lambda inputs, **_: freezing.run_graph(graph, inputs, lambda of: _augmented(of, random))


def _outside_of_backbones(layer: keras.Layer) -> list[keras.Layer]:
    found: dict[int, keras.Layer] = {}
    for inner in freezing.walk(layer):
        found[id(inner)] = inner
    for inner in list(found.values()):
        if isinstance(inner, Backbone | BackbonePart):
            for each in freezing.walk(inner):
                found.pop(id(each), None)
    return list(found.values())


def _is_random(layer: keras.Layer) -> bool:
    if _is_recurrent(layer) and not (layer.dropout or layer.recurrent_dropout):
        return False  # it has a generator and never draws
    return bool(generators(layer))


def _draws(layer: keras.Layer) -> bool:
    return _is_random(layer) or any(_is_foreign_generator(each) for each in _values(vars(layer)))


def _is_foreign_generator(value: Any) -> bool:
    module = type(value).__module__.partition(".")[0]
    named = type(value).__name__ == "Generator" and module in ("torch", "tensorflow")
    return named or isinstance(value, np.random.Generator | np.random.RandomState | random.Random)


def _values(value: Any) -> list[Any]:
    """What is in a value, lists and dicts opened."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return [inner for each in value for inner in _values(each)]
    return [value]


def _regularizes(layer: keras.Layer) -> bool:
    return isinstance(layer, _REGULARIZERS) or _is_recurrent(layer)


def _is_recurrent(layer: Any) -> bool:
    return hasattr(layer, "dropout") and hasattr(layer, "recurrent_dropout")


def _moves(layer: keras.Layer) -> bool:
    """Whether `layer` writes to weights of its own while training."""
    if freezing.is_batch_norm(layer):
        # One that a guard has told that nobody trains has a `call` of its own.
        return layer.trainable and "call" not in vars(layer)
    return isinstance(layer, keras.layers.SpectralNormalization)
