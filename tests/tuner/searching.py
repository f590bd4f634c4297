"""A search that tells what it does, to be run as a chief and workers and to be killed.

Each trial says in `events` when it begins and when it is done; in between it takes its time. The
trial FAILS fails, or kills its process, whoever runs it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

TRIALS = 14
FAILS = 3


def event(folder, what, trial=""):
    line = f"{what} {os.environ.get('KERASTUNER_TUNER_ID', 'alone')} {os.getpid()} {trial}\n"
    with (Path(folder) / "events").open("a") as file:
        file.write(line)


def events(folder):
    path = Path(folder) / "events"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(" ") for line in lines]


def main(folder, kind, seconds, overwrite=False, dies=False):
    from keras_xfer import lifeline

    lifeline.watch()
    import keras
    import keras_tuner
    import numpy as np

    from keras_xfer.tuner import DurableTuner, FunnelOracle, durable

    class Tiny(keras_tuner.HyperModel):
        def build(self, hp):
            hp.Float("x", 0.0, 1.0)
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse", run_eagerly=True)
            return model

        def fit(self, hp, model, *args, callbacks, **kwargs):
            trial = next(each.trial.trial_id for each in callbacks if hasattr(each, "trial"))
            event(folder, "begin", trial)
            time.sleep(seconds)
            if int(trial) == FAILS and dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if int(trial) == FAILS:
                raise ValueError("this one always fails")
            history = model.fit(*args, callbacks=callbacks, **kwargs)
            event(folder, "done", trial)
            return history

    if kind == "random":
        oracle = durable(keras_tuner.oracles.RandomSearchOracle)(
            objective="val_loss", max_trials=TRIALS, seed=1
        )
    else:
        oracle = FunnelOracle(
            "val_loss", 6, finalists=2, head_epochs=1, fine_tune_epochs=1, factor=2, seed=1
        )
    tuner = DurableTuner(
        oracle, Tiny(), directory=folder, project_name="search", overwrite=overwrite, seed=1
    )
    event(folder, "ready")
    x = np.ones((4, 1), "float32")
    tuner.search(x, x, validation_data=(x, x), epochs=1, verbose=0)
    event(folder, "end")


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
