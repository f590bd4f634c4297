"""Fashion-MNIST: VGG16 as extractor for grey 28 x 28 images, frozen, thawed, and thawed too fast.

    python -m benchmarks.recipes.fashion_mnist [--smoke] [--output DIR]

The last stage shows why the rate of fine-tuning is a tenth or a hundredth of the head's.
"""

from pathlib import Path

import keras
import pandas as pd

from benchmarks.recipes import materials
from keras_xfer import Backbone, EpochTiming, Stage, StagedUnfreezing
from keras_xfer.reports import plot_history


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Three stages in one fit; the accuracy at the end of each."""
    (x, y), test = given.fashion_mnist()
    epochs = given.epochs(3)
    backbone = Backbone.from_application("VGG16", input_shape=(32, 32, 3), weights=given.weights)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            backbone.preprocessing(image_size=32),  # and grey to three channels
            backbone,
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        "adam", "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    stages = [
        Stage(epochs=epochs, learning_rate=1e-3, name="frozen"),
        Stage("all", epochs=epochs, learning_rate=1e-5, name="thawed"),
        Stage("all", epochs=epochs, learning_rate=1e-2, name="thawed too fast"),
    ]
    timing = EpochTiming()
    history = model.fit(
        x[..., None],
        y,
        validation_data=(test[0][..., None], test[1]),
        epochs=3 * epochs,
        callbacks=[timing, StagedUnfreezing(stages)],
    )
    table = pd.DataFrame(history.history).groupby("stage").last()
    table.index = [stage.name for stage in stages]
    print(table[["backbone_learning_rate", "accuracy", "val_accuracy"]])
    plot_history(history).savefig(output / "history.png")
    return timing


if __name__ == "__main__":
    materials.run(main)
