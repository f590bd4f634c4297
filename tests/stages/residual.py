"""A small model whose backbone has three blocks, for the tests of stages."""

import keras

from keras_xfer import Backbone

# Of each part: kernel and bias, on the way from 6 inputs through 4 units to 3 classes.
PARAMETERS = {"stem": 6 * 4 + 4, "one": 4 * 4 + 4, "two": 4 * 4 + 4, "head": 4 * 3 + 3}


def backbone_model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(4, name="stem")(inputs)
    for name in ("one", "two"):
        added = keras.layers.Dense(4, name=f"{name}_dense")(x)
        x = keras.layers.Add(name=f"{name}_add")([x, added])
    return keras.Model(inputs, x)


def model(seed=1):
    """Blocks `stem`, `one` and `two` in backbone `base`, and a head."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            Backbone(backbone_model(), name="base"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def kernels(of):
    """The kernel of each part of `model`, by name, from the top down."""
    base = of.get_layer("base").model
    return {
        "head": of.get_layer("head").kernel,
        "two": base.get_layer("two_dense").kernel,
        "one": base.get_layer("one_dense").kernel,
        "stem": base.get_layer("stem").kernel,
    }
