"""A `keras.layers.RandomShear` that loads again."""

from typing import Any

import keras


# Keras 3.15.1 writes the range that it made of a factor, [-0.1, 0.1], and refuses a negative bound
# when it reads it: no model that holds such a layer loads.
# https://github.com/keras-team/keras/issues/21110
@keras.saving.register_keras_serializable(package="keras_xfer")
class RandomShear(keras.layers.RandomShear):
    """Keras's own, but for its configuration."""

    def get_config(self) -> dict[str, Any]:
        """A symmetric range as the number that it was made of."""
        config = super().get_config()
        for name in ("x_factor", "y_factor"):
            low, high = config[name]
            if low == -high:
                config[name] = high
        return config
