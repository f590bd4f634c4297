"""`funnel_search` from its arguments to its files; which trials it runs is in
test_funnel_oracle.py."""

import json
import shutil
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pandas as pd
import pytest

from keras_xfer.bundle import read_bundle
from keras_xfer.features import FeatureCache
from keras_xfer.features.manifest import FORMAT
from keras_xfer.features.store import MARKER
from keras_xfer.files import write_json
from keras_xfer.retarget import capture
from keras_xfer.tuner import FunnelOracle, asked
from tests.callbacks.test_resuming import differing
from tests.tuner import hypermodels
from tests.tuner.hypermodels import Watching
from tests.tuner.killed_search import BATCH, PLAN, ROUNDS, SEED, SPACE, data, search

QUICK = {"max_trials": 2, "finalists": 1, "head_epochs": 1, "fine_tune_epochs": 1}
TRAIN, VALIDATION = data()


def trial_files(folder):
    """Each trial's trial.json by its id."""
    paths = sorted((folder / "search").glob("trial_*/trial.json"))
    states = [json.loads(path.read_text()) for path in paths]
    return {state["trial_id"]: state for state in states}


def values(state):
    return state["hyperparameters"]["values"]


def chain(trials, trial_id):
    """A trial and those that it goes on from, the first of them first, by their files."""
    parent = values(trials[trial_id]).get("tuner/trial_id")
    return [*(chain(trials, parent) if parent else []), trial_id]


def without_times(table):
    times = [name for name in table.columns if "second" in name or name.startswith("step_")]
    return table.drop(columns=times)


def same(one, other):
    """Whether two results are of the same trials with the same scores, to the bit."""
    pd.testing.assert_frame_equal(without_times(one.trials), without_times(other.trials))
    pd.testing.assert_frame_equal(without_times(one.epochs), without_times(other.epochs))
    assert one.best_score == other.best_score


class Counted:
    """How many rows went through an extraction."""

    def __init__(self, monkeypatch):
        self.rows = 0
        predict = keras.Model.predict_on_batch

        def counted(model, x):
            self.rows += len(keras.tree.flatten(x)[0])
            return predict(model, x)

        monkeypatch.setattr(keras.Model, "predict_on_batch", counted)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // BATCH)

    def __getitem__(self, index):
        rows = slice(BATCH * index, BATCH * (index + 1))
        return self.x[rows], self.y[rows]


def tf_data(x, y):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that ran through: its folder, its result, what it trained, rows it extracted."""
    folder = tmp_path_factory.mktemp("whole")
    watching = Watching()
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(monkeypatch)
        result = search(folder, callbacks=watching, shuffle=False)
    return folder, result, watching.runs, counted.rows


# --- What it does ----------------------------------------------------------------------------


def test_every_round_is_run_with_its_epochs(whole):
    folder, _, runs, _ = whole
    trials = trial_files(folder)
    numbers = [values(trial)["tuner/round"] for trial in trials.values()]
    assert numbers == [n for n, (count, _) in enumerate(ROUNDS) for _ in range(count)]
    begin = [0, *(epochs for _, epochs in ROUNDS)]
    assert [list(run["epochs"]) for run in runs] == [
        list(range(begin[n], ROUNDS[n][1])) for n in numbers
    ]


def test_the_best_of_each_round_go_on(whole):
    trials = trial_files(whole[0])
    scores = {
        trial_id: min(logs["val_loss"] for logs in run["logs"].values())
        for trial_id, run in zip(trials, whole[2], strict=True)
    }
    for number in (1, 2):
        earlier = [k for k, t in trials.items() if values(t)["tuner/round"] == number - 1]
        later = [values(t) for t in trials.values() if values(t)["tuner/round"] == number]
        expected = sorted(earlier, key=scores.get)[: ROUNDS[number][0]]
        assert [each["tuner/trial_id"] for each in later] == expected


def test_heads_train_on_features_that_are_computed_once(whole):
    _, _, runs, rows = whole
    once = len(TRAIN[0]) + len(VALIDATION[0])
    # And the first batch of each, which tells what the features are like.
    assert once <= rows <= once + 2 * 32
    assert len(runs) == 11


def finalist(whole, shuffle, callbacks=(), cache=None):
    """The trials of the best finalist, and one training of its schedule that was not split."""
    folder = whole[0]
    trials = trial_files(folder)
    last = min((t for t in trials if values(trials[t])["tuner/round"] == 2),
               key=lambda t: trials[t]["score"])  # fmt: skip
    line = chain(trials, last)
    assert len(line) == 3
    drawn = {k: v for k, v in values(trials[line[-1]]).items() if not k.startswith("tuner/")}
    hp = hypermodels.drawn(**drawn, head_epochs=4)
    keras.utils.set_random_seed(SEED + int(line[0]))
    keras.backend.clear_session()
    space = {**SPACE, "head_epochs": 4}
    made = hypermodels.hypermodel(space=space, cache=cache)
    model = made.build(hp)
    alone = Watching()
    made.fit(
        hp, model, *TRAIN, validation_data=VALIDATION, batch_size=BATCH, epochs=6, verbose=0,
        shuffle=shuffle, callbacks=[alone, *callbacks],
    )  # fmt: skip
    return line, model, alone.runs[0]


def test_a_finalist_goes_on_from_its_head_as_if_it_had_never_stopped(whole, tmp_path):
    folder, result, runs, _ = whole
    line, model, alone = finalist(whole, shuffle=False, cache=tmp_path / "cache")
    mine = [runs[list(trial_files(folder)).index(each)] for each in line]
    hypermodels.assert_same(mine[0]["begin"], alone["begin"])
    assert hypermodels.differ(alone["begin"], alone["epochs"][3])
    assert hypermodels.differ(alone["epochs"][3], alone["epochs"][4])
    for run in mine:
        for epoch, weights in run["epochs"].items():
            hypermodels.assert_same(weights, alone["epochs"][epoch])
            for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
                assert run["logs"][epoch][name] == alone["logs"][epoch][name]
    rows = result.epochs[result.epochs["trial"] == line[0]]
    assert rows["epoch"].tolist() == list(range(6))
    assert rows["stage"].tolist() == [0, 0, 0, 0, 1, 1]
    assert rows["val_loss"].tolist() == [alone["logs"][i]["val_loss"] for i in range(6)]
    # The optimizer with its slots, what trains, the seeds of the model.
    left = read_bundle(folder / "search" / f"trial_{line[-1]}" / "training_state.zip")["model"]
    expected = capture(model)
    left["variables"] = [  # nothing is written of what is as it came
        there if here is None else here
        for here, there in zip(left["variables"], expected["variables"], strict=True)
    ]
    assert not differing(left, expected)


def test_and_as_without_a_cache_to_rounding(whole):
    folder, _, runs, _ = whole
    line, _, alone = finalist(whole, shuffle=False)
    for each in line:
        run = runs[list(trial_files(folder)).index(each)]
        for epoch, weights in run["epochs"].items():
            hypermodels.assert_same(weights, alone["epochs"][epoch], atol=1e-5)


def test_and_goes_on_through_the_rows_in_the_same_order(tmp_path):
    watching = Watching()
    search(tmp_path, callbacks=watching)
    line, _, alone = finalist((tmp_path,), shuffle=True, cache=tmp_path / "cache")
    run = watching.runs[list(trial_files(tmp_path)).index(line[1])]
    hypermodels.assert_same(run["epochs"][3], alone["epochs"][3])


# --- What it leaves --------------------------------------------------------------------------


def test_the_best_model_is_what_the_best_score_says(whole):
    folder, result, _, _ = whole
    best = keras.saving.load_model(folder / "best_model.keras")
    loss, accuracy = best.evaluate(*VALIDATION, batch_size=BATCH, verbose=0)
    assert loss == pytest.approx(result.best_score, rel=1e-5)
    row = result.trials.loc[result.trials["score"].idxmin()]
    assert row["score"] == result.best_score
    epochs = result.epochs[result.epochs["trial"] == row["trial"]].set_index("epoch")
    assert epochs.loc[row["best_epoch"], "val_accuracy"] == pytest.approx(accuracy)
    hypermodels.assert_same(best.get_weights(), result.load_best_model().get_weights())
    drawn = result.best_hyperparameters.values
    assert drawn["learning_rate"] == row["hp.learning_rate"]
    assert not result.interrupted


def test_the_table_says_what_the_trials_did(whole):
    folder, result, _, _ = whole
    trials, table = trial_files(folder), result.trials
    lines = {name: [t for t in trials if chain(trials, t)[0] == name] for name in trials}
    first = [name for name, trial in trials.items() if values(trial)["tuner/round"] == 0]
    assert table["trial"].tolist() == first
    assert len(first) == PLAN["max_trials"]
    for row in table.itertuples():
        line = lines[row.trial]
        assert row.score == min(trials[each]["score"] for each in line)
        assert row.epochs == ROUNDS[len(line) - 1][1]
        assert row.stage == ("fine-tuning" if len(line) == 3 else "head")
        assert (row.status, row.objective, row.direction) == ("completed", "val_loss", "min")
        drawn = values(trials[row.trial])
        assert table.loc[row.Index, "hp.dropout"] == drawn["dropout"]
        assert table.loc[row.Index, "hp.learning_rate"] == drawn["learning_rate"]
        mine = result.epochs[result.epochs["trial"] == row.trial]
        assert mine["epoch"].tolist() == list(range(row.epochs))
        assert mine["val_loss"].min() == row.score
        assert mine["val_loss"].tolist()[row.best_epoch] == row.score
        assert row.seconds > mine["epoch_seconds"].sum() > 0
    assert {name for name in table.columns if name.startswith("hp.")} == {
        "hp.dropout",
        "hp.learning_rate",
    }


def test_the_files_are_the_tables(whole):
    folder, result, _, _ = whole
    types = {"trial": str, "best_epoch": "Int64"}
    read = pd.read_csv(folder / "trials.csv", dtype=types).assign(error="")
    pd.testing.assert_frame_equal(read, result.trials, check_dtype=False)
    epochs = pd.read_csv(folder / "trial_epochs.csv", dtype={"trial": str})
    pd.testing.assert_frame_equal(epochs, result.epochs, check_dtype=False)
    assert len(result.plot_objective().axes) == 1
    assert result.plot_parallel_coordinates().axes


def test_the_features_go_with_the_end_of_the_search(whole):
    assert not (whole[0] / "features").exists()
    assert not [path for path in whole[0].rglob("*") if ".tmp-" in path.name]


# --- Again -----------------------------------------------------------------------------------


def test_once_more_returns_at_once(whole, monkeypatch):
    folder, result, _, _ = whole
    watching, counted = Watching(), Counted(monkeypatch)
    before = {p: p.read_bytes() for p in (folder / "search").rglob("trial_*/*") if p.is_file()}
    again = search(folder, callbacks=watching, shuffle=False)
    assert (watching.runs, counted.rows) == ([], 0)
    same(again, result)
    pd.testing.assert_frame_equal(again.trials, result.trials)
    assert before == {p: p.read_bytes() for p in before}
    assert not (folder / "features").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_trials": 7}, "number of trials or epochs"),
        ({"finalists": 1}, "number of trials or epochs"),
        ({"head_epochs": 5}, "number of trials or epochs"),
        ({"fine_tune_epochs": 1}, "number of trials or epochs"),
        ({"factor": 4}, "number of trials or epochs"),
        ({"objective": "val_accuracy"}, "objective"),
        ({"objective": keras_tuner.Objective("val_loss", "max")}, "objective"),
        ({"seed": 4}, "seed"),
        ({"hypermodel": hypermodels.hypermodel(space={**SPACE, "dropout": 0.1})}, "space"),
        ({"x": TRAIN[0] + 1, "y": TRAIN[1]}, "x"),
        ({"x": TRAIN[0], "y": TRAIN[1][::-1]}, "y"),
        ({"validation_data": (VALIDATION[0], VALIDATION[1][::-1])}, "validation_data"),
        ({"class_weight": {0: 1.0, 1: 2.0, 2: 1.0}}, "class_weight"),
        ({"sample_weight": np.linspace(0, 1, 24)}, "sample_weight"),
        ({"batch_size": 4}, "batch_size"),
    ],
)
def test_another_search_does_not_go_on_with_this_one(whole, change, named):
    folder, *_ = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    made = change.get("hypermodel") or hypermodels.hypermodel(space=SPACE)
    with pytest.raises(ValueError, match=f"another.*{named}.*overwrite=True"):
        search(folder, **{"hypermodel": made, **change})
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert made.cache is None


def doubled(x, y):
    return Batches(np.concatenate([x, x]), np.concatenate([y, y]))


def larger(x, y):
    return Batches(np.repeat(x, 2, axis=1), y)


class Fingerprinted(Batches):
    """One that has looked at its files."""

    def __init__(self, x, y, name="then"):
        super().__init__(x, y)
        self.name = name

    def fingerprint(self):
        return self.name


def changed(x, y):
    return Fingerprinted(x, y, "now")


def fewer(x, y):
    return Fingerprinted(x[:8], y[:8])


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (Batches, doubled),
        (Batches, larger),
        (Fingerprinted, changed),
        (tf_data, lambda x, y: tf_data(x, y).take(2)),
        (tf_data, lambda x, y: tf_data(x.astype("float16"), y)),
    ],
)
def test_nor_with_that_of_other_data_in_batches(tmp_path, make, other):
    def run(train):
        # To be found by its files alone, it need not run.
        return search(tmp_path, **QUICK, x=train(*TRAIN), batch_size=None, callbacks=Interrupts(1))

    for _ in range(2):  # the same data, made once more
        with pytest.raises(KeyboardInterrupt):
            run(make)
    with pytest.raises(ValueError, match="another x.*overwrite=True"):
        run(other)


def test_nor_with_one_of_other_objectives(tmp_path):
    def run(*directions):
        goals = [keras_tuner.Objective(f"val_{n}", d) for n, d in directions]
        return search(tmp_path, **QUICK, objective=goals, callbacks=Interrupts(1))

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(("loss", "min"), ("accuracy", "max"))
    with pytest.raises(ValueError, match="another objective.*overwrite=True"):
        run(("loss", "min"), ("loss", "max"))


def test_a_worker_elsewhere_has_the_same_images_at_another_path(tmp_path, monkeypatch):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "oracle.json").write_text("{}")

    def told(data):
        return {"x": asked.of_data(data)}

    (tmp_path / "search.json").write_text(json.dumps(told(Fingerprinted(*TRAIN))))
    with pytest.raises(ValueError, match="another x"):
        asked.check_same(tmp_path, told(changed(*TRAIN)), overwrite=False)
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner1")
    asked.check_same(tmp_path, told(changed(*TRAIN)), overwrite=False)
    with pytest.raises(ValueError, match="another x"):
        asked.check_same(tmp_path, told(fewer(*TRAIN)), overwrite=False)


def test_nor_with_one_that_is_no_funnel(whole, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "oracle.json").write_bytes(
        (whole[0] / "search" / "oracle.json").read_bytes()
    )
    with pytest.raises(ValueError, match="another.*overwrite=True"):
        search(tmp_path)
    assert (tmp_path / "search" / "oracle.json").exists()


def test_begun_anew(tmp_path):
    first = search(tmp_path, **QUICK)
    watching = Watching()
    other = search(tmp_path, **{**QUICK, "max_trials": 3}, callbacks=watching, seed=8,
                   overwrite=True)  # fmt: skip
    assert len(watching.runs) == 4
    assert len(other.trials) == 3
    assert not set(first.trials["hp.learning_rate"]) & set(other.trials["hp.learning_rate"])
    assert len(trial_files(tmp_path)) == 4
    same(search(tmp_path, **{**QUICK, "max_trials": 3}, seed=8), other)


def test_killed_while_it_begins_anew(tmp_path, monkeypatch):
    """The old search is gone, or there is none; never the old one under the new one's name."""
    search(tmp_path, **QUICK)

    class Killed(BaseException):
        pass

    def dies(self, *args, **kwargs):
        raise Killed

    new = {**QUICK, "seed": 8}
    monkeypatch.setattr("keras_xfer.tuner.funnel.DurableTuner.__init__", dies)
    with pytest.raises(Killed):
        search(tmp_path, **new, overwrite=True)
    monkeypatch.undo()
    watching = Watching()
    search(tmp_path, **new, callbacks=watching)
    assert len(watching.runs) == 3


def test_killed_while_its_features_are_removed(whole, tmp_path, monkeypatch):
    """Half of them would be refused as no cache, and always."""
    folder = tmp_path / "search"
    shutil.copytree(whole[0], folder)
    (folder / "features" / "entry").mkdir(parents=True)
    write_json(folder / "features" / MARKER, {"format": FORMAT})

    class Killed(BaseException):
        pass

    def dies(path, **kwargs):
        for each in Path(path).glob(MARKER):
            each.unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(Killed):
        search(folder, shuffle=False)
    monkeypatch.undo()
    same(search(folder, shuffle=False), whole[1])
    assert not [path for path in folder.iterdir() if "features" in path.name]


# --- Ctrl-C ----------------------------------------------------------------------------------


class Interrupts(keras.callbacks.Callback):
    """Ctrl-C in an epoch, counted over all trials by its copies together."""

    def __init__(self, after, count=None):
        super().__init__()
        self.after, self.count = after, [0] if count is None else count

    def __deepcopy__(self, memo):
        return Interrupts(self.after, self.count)

    def on_epoch_end(self, epoch, logs=None):
        self.count[0] += 1
        if self.count[0] == self.after:
            raise KeyboardInterrupt


def test_interrupted_and_taken_up(whole, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):  # no trial was over
        search(tmp_path, callbacks=Interrupts(1), shuffle=False)
    assert not (tmp_path / "best_model.keras").exists()
    table = pd.read_csv(tmp_path / "trials.csv")
    assert table["status"].tolist() == ["interrupted"]
    counted = Counted(monkeypatch)
    result = search(tmp_path, callbacks=Interrupts(5), shuffle=False)  # in the third head
    assert result.interrupted
    assert result.trials["status"].tolist() == ["completed", "completed", "interrupted"]
    assert result.trials["epochs"].tolist() == [2, 2, 0]
    loss, _ = result.load_best_model().evaluate(*VALIDATION, verbose=0)
    assert loss == pytest.approx(result.best_score, rel=1e-5)
    assert result.best_score == result.trials["score"].min()
    assert (tmp_path / "features").exists()
    result = search(tmp_path, callbacks=Interrupts(9 + 3), shuffle=False)  # while it fine-tunes
    assert result.interrupted
    assert "fine-tuning" not in set(result.trials["stage"])
    last = search(tmp_path, shuffle=False)
    same(last, whole[1])
    assert not last.interrupted
    assert counted.rows == 0  # the features were there all the time
    assert not (tmp_path / "features").exists()


def test_interrupted_while_the_best_model_is_written(tmp_path, monkeypatch):
    save, interrupts = keras.Model.save, [KeyboardInterrupt]

    def interrupted(model, filepath, *args, **kwargs):
        if filepath.parent == tmp_path and interrupts:
            raise interrupts.pop()
        save(model, filepath, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "save", interrupted)
    result = search(tmp_path, **QUICK)
    assert result.interrupted
    loss, _ = result.load_best_model().evaluate(*VALIDATION, verbose=0)
    assert loss == pytest.approx(result.best_score, rel=1e-5)
    assert not (tmp_path / "features").exists()


# --- Failures --------------------------------------------------------------------------------


def chosen_head(**kinds):
    """A head that is one of several, by a hyperparameter; the first is the default."""

    def head(hp, features):
        kind = hp.Choice("kind", list(kinds))
        return keras.layers.Dense(3, activation="softmax")(kinds[kind](features))

    return hypermodels.hypermodel(space=SPACE, head=head)


def fails(features):
    raise ValueError(f"no head for {features.shape}")


def test_a_head_that_fails_is_recorded_and_the_search_goes_on(tmp_path):
    made = chosen_head(good=keras.layers.Dropout(0.1), bad=fails)
    result = search(tmp_path, hypermodel=made, **{**QUICK, "max_trials": 7})
    table = result.trials.set_index("trial")
    bad = table[table["hp.kind"] == "bad"]
    assert 4 <= len(bad) < 7  # more than KerasTuner forgives in a row, with this seed
    assert (bad["status"] == "failed").all()
    assert bad["score"].isna().all()
    for error in bad["error"]:
        assert error.startswith("Traceback (most recent call last)")
        assert "in fails" in error
        assert error.strip().endswith("ValueError: no head for (None, 6)")
    good = table[table["hp.kind"] == "good"]
    assert (good["status"] == "completed").all()
    assert (good["error"] == "").all()
    assert result.best_score == good["score"].min()
    assert good["stage"].tolist().count("fine-tuning") == 1
    read = pd.read_csv(tmp_path / "trials.csv")
    assert read.loc[read["hp.kind"] == "bad", "error"].tolist() == bad["error"].tolist()
    assert len(result.plot_objective().axes) == 1


def test_the_head_that_is_tried_first_fails(tmp_path):
    made = chosen_head(bad=fails, good=keras.layers.Dropout(0.1))
    result = search(tmp_path, hypermodel=made, **{**QUICK, "max_trials": 5})
    table = result.trials
    assert set(table.loc[table["hp.kind"] == "bad", "status"]) == {"failed"}
    assert set(table.loc[table["hp.kind"] == "good", "status"]) == {"completed"}


def broken(input_shape):
    raise OSError("no weights")


def test_the_backbone_that_is_tried_first_fails(tmp_path):
    made = hypermodels.hypermodel(
        backbones={"broken": broken, "tiny": hypermodels.tiny()},
        space={**SPACE, "backbone": ["broken", "tiny"], "stages": [1, 2]},
    )
    result = search(tmp_path / "one", hypermodel=made, **{**QUICK, "max_trials": 5})
    table = result.trials
    assert set(table.loc[table["hp.backbone"] == "broken", "status"]) == {"failed"}
    assert set(table.loc[table["hp.backbone"] == "tiny", "status"]) == {"completed"}
    made = hypermodels.hypermodel(backbones={"broken": broken}, space=SPACE)
    with pytest.raises(RuntimeError, match="2 that failed, the first by OSError: no weights"):
        search(tmp_path / "all", hypermodel=made, **QUICK)


class Raises(keras.callbacks.Callback):
    """Fails in an epoch of each trial."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise RuntimeError(f"failed in epoch {epoch}")


def test_all_finalists_fail_and_the_best_head_is_the_result(tmp_path):
    result = search(tmp_path, **QUICK, callbacks=[Raises(1)])
    failed = result.trials[result.trials["error"] != ""]
    assert failed["status"].tolist() == ["completed"]  # its head
    assert "RuntimeError: failed in epoch 1" in failed["error"].item()
    assert failed["score"].item() == result.best_score  # of its head
    loss, _ = result.load_best_model().evaluate(*VALIDATION, verbose=0)
    assert loss == pytest.approx(result.best_score, rel=1e-5)


def test_all_trials_fail(tmp_path):
    with pytest.raises(RuntimeError, match="2 that failed.*trials.csv(.|\n)*failed in epoch 0"):
        search(tmp_path, **QUICK, callbacks=[Raises(0)])
    table = pd.read_csv(tmp_path / "trials.csv")
    assert table["status"].tolist() == ["failed", "failed"]


def test_what_made_all_trials_fail_is_mended(tmp_path):
    with pytest.raises(RuntimeError) as raised:
        search(tmp_path, **QUICK, callbacks=[Raises(0)])
    first, *rest = str(raised.value).splitlines()
    assert "2 that failed, the first by RuntimeError: failed in epoch 0." in first
    assert "call again, which begins anew" in first
    assert rest[0].startswith("Traceback")
    result = search(tmp_path, **QUICK)
    assert set(result.trials["status"]) == {"completed"}
    assert len(trial_files(tmp_path)) == 3


def test_some_that_failed_are_not_tried_again(tmp_path):
    made = chosen_head(good=keras.layers.Dropout(0.1), bad=fails)
    search(tmp_path, hypermodel=made, **{**QUICK, "max_trials": 4})
    watching = Watching()
    made = chosen_head(good=keras.layers.Dropout(0.1), bad=keras.layers.Dropout(0.2))
    again = search(tmp_path, hypermodel=made, **{**QUICK, "max_trials": 4}, callbacks=watching)
    assert "failed" in set(again.trials["status"])
    assert not watching.runs


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_loss_that_is_not_a_number(tmp_path):
    made = chosen_head(good=lambda each: each, bad=lambda each: each * float("nan"))
    result = search(tmp_path, hypermodel=made, **{**QUICK, "max_trials": 5})
    table = result.trials
    bad, good = table[table["hp.kind"] == "bad"], table[table["hp.kind"] == "good"]
    assert len(bad)
    assert (bad["status"] == "failed").all()
    assert bad["score"].isna().all()
    assert bad["error"].str.contains("not a number").all()
    assert result.best_score == good["score"].min()


def test_an_objective_that_is_not_logged(tmp_path):
    """Own callbacks may log it, so the trials tell."""
    objective = keras_tuner.Objective("val_auc", "max")
    with pytest.raises(RuntimeError, match="val_auc"):
        search(tmp_path, **QUICK, objective=objective, callbacks=[Raises(9)])
    table = pd.read_csv(tmp_path / "trials.csv")
    assert (table["seconds"] > 0).all()


# --- What it is given ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Batches, tf_data])
def test_data_that_come_in_batches(tmp_path, make):
    expected = search(tmp_path / "arrays", **QUICK, shuffle=False)
    result = search(
        tmp_path / "batches", **QUICK, x=make(*TRAIN), validation_data=make(*VALIDATION),
        batch_size=None, shuffle=False,
    )  # fmt: skip
    mine, theirs = result.trials, expected.trials
    np.testing.assert_allclose(mine["score"], theirs["score"], rtol=1e-5)
    assert mine["stage"].tolist() == theirs["stage"].tolist()


def test_backbones_that_a_function_of_hp_returns_each_time(tmp_path):
    nets = {"a": hypermodels.tiny(), "b": hypermodels.tiny()}
    made = hypermodels.hypermodel(
        backbones=[lambda hp: nets[hp.Choice("net", list(nets))]], space=SPACE
    )
    watching = Watching()
    result = search(
        tmp_path, hypermodel=made, **{**QUICK, "finalists": 2}, callbacks=watching,
    )  # fmt: skip
    assert result.trials["error"].tolist() == [""] * 2
    assert set(result.trials["stage"]) == {"fine-tuning"}
    for run in watching.runs[:2]:
        hypermodels.assert_same(run["begin"][:8], nets["a"].get_weights())
    loss, _ = result.load_best_model().evaluate(*VALIDATION, verbose=0)
    assert loss == pytest.approx(result.best_score, rel=1e-5)
    for each in nets.values():
        hypermodels.assert_same(each.get_weights(), hypermodels.tiny().get_weights())


class Augmented(Batches):
    """Other images in every pass."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.default_rng().normal(size=x.shape), y


def test_data_that_differ_from_pass_to_pass_end_it_at_once(tmp_path):
    with pytest.raises(ValueError, match="pass to pass.*Augment inside the model"):
        search(tmp_path, **QUICK, x=Augmented(*TRAIN), batch_size=None)
    assert len(trial_files(tmp_path)) == 1


def test_a_metric_of_each_class_and_class_weights_of_one(tmp_path):
    made = hypermodels.hypermodel(
        label_mode="categorical",
        metrics=["accuracy", keras.metrics.F1Score(name="f1")],
        space=SPACE,
    )
    one_hot = np.eye(3, dtype="float32")
    result = search(
        tmp_path, hypermodel=made, **{**QUICK, "max_trials": 1}, x=TRAIN[0], y=one_hot[TRAIN[1]],
        class_weight={0: 3.0}, validation_data=(VALIDATION[0], one_hot[VALIDATION[1]]),
    )  # fmt: skip
    assert result.trials["error"].tolist() == [""]
    best = result.load_best_model()
    predicted = np.eye(3)[best.predict(VALIDATION[0], verbose=0).argmax(axis=1)]
    right = one_hot[VALIDATION[1]]
    both = 2 * (predicted * right).sum(axis=0)
    f1 = (both / (predicted.sum(axis=0) + right.sum(axis=0))).mean()
    row = result.trials.loc[result.trials["score"].idxmin()]
    rows = result.epochs[result.epochs["trial"] == row["trial"]].set_index("epoch")
    assert rows.loc[row["best_epoch"], "val_f1"] == pytest.approx(f1, abs=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"space": {"head_epochs": 3}}, {"space": None, "tune": ["head_epochs"]}]
)
def test_head_epochs_are_the_funnels_own(tmp_path, kwargs):
    with pytest.raises(ValueError, match="Expected head_epochs as an argument.*tune and space"):
        search(tmp_path, hypermodel=hypermodels.hypermodel(**kwargs), **QUICK)
    assert not list(tmp_path.iterdir())
    same = hypermodels.hypermodel(space={**SPACE, "head_epochs": QUICK["head_epochs"]})
    assert len(search(tmp_path, hypermodel=same, **QUICK).trials) == 2


def test_a_regression(tmp_path):
    made = hypermodels.hypermodel(1, space=SPACE, task="regression")
    validation = (VALIDATION[0], VALIDATION[1].astype("float32"))
    result = search(
        tmp_path, hypermodel=made, **QUICK, x=TRAIN[0], y=TRAIN[1].astype("float32"),
        validation_data=validation, objective=None,
    )  # fmt: skip
    assert set(result.trials["objective"]) == {"val_loss"}
    assert set(result.trials["direction"]) == {"min"}
    predicted = result.load_best_model().predict(validation[0], verbose=0)[:, 0]
    assert np.mean((predicted - validation[1]) ** 2) == pytest.approx(result.best_score, rel=1e-4)


def test_an_own_cache_is_used_and_kept(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "cache")
    made = hypermodels.hypermodel(space=SPACE, cache=cache)
    search(tmp_path / "one", hypermodel=made, **{**QUICK, "head_epochs": 2})
    assert made.cache is cache
    assert cache.info().total_bytes
    assert not (tmp_path / "one" / "features").exists()
    counted = Counted(monkeypatch)
    search(tmp_path / "two", hypermodel=made, **{**QUICK, "head_epochs": 2}, seed=9)
    assert counted.rows == 0


def test_own_callbacks_see_every_trial_and_are_copied(tmp_path):
    class Own(keras.callbacks.Callback):
        count, seen = 0, []

        def on_train_begin(self, logs=None):
            Own.seen.append((self.count, self.model.name))
            self.count += 1

    own = Own()
    search(tmp_path, **QUICK, callbacks=own)
    assert Own.seen == [(0, "hyper_transfer")] * 3
    assert own.count == 0


def test_an_argument_that_fit_does_not_have(tmp_path):
    with pytest.raises(TypeError, match="no_such_argument"):
        search(tmp_path, **QUICK, no_such_argument=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["epochs", "initial_epoch"])
def test_epochs_are_the_funnels_own(tmp_path, name):
    with pytest.raises((TypeError, ValueError), match=f"{name}=7"):
        search(tmp_path, **QUICK, **{name: 7})
    assert not list(tmp_path.iterdir())


def test_only_a_hyper_transfer(tmp_path):
    with pytest.raises(TypeError, match="HyperTransfer.*HyperModel"):
        search(tmp_path, hypermodel=keras_tuner.HyperModel())


def test_the_objective_unless_one_is_named(tmp_path):
    result = search(tmp_path, **QUICK, objective=None)
    assert set(result.trials["objective"]) == {"val_accuracy"}
    assert set(result.trials["direction"]) == {"max"}
    assert result.best_score == result.trials["score"].max()
    _, accuracy = result.load_best_model().evaluate(*VALIDATION, verbose=0)
    assert accuracy == pytest.approx(result.best_score)


def test_a_line_for_each_trial(tmp_path, capsys):
    search(tmp_path, **QUICK, verbose=1)
    lines = [each for each in capsys.readouterr().out.splitlines() if each.startswith("Trial")]
    count = sum(size for size, _ in FunnelOracle("val_loss", 2, finalists=1, head_epochs=1,
                                                 fine_tune_epochs=1).rounds)  # fmt: skip
    assert [line.split(",")[0] for line in lines] == [f"Trial {i} of {count}" for i in (1, 2, 3)]
    search(tmp_path / "quiet", **QUICK, verbose=0)
    assert "Trial" not in capsys.readouterr().out
