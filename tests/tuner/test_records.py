"""The tables of a search, of histories that are made up."""

import json
import math

import keras
import keras_tuner
import numpy as np
import pytest

from keras_xfer.tuner import records

VAL_LOSS = keras_tuner.Objective("val_loss", "min")


def history(epochs=(0, 1, 2), **logs):
    made = keras.callbacks.History()
    made.on_train_begin()
    made.epoch, made.history = list(epochs), {name: list(each) for name, each in logs.items()}
    return made


def trial(trial_id, status="COMPLETED", *, score=None, message=None, **values):
    hp = keras_tuner.HyperParameters()
    kind = hp.Choice("kind", ["a", "b"])
    with hp.conditional_scope("kind", ["b"]):
        hp.Float("rate", 0.0, 1.0)
    hp.values = {"kind": kind, **values}
    made = keras_tuner.engine.trial.Trial(hp, trial_id, status)
    made.score, made.message = score, message
    return made


def succeed(project, made, *results, objective=VAL_LOSS, seconds=2.0):
    folder = project / f"trial_{made.trial_id}"
    folder.mkdir(exist_ok=True)
    records.write_success(folder, made, objective, list(results), seconds)
    return json.loads((folder / "outcome.json").read_text())


def test_the_best_epoch_and_the_stage(tmp_path):
    done = history(val_loss=[0.5, np.float32(0.25), 0.75], stage=[0, 1, 1])
    outcome = succeed(tmp_path, trial("0"), done)
    assert outcome["score"] == 0.25
    assert outcome["best_epoch"] == 1
    assert outcome["epochs"] == 3
    assert (outcome["status"], outcome["stage"], outcome["error"]) == (
        "completed",
        "fine-tuning",
        "",
    )
    accuracy = keras_tuner.Objective("val_loss", "max")
    assert succeed(tmp_path, trial("0"), done, objective=accuracy)["best_epoch"] == 2


def test_epochs_are_those_of_the_whole_schedule(tmp_path):
    later = history([4, 5], val_loss=[0.5, 0.25], stage=[0, 0])
    outcome = succeed(tmp_path, trial("0"), later)
    assert (outcome["best_epoch"], outcome["epochs"], outcome["stage"]) == (5, 2, "head")
    table = records.epochs_table(tmp_path, {"0": trial("0")})
    assert table.to_dict("list") == {
        "trial": ["0"] * 2,
        "execution": [0, 0],
        "epoch": [4, 5],
        "val_loss": [0.5, 0.25],
        "stage": [0, 0],
    }


def test_executions_are_averaged(tmp_path):
    first, second = history(val_loss=[0.5, 0.2, 0.9]), history(val_loss=[0.6, 0.8, 0.9])
    outcome = succeed(tmp_path, trial("0"), first, second)
    assert outcome["score"] == pytest.approx(0.4)
    assert outcome["best_epoch"] is None
    assert outcome["epochs"] == 3
    table = records.epochs_table(tmp_path, {"0": trial("0")})
    assert table["execution"].tolist() == [0] * 3 + [1] * 3
    assert table["val_loss"].tolist() == [0.5, 0.2, 0.9, 0.6, 0.8, 0.9]


def test_epochs_that_are_no_number_are_passed_over(tmp_path):
    outcome = succeed(tmp_path, trial("0"), history(val_loss=[0.5, 0.25, math.nan]))
    assert (outcome["score"], outcome["best_epoch"]) == (0.25, 1)


def test_a_metric_that_is_a_vector(tmp_path):
    """The mean over its classes, as KerasTuner writes it."""
    f1 = [np.array([0.25, 0.75]), np.array([0.0, 0.5])]
    succeed(tmp_path, trial("0"), history([0, 1], val_loss=[0.5, 0.25], val_f1=f1))
    table = records.epochs_table(tmp_path, {"0": trial("0")})
    assert table["val_f1"].tolist() == [0.5, 0.25]


def test_no_number_at_all_is_a_failure(tmp_path):
    outcome = succeed(tmp_path, trial("0", "FAILED"), history(val_loss=[math.nan] * 3))
    assert outcome["status"] == "failed"
    assert outcome["score"] == "NaN"  # JSON has none
    assert "not a number" in outcome["error"]
    assert records.outcomes(tmp_path)[0]["score"] != records.outcomes(tmp_path)[0]["score"]


def test_several_objectives(tmp_path):
    goals = [VAL_LOSS, keras_tuner.Objective("val_accuracy", "max")]
    both = keras_tuner.Oracle(goals).objective
    done = history(val_loss=[0.5, 0.4, 0.3], val_accuracy=[0.5, 0.9, 0.6])
    outcome = succeed(tmp_path, trial("0"), done, objective=both)
    assert (outcome["score"], outcome["best_epoch"]) == (pytest.approx(-0.5), 1)


def test_a_candidate_is_a_row_with_all_of_its_rounds(tmp_path):
    trials = {
        "0": trial("0", kind="b", rate=0.25),
        "1": trial("1", kind="a"),
        "2": trial("2", kind="b", rate=0.25, **{"tuner/trial_id": "0", "tuner/round": 1}),
        "3": trial("3", kind="b", rate=0.25, **{"tuner/trial_id": "2", "tuner/round": 2}),
    }
    succeed(tmp_path, trials["0"], history([0, 1], val_loss=[0.9, 0.8], stage=[0, 0]), seconds=1)
    succeed(tmp_path, trials["1"], history([0, 1], val_loss=[0.95, 0.99], stage=[0, 0]), seconds=2)
    succeed(tmp_path, trials["2"], history([2], val_loss=[0.5], stage=[0]), seconds=4)
    succeed(tmp_path, trials["3"], history([3, 4], val_loss=[0.7, 0.6], stage=[1, 1]), seconds=8)
    table = records.trials_table(tmp_path, trials, VAL_LOSS)
    assert table["trial"].tolist() == ["0", "1"]
    assert table["stage"].tolist() == ["fine-tuning", "head"]
    assert table["score"].tolist() == [0.5, 0.95]
    assert table["best_epoch"].tolist() == [2, 0]
    assert table["epochs"].tolist() == [5, 2]
    assert table["seconds"].tolist() == [13.0, 2.0]
    assert table["hp.kind"].tolist() == ["b", "a"]
    assert table["hp.rate"].tolist()[0] == 0.25
    assert math.isnan(table["hp.rate"][1])  # it does not act
    assert [name for name in table.columns if "tuner/" in name] == []
    epochs = records.epochs_table(tmp_path, trials)
    assert epochs["trial"].tolist() == ["0"] * 5 + ["1"] * 2
    assert epochs["epoch"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert epochs["val_loss"].tolist() == [0.9, 0.8, 0.5, 0.7, 0.6, 0.95, 0.99]


def test_failed_interrupted_and_unrecorded_trials(tmp_path):
    trials = {
        "0": trial("0", "FAILED"),
        "1": trial("1", "RUNNING"),
        "2": trial("2", "FAILED", message="Traceback: the worker died"),
        "3": trial("3", score=0.5),
        "4": trial("4", "RUNNING"),
    }
    for name in trials:
        (tmp_path / f"trial_{name}").mkdir()
    records.write_failure(tmp_path / "trial_0", trials["0"], 3.0, "Traceback\nValueError: no\n")
    # Killed after it was written, before the oracle was told: it is run again.
    succeed(tmp_path, trials["4"], history(val_loss=[0.1, 0.1, 0.1]))
    table = records.trials_table(tmp_path, trials, VAL_LOSS)
    assert table["status"].tolist() == [
        "failed",
        "interrupted",
        "failed",
        "completed",
        "interrupted",
    ]
    assert table["error"].tolist() == [
        "Traceback\nValueError: no\n",
        "",
        "Traceback: the worker died",
        "",
        "",
    ]
    assert table["seconds"].tolist()[:2] == [3.0, 0.0]
    assert table["score"].tolist()[3] == 0.5
    assert table["score"].isna().tolist() == [True, True, True, False, True]


def test_a_failure_after_a_good_round_keeps_its_score(tmp_path):
    trials = {
        "0": trial("0"),
        "1": trial("1", "FAILED", **{"tuner/trial_id": "0", "tuner/round": 1}),
    }
    succeed(tmp_path, trials["0"], history(val_loss=[0.9, 0.8, 0.7], stage=[0, 0, 0]))
    (tmp_path / "trial_1").mkdir()
    records.write_failure(tmp_path / "trial_1", trials["1"], 5.0, "Traceback\nMemoryError\n")
    (row,) = records.trials_table(tmp_path, trials, VAL_LOSS).to_dict("records")
    assert (row["status"], row["stage"], row["score"], row["best_epoch"]) == (
        "completed",
        "head",
        0.7,
        2,
    )
    # What failed is told beside it.
    assert row["error"] == "Traceback\nMemoryError\n"
    assert row["seconds"] == 7.0


def test_no_trials(tmp_path):
    assert len(records.trials_table(tmp_path, {}, VAL_LOSS)) == 0
    assert len(records.epochs_table(tmp_path, {})) == 0
    assert records.outcomes(tmp_path) == []
