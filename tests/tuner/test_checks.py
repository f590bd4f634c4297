"""What a search refuses before its first trial, and what it takes."""

import keras
import keras_tuner
import numpy as np
import pytest

from keras_xfer.tuner import checks
from tests.tuner.hypermodels import FIXED, data, hypermodel
from tests.tuner.killed_search import search
from tests.tuner.test_funnel import BATCH, QUICK, Batches, tf_data

X, Y = data()
ONE_HOT = np.eye(3)[Y]
REGRESSION = {"task": "regression"}
ONE_HOT_MODE = {"label_mode": "categorical"}


def own_head(hp, features):
    return keras.layers.Dense(5)(features)


WRONG = [
    (1, {}, 2 * (Y % 2) - 1, "labels 0 and 1 .*from -1 to 1"),
    (1, {}, Y, "labels 0 and 1 .*from 0 to 2"),
    (1, {}, (Y % 2) / 2, "labels 0 and 1 .*such as 0.5"),
    (1, {}, np.eye(2)[Y % 2], r"one label an image .*\(24, 2\)"),
    (3, {}, Y + 1, "labels from 0 to 2 .*from 1 to 3"),
    (3, {}, Y - 1, "labels from 0 to 2 .*from -1 to 1"),
    (3, {}, Y + 0.5, "labels from 0 to 2 .*such as 0.5"),
    (3, {}, np.where(Y, Y, np.nan), "labels from 0 to 2"),
    (3, {}, np.array(["a", "b", "c"])[Y], "strings"),
    (3, {}, ONE_HOT, "label_mode='categorical'"),
    (4, {}, ONE_HOT, r"one label an image .*\(24, 3\)"),
    (3, ONE_HOT_MODE, Y, "label_mode='int'"),
    (4, ONE_HOT_MODE, ONE_HOT, r"one-hot labels of 4 classes.*\(24, 3\)"),
    (2, REGRESSION, ONE_HOT, r"2 numbers an image .*\(24, 3\)"),
    (2, REGRESSION, Y, r"2 numbers an image .*\(24,\)"),
]
RIGHT = [
    (1, {}, Y % 2),
    (1, {}, (Y % 2 == 1)[:, None]),
    (1, {"loss": "hinge"}, 2 * (Y % 2) - 1),
    (1, {"head": own_head}, ONE_HOT),
    (3, {}, Y.astype("float32")[:, None]),
    (3, {}, Y.astype("uint8")),
    (3, ONE_HOT_MODE, 0.9 * ONE_HOT + 0.05),
    (1, REGRESSION, Y / 7),
    (1, REGRESSION, Y[:, None] / 7),
    (3, REGRESSION, ONE_HOT / 7),
    (2, {**REGRESSION, "head": own_head}, ONE_HOT),
]


@pytest.mark.parametrize(("num_classes", "kwargs", "labels", "message"), WRONG)
def test_labels_that_do_not_fit(num_classes, kwargs, labels, message):
    made = hypermodel(num_classes, **kwargs)
    with pytest.raises(ValueError, match=f"Expected.*{message}"):
        checks.check_labels(made, labels, "y")


@pytest.mark.parametrize(("num_classes", "kwargs", "labels"), RIGHT)
def test_labels_that_fit(num_classes, kwargs, labels):
    checks.check_labels(hypermodel(num_classes, **kwargs), labels, "y")


def test_a_trial_of_any_tuner_refuses_them():
    made, hp = hypermodel(1), keras_tuner.HyperParameters()
    model = made.build(hp)
    with pytest.raises(ValueError, match="y with values from 0 to 2"):
        made.fit(hp, model, X, Y, verbose=0)
    with pytest.raises(ValueError, match="validation_data with values from 0 to 2"):
        made.fit(hp, model, X, Y % 2, validation_data=(X, Y), verbose=0)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"validation_data": None}, ValueError, "validation_data=None"),
        ({"x": X, "y": Y[:9]}, ValueError, "one number of rows"),
        ({"x": X, "y": None}, ValueError, "labels beside the images.*arrays x"),
        ({"x": X, "y": Y.tolist()}, ValueError, "numpy"),
        ({"x": X, "y": Y + 1}, ValueError, "y with values from 1 to 3"),
        ({"validation_data": (X, Y + 1)}, ValueError, "validation_data with values from 1 to 3"),
        ({"validation_data": (X,)}, ValueError, "labels beside the images.*validation_data"),
        ({"x": Batches(X, Y + 1)}, ValueError, "batches of x with values from 1 to 3"),
        ({"validation_data": Batches(X, Y + 1)}, ValueError, "batches of validation_data with"),
        ({"objective": "val_mae"}, ValueError, "val_loss, val_accuracy.*objective='val_mae'"),
        ({"validation_freq": 2}, ValueError, "validation_freq=2"),
        ({"validation_freq": [1, 2]}, ValueError, r"validation_freq=\[1, 2\]"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_a_search_refuses_before_it_begins(tmp_path, kwargs, error, message):
    given = {"validation_data": (X, Y), **kwargs}
    if given["validation_data"] is None:
        with pytest.raises(error, match=message):
            check(**given)
        return
    with pytest.raises(error, match=message):
        search(tmp_path, **QUICK, **{"batch_size": BATCH, **given})
    assert not list(tmp_path.iterdir())


def check(*, made=None, objective="val_loss", x=X, y=Y, callbacks=(), **kwargs):
    validation_data = kwargs.pop("validation_data", (X, Y))
    checks.check_search(made or hypermodel(), [objective], x, y, validation_data, callbacks, kwargs)


def test_part_of_the_arrays_may_be_the_validation():
    check(validation_data=None, validation_split=0.5)


def test_the_first_batch_of_tf_data():
    check(x=tf_data(X, Y), y=None, validation_data=tf_data(X, Y))
    with pytest.raises(ValueError, match="batches of x with values from 1 to 3"):
        check(x=tf_data(X, Y + 1), y=None)
    with pytest.raises(ValueError, match=r"dataset.batch\(32\)"):
        check(x=tf_data(X, Y).unbatch(), y=None)


def test_what_is_read_once_is_left_alone():
    batches = iter([(X, Y + 1)])
    check(x=batches, y=None, steps_per_epoch=1)
    assert len(list(batches)) == 1


def test_batch_size_of_data_in_batches():
    for batch_size in (4, [4, 12]):
        made = hypermodel(space={**FIXED, "batch_size": batch_size})
        check(made=made)
        with pytest.raises(ValueError, match="x=Batches. Leave batch_size out"):
            check(made=made, x=Batches(X, Y), y=None)


class Own(keras.callbacks.Callback):
    """May log anything."""


@pytest.mark.parametrize(
    ("objective", "kwargs", "callbacks", "is_known"),
    [
        ("val_accuracy", {}, [], True),
        ("loss", {}, [], True),
        ("epoch_seconds", {}, [], True),
        ("val_auc", {}, [], False),
        ("val_auc", {}, [keras.callbacks.TerminateOnNaN()], False),
        ("val_auc", {}, [Own()], True),
        ("val_auc", {"metrics": [keras.metrics.AUC()]}, [], True),
        ("val_accuracy", {"metrics": [keras.metrics.AUC()]}, [], False),
        ("val_accuracy", {"metrics": ["accuracy"]}, [], True),
        ("val_f1_score", {"metrics": [keras.metrics.F1Score()]}, [], True),  # of one class
        ("val_mae", {"metrics": []}, [], False),
        ("val_one_loss", {"loss": ["mse", "mae"]}, [], True),  # of several outputs
        ("val_accuracy", REGRESSION, [], False),
        ("val_mae", REGRESSION, [], True),
    ],
)
def test_the_objective(objective, kwargs, callbacks, is_known):
    made = hypermodel(1, **kwargs)
    given = {"made": made, "objective": objective, "callbacks": callbacks, "y": Y % 2}
    given["validation_data"] = (X, Y % 2)
    if is_known:
        check(**given)
    else:
        with pytest.raises(ValueError, match=f"objective={objective!r}"):
            check(**given)


@pytest.mark.parametrize(("average", "is_number"), [(None, False), ("macro", True)])
def test_the_objective_is_one_number(average, is_number):
    metrics = ["accuracy", keras.metrics.F1Score(average=average, name="f1")]
    made = hypermodel(3, **ONE_HOT_MODE, metrics=metrics)
    given = {"made": made, "y": ONE_HOT, "validation_data": (X, ONE_HOT)}
    check(**given, objective="val_accuracy")
    if is_number:
        check(**given, objective="val_f1")
    else:
        with pytest.raises(ValueError, match="objective='val_f1'.*F1Score.*average='macro'"):
            check(**given, objective="val_f1")
