"""`VariableGroup`: variables that came without a Keras layer around them, as one."""

import re
from collections.abc import Sequence

import keras

_STATISTICS = {"moving_mean", "moving_variance"}  # of BatchNormalization, in every TensorFlow


class VariableGroup(keras.layers.Layer):
    """The variables of one scope of a SavedModel, frozen and thawed together like a layer.

    It computes nothing: the SavedModel does. It gives `freezing` something to walk over.

    Args:
        scope: str, the scope as the SavedModel writes it, such as `"bert/layer_3/dense"`.
        variables: dict of the name of each within the scope to its `keras.Variable`.
        name: str, the layer's name.

    Attributes:
        aliases: the names by which it can be selected besides its own: the scope, and the full
            name of each variable.
        is_batch_norm: whether these are the variables of a BatchNormalization.

    Example:

    >>> group = VariableGroup("tower/dense", {"kernel": keras.Variable(1.0)}, name="tower_dense")
    >>> group.aliases
    ('tower/dense', 'tower/dense/kernel')
    """

    def __init__(self, scope: str, variables: dict[str, keras.Variable], *, name: str) -> None:
        super().__init__(name=name)
        self.aliases = tuple(dict.fromkeys([scope, *(join(scope, each) for each in variables)]))
        self.is_batch_norm = set(variables) >= _STATISTICS
        for i, variable in enumerate(variables.values()):
            setattr(self, f"variable_{i}", variable)  # Keras tracks it from here
        self.built = True


def split(name: str) -> tuple[str, str]:
    """A variable's scope and its name within it: one that has no scope is one of its own."""
    scope, _, last = name.rpartition("/")
    return scope or last, last


def join(scope: str, last: str) -> str:
    """The inverse of `split`."""
    return last if scope == last else f"{scope}/{last}"


def sanitised(name: str, taken: Sequence[str] = ()) -> str:
    """`name` as Keras allows it, without slashes, and none of `taken`."""
    name = re.sub(r"[^0-9A-Za-z_.\-]+", "_", name).strip("_") or "variable"
    number = 1
    unique = name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique
