"""How the hand-written forms tell that something has moved that should not have, or the reverse."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np


def values(variables: Iterable[Any]) -> list[np.ndarray]:
    """What the variables hold now."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def moved(variables: Iterable[Any], before: list[np.ndarray]) -> int:
    """How many of the variables hold something else than before."""
    pairs = zip(values(variables), before, strict=True)
    return sum(not np.array_equal(now, then) for now, then in pairs)


def statistics(model: keras.Model) -> list[Any]:
    """The moving means and variances of all BatchNormalization in a model."""
    norms = [each for each in model.layers if isinstance(each, keras.layers.BatchNormalization)]
    return [variable for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]
