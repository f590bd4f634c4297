"""fruits as it is taught: ImageDataGenerator, VGG16 on [0, 1], `Lambda` for what it expects."""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks.recipes import materials


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    size, folder = given.pixels(100), given.fruits()
    augmented = tf.keras.preprocessing.image.ImageDataGenerator(
        rescale=1 / 255,
        rotation_range=40,
        width_shift_range=0.1,
        height_shift_range=0.1,
        shear_range=0.2,
        zoom_range=0.2,
        horizontal_flip=True,
        validation_split=0.2,
    )
    plain = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    flow = {"target_size": (size, size), "batch_size": 32, "class_mode": "sparse"}
    train = augmented.flow_from_directory(folder / "Training", subset="training", **flow)
    validation = augmented.flow_from_directory(folder / "Training", subset="validation", **flow)
    test = plain.flow_from_directory(folder / "Test", shuffle=False, **flow)
    base = keras.applications.VGG16(
        input_shape=(size, size, 3), weights=given.weights, include_top=False, pooling="avg"
    )
    for layer in base.layers[:10]:
        layer.trainable = False
    model = keras.Sequential(
        [
            base,
            keras.layers.Dense(1000, activation="relu"),
            keras.layers.Dense(len(train.class_indices), activation="softmax"),
        ]
    )
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(train, validation_data=validation, epochs=given.epochs(10))
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

    # What those weights were trained on, of the same images.
    expected = keras.applications.vgg16.preprocess_input(images * 255)
    return (
        f"VGG16, trained on [{expected.min():.0f}, {expected.max():.0f}] in BGR, is fed "
        f"[{images.min():.0f}, {images.max():.0f}] in RGB; validation is augmented too; "
        f"shear_range={augmented.shear_range} is in degrees: none to speak of"
    )
