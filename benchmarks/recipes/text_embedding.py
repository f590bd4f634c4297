"""Film reviews: an embedding of TensorFlow Hub as first layer, frozen, then trained.

    python -m benchmarks.recipes.text_embedding [--smoke] [--output DIR]

After https://www.tensorflow.org/tutorials/keras/text_classification_with_hub.
"""

from pathlib import Path

import keras

from benchmarks.recipes import materials
from keras_xfer import Backbone, EpochTiming, HubModule, Stage, StagedUnfreezing
from keras_xfer.reports import plot_history


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Strings in, a logit out."""
    folder, epochs = given.reviews(), given.epochs(10)
    train, validation = keras.utils.text_dataset_from_directory(
        folder / "train", batch_size=32, validation_split=0.2, subset="both", seed=0
    )
    test = keras.utils.text_dataset_from_directory(folder / "test", batch_size=32, shuffle=False)
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            Backbone(HubModule(given.text_module())),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0)  # of a logit
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=[accuracy], jit_compile=False)
    stages = [
        Stage(epochs=epochs, learning_rate=1e-3, name="frozen"),
        Stage("all", epochs=epochs, learning_rate=1e-3, name="trained"),
    ]
    timing = EpochTiming()
    callbacks = [timing, StagedUnfreezing(stages)]
    history = model.fit(
        train, validation_data=validation, epochs=2 * epochs, shuffle=False, callbacks=callbacks
    )
    print(model.evaluate(test, return_dict=True))
    plot_history(history).savefig(output / "history.png")
    model.save(output / "reviews.keras")  # loads with safe_mode=False: the module is code
    return timing


if __name__ == "__main__":
    materials.run(main)
