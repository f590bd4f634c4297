"""A search's files: complete at any moment, and put right where they were cut off between two."""

import errno
import json
import math
import os
import shutil
import threading

import keras
import keras_tuner
import numpy as np
import pytest

from keras_xfer.tuner import DurableTuner, FunnelOracle, durable
from keras_xfer.tuner.durable import GRACE_SECONDS
from tests.tuner import hypermodels
from tests.tuner.hypermodels import Watching

oracles = keras_tuner.oracles


class Killed(BaseException):
    """In place of SIGKILL: nothing is tidied up after it."""


def make(folder, kind=oracles.RandomSearchOracle, **kwargs):
    """A durable oracle over a number, which goes on with what is in the folder."""
    hp = keras_tuner.HyperParameters()
    hp.Choice("x", [1.0, 2.0, 3.0, 4.0, 5.0])
    if kind is FunnelOracle:
        kwargs = {"max_trials": 4, "finalists": 1, "head_epochs": 1, **kwargs}
        oracle = FunnelOracle("val_loss", seed=1, hyperparameters=hp, **kwargs)
    else:
        kwargs = {"hyperparameters": hp, "seed": 1, **kwargs}
        if kind is not oracles.HyperbandOracle:
            kwargs = {"max_trials": 4, **kwargs}
        oracle = durable(kind)(objective="val_loss", **kwargs)
    oracle.verbose = 0
    oracle._set_project_dir(str(folder), "search")
    if (folder / "search" / "oracle.json").exists():
        oracle.reload()
    return oracle


def run(oracle, worker="tuner0", *, score=None):
    """A trial from its beginning to its end; its id, or None where there is none."""
    trial = oracle.create_trial(worker)
    if trial.status != "RUNNING":
        assert trial.status == "STOPPED"
        return None
    oracle.update_trial(trial.trial_id, {"val_loss": trial.hyperparameters.get("x")})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)
    return trial.trial_id


def run_all(oracle):
    return list(iter(lambda: run(oracle), None))


def table(oracle):
    return {
        name: (trial.status, trial.score, trial.hyperparameters.values)
        for name, trial in sorted(oracle.trials.items())
    }


KINDS = [
    oracles.RandomSearchOracle,
    oracles.BayesianOptimizationOracle,
    oracles.GridSearchOracle,
    oracles.HyperbandOracle,
    FunnelOracle,
]


def options(kind):
    if kind is oracles.HyperbandOracle:
        return {"max_epochs": 3, "factor": 2}
    if kind is oracles.BayesianOptimizationOracle:
        return {"max_trials": 3, "num_initial_points": 2}
    return {}


# --- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_write(tmp_path, monkeypatch, kind):
    """Before and after each move of a new file into place a process dies; the next goes on from
    that. Each trial ends once, none is lost, and the oracle draws what it draws undisturbed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    undisturbed = make(tmp_path / "undisturbed", kind, **options(kind))
    run_all(undisturbed)
    replace, moves = os.replace, []

    def count(source, target):
        moves.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", count)
    run_all(make(tmp_path / "counted", kind, **options(kind)))
    differing = []
    # A Gaussian process takes half a second for a trial.
    for moment in range(0, len(moves), 4 if kind is oracles.BayesianOptimizationOracle else 1):
        for after in (False, True):
            folder = tmp_path / f"{moment} {after}"
            left = [moment]

            def dies(source, target, left=left, after=after):
                left[0] -= 1
                if left[0] == -1 and not after:
                    raise Killed
                replace(source, target)
                if left[0] == -1:
                    raise Killed

            monkeypatch.setattr(os, "replace", dies)
            with pytest.raises(Killed):
                run_all(make(folder, kind, **options(kind)))
            monkeypatch.setattr(os, "replace", replace)
            for path in (folder / "search").rglob("[!.]*.json"):
                json.loads(path.read_text())
            ended = {
                path.parent.name: path.read_text()
                for path in (folder / "search").glob("trial_*/trial.json")
                if json.loads(path.read_text())["status"] == "COMPLETED"
            }
            resumed = make(folder, kind, **options(kind))
            run_all(resumed)
            for name, text in ended.items():  # not touched again
                assert (folder / "search" / name / "trial.json").read_text() == text
            assert sorted(resumed.end_order) == sorted(set(resumed.end_order))
            if table(resumed) != table(undisturbed):
                differing.append((moment, after))
    assert not differing


def test_killed_while_it_writes(tmp_path, monkeypatch):
    oracle = make(tmp_path)
    run(oracle)
    before = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    write = type(tmp_path).write_text

    def half(self, text, **kwargs):
        write(self, text[: len(text) // 2], **kwargs)
        raise Killed

    monkeypatch.setattr(type(tmp_path), "write_text", half)
    with pytest.raises(Killed):
        oracle.save()
    monkeypatch.undo()
    assert {path: path.read_text() for path in tmp_path.rglob("[!.]*.json")} == before
    assert len(run_all(make(tmp_path))) == 3


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_number_that_is_none_is_kept(tmp_path):
    oracle = make(tmp_path, max_trials=1)
    trial = oracle.create_trial("tuner0")
    trial.metrics.register("loss", "min")
    trial.metrics.update("loss", math.nan)
    oracle._save_trial(trial)
    reloaded = make(tmp_path)
    assert math.isnan(reloaded.trials[trial.trial_id].metrics.get_last_value("loss"))


# --- Trials that were cut off ----------------------------------------------------------------


def test_a_trial_that_was_cut_off_after_it_told_its_metrics_is_scored_anew(tmp_path):
    first = make(tmp_path)
    trial = first.create_trial("tuner0")
    first.update_trial(trial.trial_id, {"val_loss": 0.1})
    second = make(tmp_path)
    again = second.create_trial("tuner0")
    assert again.trial_id == trial.trial_id
    # KerasTuner takes metrics that are there for those of this run, and warns.
    assert not again.metrics.exists("val_loss")
    second.update_trial(again.trial_id, {"val_loss": 0.5})
    again.status = "COMPLETED"
    second.end_trial(again)
    assert second.trials[trial.trial_id].score == 0.5


def test_a_trial_that_is_tried_again_is_scored_by_its_last_attempt(tmp_path):
    oracle = make(tmp_path, max_retries_per_trial=1)
    trial = oracle.create_trial("tuner0")
    oracle.update_trial(trial.trial_id, {"val_loss": 0.1})
    trial.status = "INVALID"
    oracle.end_trial(trial)
    again = oracle.create_trial("tuner0")
    assert again.trial_id == trial.trial_id
    oracle.update_trial(trial.trial_id, {"val_loss": 0.5})
    again.status = "COMPLETED"
    oracle.end_trial(again)
    assert oracle.trials[trial.trial_id].score == 0.5


def test_the_chief_keeps_what_a_worker_told_before_it_was_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    first = make(tmp_path)
    trial = first.create_trial("tuner0")
    first.update_trial(trial.trial_id, {"val_loss": 0.1})
    second = make(tmp_path)  # the worker is at it still, and has told its metrics
    trial.status = "COMPLETED"
    second.end_trial(trial)
    assert second.trials[trial.trial_id].score == 0.1
    assert run(second, "tuner0") != trial.trial_id


@pytest.fixture
def back(tmp_path, monkeypatch):
    """A chief that went while `tuner0` was at trial 0, and what it is when it is back."""
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    assert make(tmp_path, max_trials=1).create_trial("tuner0").trial_id == "0"
    return lambda **kwargs: make(tmp_path, **{"max_trials": 1, **kwargs})


def test_the_chief_gives_no_trial_away_whose_worker_lives(back, later):
    oracle = back()
    later(1000)  # until it listens
    assert oracle.create_trial("tuner1").status == "IDLE"
    for _ in range(5):
        later(GRACE_SECONDS - 1)
        oracle.get_trial("0")  # as workers do while they train
        assert oracle.create_trial("tuner1").status == "IDLE"
    later(GRACE_SECONDS - 1)
    assert oracle.create_trial("tuner1").status == "IDLE"
    later(2)  # now it is silent
    trial = oracle.create_trial("tuner1")
    assert (trial.status, trial.trial_id) == ("RUNNING", "0")
    assert oracle.ongoing_trials == {"tuner1": trial}


def test_nor_one_that_comes_back_twice(back):
    assert back(max_trials=3).create_trial("tuner1").trial_id == "1"
    oracle = back(max_trials=3)
    assert oracle.create_trial("tuner2").trial_id == "2"
    assert oracle.create_trial("tuner3").status == "IDLE"
    assert [oracle.create_trial(f"tuner{n}").trial_id for n in (0, 1)] == ["0", "1"]


def test_what_comes_after_the_end_of_a_trial_changes_nothing(tmp_path):
    oracle = make(tmp_path)
    trial_id = run(oracle)
    before = table(oracle)
    late = keras_tuner.engine.trial.Trial(oracle.get_space(), trial_id, "FAILED", "too late")
    oracle.update_trial(trial_id, {"val_loss": -1.0}, step=7)
    oracle.end_trial(late)
    assert table(oracle) == table(make(tmp_path)) == before
    assert oracle.trials[trial_id].metrics.get_best_value("val_loss") == before[trial_id][1]


@pytest.mark.parametrize("what", ["create_trial", "update_trial", "end_trial"])
def test_an_error_leaves_the_oracle_to_others(tmp_path, monkeypatch, what):
    oracle = make(tmp_path)
    trial = oracle.create_trial("tuner0")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(oracle, "_save_trial", full)
    arguments = {"create_trial": ["tuner1"], "update_trial": ["0", {"val_loss": 1.0}]}
    with pytest.raises(OSError, match="No space left"):
        getattr(oracle, what)(*arguments.get(what, [trial]))
    monkeypatch.undo()
    # As KerasTuner's server does, in a thread of another name.
    other = threading.Thread(target=oracle.create_trial, args=["tuner2"], daemon=True)
    other.start()
    other.join(10)
    assert "tuner2" in oracle.ongoing_trials


def test_a_trial_whose_end_the_oracle_has_not_heard_of(tmp_path):
    """`trial.json` is written before `oracle.json`."""
    first = make(tmp_path)
    run(first)
    before = (tmp_path / "search" / "oracle.json").read_text()
    run(first)
    (tmp_path / "search" / "oracle.json").write_text(
        json.dumps({**json.loads((tmp_path / "search" / "oracle.json").read_text()),
                    "end_order": ["0"], "ongoing_trials": {"tuner0": "1"}})
    )  # fmt: skip
    second = make(tmp_path)
    assert second.end_order == ["0", "1"]
    assert run_all(second) == ["2", "3"]
    # And one that begins: its folder is there, the oracle knows nothing of it.
    shutil.rmtree(tmp_path / "search" / "trial_2")
    shutil.rmtree(tmp_path / "search" / "trial_3")
    shutil.copytree(tmp_path / "search" / "trial_1", tmp_path / "search" / "trial_2")
    text = (tmp_path / "search" / "trial_2" / "trial.json").read_text()
    (tmp_path / "search" / "trial_2" / "trial.json").write_text(
        text.replace('"1"', '"2"').replace("COMPLETED", "RUNNING")
    )
    (tmp_path / "search" / "oracle.json").write_text(before)
    shutil.rmtree(tmp_path / "search" / "trial_1")
    third = make(tmp_path)
    assert sorted(third.trials) == ["0"]
    assert run_all(third) == ["1", "2", "3"]


def test_a_trial_that_the_oracle_holds_for_over_and_its_file_does_not(tmp_path):
    """The other way round, as a file system that was restored from a copy may leave it."""
    first = make(tmp_path)
    trial = first.create_trial("tuner0")
    before = (tmp_path / "search" / "trial_0" / "trial.json").read_text()
    first.update_trial(trial.trial_id, {"val_loss": 0.1})
    trial.status = "COMPLETED"
    first.end_trial(trial)
    (tmp_path / "search" / "trial_0" / "trial.json").write_text(before)
    second = make(tmp_path)
    assert run_all(second) == ["0", "1", "2", "3"]
    assert sorted(second.end_order) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", KINDS)
def test_failures_do_not_end_it(tmp_path, kind):
    oracle = make(tmp_path, kind, **options(kind))
    failed = 0
    while (trial := oracle.create_trial("tuner0")).status == "RUNNING":
        trial.status, trial.message = "INVALID", "made up"
        oracle.end_trial(trial)
        failed += 1
    assert failed >= 3
    again = make(tmp_path, kind, **options(kind))
    assert {trial.status for trial in again.trials.values()} == {"FAILED"}
    assert again.create_trial("tuner0").status == "STOPPED"


def test_failures_end_it_where_that_is_asked(tmp_path):
    oracle = make(tmp_path, max_consecutive_failed_trials=2)
    for failure in range(2):
        trial = oracle.create_trial("tuner0")
        trial.status = "INVALID"
        if failure == 0:
            oracle.end_trial(trial)
    with pytest.raises(RuntimeError, match="consecutive failures"):
        oracle.end_trial(trial)


# --- The tuner -------------------------------------------------------------------------------

SPACE = {**hypermodels.FIXED, "learning_rate": [0.003, 0.01, 0.03], "head_epochs": 1}


def tuner(folder, kind=oracles.RandomSearchOracle, *, made=None, objective="val_loss", **kwargs):
    options = {"max_trials": 3}
    if kind is oracles.HyperbandOracle:
        options = {"max_epochs": 3, "factor": 2}
    if kind is oracles.BayesianOptimizationOracle:
        options = {"max_trials": 3, "num_initial_points": 2}
    oracle = durable(kind)(objective=objective, seed=1, **options)
    made = made or hypermodels.hypermodel(space=SPACE, max_stages=1)
    return DurableTuner(oracle, made, directory=folder, seed=1, **kwargs)


def search(made, callbacks=(), **kwargs):
    x, y = hypermodels.data(32)
    made.search(
        x[:16], y[:16], validation_data=(x[16:], y[16:]), batch_size=8, verbose=0,
        callbacks=list(callbacks), **{"epochs": 2, "shuffle": False, **kwargs},
    )  # fmt: skip
    return made


class StopsAt(keras.callbacks.Callback):
    """The process dies in an epoch, counted over all trials."""

    def __init__(self, after, count=None):
        super().__init__()
        self.after, self.count = after, [0] if count is None else count

    def __deepcopy__(self, memo):
        return StopsAt(self.after, self.count)

    def on_epoch_end(self, epoch, logs=None):
        self.count[0] += 1
        if self.count[0] == self.after:
            raise Killed


@pytest.mark.parametrize(
    "kind",
    [
        oracles.BayesianOptimizationOracle,
        pytest.param(oracles.RandomSearchOracle, marks=pytest.mark.slow),
        pytest.param(oracles.GridSearchOracle, marks=pytest.mark.slow),
        pytest.param(oracles.HyperbandOracle, marks=pytest.mark.slow),
    ],
)
def test_every_oracle_goes_on_as_if_it_had_never_stopped(tmp_path, kind):
    whole = search(tuner(tmp_path / "whole", kind))
    with pytest.raises(Killed):
        search(tuner(tmp_path / "killed", kind), [StopsAt(4)])
    assert len(tuner(tmp_path / "killed", kind).oracle.end_order) >= 1
    resumed = search(tuner(tmp_path / "killed", kind))
    assert table(resumed.oracle) == table(whole.oracle)
    assert len(whole.oracle.trials) >= 3
    best = [made.get_best_models(2) for made in (whole, resumed)]
    for one, other in zip(*best, strict=True):
        hypermodels.assert_same(one.get_weights(), other.get_weights())


def test_the_best_models_are_those_of_the_best_scores(tmp_path):
    watching = Watching()
    made = search(tuner(tmp_path), [watching])
    trials = made.oracle.get_best_trials(3)
    scores = [trial.score for trial in trials]
    assert scores == sorted(scores)
    x, y = hypermodels.data(32)
    for trial, model in zip(trials, made.get_best_models(3), strict=True):
        loss, _ = model.evaluate(x[16:], y[16:], verbose=0)
        assert loss == pytest.approx(trial.score, rel=1e-5)
        run = watching.runs[made.oracle.start_order.index(trial.trial_id)]
        epoch = min(run["logs"], key=lambda each: run["logs"][each]["val_loss"])
        hypermodels.assert_same(model.get_weights(), run["epochs"][epoch])


def test_more_trials_fail_in_a_row_than_keras_tuner_forgives(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise RuntimeError("made up")

    oracle = durable(oracles.RandomSearchOracle)(objective="val_loss", max_trials=5, seed=1)
    space = {**SPACE, "learning_rate": (0.001, 0.1)}
    made = DurableTuner(
        oracle, hypermodels.hypermodel(space=space, max_stages=1), directory=tmp_path
    )
    search(made, [Fails()])
    assert [trial.status for trial in made.oracle.trials.values()] == ["FAILED"] * 5
    for name in made.oracle.trials:
        outcome = json.loads((tmp_path / "search" / f"trial_{name}" / "outcome.json").read_text())
        assert outcome["status"] == "failed"
        assert outcome["error"].strip().endswith("RuntimeError: made up")


def test_executions_of_a_trial(tmp_path):
    watching = Watching()
    made = search(tuner(tmp_path, executions_per_trial=2), [watching])
    assert len(watching.runs) == 2 * 3
    for number, trial in enumerate(made.oracle.trials.values()):
        runs = watching.runs[2 * number : 2 * number + 2]
        best = [min(logs["val_loss"] for logs in run["logs"].values()) for run in runs]
        assert trial.score == pytest.approx(np.mean(best))
        rows = (tmp_path / "search" / f"trial_{trial.trial_id}" / "epochs.csv").read_text()
        assert len(rows.splitlines()) == 1 + 4


def test_told_after_each_trial(tmp_path):
    made, told = tuner(tmp_path), []
    made.after_each_trial = lambda: told.append(list(made.oracle.end_order))
    search(made)
    assert told == [["0"], ["0", "1"], ["0", "1", "2"]]


def test_a_seed_decides_a_trial_and_none_does_not(tmp_path):
    def weights(folder, seed):
        made = tuner(tmp_path / folder)
        made.seed = seed
        return search(made).get_best_models()[0].get_weights()

    first = weights("one", 5)
    assert hypermodels.differ(first, weights("two", 6))
    hypermodels.assert_same(first, weights("three", 5))


def test_what_a_killed_process_half_wrote_is_removed(tmp_path, monkeypatch):
    replace = os.replace

    def dies(source, target):
        if str(target).endswith("best_weights.zip"):
            shutil.copy(source, str(source).replace(str(os.getpid()), "999999999"))
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Killed):
        search(tuner(tmp_path))
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]
    search(tuner(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]


def test_overwriting_begins_anew(tmp_path):
    search(tuner(tmp_path))
    watching = Watching()
    made = search(tuner(tmp_path, overwrite=True), [watching])
    assert len(watching.runs) == len(made.oracle.trials) == 3


def test_a_worker_never_overwrites(tmp_path, monkeypatch):
    search(tuner(tmp_path))
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner4")
    with pytest.raises(ValueError, match="overwrite=False in a worker.*chief alone"):
        tuner(tmp_path, overwrite=True)
    assert len(list((tmp_path / "search").glob("trial_*"))) == 3


# --- A build that fails ----------------------------------------------------------------------


class Fails(keras_tuner.HyperModel):
    """A build that comes to its condition only where it fails before."""

    def __init__(self, error):
        super().__init__()
        self.error, self.builds = error, 0

    def declare_hyperparameters(self, hp):
        hp.Float("early", 0.0, 1.0)

    def build(self, hp):
        self.builds += 1
        kind = hp.Choice("kind", ["plain", "broken"])
        if kind == "broken":
            hp.Int("late", 1, 3)
            raise self.error
        with hp.conditional_scope("kind", ["broken"]):
            hp.Boolean("never")
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


def explored(folder, made):
    oracle = durable(oracles.RandomSearchOracle)(objective="val_loss", max_trials=2)
    DurableTuner(oracle, made, directory=folder)
    return [each.name for each in oracle.get_space().space]


def test_what_is_declared_where_a_build_fails(tmp_path):
    made = Fails(ValueError("broken"))
    assert explored(tmp_path, made) == ["early", "kind", "never", "late"]
    assert made.builds < 9  # it does not wait for a condition that no build comes to


@pytest.mark.parametrize("error", [KeyboardInterrupt(), keras_tuner.errors.FatalValueError("x")])
def test_what_ends_a_search_ends_it(tmp_path, error):
    with pytest.raises(type(error)):
        explored(tmp_path, Fails(error))
