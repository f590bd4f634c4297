"""Flowers: what an epoch of InceptionV3 takes frozen, and what thawed; the dropout found by search.

    python -m benchmarks.recipes.flowers_speed [--smoke] [--output DIR]

Published: 16.2 s against 60.0 s an epoch; validation accuracy 0.87 against 0.926.
"""

from pathlib import Path

import keras
import keras_tuner

from benchmarks.recipes import materials
from keras_xfer import BestCheckpoint, EpochTiming, Stage, StagedUnfreezing, tuner
from keras_xfer.images import scan
from keras_xfer.reports import plot_timing


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Search, train, time."""
    size, epochs = given.pixels(299), given.epochs(10)
    photos = scan(given.flowers(), validation_split=0.25, test_split=0.25)
    train, validation, test = photos.datasets(size)

    heads = tuner.HyperTransfer(
        len(photos.class_names),
        backbones=["InceptionV3"],
        input_shape=(size, size, 3),
        weights=given.weights,
        cache=output / "features",
        max_stages=1,
        tune=(),  # but for what has several values here:
        space={"dropout": [0.2, 0.5], "head_layers": 1, "head_units": 512},
    )
    oracle = tuner.durable(keras_tuner.oracles.GridSearchOracle)("val_accuracy")
    search = tuner.DurableTuner(oracle, heads, directory=output / "search", overwrite=True)
    search.search(train, validation_data=validation, epochs=epochs)
    best_values = search.get_best_hyperparameters()[0]

    model = heads.build(best_values)
    stages = [Stage(epochs=epochs, learning_rate=1e-3), Stage("all", learning_rate=1e-5)]
    timing, board = EpochTiming(), keras.callbacks.TensorBoard(output / "logs", write_graph=False)
    best = BestCheckpoint(output / "best.keras", restore_best_weights=True, resume=False)
    callbacks = [timing, StagedUnfreezing(stages), best, board]
    model.fit(train, validation_data=validation, epochs=2 * epochs, callbacks=callbacks)
    print(f"dropout {best_values['dropout']}, best epoch {best.best_epoch + 1}")
    print(model.evaluate(test, return_dict=True))
    plot_timing(timing).savefig(output / "timing.png")
    return timing


if __name__ == "__main__":
    materials.run(main)
