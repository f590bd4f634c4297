"""`BackbonePart`: what of a `Backbone` runs below a cut through it, or above."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_xfer import freezing
from keras_xfer.layers.backbone import Backbone

# What Keras calls the input of a graph that has got no name. Tried on Keras 3.15.1.
_AUTOMATIC_NAME = re.compile(r"(keras_tensor|input_layer)(_\d+)?(CLONE)*")


class Cut(NamedTuple):
    """A cut through the graph of a backbone's model.

    Attributes:
        below: the calls before the cut.
        above: those after it.
        inputs: the numbers of the model's inputs.
        crossing: the numbers of the tensors that cross it, each once.
        outputs: the numbers of the model's outputs.
    """

    below: list[freezing.Node]
    above: list[freezing.Node]
    inputs: tuple[int, ...]
    crossing: tuple[int, ...]
    outputs: tuple[int, ...]


class BackbonePart(freezing.ExactTrainable, keras.layers.Layer):
    """The layers of a `Backbone` on one side of a cut, the very objects with their variables.

    Below it gives the list of tensors that cross the cut, always in inference mode; above it makes
    of them what the backbone gives, and holds to what the backbone holds to: what is frozen runs in
    inference mode, BatchNormalization obeys the backbone's policy.
    """

    _backbone: Backbone
    _cut: Cut

    def __init__(self, backbone: Backbone, cut: Cut, *, above: bool) -> None:
        side = "above" if above else "below"
        super().__init__(
            name=f"{backbone.name}_{side}", dtype=backbone.dtype_policy, autocast=False
        )
        self.above = above
        self.parts = _layers(cut.above if above else cut.below)
        # Past Keras, which would count all of its variables among this layer's.
        object.__setattr__(self, "_backbone", backbone)
        object.__setattr__(self, "_cut", cut)
        self.built = True

    @property
    def nodes(self) -> Sequence[freezing.Node]:
        """The calls that are run, in order."""
        return self._cut.above if self.above else self._cut.below

    @property
    def variables(self) -> list[Any]:
        """The variables of the part, after holding BatchNormalization to its policy."""
        self._backbone.enforce_batch_norm()
        return super().variables

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The tensors that cross the cut; above, the backbone's features of them."""
        backbone, cut = self._backbone, self._cut
        backbone.enforce_batch_norm()
        if not self.above:
            given = freezing.standard_inputs(self._graph(), inputs)
            values = dict(zip(cut.inputs, given, strict=True))
            for node in cut.below:
                node.run(values, freezing.in_inference_mode(node.layer))
            return [values[i] for i in cut.crossing]
        live = bool(training) and any(weight.trainable for weight in self.weights)
        wrap = freezing.gated if live else freezing.in_inference_mode
        values = dict(zip(cut.crossing, keras.tree.flatten(inputs), strict=True))
        for node in cut.above:
            node.run(values, wrap(node.layer))
        outputs = backbone.finish(self._packed([values[i] for i in cut.outputs]))
        return freezing.say_training(outputs, training)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002  # Keras's signature
        """Shapes and dtypes, without running the layers."""
        backbone, cut = self._backbone, self._cut
        given = keras.tree.flatten(inputs)
        if not self.above:  # as `standard_inputs` converts them
            given = [
                keras.KerasTensor(x.shape, like.dtype)
                for x, like in zip(given, self._graph().inputs, strict=True)
            ]
        values = dict(zip(cut.crossing if self.above else cut.inputs, given, strict=True))
        for node in self.nodes:
            node.run(values, node.layer.compute_output_spec)
        if not self.above:
            return [values[i] for i in cut.crossing]
        return backbone.finish_spec(self._packed([values[i] for i in cut.outputs]))

    def get_config(self) -> dict[str, Any]:
        """What the part computes, as plain data: it tells two parts apart, and does not make one."""
        backbone, cut = self._backbone, self._cut
        # By their place, so that equal parts are told in equal numbers.
        begin = cut.crossing if self.above else cut.inputs
        numbers = {i: number for number, i in enumerate(begin)}
        nodes = [_told(node, numbers) for node in self.nodes]
        return {
            "inputs": None if self.above else [_told_input(each) for each in self._graph().inputs],
            "nodes": nodes,
            "crossing": [numbers[i] for i in cut.crossing],
            "outputs": [numbers[i] for i in cut.outputs] if self.above else None,
            "pooling": backbone.pooling if self.above else None,
            "dtype": backbone.compute_dtype,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Refused: a part is made of the backbone that it is a part of."""
        raise NotImplementedError(
            "A part of a Backbone is not made again from a file: save the whole model, and split "
            "it again with keras_xfer.features.split_model."
        )

    def _graph(self) -> Any:
        return freezing.graph_of(self._backbone.model)

    def _packed(self, outputs: list[Any]) -> Any:
        return freezing.unpacked(keras.tree.pack_sequence_as(self._graph().output, outputs))


def _layers(nodes: Sequence[freezing.Node]) -> list[keras.Layer]:
    layers = {id(node.layer): node.layer for node in nodes}
    return [layer for layer in layers.values() if isinstance(layer, keras.Layer)]


def arguments_of(node: freezing.Node, tensors: Mapping[int, Any]) -> tuple[Any, Any]:
    """The arguments that the graph gives in this call, with `tensors` by number in place of its
    tensors."""
    given: list[tuple[Any, Any]] = []

    def operation(*args: Any, **kwargs: Any) -> list[None]:
        given.append((args, kwargs))
        return [None] * len(node.outputs)

    node.run(dict(tensors), operation)
    return given[0]


def _told(node: freezing.Node, numbers: dict[int, int]) -> list[Any]:
    """A call: of what, with what, and what it gives, which is numbered here."""
    tensors = {i: {"tensor": numbers[i]} for i in node.inputs}
    arguments = arguments_of(node, tensors)
    called = keras.saving.serialize_keras_object(node.layer)
    if not isinstance(node.layer, keras.Layer):  # Keras numbers operations as a process makes them
        called["config"].pop("name", None)
    outputs = [numbers.setdefault(i, len(numbers)) for i in node.outputs]
    return [called, keras.saving.serialize_keras_object(arguments), outputs]


def _told_input(tensor: Any) -> list[Any]:
    """What is made of an input before the first call, and by which name it is found in a dict."""
    name = None if _AUTOMATIC_NAME.fullmatch(tensor.name) else tensor.name
    return [name, tensor.dtype, len(tensor.shape)]
