"""flowers_hub as it is taught: hub.KerasLayer, then ResNet101V2 on the same images in [0, 1]."""

from pathlib import Path

import keras
import matplotlib.figure
import numpy as np
import pandas as pd
import sklearn.metrics

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    import tensorflow_hub as hub

    size, epochs = given.pixels(224), given.epochs(5)
    train, validation = keras.utils.image_dataset_from_directory(
        given.flowers(), image_size=(size, size), batch_size=32, validation_split=0.2, subset="both",
        seed=0, label_mode="categorical",
    )  # fmt: skip
    class_names = train.class_names
    rescale = keras.layers.Rescaling(1 / 255)
    train, validation = (
        part.map(lambda x, y: (rescale(x), y)).cache() for part in (train, validation)
    )
    try:
        keras.Sequential(
            [
                keras.Input((size, size, 3)),
                hub.KerasLayer(given.image_module()),
                keras.layers.Dense(5),
            ]
        )
        refused = "hub.KerasLayer works"
    except ValueError:
        refused = "Sequential refuses hub.KerasLayer"

    base = keras.applications.ResNet101V2(
        input_shape=(size, size, 3), weights=given.weights, include_top=False, pooling="avg"
    )
    base.trainable = False
    model = keras.Sequential([base, keras.layers.Dense(5, activation="softmax")])

    def compile_model():
        model.compile(
            keras.optimizers.SGD(0.005, momentum=0.9),
            keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
            metrics=["accuracy"],
            jit_compile=False,
        )

    compile_model()
    histories = [model.fit(train, validation_data=validation, epochs=epochs).history]
    base.trainable = True
    for layer in base.layers[:370]:
        layer.trainable = False
    compile_model()
    before = measured.values(measured.statistics(base))
    histories.append(model.fit(train, validation_data=validation, epochs=epochs).history)

    answers = model.predict(validation).argmax(1)
    labels = np.concatenate([y for _, y in validation]).argmax(1)
    table = pd.DataFrame({"label": labels, "prediction": answers})
    table.to_csv(output / "predictions.csv", index=False)
    print(sklearn.metrics.confusion_matrix(labels, answers))
    print(
        sklearn.metrics.classification_report(
            labels, answers, labels=range(5), target_names=class_names, zero_division=0
        )
    )
    figure = matplotlib.figure.Figure()
    axes = figure.add_subplot()
    for name in ("accuracy", "val_accuracy"):
        axes.plot(np.concatenate([history[name] for history in histories]), label=name)
    axes.axvline(epochs - 0.5)
    axes.legend()
    figure.savefig(output / "history.png")
    highest = max(float(x.numpy().max()) for x, _ in train)
    lowest = min(float(x.numpy().min()) for x, _ in train)
    moved = measured.moved(measured.statistics(base), before)
    return (
        f"{refused}; ResNet101V2, trained on [-1, 1], is fed [{lowest:.0f}, {highest:.0f}]; "
        f"{moved} BatchNormalization statistics move in the thawed top"
    )
