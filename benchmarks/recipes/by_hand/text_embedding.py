"""text_embedding as it is taught since hub.KerasLayer is refused: hub.load in a Lambda."""

from pathlib import Path

import keras
import matplotlib.figure
import numpy as np
import tensorflow as tf

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    folder, epochs = given.reviews(), given.epochs(10)
    train, validation = keras.utils.text_dataset_from_directory(
        folder / "train", batch_size=32, validation_split=0.2, subset="both", seed=0
    )
    test = keras.utils.text_dataset_from_directory(folder / "test", batch_size=32, shuffle=False)
    embedding = tf.saved_model.load(given.text_module())
    width = int(embedding(tf.constant(["a"])).shape[-1])
    frozen = keras.layers.Lambda(lambda text: embedding(text), output_shape=(width,))
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            frozen,
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(1),
        ]
    )

    def compile_model():
        model.compile(
            keras.optimizers.Adam(1e-3),
            keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.BinaryAccuracy(threshold=0, name="accuracy")],
            jit_compile=False,
        )

    compile_model()
    histories = [model.fit(train, validation_data=validation, epochs=epochs).history]
    frozen.trainable = True
    compile_model()
    variables = [embedding.embeddings] if given.smoke else list(embedding.variables)
    before = measured.values(variables)
    histories.append(model.fit(train, validation_data=validation, epochs=epochs).history)
    print(model.evaluate(test, return_dict=True))
    figure = matplotlib.figure.Figure()
    axes = figure.add_subplot()
    for name in ("loss", "val_loss"):
        axes.plot(np.concatenate([history[name] for history in histories]), label=name)
    axes.legend()
    figure.savefig(output / "history.png")
    moved = measured.moved(variables, before)
    try:
        model.save(output / "reviews.keras")
        keras.saving.load_model(output / "reviews.keras", safe_mode=False)
        loaded = "the model saves and loads"
    except Exception as error:
        loaded = f"the model does not save and load ({type(error).__name__})"
    return f"thawed, the embedding trains {moved} of its {len(variables)} variables; {loaded}"
