"""What the tests of the tuner share: a tiny backbone, images, and what looks on while it trains."""

import keras
import keras_tuner
import numpy as np

from keras_xfer.tuner import HyperTransfer

SHAPE = (8, 8, 3)
# One head and one schedule, so that a training can be written by hand: the head for an epoch at
# 1e-2, then all of the backbone at 5e-3.
FIXED = {
    "pooling": "avg",
    "head_layers": 0,
    "dropout": 0.0,
    "optimizer": "adam",
    "learning_rate": 1e-2,
    "unfreeze": 1.0,
    "head_epochs": 1,
    "backbone_learning_rate": 5e-3,
    "batch_norm": "frozen",
}


def tiny(*, name="tiny", pooled=False, shape=SHAPE):
    """Two convolutions and a BatchNormalization whose statistics are those of no new one; always
    with the same weights."""
    layers = keras.layers
    low, high = (keras.initializers.RandomNormal(stddev=dev, seed=4) for dev in (0.02, 0.2))
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(4, 3, strides=2, kernel_initializer=low, name="low"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.Conv2D(6, 3, activation="tanh", kernel_initializer=high, name="high"),
            *([layers.GlobalAveragePooling2D(name="pool")] if pooled else []),
        ],
        name=name,
    )
    model.get_layer("bn").moving_mean.assign(np.linspace(-1, 1, 4))
    model.get_layer("bn").moving_variance.assign(np.linspace(1, 4, 4))
    return model


def data(count=24, shape=SHAPE, classes=3):
    """Images of range [0, 255], darker where the label is lower, and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = rng.uniform(0, 155, (count, *shape)) + 100 * labels[:, None, None, None] / classes
    return images.astype("float32"), labels


def hypermodel(num_classes=3, **kwargs):
    kwargs = {"backbones": {"tiny": tiny()}, "input_shape": SHAPE, "space": FIXED, **kwargs}
    return HyperTransfer(num_classes, **kwargs)


def drawn(**values):
    """HyperParameters with these values drawn."""
    hp = keras_tuner.HyperParameters()
    hp.values.update(values)
    return hp


def fit(made, hp=None, *, model=None, **kwargs):
    """Build and train as a tuner does; returns the model and the History."""
    hp = hp or keras_tuner.HyperParameters()
    model = model or made.build(hp)
    x, y = data()
    kwargs = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0, **kwargs}
    return model, made.fit(hp, model, x, y, **kwargs)


def copies(weights):
    return [np.array(weight) for weight in weights]


def inside(model):
    """All values of a model's backbone."""
    return copies(model.get_layer("backbone").model.get_weights())


def assert_same(mine, theirs, atol=0.0):
    """Equal lists of arrays, to the bit unless `atol` is given."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def differ(mine, theirs):
    return any(not np.array_equal(*pair) for pair in zip(mine, theirs, strict=True))


class Watching(keras.callbacks.Callback):
    """Notes what a training begins with, and the weights and logs of each of its epochs, in lists
    that its copies share: KerasTuner copies callbacks."""

    def __init__(self, runs=None):
        super().__init__()
        self.runs = [] if runs is None else runs

    def __deepcopy__(self, memo):
        return Watching(self.runs)

    def on_train_begin(self, logs=None):
        begin = copies(self.model.get_weights())
        self.runs.append({"begin": begin, "model": self.model.name, "epochs": {}, "logs": {}})

    def on_epoch_end(self, epoch, logs=None):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self.runs[-1]["epochs"][epoch] = copies(self.model.get_weights())
        self.runs[-1]["logs"][epoch] = dict(logs)
