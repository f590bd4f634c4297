"""cats_dogs as it is taught: two compiles, two fits, two histories; `training=False` for BatchNorm."""

from pathlib import Path

import keras
import matplotlib.figure

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    size, epochs = given.pixels(160), given.epochs(10)
    folder = given.cats_dogs()
    train = keras.utils.image_dataset_from_directory(
        folder / "train", shuffle=True, batch_size=32, image_size=(size, size), label_mode="binary"
    )
    validation = keras.utils.image_dataset_from_directory(
        folder / "validation", shuffle=True, batch_size=32, image_size=(size, size),
        label_mode="binary",
    )  # fmt: skip
    test, validation = validation.take(1), validation.skip(len(validation) // 5)
    base = keras.applications.MobileNetV2(
        input_shape=(size, size, 3), include_top=False, weights=given.weights
    )
    base.trainable = False
    inputs = keras.Input((size, size, 3))
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.RandomRotation(0.2)(x)
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))

    def compile_model(rate):
        model.compile(
            keras.optimizers.RMSprop(rate),
            keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.BinaryAccuracy(threshold=0, name="accuracy")],
            jit_compile=False,
        )

    compile_model(1e-4)
    history = model.fit(train, validation_data=validation, epochs=epochs)
    base.trainable = True
    for layer in base.layers[:100]:
        layer.trainable = False
    compile_model(1e-5)
    before = measured.values(measured.statistics(base))
    fine = model.fit(
        train, validation_data=validation, epochs=2 * epochs, initial_epoch=len(history.epoch)
    )
    print(model.evaluate(test, return_dict=True))
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 2)
    for ax, name in zip(axes, ("accuracy", "loss"), strict=True):
        for key in (name, f"val_{name}"):
            ax.plot(history.history[key] + fine.history[key], label=key)
        ax.axvline(epochs - 0.5, label="start of fine-tuning")
        ax.legend()
    figure.savefig(output / "history.png")
    moved = measured.moved(measured.statistics(base), before)
    return (
        f"{moved} BatchNormalization statistics move in fine-tuning, for all `training=False`; "
        "RMSprop begins anew"
    )
