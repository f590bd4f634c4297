"""fashion_mnist as it is taught: the images in [0, 1], the backbone thawed by a callback."""

from pathlib import Path

import keras
import matplotlib.figure
import pandas as pd

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


class Thaw(keras.callbacks.Callback):
    """Thaws at an epoch, and sets the rate."""

    def __init__(self, base, rates):
        super().__init__()
        self.base = base
        self.rates = rates

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.rates:
            self.base.trainable = True
            self.model.optimizer.learning_rate = self.rates[epoch]


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    (x, y), (test_x, test_y) = given.fashion_mnist()
    epochs = given.epochs(3)

    def prepare(images):
        images = keras.ops.image.resize(images[..., None] / 255, (32, 32))
        return keras.ops.convert_to_numpy(keras.ops.repeat(images, 3, -1)).astype("float32")

    x, test_x = prepare(x), prepare(test_x)
    base = keras.applications.VGG16(
        input_shape=(32, 32, 3), weights=given.weights, include_top=False, pooling="avg"
    )
    base.trainable = False
    model = keras.Sequential([base, keras.layers.Dense(10, activation="softmax")])
    loss = "sparse_categorical_crossentropy"
    model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    before = measured.values(base.weights)
    history = model.fit(
        x,
        y,
        validation_data=(test_x, test_y),
        epochs=3 * epochs,
        callbacks=[Thaw(base, {epochs: 1e-5, 2 * epochs: 1e-2})],
    )
    table = pd.DataFrame(history.history)
    print(table.iloc[[epochs - 1, 2 * epochs - 1, 3 * epochs - 1]])
    figure = matplotlib.figure.Figure()
    table[["accuracy", "val_accuracy"]].plot(ax=figure.add_subplot())
    figure.savefig(output / "history.png")
    moved = measured.moved(base.weights, before)
    return (
        f"thawed by a callback, {moved} of the backbone's {len(before)} weights train; VGG16 is fed "
        f"[{x.min():.0f}, {x.max():.0f}] in place of [-124, 151]"
    )
