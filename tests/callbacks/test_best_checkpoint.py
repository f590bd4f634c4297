"""BestCheckpoint: what it keeps, what it refuses, and what is left when it is killed."""

import copy
import errno
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_xfer.callbacks import best_checkpoint
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.stages.current import set_current_stage

pytestmark = pytest.mark.core

X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = (X @ np.array([1.0, -2.0, 0.5], "float32"))[:, None]
VALIDATION = X[:8] + 0.1, Y[:8]


def make_model(learning_rate=0.01, **compile_arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    compile_arguments = {"loss": "mse", "metrics": ["mae"], **compile_arguments}
    model.compile(keras.optimizers.Adam(learning_rate), **compile_arguments)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *callbacks, **arguments):
    arguments = {"validation_data": VALIDATION, "epochs": 2, "verbose": 0, **arguments}
    return model.fit(X, Y, batch_size=16, callbacks=list(callbacks), **arguments)


def read_json(filepath):
    return json.loads(Path(f"{filepath}.json").read_text())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def drive(callback, model, *values, name="val_accuracy", first_epoch=0):
    """Calls the hooks by hand with these values of the monitor, the weights marking the epoch."""
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(values, start=first_epoch):
        model.set_weights([np.full_like(weight, epoch) for weight in model.get_weights()])
        callback.on_epoch_end(epoch, {name: value, "loss": 1.0})
    callback.on_train_end()


def saved_epoch(filepath):
    """Which epoch's weights are in the file."""
    return int(keras.models.load_model(filepath).get_weights()[0].flat[0])


class Scores(keras.callbacks.Callback):
    """Logs one of these values in each epoch."""

    def __init__(self, values, name="score"):
        super().__init__()
        self.values, self.name = values, name

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.values[epoch]


# What is kept


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "epoch"),
    [
        ("max", 0.0, [0.5, 0.7, 0.6], 1),
        ("max", 0.0, [0.5, 0.7, 0.7], 1),  # of equal values the earlier one
        ("max", 0.0, [math.nan, 0.5, math.nan], 1),  # a first NaN is not best, nor a later one
        ("max", 0.0, [0.5, math.inf], 0),
        ("max", 0.25, [0.5, 0.75, 1.25], 2),  # not better by exactly min_delta, then by more
        ("max", 0.25, [0.5, 0.625, 0.7], 0),
        ("min", 0.0, [0.5, 0.7, 0.4], 2),
        ("min", 0.0, [-math.inf, 0.5, 0.5], 1),
        ("min", 0.25, [0.5, 0.3, 0.25], 0),
        ("min", 0.25, [0.5, 0.3, 0.2], 2),
    ],
)
def test_which_epoch_is_best(tmp_path, mode, min_delta, values, epoch):
    filepath = tmp_path / "best.keras"
    callback = BestCheckpoint(filepath, mode=mode, min_delta=min_delta)
    drive(callback, make_model(), *values)
    assert saved_epoch(filepath) == epoch
    assert (callback.best, callback.best_epoch) == (values[epoch], epoch)
    assert callback.best_logs == {"val_accuracy": values[epoch], "loss": 1.0}
    assert read_json(filepath)["best"] == values[epoch]


def test_nothing_finite_saves_nothing(tmp_path):
    callback = BestCheckpoint(tmp_path / "best.keras", restore_best_weights=True)
    drive(callback, make_model(), math.nan, math.nan)
    assert callback.best is None
    assert names(tmp_path) == []


def test_file_is_the_best_epoch_of_fit_with_its_optimizer(tmp_path):
    filepath = tmp_path / "best.keras"
    weights = {}

    class Weights(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            weights[epoch] = self.model.get_weights()

    callback = BestCheckpoint(filepath, monitor="val_loss")
    diverge = keras.callbacks.LearningRateScheduler(lambda epoch: 0.05 if epoch < 3 else 50.0)
    history = fit(make_model(), diverge, Weights(), callback, epochs=5).history
    best_epoch = int(np.argmin(history["val_loss"]))
    assert best_epoch == 2

    loaded = keras.models.load_model(filepath)
    assert callback.best_epoch == best_epoch
    for one, other in zip(loaded.get_weights(), weights[best_epoch], strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(loaded.optimizer.iterations.numpy()) == 2 * (best_epoch + 1)
    evaluated = loaded.evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_json_beside_the_file(tmp_path):
    filepath = tmp_path / "best.keras"
    history = fit(make_model(), BestCheckpoint(filepath, monitor="val_loss"), epochs=3).history
    record = read_json(filepath)
    assert {name: record[name] for name in ("monitor", "mode", "best", "epoch", "stage")} == {
        "monitor": "val_loss",
        "mode": "min",
        "best": history["val_loss"][2],
        "epoch": 2,
        "stage": None,
    }
    assert record["logs"] == {name: values[2] for name, values in history.items()}
    assert record["sha256"] == hashlib.sha256(filepath.read_bytes()).hexdigest()
    assert record["structure"] == {
        "layers": 1,
        "weights": 2,
        "parameters": 4,
        "sha256": record["structure"]["sha256"],
    }
    assert names(tmp_path) == ["best.keras", "best.keras.json"]


def test_weights_only(tmp_path):
    filepath = tmp_path / "best.weights.h5"
    callback = BestCheckpoint(filepath, save_weights_only=True)
    drive(callback, make_model(), 0.5, 0.7, 0.6)
    model = make_model()
    model.load_weights(filepath)
    assert model.get_weights()[0].flat[0] == 1
    assert names(tmp_path) == ["best.weights.h5", "best.weights.h5.json"]


@pytest.mark.parametrize("convert", [np.float32, np.array, keras.ops.convert_to_tensor])
def test_logs_of_numpy_and_of_the_backend(tmp_path, convert):
    filepath = tmp_path / "best.keras"
    callback = BestCheckpoint(filepath)
    drive(callback, make_model(), convert(0.5))
    assert type(callback.best) is float
    assert read_json(filepath)["best"] == 0.5


def test_logs_that_are_not_numbers(tmp_path):
    callback = BestCheckpoint(tmp_path / "best.keras")
    callback.set_model(make_model())
    callback.on_train_begin()
    logs = {"val_accuracy": 0.5, "loss": math.nan, "rates": [0.1, 0.2], "name": "1.5"}
    callback.on_epoch_end(0, logs)
    assert read_json(tmp_path / "best.keras")["logs"] == {"val_accuracy": 0.5, "loss": "NaN"}
    with pytest.raises(ValueError, match=r"one number.*Received: val_accuracy=\[0.1, 0.2\]"):
        callback.on_epoch_end(1, {"val_accuracy": [0.1, 0.2]})


def test_stage_is_that_of_the_logs_else_of_the_schedule(tmp_path):
    filepath = tmp_path / "best.keras"
    model = make_model()
    callback = BestCheckpoint(filepath)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, {"val_accuracy": 0.1})
    assert read_json(filepath)["stage"] is None
    set_current_stage(model, 2)
    callback.on_epoch_end(1, {"val_accuracy": 0.2})
    assert read_json(filepath)["stage"] == 2
    callback.on_epoch_end(2, {"val_accuracy": 0.3, "stage": np.float32(1)})
    assert read_json(filepath)["stage"] == 1


# Going on


def test_a_new_process_goes_on(tmp_path, capsys):
    filepath = tmp_path / "best.keras"
    drive(BestCheckpoint(filepath), make_model(), 0.5, 0.7)

    again = BestCheckpoint(filepath, verbose=1)
    drive(again, make_model(), 0.6, 0.65, first_epoch=2)
    assert "goes on" in capsys.readouterr().out
    assert (again.best, again.best_epoch, saved_epoch(filepath)) == (0.7, 1, 1)
    assert again.best_logs == {"val_accuracy": 0.7, "loss": 1.0}

    drive(BestCheckpoint(filepath), make_model(), 0.6, 0.8, first_epoch=4)
    assert (read_json(filepath)["best"], saved_epoch(filepath)) == (0.8, 5)


def test_one_callback_over_two_fits(tmp_path):
    for resume in (True, False):
        filepath = tmp_path / f"best-{resume}.keras"
        model, callback = make_model(), BestCheckpoint(filepath, resume=resume)
        drive(callback, model, 0.5, 0.7)
        drive(callback, model, 0.6, first_epoch=2)
        assert (callback.best, saved_epoch(filepath)) == (0.7, 1)


def test_without_resume_the_old_file_stays_until_there_is_a_new_best(tmp_path):
    filepath = tmp_path / "best.keras"
    drive(BestCheckpoint(filepath), make_model(), 0.5, 0.7)
    fresh = BestCheckpoint(filepath, resume=False)
    drive(fresh, make_model(), math.nan, first_epoch=2)
    assert (fresh.best, saved_epoch(filepath)) == (None, 1)
    drive(fresh, make_model(), 0.1, first_epoch=3)
    assert (fresh.best, saved_epoch(filepath)) == (0.1, 3)
    drive(fresh, make_model(), 0.05, first_epoch=4)  # another model is another run
    assert (fresh.best, saved_epoch(filepath)) == (0.05, 4)


def other_structure():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("arguments", "make", "damage", "named"),
    [
        (
            {"monitor": "accuracy"},
            make_model,
            None,
            r"monitor was 'val_accuracy' and is 'accuracy'",
        ),
        ({"mode": "min"}, make_model, None, r"mode was 'max' and is 'min'"),
        ({}, other_structure, None, r"structure was .*'parameters': 4.* and is .*'parameters': 11"),
        ({}, make_model, lambda path: make_model().save(path), r"something else has written it"),
        ({}, make_model, lambda path: Path(f"{path}.json").unlink(), r"without its record"),
        ({}, make_model, lambda path: Path(f"{path}.json").write_text("{"), r"not a record"),
        ({}, make_model, lambda path: Path(f"{path}.json").write_text("[]"), r"not a record"),
    ],
)
def test_what_belongs_to_something_else_is_refused(tmp_path, arguments, make, damage, named):
    filepath = tmp_path / "best.keras"
    drive(BestCheckpoint(filepath), make_model(), 0.5)
    if damage:
        damage(filepath)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    mend = r".*another filepath.*resume=False.*delete it.*Received: filepath="
    with pytest.raises(ValueError, match=named + mend):
        drive(BestCheckpoint(filepath, **arguments), make(), 0.9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    afresh = BestCheckpoint(filepath, **arguments, resume=False)
    drive(afresh, make(), 0.4, name=afresh.monitor)
    assert read_json(filepath)["best"] == 0.4


def test_a_deleted_model_begins_afresh(tmp_path):
    filepath = tmp_path / "best.keras"
    drive(BestCheckpoint(filepath), make_model(), 0.9)
    filepath.unlink()
    drive(BestCheckpoint(filepath), make_model(), 0.5)
    assert (read_json(filepath)["best"], saved_epoch(filepath)) == (0.5, 0)


def test_a_model_without_input_is_built_in_fit(tmp_path):
    def unbuilt(units):
        model = keras.Sequential([keras.layers.Dense(units), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    filepath = tmp_path / "best.keras"
    first = BestCheckpoint(filepath, monitor="val_loss")
    fit(unbuilt(2), first, epochs=3)
    again = BestCheckpoint(filepath, monitor="val_loss")
    fit(unbuilt(2), again, epochs=1)
    assert again.best <= first.best
    with pytest.raises(ValueError, match="structure was"):
        fit(unbuilt(4), BestCheckpoint(filepath, monitor="val_loss"), epochs=1)


# Going on from a state


def state_of(callback):
    return json.loads(json.dumps(callback.state_dict()))


def go_on(callback, model, state, *values, first_epoch, end=True):
    """As `drive`, in a process that loads the state of one that was killed."""
    callback.set_model(model)
    callback.on_train_begin()
    callback.load_state_dict(state)
    for epoch, value in enumerate(values, start=first_epoch):
        model.set_weights([np.full_like(weight, epoch) for weight in model.get_weights()])
        callback.on_epoch_end(epoch, {"val_accuracy": value, "loss": 1.0})
    if end:
        callback.on_train_end()


def outcome(callback, filepath):
    """All that a run leaves, but for the digest of a file that holds the time of its writing."""
    record = read_json(filepath) if Path(f"{filepath}.json").exists() else {"sha256": None}
    if record.pop("sha256"):
        record["weights of epoch"] = saved_epoch(filepath)
    return callback.state_dict(), callback.best, callback.best_epoch, record


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.7, 0.6, 0.8],
        [0.5, 0.7, 0.6, 0.65],
        [0.9, 0.1, 0.2, 0.3],
        [math.nan, math.nan, 0.2, 0.1],
        [0.5, math.nan, math.nan, math.nan],
        [math.nan] * 4,
    ],
)
@pytest.mark.parametrize("saved_too_much", [False, True])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, resume, values, saved_too_much):
    whole = BestCheckpoint(tmp_path / "whole.keras", resume=resume)
    drive(whole, make_model(), *values)

    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath, resume=resume)
    killed.set_model(make_model())
    go_on_from = {}
    killed.on_train_begin()
    for epoch, value in enumerate(values[: 3 if saved_too_much else 2]):
        killed.model.set_weights([np.full_like(w, epoch) for w in killed.model.get_weights()])
        killed.on_epoch_end(epoch, {"val_accuracy": value, "loss": 1.0})
        if epoch < 2:  # killed before the state of the third epoch was saved
            go_on_from = state_of(killed)

    resumed = BestCheckpoint(filepath, resume=resume)
    go_on(resumed, make_model(), go_on_from, *values[2:], first_epoch=2)
    assert outcome(resumed, filepath) == outcome(whole, tmp_path / "whole.keras")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(("mode", "values"), [("max", [0.5, 0.6, 0.8]), ("min", [0.8, 0.6, 0.5])])
def test_an_epoch_that_runs_again_is_saved_again(tmp_path, resume, mode, values, capsys):
    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath, mode=mode, resume=resume)
    drive(killed, make_model(), *values[:2])
    state = state_of(killed)
    drive(killed, killed.model, values[2], first_epoch=2)
    resumed = BestCheckpoint(filepath, mode=mode, resume=resume, verbose=1)
    go_on(resumed, make_model(), state, first_epoch=2, end=False)
    assert (resumed.best, resumed.best_epoch) == (values[1], 1)
    resumed.on_epoch_end(2, {"val_accuracy": values[2]})
    said = f"Epoch 3: val_accuracy = {values[2]}, better than {values[1]}; saved"
    assert said in capsys.readouterr().out
    assert (resumed.best, resumed.best_epoch) == (values[2], 2)
    assert read_json(filepath)["logs"] == {"val_accuracy": values[2]}  # not those of the first run


@pytest.mark.parametrize("value", [0.55, math.nan])
def test_an_epoch_that_comes_out_worse_when_it_runs_again(tmp_path, value):
    filepath = tmp_path / "best.keras"  # as it may on a GPU
    killed = BestCheckpoint(filepath)
    drive(killed, make_model(), 0.5, 0.6)
    state = state_of(killed)
    drive(killed, killed.model, 0.8, first_epoch=2)
    resumed = BestCheckpoint(filepath, restore_best_weights=True)
    go_on(resumed, make_model(), state, value, 0.7, first_epoch=2)
    assert (resumed.best, resumed.best_epoch, saved_epoch(filepath)) == (0.8, 2, 2)
    assert resumed.best_logs == {"val_accuracy": 0.8, "loss": 1.0}
    assert resumed.model.get_weights()[0].flat[0] == 2


def test_what_another_run_left_is_replaced_also_after_an_interruption(tmp_path):
    filepath = tmp_path / "best.keras"
    drive(BestCheckpoint(filepath), make_model(), 0.95)
    killed = BestCheckpoint(filepath, resume=False)
    drive(killed, make_model(), math.nan)
    resumed = BestCheckpoint(filepath, resume=False)
    go_on(resumed, make_model(), state_of(killed), 0.5, first_epoch=1)
    assert (resumed.best, saved_epoch(filepath)) == (0.5, 1)


def worse(filepath):
    drive(BestCheckpoint(filepath, resume=False), make_model(), 0.3)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.unlink(), r"val_accuracy = 0.7 of epoch 2\) is gone"),
        (worse, r"val_accuracy = 0.7 of epoch 2\) has been replaced by .*val_accuracy = 0.3"),
        (lambda path: Path(f"{path}.json").unlink(), "without its record"),
        (lambda path: make_model().save(path), "something else has written it"),
    ],
)
def test_a_state_without_its_file_is_refused(tmp_path, resume, damage, named):
    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath)
    drive(killed, make_model(), 0.5, 0.7)
    damage(filepath)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"{named}.*Received: filepath=.*best\.keras") as error:
        go_on(
            BestCheckpoint(filepath, resume=resume), make_model(), state_of(killed), first_epoch=2
        )
    assert resume or "begin afresh, without its backup" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_refused_state_is_not_remembered(tmp_path):
    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath)
    drive(killed, make_model(), 0.7)
    filepath.unlink()
    again = BestCheckpoint(filepath)
    with pytest.raises(ValueError, match="is gone"):
        go_on(again, make_model(), state_of(killed), first_epoch=1)
    drive(again, make_model(), 0.4)
    assert (again.best, saved_epoch(filepath)) == (0.4, 0)


def test_a_file_within_min_delta_of_the_state_is_not_that_of_the_state(tmp_path):
    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath, min_delta=0.1)
    drive(killed, make_model(), 0.7)
    drive(BestCheckpoint(filepath, resume=False), make_model(), 0.75)
    resumed = BestCheckpoint(filepath, min_delta=0.1)
    with pytest.raises(ValueError, match="has been replaced"):
        go_on(resumed, make_model(), state_of(killed), first_epoch=1)


@pytest.mark.parametrize("load_before_fit", [False, True])
def test_a_state_in_a_fit_of_a_model_that_is_built_there(tmp_path, load_before_fit):
    def train(best, *callbacks, **arguments):
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        scores = Scores([0.9, 0.5, 0.6, 0.7])
        fit(model, scores, best, *callbacks, **arguments)

    filepath = tmp_path / "best.keras"
    arguments = {"filepath": filepath, "monitor": "score", "mode": "max", "resume": False}
    killed, resumed = BestCheckpoint(**arguments), BestCheckpoint(**arguments)
    train(killed)
    state = state_of(killed)
    before = filepath.read_bytes()
    if load_before_fit:
        resumed.load_state_dict(state)
        train(resumed, initial_epoch=2, epochs=4)
    else:
        load = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: resumed.load_state_dict(state)
        )
        train(resumed, load, initial_epoch=2, epochs=4)
    assert (resumed.best, resumed.best_epoch) == (0.9, 0)
    assert resumed.best_logs == killed.best_logs
    assert filepath.read_bytes() == before


def test_whether_the_monitor_was_ever_logged_is_part_of_the_state(tmp_path):
    def killed_after(logs):
        callback = BestCheckpoint(tmp_path / "best.keras")
        model = make_model(metrics=["accuracy"])
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_end(0, logs)
        return state_of(callback)

    without = killed_after({"loss": 1.0, "accuracy": 0.5})
    with pytest.raises(ValueError, match="saved nothing"):
        go_on(BestCheckpoint(tmp_path / "best.keras"), make_model(), without, first_epoch=1)
    diverged = killed_after({"loss": math.nan, "val_accuracy": math.nan})
    go_on(BestCheckpoint(tmp_path / "best.keras"), make_model(), diverged, first_epoch=1)


def test_the_best_weights_are_restored_after_an_interruption(tmp_path):
    filepath = tmp_path / "best.keras"
    killed = BestCheckpoint(filepath)
    drive(killed, make_model(), 0.5, 0.7)
    resumed = BestCheckpoint(filepath, resume=False, restore_best_weights=True)
    go_on(resumed, make_model(), state_of(killed), 0.6, first_epoch=2)
    assert resumed.model.get_weights()[0].flat[0] == 1


# Restoring


def test_restored_weights_are_those_of_the_best_epoch(tmp_path):
    filepath = tmp_path / "best.keras"
    model = make_model()
    drive(BestCheckpoint(filepath, restore_best_weights=True), model, 0.5, 0.7, 0.6)
    assert model.get_weights()[0].flat[0] == 1
    later = make_model()
    drive(BestCheckpoint(filepath, restore_best_weights=True), later, 0.6, first_epoch=3)
    assert later.get_weights()[0].flat[0] == 1


def test_a_model_that_is_not_compiled(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    drive(BestCheckpoint(tmp_path / "best.keras", restore_best_weights=True), model, 0.5, 0.7, 0.6)
    assert model.get_weights()[0].flat[0] == 1
    model.compile("sgd", "mse")
    fit(model)


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_restoring_after_the_optimizer_was_replaced(tmp_path, name):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    best = BestCheckpoint(
        tmp_path / name,
        monitor="score",
        mode="max",
        save_weights_only=name.endswith("h5"),
        restore_best_weights=True,
    )
    callbacks = [Scores([0.1, 0.9, 0.3, 0.4]), best]
    model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks)
    expected = model.get_weights()
    model.layers[0].trainable = False
    optimizer = keras.optimizers.Adam(10.0)
    model.compile(optimizer, "mse")
    model.fit(X, Y, initial_epoch=2, epochs=4, verbose=0, callbacks=callbacks)
    assert best.best_epoch == 1
    assert model.optimizer is optimizer
    assert int(optimizer.iterations.numpy()) == 2
    for one, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_goes_on_after_restoring(tmp_path):
    model = make_model()
    best = BestCheckpoint(tmp_path / "best.keras", "val_loss", restore_best_weights=True)
    fit(model, best)
    fit(model, best, initial_epoch=2, epochs=4)
    evaluated = model.evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(best.best, rel=1e-5)


# Directions


def test_direction_by_the_compiled_metric(tmp_path):
    model = make_model(metrics=[keras.metrics.MeanAbsoluteError(name="quality")])
    best = BestCheckpoint(tmp_path / "best.keras", monitor="val_quality")
    fit(model, best)
    assert read_json(tmp_path / "best.keras")["mode"] == "min"


@pytest.mark.parametrize("trained", [False, True])
def test_ambiguous_direction_asks_for_the_mode(tmp_path, trained):
    def quality(y_true, y_pred):
        return keras.ops.mean(y_pred - y_true)

    model = make_model(metrics=[quality])
    if trained:
        fit(model)
    batches = []
    counter = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(batch)
    )
    with pytest.raises(ValueError, match=r"higher or a lower.*monitor='val_quality'.*mode='max'"):
        fit(model, counter, BestCheckpoint(tmp_path / "best.keras", monitor="val_quality"))
    assert len(batches) <= 1  # not a whole epoch is lost
    fit(model, BestCheckpoint(tmp_path / "best.keras", monitor="val_quality", mode="max"))


# A monitor that is not there


@pytest.mark.parametrize(
    ("monitor", "arguments"),
    [
        ("val_acuracy", {}),
        ("val_acuracy", {"validation_freq": 2}),
        ("acuracy", {"validation_freq": 2}),
        ("val_mae", {"validation_data": None}),
    ],
)
def test_missing_monitor_is_an_error_in_the_first_epoch(tmp_path, monitor, arguments):
    epochs = []
    counter = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    best = BestCheckpoint(tmp_path / "best.keras", monitor=monitor, mode="max")
    logged = r"\['loss', 'mae'" + (r", 'val_loss', 'val_mae'\]" if not arguments else r"\]")
    with pytest.raises(ValueError, match=rf"Received: monitor='{monitor}'.*{logged}"):
        fit(make_model(), counter, best, epochs=4, **arguments)
    assert epochs == [0]
    assert names(tmp_path) == []


def test_epochs_without_validation_are_waited_for(tmp_path):
    best = BestCheckpoint(tmp_path / "best.keras", monitor="val_mae")
    history = fit(make_model(), best, epochs=4, validation_freq=2).history
    assert (best.best, best.best_epoch) == (history["val_mae"][1], 3)


def test_validation_that_never_came_is_an_error_at_the_end(tmp_path):
    best = BestCheckpoint(tmp_path / "best.keras", monitor="val_mae")
    with pytest.raises(ValueError, match=r"saved nothing.*validation_freq"):
        fit(make_model(), best, epochs=2, validation_freq=5)


class TestStep(keras.Sequential):
    __test__ = False

    def test_step(self, *args):
        logs = super().test_step(*args)
        if isinstance(logs, tuple):  # JAX
            return {"fid": logs[0]["loss"]}, logs[1]
        return {"fid": logs["loss"]}


def test_metric_of_a_test_step_of_its_own(tmp_path):
    model = TestStep([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    best = BestCheckpoint(tmp_path / "best.keras", monitor="val_fid", mode="min", verbose=0)
    fit(model, best, epochs=4, validation_freq=2)
    assert best.best_epoch == 3


def test_metric_that_an_earlier_callback_logs(tmp_path):
    scores = Scores([0.1, 0.3, 0.2], name="val_score")
    best = BestCheckpoint(tmp_path / "best.keras", monitor="val_score", mode="max")
    fit(make_model(), scores, best, epochs=3, validation_data=None)
    assert (best.best, best.best_epoch) == (0.3, 1)


def test_missing_monitor_when_driven_by_hand(tmp_path):
    with pytest.raises(ValueError, match="monitor='val_accuracy'"):
        drive(BestCheckpoint(tmp_path / "best.keras"), make_model(), 0.5, name="val_loss")


# Paths and failures


def test_errors_of_the_path_come_before_training(tmp_path, monkeypatch):
    def never(*_args, **_kwargs):
        pytest.fail("trained")

    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.keras.json").mkdir()
    guard = keras.callbacks.LambdaCallback(on_train_batch_begin=never)
    for filepath, error, message in [
        ("folder.keras", IsADirectoryError, "there is a folder"),
        ("taken.keras", IsADirectoryError, "there is a folder"),
        ("file/best.keras", OSError, "cannot create the folder"),
    ]:
        with pytest.raises(error, match=f"{message}.*Received: filepath="):
            fit(make_model(), BestCheckpoint(tmp_path / filepath, "val_loss"), guard)

    def read_only(self, *_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "open", read_only)  # root may write anywhere, so chmod shows nothing
    with pytest.raises(OSError, match=r"Read-only file system.*Received: filepath="):
        fit(make_model(), BestCheckpoint(tmp_path / "best.keras", "val_loss"), guard)


def test_folder_is_created(tmp_path):
    drive(BestCheckpoint(tmp_path / "a" / "b" / "best.keras"), make_model(), 0.5)
    assert names(tmp_path / "a" / "b") == ["best.keras", "best.keras.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filepath": "best.h5"}, r"ends in '\.keras'.*Received: filepath='best\.h5'"),
        ({"filepath": "best.keras", "save_weights_only": True}, r"ends in '\.weights\.h5'"),
        ({"filepath": "best.weights.h5"}, r"ends in '\.keras'"),
        ({"filepath": "best-{epoch:02d}.keras"}, r"not a pattern"),
        ({"filepath": "best-{val_loss}.keras"}, r"not a pattern"),
        ({"monitor": ""}, r"Received: monitor=''"),
        ({"monitor": None}, r"Received: monitor=None"),
        ({"mode": "up"}, r"Received: mode='up'"),
        ({"min_delta": -0.1}, r"Received: min_delta=-0\.1"),
        ({"min_delta": math.nan}, r"Received: min_delta=nan"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BestCheckpoint(**{"filepath": "best.keras", **arguments})


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_raises_and_changes_nothing(tmp_path, monkeypatch, existing):
    filepath = tmp_path / "best.keras"
    model, callback = make_model(), BestCheckpoint(filepath)
    if existing:
        drive(callback, model, 0.5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(path, *_args, **_kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        drive(callback, model, 0.9, first_epoch=1)
    assert (callback.best, callback.best_epoch) == ((0.5, 0) if existing else (None, None))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# As a callback among others


def test_config_round_trip(tmp_path):
    arguments = {
        "filepath": str(tmp_path / "best.weights.h5"),
        "monitor": "val_loss",
        "mode": "min",
        "min_delta": 0.5,
        "save_weights_only": True,
        "restore_best_weights": True,
        "resume": False,
        "verbose": 1,
    }
    callback = BestCheckpoint(**arguments)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(callback))
    assert isinstance(again, BestCheckpoint)
    assert again.get_config() == arguments


def test_deep_copies_before_training_are_independent(tmp_path):
    original = BestCheckpoint(tmp_path / "best.keras", "val_loss")
    copied = copy.deepcopy(original)
    fit(make_model(), copied)
    assert copied.best is not None
    assert original.best is None


def test_messages_count_epochs_from_one_and_only_when_asked(tmp_path, capsys):
    drive(BestCheckpoint(tmp_path / "a.keras"), make_model(), 0.5, 0.4)
    assert capsys.readouterr().out == ""
    drive(
        BestCheckpoint(tmp_path / "b.keras", verbose=1, restore_best_weights=True),
        make_model(),
        *[0.5, 0.4],
    )
    out = capsys.readouterr().out
    assert "Epoch 1: val_accuracy = 0.5; saved" in out
    assert "Epoch 2: val_accuracy = 0.4 is not better than 0.5" in out
    assert "Restored the weights of epoch 1" in out


# Killed processes

# Keras is imported once; each run is a process of its own, forked before anything is computed.
RUNS = """
import os, signal, sys
import keras, numpy as np
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint

folder = sys.argv[1]
filepath = os.path.join(folder, "best.keras")

class Note(keras.callbacks.Callback):
    def __init__(self, name):
        super().__init__()
        self.name = name
    def on_epoch_end(self, epoch, logs=None):
        with open(os.path.join(folder, self.name), "a") as file:
            file.write(f"{logs['val_loss']!r}\\n")

def die_at_replacement(number):
    replace, replaced = os.replace, []
    def replace_or_die(*paths):
        replaced.append(paths)
        if len(replaced) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = replace_or_die

def train():
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    y = (x @ np.array([1.0, -2.0, 0.5], "float32"))[:, None]
    if os.path.exists(filepath):
        model = keras.models.load_model(filepath)
    else:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(x, y, validation_data=(x, y), epochs=10**6, verbose=0,
              callbacks=[Note("seen"), BestCheckpoint(filepath, "val_loss"), Note("saved")])

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            if int(line):
                die_at_replacement(int(line))
            train()
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Killed:
    """Training processes that are killed, and what they leave."""

    def __init__(self, folder):
        self.checkpoint = folder / "checkpoint"
        self.filepath = self.checkpoint / "best.keras"
        self.x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
        self.y = (self.x @ np.array([1.0, -2.0, 0.5], "float32"))[:, None]
        self.checkpoint.mkdir()

    def values(self, name):
        path = self.checkpoint / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [float(line) for line in lines if line.endswith("\n")]

    def __enter__(self):
        self.runs = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RUNS, str(self.checkpoint)],
            cwd=Path(best_checkpoint.__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.runs.communicate()

    def run(self, kill_at=0, kill_after=None):
        for name in ("seen", "saved"):
            (self.checkpoint / name).unlink(missing_ok=True)
        print(kill_at, file=self.runs.stdin, flush=True)
        pid = int(self.runs.stdout.readline())
        if kill_after is not None:
            while not self.values("saved") and Path(f"/proc/{pid}").exists():
                time.sleep(0.01)
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        status = int(self.runs.stdout.readline())
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL

    def evaluate(self):
        assert zipfile.is_zipfile(self.filepath)
        model = keras.models.load_model(self.filepath)
        return model, model.evaluate(self.x, self.y, verbose=0)

    def start_again(self):
        """What the next start finds and makes good, up to the first step of training."""
        model, _ = self.evaluate()
        callback = BestCheckpoint(self.filepath, "val_loss")
        callback.set_model(model)
        callback.on_train_begin()
        return callback

    def files(self):
        return [name for name in names(self.checkpoint) if name not in ("seen", "saved")]


def check_after_kill(killed, best_before):
    seen, saved = killed.values("seen"), killed.values("saved")
    assert len(seen) - len(saved) in (0, 1)
    _, evaluated = killed.evaluate()  # loads as it is, before anything is made good
    callback = killed.start_again()
    record = read_json(killed.filepath)
    assert evaluated == pytest.approx(record["best"], rel=1e-5)
    assert record["best"] == callback.best
    # The best of all epochs that are over, and perhaps of the one in which it was killed.
    assert record["best"] in (min([best_before, *saved]), min([best_before, *seen]))
    assert record["best"] <= best_before
    assert killed.files() == ["best.keras", "best.keras.json"]
    return record["best"]


def kill_at_random(folder, times):
    best, bests = math.inf, []
    moments = random.Random(0)  # noqa: S311 - moments to kill at are no secret
    with Killed(folder) as killed:
        for _ in range(times):
            killed.run(kill_after=moments.uniform(0.0, 0.5))
            best = check_after_kill(killed, best)
            bests.append(best)
    assert bests[-1] < bests[0]  # they did go on


ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="processes that are killed while they write files: the backend makes no difference",
)


@ON_TENSORFLOW
def test_killed_at_random(tmp_path):
    kill_at_random(tmp_path, times=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_many_times(tmp_path):
    kill_at_random(tmp_path, times=30)


@ON_TENSORFLOW
def test_killed_before_and_between_the_two_replacements(tmp_path):
    with Killed(tmp_path) as killed:
        killed.run(kill_at=5)  # two saves are complete; the third model and record are written
        assert len(killed.files()) == 4
        assert read_json(killed.filepath)["best"] == killed.values("saved")[1]
        best = check_after_kill(killed, math.inf)
        assert best == killed.values("saved")[1] > killed.values("seen")[2]

        killed.run(kill_at=4)  # one save is complete; of the second the model is in place
        assert len(killed.files()) == 3
        stale = read_json(killed.filepath)["best"]
        best_between = check_after_kill(killed, best)
        assert best_between == killed.values("seen")[1] < stale < best


def test_killed_between_the_replacements_of_the_very_first_save(tmp_path, monkeypatch):
    filepath, replace = tmp_path / "best.keras", os.replace

    class Killed(BaseException):
        pass

    def replace_the_model_only(source, target):
        if str(target).endswith(".json"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_the_model_only)
    with pytest.raises(Killed):
        drive(BestCheckpoint(filepath), make_model(), 0.5)
    monkeypatch.undo()
    assert not Path(f"{filepath}.json").exists()
    callback = BestCheckpoint(filepath)
    callback.set_model(make_model())
    callback.on_train_begin()
    assert (callback.best, read_json(filepath)["best"]) == (0.5, 0.5)
    assert names(tmp_path) == ["best.keras", "best.keras.json"]
