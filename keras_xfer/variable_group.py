"""`VariableGroup`: variables that came without a Keras layer around them, as one."""

import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

# Two layers over one loaded object share its variables: known to Keras twice, each would be updated
# twice in a step. By the id of the tf.Variable, which lives as long as its keras.Variable, and whether
# it is to be trained.
_known: weakref.WeakValueDictionary[tuple[int, bool], keras.Variable] = (
    weakref.WeakValueDictionary()
)
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
        statistics_move: function that tells whether training moves what is not trained.

    Example:

    >>> group = VariableGroup("tower/dense", {"kernel": keras.Variable(1.0)}, name="tower_dense")
    >>> group.aliases
    ('tower/dense', 'tower/dense/kernel')
    """

    def __init__(self, scope: str, variables: dict[str, keras.Variable], *, name: str) -> None:
        super().__init__(name=name)
        self._variable_names = tuple(_join(scope, each) for each in variables)
        self.aliases = tuple(dict.fromkeys([scope, *self._variable_names]))
        self.is_batch_norm = set(variables) >= _STATISTICS
        self.statistics_move: Callable[[], bool] = lambda: False
        for i, variable in enumerate(variables.values()):
            setattr(self, f"variable_{i}", variable)  # Keras tracks it from here
        self.built = True

    # By name, since position would take one variable for another where the SavedModel behind a
    # handle has been replaced by one that reads them in another order.

    def save_own_variables(self, store: Any) -> None:
        """Write the values, each under its variable's full name."""
        for name, variable in self._named().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Read the values; refuse those of other variables."""
        named = self._named()
        if set(named) != set(store.keys()):
            raise ValueError(
                f"Expected the values of {sorted(named)}. Received: those of "
                f"{sorted(store.keys())}. The SavedModel is another than that which the file was "
                "saved with."
            )
        for name, variable in named.items():
            variable.assign(store[name])

    def _named(self) -> dict[str, keras.Variable]:
        """By names without slashes, which would be folders in the file."""
        return {
            name.replace("/", "|"): getattr(self, f"variable_{i}")
            for i, name in enumerate(self._variable_names)
        }


def grouped(variables: Iterable[tuple[str, Any, bool]], layer_name: str) -> list[VariableGroup]:
    """Variables of TensorFlow, known to Keras and grouped by scope, in the order in which they come.

    Args:
        variables: of each its name with slashes, the tf.Variable, and whether it is to be trained.
        layer_name: str, the layer that they belong to, where their paths begin.

    Returns:
        list of VariableGroup, with names of their own.
    """
    scopes: dict[str, dict[str, keras.Variable]] = {}
    for name, variable, trainable in variables:
        scope, last = _split(name)
        inside = scopes.setdefault(scope, {})
        while last in inside:
            last += "_"
        key = id(variable), trainable
        if key not in _known:
            with keras.name_scope(layer_name), keras.name_scope(_sanitised(scope)):
                made = keras.Variable(
                    variable, trainable=trainable, autocast=False, name=_sanitised(last)
                )
            _known[key] = made
        inside[last] = _known[key]
        inside[last].trainable = trainable  # a layer that shares it may have frozen it
    taken: list[str] = []
    for scope in scopes:
        taken.append(_sanitised(scope, taken))
    return [
        VariableGroup(scope, inside, name=name)
        for name, (scope, inside) in zip(taken, scopes.items(), strict=True)
    ]


def _split(name: str) -> tuple[str, str]:
    """A variable's scope and its name within it: one that has no scope is one of its own."""
    scope, _, last = name.rpartition("/")
    return scope or last, last


def _join(scope: str, last: str) -> str:
    """The inverse of `_split`."""
    return last if scope == last else f"{scope}/{last}"


def _sanitised(name: str, taken: Sequence[str] = ()) -> str:
    """`name` as Keras allows it, without slashes, and none of `taken`."""
    name = re.sub(r"[^0-9A-Za-z_.\-]+", "_", name).strip("_") or "variable"
    number = 1
    unique = name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique
