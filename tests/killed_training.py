"""A training of three stages on seeded data that may be killed at any moment and started again.

Imported by the processes that the tests start, one after the other, each forked from one that has
imported Keras already.
"""

from pathlib import Path

import keras
import numpy as np

import keras_xfer
from keras_xfer import Backbone, Stage
from keras_xfer.bundle import write_bundle
from keras_xfer.retarget import capture

EPOCHS = 9


class Shuffled(keras.utils.PyDataset):
    """Batches whose order depends on the seed and the epoch alone."""

    def __init__(self, x, y, seed):
        super().__init__()
        self.x, self.y, self.seed = x, y, seed
        self.epoch = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.x))
        rows = order[8 * index : 8 * (index + 1)]
        return self.x[rows], self.y[rows]


def make_model():
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="low"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(4, activation="relu", name="high"),
        ]
    )
    model = keras.Sequential(
        [keras.Input((6,)), Backbone(base, name="base"), keras.layers.Dropout(0.2),
         keras.layers.Dense(3, name="head")]
    )  # fmt: skip
    model.compile(
        keras.optimizers.AdamW(1e-2, weight_decay=0.01, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def schedule():
    cosine = keras.optimizers.schedules.CosineDecay(3e-3, 12)
    return keras_xfer.StagedUnfreezing(
        [
            Stage(epochs=2, learning_rate=1e-2),
            Stage("high", epochs=4, learning_rate=5e-3, warmup_epochs=1, patience=2),
            Stage("all", learning_rate={"head": cosine, "backbone": 1e-3}, layer_decay=0.5),
        ],
        restore_best=True,
    )


def train(folder, cached=False):
    """Train to the end, from wherever the last process came to, and write down what came out."""
    folder = Path(folder)
    keras.utils.set_random_seed(7)
    rng = np.random.default_rng(0)
    x, y = rng.random((32, 6), "float32"), rng.integers(0, 3, 32)
    data, model = Shuffled(x, y, seed=3), make_model()
    best = keras_xfer.BestCheckpoint(folder / "best.keras", resume=False)
    tell = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(data, "epoch", epoch)
    )
    callbacks = [
        keras_xfer.BackupAndRestore(folder / "backup", delete_checkpoint=False),
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.05),
        best,
        keras_xfer.EpochTiming(),
    ]
    common = {"validation_data": (x, y), "epochs": EPOCHS, "verbose": 0}
    if cached:
        history = keras_xfer.fit_staged(
            model, x, y, stages=schedule(), cache=folder / "features", boundary="always",
            batch_size=8, seed=3, callbacks=callbacks, **common,
        )  # fmt: skip
    else:
        history = model.fit(data, callbacks=[tell, schedule(), *callbacks], **common)
    timings = {"epoch_seconds", "train_seconds", "validation_seconds", "first_step_seconds",
               "step_seconds_median", "step_seconds_p95", "samples_per_second"}  # fmt: skip
    logs = {name: values for name, values in history.history.items() if name not in timings}
    outcome = {
        "state": capture(model),
        "epochs": history.epoch,
        "history": logs,
        "best": [best.best, best.best_epoch],
        "rows": [],
    }
    write_bundle(folder / "outcome.zip", outcome)
