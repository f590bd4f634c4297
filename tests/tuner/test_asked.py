"""What tells a search from others."""

import functools
import json

import keras
import numpy as np
import pytest

from keras_xfer.tuner.asked import of_callable

FOCAL = keras.losses.CategoricalFocalCrossentropy


def own_loss(y_true, y_pred):
    return keras.ops.mean(y_true - y_pred)


class Weighted(keras.losses.Loss):
    """Whose configuration is none that JSON has."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def call(self, y_true, y_pred):
        return own_loss(y_true, y_pred)

    def get_config(self):
        return {**super().get_config(), "weights": self.weights, "of": own_loss}


def mean_of(function):
    return keras.metrics.MeanMetricWrapper(function, name="mean")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: FOCAL(gamma=2.0), lambda: FOCAL(gamma=5.0)),
        (lambda: FOCAL(alpha=[0.1, 0.2]), lambda: FOCAL(alpha=[0.2, 0.2])),
        (lambda: keras.losses.Huber(delta=1.0), lambda: keras.losses.Huber(delta=2.0)),
        (lambda: keras.losses.MeanSquaredError(), lambda: keras.losses.MeanAbsoluteError()),
        (lambda: own_loss, lambda: "mse"),
        (lambda: {"a": FOCAL(gamma=2.0)}, lambda: {"a": FOCAL(gamma=5.0)}),
        (lambda: [keras.metrics.AUC()], lambda: [keras.metrics.AUC(curve="PR")]),
        (lambda: [keras.metrics.AUC(name="mine")], lambda: [keras.metrics.AUC()]),
        (lambda: [keras.metrics.F1Score()], lambda: [keras.metrics.F1Score(average="macro")]),
        (lambda: Weighted(np.ones(2)), lambda: Weighted(np.zeros(2))),
        (lambda: mean_of(own_loss), lambda: mean_of(keras.losses.mean_squared_error)),
    ],
)
def test_losses_and_metrics_are_told_apart_by_what_they_are_made_with(one, other):
    # Made twice in a process, where Keras calls the second auc_1; and as it comes out of a file.
    told, again = of_callable(one()), json.loads(json.dumps(of_callable(one())))
    assert told == again
    assert told != of_callable(other())


def test_what_has_no_name_is_the_same_in_every_process():
    assert of_callable([None, functools.partial(own_loss)]) == [None, "partial"]
    assert of_callable(lambda x: x) == "<lambda>"
    with pytest.warns(UserWarning, match="lambda"):  # Keras's, that it could not be loaded
        told = of_callable(mean_of(lambda y_true, y_pred: y_pred))
    assert told[1]["fn"] == "<lambda>"
