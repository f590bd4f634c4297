"""A small model whose backbone has three blocks, for the tests of stages."""

import keras
import numpy as np

from keras_xfer import Backbone


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


BATCH = {"batch_size": 8, "shuffle": False, "verbose": 0}
STEPS = 4  # an epoch


def data():
    rng = np.random.default_rng(0)
    return rng.random((32, 6), "float32"), rng.random((32, 3), "float32")


def compiled(optimizer, **kwargs):
    made = model()
    made.compile(optimizer, "mse", **{"run_eagerly": True, **kwargs})
    return made


def layers(of):
    """The layers of `model` with weights, by name, from the bottom up."""
    base = of.get_layer("base").model
    return {
        "stem": base.get_layer("stem"),
        "one": base.get_layer("one_dense"),
        "two": base.get_layer("two_dense"),
        "head": of.get_layer("head"),
    }


def trained_by_hand(rates):
    """The weights of `model` after gradient descent in NumPy: `rates[step]` has the rate of each
    part, 0 where it has none."""
    parts = {
        name: [weight.astype("float64") for weight in layer.get_weights()]
        for name, layer in layers(model()).items()
    }
    x, y = data()
    for step, rate in enumerate(rates):
        rows = slice(8 * (step % STEPS), 8 * (step % STEPS) + 8)
        of = {"stem": x[rows]}
        of["one"] = of["stem"] @ parts["stem"][0] + parts["stem"][1]
        of["two"] = of["one"] + of["one"] @ parts["one"][0] + parts["one"][1]
        of["head"] = of["two"] + of["two"] @ parts["two"][0] + parts["two"][1]
        gradient = 2 * (of["head"] @ parts["head"][0] + parts["head"][1] - y[rows]) / (8 * 3)
        for name in reversed(parts):
            kernel, bias = parts[name]
            below = gradient @ kernel.T + (gradient if name in ("one", "two") else 0)
            parts[name] = [
                kernel - rate.get(name, 0) * of[name].T @ gradient,
                bias - rate.get(name, 0) * gradient.sum(0),
            ]
            gradient = below
    return parts


def assert_trained(of, rates, atol=1e-5):
    for name, weights in trained_by_hand(rates).items():
        for mine, theirs in zip(layers(of)[name].get_weights(), weights, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol, err_msg=name)
