"""What in an extractor acts otherwise while training, so that its features are not fixed."""

from collections.abc import Callable
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.backbone_part import BackbonePart

# They act on what a layer has computed; features are taken without them, as `predict` does.
_REGULARIZERS = (
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.GaussianNoise,
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
    BatchNormalization whose statistics move.

    What a `Backbone` holds is not among them: what is frozen there runs in inference mode. In an
    extractor without one, which as a whole is a pretrained model, only augmentation is: nobody
    extracts features with dropout.
    """
    if isinstance(extractor, Still):
        return []
    outside = _outside_of_backbones(extractor)
    if len(outside) == len(freezing.walk(extractor)):
        return [layer for layer in outside if _is_random(layer) and not _regularizes(layer)]
    return [layer for layer in outside if _is_random(layer) or _moves(layer)]


def random_layers(extractor: keras.Layer) -> list[keras.Layer]:
    """Those of `live_layers` that draw random numbers, which `views` can store."""
    return [layer for layer in live_layers(extractor) if _is_random(layer)]


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
    return any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())


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
