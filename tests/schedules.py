"""A small model with a backbone, and its data, for the tests of schedules."""

import keras
import numpy as np

from keras_xfer import Backbone

LOSS = keras.losses.SparseCategoricalCrossentropy
BATCH = {"batch_size": 8, "shuffle": False, "verbose": 0}


def data():
    rng = np.random.default_rng(0)
    return rng.random((32, 6), "float32"), rng.integers(0, 3, 32)


def model(seed=1):
    """Two dense layers with BatchNormalization as backbone `base`, and a head."""
    keras.utils.set_random_seed(seed)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="low"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(4, activation="relu", name="high"),
        ]
    )
    return keras.Sequential(
        [keras.Input((6,)), Backbone(base, name="base"), keras.layers.Dense(3, name="head")]
    )


def compiled(optimizer, **kwargs):
    made = model()
    made.compile(optimizer, LOSS(from_logits=True), **kwargs)
    return made


def weights(of):
    return [weight.copy() for weight in of.get_weights()]


def value(variable):
    return variable.numpy().copy()


def assert_equal_weights(one, other, **tolerance):
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, **{"rtol": 0, "atol": 1e-6, **tolerance})


def optimizers():
    """Every optimizer class that Keras ships, but those that wrap others."""
    wrappers = (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)
    return sorted(
        {
            each
            for each in vars(keras.optimizers).values()
            if isinstance(each, type)
            and issubclass(each, keras.optimizers.Optimizer)
            and each is not keras.optimizers.Optimizer
            and each not in wrappers
        },
        key=lambda each: each.__name__,
    )
