"""The state of the random number generators that a training draws from, besides the model's own."""

import random
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

# The generator behind keras.random without a seed has no public name. Tried on Keras 3.15.1.
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and Keras's global generators. TensorFlow's own, which
    tf.data shuffles by, cannot be read."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": list(np.random.get_state(legacy=True)),  # the one that Keras uses
    }
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    if generator is not None:
        state["keras"] = np.array(keras.ops.convert_to_numpy(generator.state), copy=True)
    if keras.backend.backend() == "torch":
        import torch

        state["torch"] = torch.get_rng_state().numpy().copy()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Bring the generators back to what `random_state` found."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))  # as above
    if "keras" in state:
        generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
        if generator is None:
            generator = keras.random.SeedGenerator(0)
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)
        generator.state.assign(state["keras"])
    if "torch" in state and keras.backend.backend() == "torch":
        import torch

        torch.set_rng_state(torch.from_numpy(np.asarray(state["torch"])))
