"""Food-101: EfficientNetB0 in mixed precision, three epochs frozen, three more thawed.

    python -m benchmarks.recipes.food101 [--smoke] [--output DIR]

Published: 43 ms against 127 ms a step; accuracy 0.705, then 0.777. BatchNormalization stays frozen.
The data need the extra `datasets` (tensorflow-datasets).
"""

from pathlib import Path

import keras

from benchmarks.recipes import materials
from keras_xfer import Backbone, BestCheckpoint, EpochTiming, Stage, StagedUnfreezing, reports


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Train, keep the best of both stages, score each class, show the worst mistakes."""
    keras.config.set_dtype_policy(given.mixed_precision)
    size, epochs = given.pixels(224), given.epochs(3)
    train, test, class_names = given.food101()
    backbone = Backbone.from_application(
        "EfficientNetB0", input_shape=(size, size, 3), weights=given.weights
    )
    resize = backbone.preprocessing(image_size=(size, size), resize="crop")
    train, test = (
        part.map(lambda image, label: (resize(image), label), num_parallel_calls=-1)
        for part in (train, test)
    )
    train, test = train.shuffle(1000).batch(32).prefetch(-1), test.batch(32).prefetch(-1)

    head = keras.layers.Dense(len(class_names), activation="softmax", dtype="float32")
    model = keras.Sequential([keras.Input((size, size, 3)), backbone, head])
    model.compile(
        "adam", "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    stages = [
        Stage(epochs=epochs, learning_rate=1e-3),
        Stage("all", epochs=epochs, learning_rate=1e-4),
    ]
    timing = EpochTiming()
    best = BestCheckpoint(output / "best.keras", restore_best_weights=True, resume=False)
    callbacks = [timing, StagedUnfreezing(stages), best]
    model.fit(train, validation_data=test, epochs=2 * epochs, callbacks=callbacks)

    predictions = reports.predictions_table(model, test, class_names)
    scores = reports.classification_table(predictions, class_names)
    print(scores.sort_values("f1-score"))
    reports.plot_class_scores(scores).savefig(output / "scores.png")
    reports.plot_most_wrong(predictions, images=test).savefig(output / "most_wrong.png")
    return timing


if __name__ == "__main__":
    materials.run(main)
