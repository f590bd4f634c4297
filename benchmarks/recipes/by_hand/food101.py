"""food101 as it is taught: BatchNormalization frozen layer by layer, a ModelCheckpoint for each fit."""

from pathlib import Path

import keras
import matplotlib.figure
import numpy as np
import pandas as pd
import sklearn.metrics
import tensorflow as tf

from benchmarks.recipes import materials


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    keras.mixed_precision.set_global_policy(given.mixed_precision)
    size, epochs = given.pixels(224), given.epochs(3)
    train, test, class_names = given.food101()

    def resize(image, label):
        return tf.image.resize(image, (size, size)), label

    train = train.map(resize, num_parallel_calls=-1).shuffle(1000).batch(32).prefetch(-1)
    test = test.map(resize, num_parallel_calls=-1).batch(32).prefetch(-1)
    base = keras.applications.EfficientNetB0(
        input_shape=(size, size, 3), weights=given.weights, include_top=False
    )
    base.trainable = False
    inputs = keras.Input((size, size, 3))
    x = keras.layers.GlobalAveragePooling2D()(base(inputs, training=False))
    x = keras.layers.Dense(len(class_names))(x)
    outputs = keras.layers.Activation("softmax", dtype="float32")(x)
    model = keras.Model(inputs, outputs)

    def compile_model(rate):
        model.compile(
            keras.optimizers.Adam(rate),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,
        )

    def checkpoint():
        return keras.callbacks.ModelCheckpoint(
            output / "best.keras", "val_accuracy", save_best_only=True
        )

    compile_model(1e-3)
    first, second = checkpoint(), checkpoint()
    model.fit(train, validation_data=test, epochs=epochs, callbacks=[first])
    base.trainable = True
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    compile_model(1e-4)
    model.fit(
        train,
        validation_data=test,
        epochs=2 * epochs,
        initial_epoch=epochs,
        callbacks=[second],
    )
    model = keras.saving.load_model(output / "best.keras")

    probabilities = model.predict(test)
    answers = probabilities.argmax(1)
    labels = np.concatenate([y for _, y in test])
    report = sklearn.metrics.classification_report(
        labels, answers, labels=range(len(class_names)), target_names=class_names,
        output_dict=True, zero_division=0,
    )  # fmt: skip
    scores = pd.DataFrame(report).T.sort_values("f1-score")
    print(scores)
    figure = matplotlib.figure.Figure(figsize=(8, 20))
    figure.add_subplot().barh(scores.index, scores["f1-score"])
    figure.savefig(output / "scores.png")
    wrong = np.flatnonzero(answers != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(1))][:9]
    images = [x for x, _ in test.unbatch()]
    figure = matplotlib.figure.Figure(figsize=(8, 8))
    for place, number in enumerate(wrong):
        axes = figure.add_subplot(3, 3, place + 1)
        axes.imshow(images[number].numpy().astype("uint8"))
        axes.set_title(f"{class_names[answers[number]]}, is {class_names[labels[number]]}")
        axes.axis("off")
    figure.savefig(output / "most_wrong.png")
    return (
        f"the first fit's best model ({first.best:.2f}) is overwritten by the second's "
        f"({second.best:.2f}), better or not; Adam begins anew"
    )
