"""Cats and dogs: MobileNetV2 frozen for ten epochs, thawed from layer 100 for ten more, in one fit.

    python -m benchmarks.recipes.cats_dogs [--smoke] [--output DIR]

Published: test accuracy 0.95 frozen, then 0.97
(https://www.tensorflow.org/tutorials/images/transfer_learning).
"""

from pathlib import Path

import keras

from benchmarks.recipes import materials
from keras_xfer import Backbone, EpochTiming, Stage, StagedUnfreezing
from keras_xfer.images import scan
from keras_xfer.reports import plot_history


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Train, test, draw the curves."""
    size, epochs = given.pixels(160), given.epochs(10)
    photos = scan(given.cats_dogs(), test_split=0.1)
    train, validation, test = photos.datasets(size)

    backbone = Backbone.from_application(
        "MobileNetV2", input_shape=(size, size, 3), weights=given.weights
    )
    model = keras.Sequential(
        [
            keras.Input((size, size, 3)),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(0.2),
            backbone.preprocessing(),
            backbone,
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0)  # of a logit
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile("rmsprop", loss, metrics=[accuracy], jit_compile=False)
    stages = [
        Stage(epochs=epochs, learning_rate=1e-4, name="frozen"),
        Stage(100, epochs=epochs, learning_rate=1e-5, name="from layer 100"),
    ]
    timing = EpochTiming()
    history = model.fit(
        train,
        validation_data=validation,
        epochs=2 * epochs,
        callbacks=[timing, StagedUnfreezing(stages)],
    )
    print(model.evaluate(test, return_dict=True))
    plot_history(history).savefig(output / "history.png")
    return timing


if __name__ == "__main__":
    materials.run(main)
