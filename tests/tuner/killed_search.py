"""A funnel of six candidates that may be killed at any moment and started again.

Imported by the processes that the tests start, one after the other, each forked from one that has
imported Keras already.
"""

from pathlib import Path

from keras_xfer.tuner import funnel_search
from tests.tuner import hypermodels

SPACE = {**hypermodels.FIXED, "learning_rate": (1e-3, 1e-1), "dropout": (0.0, 0.5)}
del SPACE["head_epochs"]
PLAN = {"max_trials": 6, "finalists": 2, "head_epochs": 4, "fine_tune_epochs": 2, "factor": 2}
ROUNDS = [(6, 2), (3, 4), (2, 6)]  # what that comes to
SEED = 3
BATCH = 8


def data():
    """Images and labels to train on, and others to validate on."""
    x, y = hypermodels.data(44)
    return (x[:24], y[:24]), (x[24:], y[24:])


def search(folder, *, hypermodel=None, x=None, y=None, validation_data=None, **kwargs):
    """The funnel, of these arrays unless others are given."""
    train, validation = data()
    if x is None:
        x, y = train
    kwargs = {**PLAN, "seed": SEED, "batch_size": BATCH, "verbose": 0, **kwargs}
    return funnel_search(
        hypermodel or hypermodels.hypermodel(space=SPACE),
        x,
        y,
        validation_data=validation if validation_data is None else validation_data,
        directory=folder,
        objective=kwargs.pop("objective", "val_loss"),
        **kwargs,
    )


def run(folder):
    """The search, from wherever the last process came to."""
    search(Path(folder))
