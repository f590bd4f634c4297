"""Fruits: VGG16 on 100 x 100 pixels, its first ten layers frozen, all ways to save it.

    python -m benchmarks.recipes.fruits [--smoke] [--output DIR]

Published: accuracy 0.89 to 0.91.
"""

from pathlib import Path

import keras
import numpy as np

from benchmarks.recipes import materials
from keras_xfer import Backbone, EpochTiming
from keras_xfer.images import make_augmentation, scan


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Train, save and load the whole model, its architecture, its weights."""
    photos = scan(given.fruits())
    size = given.pixels(100)
    train, validation, test = photos.datasets(size)
    shape = (size, size, 3)
    backbone = Backbone.from_application("VGG16", input_shape=shape, weights=given.weights)
    backbone.unfreeze(10)
    model = keras.Sequential(
        [
            keras.Input(shape),
            make_augmentation(rotation=40 / 360, shift=0.1, shear=0.2, zoom=0.2),
            backbone.preprocessing(),
            backbone,
            keras.layers.Dense(1000, activation="relu"),
            keras.layers.Dense(len(photos.class_names), activation="softmax"),
        ]
    )
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"], jit_compile=False)
    timing = EpochTiming()
    epochs = given.epochs(10)
    model.fit(train, validation_data=validation, epochs=epochs, callbacks=[timing])
    print(model.evaluate(test, return_dict=True))

    model.save(output / "fruits.keras")
    (output / "fruits.json").write_text(model.to_json(), "utf-8")
    model.save_weights(output / "fruits.weights.h5")
    whole = keras.saving.load_model(output / "fruits.keras")
    rebuilt = keras.models.model_from_json((output / "fruits.json").read_text("utf-8"))
    rebuilt.load_weights(output / "fruits.weights.h5")
    images = test[0][0]
    for loaded in (whole, rebuilt):
        print("answers alike:", np.allclose(loaded.predict(images), model.predict(images)))
    return timing


if __name__ == "__main__":
    materials.run(main)
