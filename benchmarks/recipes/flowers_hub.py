"""Flowers: a ResNet of TensorFlow Hub as frozen layer, then ResNet101V2, frozen and thawed at its top.

    python -m benchmarks.recipes.flowers_hub [--smoke] [--output DIR]

Published: accuracy 0.88. Each backbone brings the range that it was trained on: [0, 1] and [-1, 1].
"""

from pathlib import Path

import keras

from benchmarks.recipes import materials
from keras_xfer import Backbone, EpochTiming, Stage, StagedUnfreezing, reports
from keras_xfer.images import scan
from keras_xfer.losses import SmoothedSparseCategoricalCrossentropy


def classifier(backbone: Backbone, size: int, classes: int) -> keras.Model:
    """Images of [0, 255] in, probabilities out."""
    head = keras.layers.Dense(classes, activation="softmax")
    layers = [keras.Input((size, size, 3)), backbone.preprocessing(), backbone, head]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.SGD(0.005, momentum=0.9)
    loss = SmoothedSparseCategoricalCrossentropy(label_smoothing=0.1)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return model


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Train both, list what the better one says of each image."""
    size, epochs = given.pixels(224), given.epochs(5)
    photos = scan(given.flowers())
    train, validation, _ = photos.datasets(size)

    hub = classifier(Backbone.from_hub(given.image_module(), image_size=size), size, 5)
    frozen = hub.fit(train, validation_data=validation, epochs=epochs)

    shape = (size, size, 3)
    resnet = Backbone.from_application("ResNet101V2", input_shape=shape, weights=given.weights)
    model, timing = classifier(resnet, size, 5), EpochTiming()
    stages = [Stage(epochs=epochs), Stage(370, epochs=epochs, learning_rate=0.005)]
    callbacks = [timing, StagedUnfreezing(stages)]
    staged = model.fit(train, validation_data=validation, epochs=2 * epochs, callbacks=callbacks)

    predictions = reports.predictions_table(model, validation, photos.class_names)
    predictions.to_csv(output / "predictions.csv", index=False)
    confusion = reports.confusion_table(predictions, photos.class_names)
    print(predictions[["file", "prediction"]], confusion, sep="\n\n")
    print(reports.classification_table(predictions, photos.class_names))
    reports.plot_history({"hub": frozen, "ResNet101V2": staged}).savefig(output / "history.png")
    reports.plot_confusion(confusion).savefig(output / "confusion.png")
    return timing


if __name__ == "__main__":
    materials.run(main)
