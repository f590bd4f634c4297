"""What the classes and functions of users do, and what their layers hold beside their weights.

A `call` that is edited gives other features under the same configuration, what a layer was told
after it was made is in no configuration, and Keras tells functions by their bare name. What is of
Keras and of this package changes with their versions, and says all of itself in its configuration.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.features import code
from keras_xfer.layers.backbone_part import BackbonePart, arguments_of

# What a model is given while it is compiled and trained.
_OF_TRAINING = {
    *("optimizer", "history", "stop_training", "stop_evaluating", "stop_predicting"),
    *("_eval_epoch_iterator", "_jax_state"),
}
# What torch keeps of a module; Keras has nothing of its own there.
_OF_TORCH = {"_buffers", "_parameters"}
# They are told elsewhere: layers and weights one by one, and what is drawn is no part of features.
_TOLD_ELSEWHERE = (keras.Layer, keras.Variable, keras.random.SeedGenerator)


def of_layers(layers: list[keras.Layer], config: Callable[[Any], Any]) -> list[Any]:
    """Code and state of users in `layers` and in what their graphs call, in JSON.

    Args:
        layers: every layer of an extractor.
        config: called with an object that has `get_config()`; what it is, in JSON.
    """
    fingerprint = code.Fingerprints(config)
    nodes = list(_nodes(layers))
    operations = [node.layer for node in nodes if not isinstance(node.layer, keras.Layer)]
    told: list[Any] = []
    for each in [*layers, *operations]:
        told.extend(
            [cls.__qualname__, fingerprint(cls)]
            for cls in type(each).__mro__
            if not code.is_of_the_stack(cls.__module__)
        )
        if type(each).__module__.partition(".")[0] == "keras_xfer":
            continue  # its configuration says it all
        own = not code.is_of_the_stack(type(each).__module__)
        for name, value in sorted(vars(each).items()):
            if _is_of_keras(name, each) or freezing.holds_back_training(value):
                continue
            if _has_code(value, layers):
                told.append([name, fingerprint(value)])
            elif own:
                told.append([name, _held(value, fingerprint)])
    for node in nodes:  # what keras.ops.map calls, for one, is an argument of it
        arguments = keras.tree.flatten(arguments_of(node, dict.fromkeys(node.inputs)))
        told.extend(fingerprint(each) for each in arguments if _has_code(each, layers))
    return told


def _nodes(layers: list[keras.Layer]) -> Iterator[freezing.Node]:
    """The calls in the graphs of `layers`."""
    for layer in layers:
        if isinstance(layer, BackbonePart):
            yield from layer.nodes
        elif found := freezing.graph_nodes(layer, nested=False):
            yield from found[0]


def _held(value: Any, fingerprint: code.Fingerprints) -> Any:
    """A value that a layer holds, in JSON."""
    if isinstance(value, _TOLD_ELSEWHERE):
        return None
    if value is None or isinstance(value, str | bool | int | float):  # a vocabulary may be long
        return value
    if isinstance(value, Mapping):
        items = [[fingerprint(key), _held(item, fingerprint)] for key, item in value.items()]
        return {"mapping": sorted(items, key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple):  # a reloaded layer has lists where it had tuples
        return [_held(each, fingerprint) for each in value]
    return fingerprint(value)


def _has_code(value: Any, layers: list[keras.Layer]) -> bool:
    """Whether it is a function, whatever is around it, or holds one."""
    if isinstance(value, Mapping):
        return any(_has_code(each, layers) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_has_code(each, layers) for each in value)
    if isinstance(value, types.MethodType):  # those of the layers are part of their classes
        return all(value.__self__ is not layer for layer in layers)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | functools.partial):
        return True
    if not callable(value) or isinstance(value, keras.Layer):
        return False
    return not code.is_of_the_stack(type(value).__module__) or hasattr(value, "python_function")


def _is_of_keras(name: str, holder: Any) -> bool:
    """Whether every layer has that attribute, or it is for training."""
    if name in _OF_TRAINING and isinstance(holder, keras.Model):
        return True
    if name in _OF_TORCH:
        return False
    return name in _of_every_layer() or name.startswith(("_self_", "_compile"))


@functools.cache
def _of_every_layer() -> frozenset[str]:
    inputs = keras.Input((1,))
    graphs = keras.Model(inputs, inputs), keras.Sequential([keras.Input((1,))])
    kinds = keras.layers.Layer(), keras.Model(), *graphs
    return frozenset(name for kind in kinds for name in vars(kind))
