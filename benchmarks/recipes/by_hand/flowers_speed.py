"""flowers_speed as it is taught: extract, train, thaw all, compile again; a checkpoint for each fit."""

import time
from pathlib import Path

import keras
import keras_tuner
import matplotlib.figure

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    size, epochs = given.pixels(299), given.epochs(10)
    folder = given.flowers()
    common = {"image_size": (size, size), "batch_size": 32, "seed": 0}
    train, rest = keras.utils.image_dataset_from_directory(
        folder, validation_split=0.5, subset="both", **common
    )
    validation, test = rest.shard(2, 0), rest.shard(2, 1)
    preprocess = keras.applications.inception_v3.preprocess_input
    train, validation, test = (
        part.map(lambda x, y: (preprocess(x), y)).cache().prefetch(-1)
        for part in (train, validation, test)
    )

    def build(hp):
        base = keras.applications.InceptionV3(
            input_shape=(size, size, 3), weights=given.weights, include_top=False, pooling="avg"
        )
        base.trainable = False
        inputs = keras.Input((size, size, 3))
        x = base(inputs, training=False)
        x = keras.layers.Dense(512, activation="relu")(x)
        x = keras.layers.Dropout(hp.Choice("dropout", [0.2, 0.5]))(x)
        model = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(x))
        compile_model(model, 1e-3)
        return model

    def compile_model(model, rate):
        model.compile(
            keras.optimizers.Adam(rate),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,
        )

    tuner = keras_tuner.GridSearch(
        build, "val_accuracy", directory=output / "search", overwrite=True
    )
    tuner.search(train, validation_data=validation, epochs=epochs, verbose=0)
    model = tuner.hypermodel.build(tuner.get_best_hyperparameters()[0])

    clock, file = Clock(), output / "best.keras"
    kept = [keras.callbacks.ModelCheckpoint(file, "val_accuracy", save_best_only=True)]
    board = keras.callbacks.TensorBoard(output / "logs", write_graph=False)
    model.fit(train, validation_data=validation, epochs=epochs, callbacks=[clock, board, kept[0]])
    base = model.layers[1]
    base.trainable = True
    compile_model(model, 1e-5)
    before = measured.values(measured.statistics(base))
    kept.append(keras.callbacks.ModelCheckpoint(file, "val_accuracy", save_best_only=True))
    model.fit(
        train,
        validation_data=validation,
        epochs=2 * epochs,
        initial_epoch=epochs,
        callbacks=[clock, board, kept[1]],
    )
    print(keras.saving.load_model(file).evaluate(test, return_dict=True))
    figure = matplotlib.figure.Figure()
    figure.add_subplot().bar(range(2 * epochs), clock.seconds)
    figure.savefig(output / "timing.png")
    moved = measured.moved(measured.statistics(base), before)
    return (
        f"{moved} BatchNormalization statistics move in fine-tuning, for all `training=False`; "
        f"the second fit's checkpoint begins at {kept[1].best:.2f} whatever the first had kept "
        f"({kept[0].best:.2f}); every trial runs the backbone anew"
    )
