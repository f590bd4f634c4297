"""`keras-xfer tune`: searches on a few small images."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import keras
import keras_tuner
import numpy as np
import pandas as pd
import psutil
import pytest

from keras_xfer.cli import main
from keras_xfer.commands import options, search
from keras_xfer.commands.recipe import UsageError
from keras_xfer.commands.screen import Screen
from keras_xfer.commands.search_recipe import SearchRecipe
from keras_xfer.tuner import DurableTuner, HyperTransfer
from keras_xfer.tuner.workers import free_port
from tests.test_cli import OUTPUTS, SMALL, failed, fill, names, read

FOUND = OUTPUTS | {"trials.csv", "trial_epochs.csv"}
UNFINISHED = FOUND | {"search"}
TINY = [*SMALL, "--weights", "none", "--batch-size", "8", "--seed", "3"]
FUNNEL = ["--max-trials", "2", "--finalists", "1", "--epochs", "3"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures") / "pictures", ["cat", "dog"], 10)


@pytest.fixture(scope="session")
def line(pictures):
    return ["tune", str(pictures), *TINY, *FUNNEL]


@pytest.fixture(scope="module")
def tuned(line, tmp_path_factory):
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert main([*line, "--output", str(run)]) == 0
    return run


def comparable(run):
    """What two searches that did the same have in common: not their times."""
    return [
        {name: value for name, value in row.items() if "seconds" not in name}
        for row in read(run / "trials.csv")
    ]


def test_tune_leaves_what_train_does_and_its_trials(tuned):
    assert names(tuned) == FOUND
    trials = read(tuned / "trials.csv")
    assert [row["status"] for row in trials] == ["completed"] * 2
    assert sorted(row["stage"] for row in trials) == ["fine-tuning", "head"]
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert "Search" in page
    record = json.loads((tuned / "run.json").read_text())
    assert (record["command"], record["max_trials"], record["backbones"]) == (
        "tune", 2, ["MobileNet"]
    )  # fmt: skip


def test_the_model_is_that_of_the_best_trial(tuned, pictures, tmp_path, capfd):
    metrics = json.loads((tuned / "metrics.json").read_text())
    scores = [float(row["score"]) for row in read(tuned / "trials.csv")]
    assert metrics["val_accuracy"] == pytest.approx(max(scores))
    assert metrics["accuracy"] == pytest.approx(max(scores))  # of the weights, on the same images
    history = read(tuned / "history.csv")
    assert [int(row["epoch"]) for row in history] == list(range(len(history)))
    best = max(history, key=lambda row: float(row["val_accuracy"]))
    assert float(best["val_accuracy"]) == pytest.approx(max(scores))
    assert metrics["search"]["trials"] == 2
    assert set(metrics["stages"]) <= {"head", "fine-tuning"}

    model = keras.saving.load_model(tuned / "model.keras")
    assert model.input_shape == (None, None, None, 3)
    assert model.inputs[0].dtype == "uint8"
    rows = read(tuned / "predictions.csv")
    table = tmp_path / "table.csv"
    files = [str(pictures / row["file"]) for row in rows]
    assert main(["predict", str(tuned), *files, "--csv", str(table), "--top", "1"]) == 0
    capfd.readouterr()
    found = read(table)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in rows]
    np.testing.assert_allclose(
        [float(row["probability"]) for row in found],
        [float(row["probability"]) for row in rows],
        atol=1e-5,
    )


@pytest.mark.slow
def test_an_interrupted_search_keeps_the_best_and_goes_on(
    line, tuned, tmp_path, capfd, monkeypatch
):
    run = tmp_path / "run"
    arguments = [*line, "--output", str(run)]
    begun = []

    def interrupting(self, trial, *args, **kwargs):
        begun.append(trial.trial_id)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return run_trial(self, trial, *args, **kwargs)

    run_trial = DurableTuner.run_trial
    monkeypatch.setattr(DurableTuner, "run_trial", interrupting)
    assert main(arguments) == 130
    shown = capfd.readouterr()
    assert "Trial 1 of 3, head: val_accuracy" in shown.out
    (said,) = shown.err.splitlines()
    assert "keeps the best model so far, of 1 candidate;" in said
    assert "--resume" in said
    assert names(run) == UNFINISHED
    assert [row["status"] for row in read(run / "trials.csv")] == ["completed", "interrupted"]
    assert keras.saving.load_model(run / "model.keras").output_shape == (None, 2)

    status = main([*arguments, "--resume", "--epochs", "4"])
    failed(capfd, status, "epochs was 3 and is 4", "--resume")
    assert names(run) == UNFINISHED
    assert main([*arguments, "--resume"]) == 0
    assert "Resumed  after 1 trial" in capfd.readouterr().out
    assert begun == ["0000", "0001", "0001", "0002"]
    assert names(run) == FOUND
    assert comparable(run) == comparable(tuned)

    assert main([*arguments, "--resume"]) == 0
    assert "nothing is left to do" in capfd.readouterr().out
    assert len(begun) == 4


def test_an_unfinished_search_is_discarded_without_resume(line, tmp_path, capfd, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DurableTuner, "run_trial", interrupt)
        assert main([*line, "--output", str(run)]) == 130
        assert "before the first trial was over" in capfd.readouterr().err
        (run / "search" / "mark").touch()
        assert main([*line, "--output", str(run)]) == 130
    assert "Discarded the unfinished run" in capfd.readouterr().out
    assert not (run / "search" / "mark").exists()


def test_interrupted_while_the_result_is_written(line, tmp_path, capfd, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DurableTuner, "search", lambda *args, **kwargs: None)
    monkeypatch.setattr(search, "write_tables", interrupt)
    assert main([*line, "--output", str(tmp_path / "run")]) == 130
    assert "while the result was written; --resume writes it" in capfd.readouterr().err


def test_where_every_trial_fails_the_first_error_is_told(line, tmp_path, capfd, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no such luck\n\nArguments received by Luck.call():\n  • x=1")

    monkeypatch.setattr(HyperTransfer, "fit", fail)
    run = tmp_path / "run"
    status = main([*line, "--output", str(run)])
    failed(capfd, status, "No trial", "2 trials failed", "ValueError: no such luck", "trials.csv")
    left = {"run.json", "labels.json", "skipped.csv", "trials.csv", "trial_epochs.csv"}
    assert names(run) == left | {"report.html"}
    assert all("no such luck" in row["error"] for row in read(run / "trials.csv"))


@pytest.mark.slow
def test_hyperband_on_features_in_a_cache_of_its_own(pictures, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = ["tune", str(pictures), *TINY, "--output", str(run), "--tuner", "hyperband"]
    arguments += ["--max-trials", "2", "--epochs", "4", "--cache", str(cache)]
    assert main([*arguments, "--test-split", "0.2"]) == 0
    assert names(run) == FOUND
    assert len(read(run / "trials.csv")) == 2
    assert json.loads((run / "metrics.json").read_text())["split"] == "test"
    assert any(cache.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["random", "bayesian"])
def test_other_tuners_with_augmentation(tuner, pictures, tmp_path):
    run = tmp_path / "run"
    arguments = ["tune", str(pictures), *TINY, "--output", str(run), "--tuner", tuner]
    arguments += ["--max-trials", "2", "--epochs", "2", "--augment", "light", "--mixed-precision"]
    assert main([*arguments, "--backbone", "MobileNetV2"]) == 0
    assert names(run) == FOUND
    trials = read(run / "trials.csv")
    assert {row["hp.backbone"] for row in trials} <= {"MobileNet", "MobileNetV2"}
    assert keras.config.dtype_policy().name == "float32"
    model = keras.saving.load_model(run / "model.keras")
    assert not [layer for layer in model.layers if layer.name == "augmentation"]
    assert model.get_layer("backbone").model.layers[1].compute_dtype in ("float16", "bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-trials", "0"], ["--max-trials", "at least 1"]),
        (["--finalists", "0"], ["--finalists", "at least 1"]),
        (["--finalists", "2", "--tuner", "random"], ["--finalists", "--tuner funnel"]),
        (["--epochs", "1"], ["--epochs", "at least 2"]),
        (["--tuner", "best"], ["--tuner", "funnel"]),
        (["--workers", "0"], ["--workers", "at least 1"]),
        (["--listen", "0.0.0.0:9000"], ["--listen", "--workers"]),
        (["--workers", "2", "--listen", "here:there"], ["--listen", "ADDRESS:PORT"]),
        (["--workers", "2", "--listen", "192.0.2.1:9000"], ["--listen", "192.0.2.1:9000"]),
        (["--backbone", "MobilNet"], ["--backbone", "MobileNet"]),
        (["--backbone", "MobileNet"], ["--backbone", "once"]),
        (["--backbone", "MobileNetV2", "--backbone-arg", "bata=1"], ["--backbone-arg", "bata"]),
        (["--image-size", "16"], ["--image-size", "at least 32"]),
        (["--weights", "nowhere.h5"], ["--weights", "no such file"]),
        (["--validation-split", "0"], ["--validation-split"]),
    ],
)
def test_wrong_options(options, words, pictures, tmp_path, capfd):
    run = tmp_path / "run"
    line = ["tune", str(pictures), "--output", str(run), *SMALL, "--weights", "none"]
    failed(capfd, main([*line, "--max-trials", "2", *options]), *words)
    assert not run.exists()


def test_wrong_environments(line, tmp_path, capfd, monkeypatch):
    arguments = [*line, "--output", str(tmp_path / "run")]
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    failed(capfd, main(arguments), "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(free_port("127.0.0.1")))
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner0")
    failed(capfd, main([*arguments, "--workers", "2"]), "--workers", "KERASTUNER_ORACLE_IP")
    monkeypatch.setattr(search, "_CHIEF_SECONDS", 0.0)
    failed(capfd, main(arguments), "No chief at 127.0.0.1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["."], [".", "--output", "x", "--max-trials", "0"]]
)
def test_help_and_wrong_usage_load_no_framework(arguments):
    code = (
        "import sys; sys.argv[0] = 'keras-xfer'; from keras_xfer.cli import main; main();"
        "sys.exit('keras' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "tune", *arguments], capture_output=True)
    assert done.returncode == 0


# What it searches


def a_search(pictures, run):
    recipe = SearchRecipe(
        max_trials=2, weights=None, image_size=64, backbones=("MobileNet",),
        backbone_args={"alpha": 0.25},
    )  # fmt: skip
    return search.Search(pictures, run, recipe, Screen())


def test_pooling_makes_a_difference(pictures, tmp_path):
    hypermodel = a_search(pictures, tmp_path / "run")._tuner(2).hypermodel
    backbones = []
    for pooling in ("avg", "max"):
        hp = keras_tuner.HyperParameters()
        hp.values["pooling"] = pooling
        backbones.append(hypermodel.build(hp).get_layer("backbone"))
    backbones[1].set_weights(backbones[0].get_weights())
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    average, highest = (np.asarray(backbone(images)) for backbone in backbones)
    assert average.shape == highest.shape == (2, 256)
    assert np.all(highest >= average)
    assert np.any(highest > average)


def test_the_best_trial_is_named_as_in_the_table(pictures, tmp_path, monkeypatch, capsys):
    made, told = a_search(pictures, tmp_path / "run"), {}
    parts = [keras_tuner.HyperParameters() for _ in range(2)]
    parts[1].values["tuner/trial_id"] = "0000"  # which it goes on from
    trials = {
        name: SimpleNamespace(trial_id=name, hyperparameters=hp)
        for name, hp in zip(("0000", "0002"), parts, strict=True)
    }
    hypermodel = SimpleNamespace(stages=lambda *args, **kwargs: ())
    tuner = SimpleNamespace(
        oracle=SimpleNamespace(trials=trials), load_model=lambda trial: None, hypermodel=hypermodel
    )
    table = pd.DataFrame({"status": ["completed"], "seconds": [1.0]})
    monkeypatch.setattr(search, "write_tables", lambda *args: (table, None))
    monkeypatch.setattr(search, "best_trial", lambda tuner: trials["0002"])
    monkeypatch.setattr(search, "_classifier", lambda *args: None)
    monkeypatch.setattr(search.records, "read", lambda *args: {"best_epoch": 0})
    monkeypatch.setattr(search.records, "history", lambda *args: [{"epoch": 0}])
    monkeypatch.setattr(search.RunFolder, "write_csv", lambda *args: None)
    monkeypatch.setattr(search.job, "finish", lambda *args, **more: told.update(more["search"]))
    made._write(tuner, None, interrupted=False)
    assert told["best_trial"] == "0000"
    assert "Best     trial 0000" in capsys.readouterr().out
    table = pd.DataFrame({"status": ["completed", "failed", "interrupted"], "seconds": [1.0] * 3})
    with pytest.raises(KeyboardInterrupt, match="of 2 candidates;"):
        made._write(tuner, None, interrupted=True)


# Many processes


@pytest.fixture
def worker(monkeypatch, pictures, tmp_path):
    """A worker of a chief that does not come, at an address of IPv6."""
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner0")
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "[::1]")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", "8000")
    monkeypatch.setattr(search, "_POLL_SECONDS", 0.0)
    called = []

    def refuse(where, timeout):
        called.append(where)
        raise ConnectionRefusedError

    monkeypatch.setattr(search.socket, "create_connection", refuse)
    made = a_search(pictures, tmp_path / "run")
    made.called = called
    return made


def test_a_worker_believes_no_earlier_run_that_the_search_has_ended(
    worker, tmp_path, monkeypatch, capsys
):
    metrics = tmp_path / "run" / "metrics.json"
    metrics.parent.mkdir()
    metrics.write_text("{}")
    os.utime(metrics, (1e9, 1e9))
    ticks = iter(range(99))

    def sleep(seconds):
        if next(ticks) == 2:
            metrics.write_text("{}")

    monkeypatch.setattr(search.time, "sleep", sleep)
    assert not worker._wait_for_chief()
    assert len(worker.called) == 4  # once more, when it is written anew
    assert "The search has ended" in capsys.readouterr().out


def test_a_worker_finds_a_chief_at_an_address_with_brackets(worker, monkeypatch, capsys):
    monkeypatch.setattr(search, "_CHIEF_SECONDS", -1.0)
    with pytest.raises(UsageError, match=r"No chief at \[::1\]:8000"):
        worker._wait_for_chief()
    assert worker.called == [("::1", 8000)]


def test_addresses():
    assert options.address("0.0.0.0:8000") == ("0.0.0.0", 8000)  # noqa: S104  # is read only
    assert options.address("chief.example.com") == ("chief.example.com", None)
    assert options.address("[::1]:8000") == ("[::1]", 8000)
    assert options.address("[::1]") == ("[::1]", None)
    for wrong in ("::1", "fe80::1:8000", "[::1", "::1]", "[]:8000", ":8000", "a:0"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"\[::1\]:8000"):
            options.address(wrong)


GROWTH = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        (None, [], {}),
        (None, ["--workers", "2"], GROWTH),
        ("chief", [], GROWTH),
        ("tuner0", [], {}),
    ],
)
def test_who_runs_no_trials_leaves_the_memory_of_the_gpu(
    name, more, expected, line, tmp_path, monkeypatch
):
    found = {}

    def look(*args, **kwargs):
        found.update({each: os.environ[each] for each in GROWTH if each in os.environ})
        raise UsageError("seen")

    for each in GROWTH:
        monkeypatch.setenv(each, "")  # so that it is as before when the test is over
        monkeypatch.delenv(each)
    if name is not None:
        monkeypatch.setenv("KERASTUNER_TUNER_ID", name)
        monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
        monkeypatch.setenv("KERASTUNER_ORACLE_PORT", "8000")
    monkeypatch.setattr(search, "Search", look)
    assert main([*line, "--output", str(tmp_path / "run"), *more]) == 2
    assert found == expected


def test_the_help_says_what_tune_does(capsys):
    def said(*words):
        assert main([*words, "--help"]) == 0
        return " ".join(capsys.readouterr().out.split())

    tune, train = said("tune"), said("train")
    assert "those that were not over are run again" in tune
    assert "seed of the candidates" in tune
    assert "candidates" not in train
    assert "features of a network that has learned nothing" in tune
    assert "from scratch" not in tune
    assert "trains everything from scratch" in train
    assert "tune" in said("predict")
    assert "tune" in said("cache", "info")


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "keras_xfer.cli", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for(condition, seconds=150):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def of_the_search(run):
    """The processes of a search, by the id that they have in it."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if str(run) in (process.info["cmdline"] or ()):
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found[environment.get("KERASTUNER_TUNER_ID", "parent")] = process
    return found


@pytest.mark.parametrize(
    "killed", [["tuner0"], pytest.param(["tuner0", "chief"], marks=pytest.mark.slow)]
)
def test_workers_of_which_one_is_killed(killed, line, tmp_path):
    """One whole run: once there is a trial, a worker is killed, or the chief too."""
    run = tmp_path / "run"
    count = len(killed) + 1
    options = ["--max-trials", count, "--workers", "2", "--output", run]
    parent = start([*line, *options])
    wait_for(lambda: list((run / "search").glob("trial_*/trial.json")) or parent.poll() is not None)
    for name in killed:
        of_the_search(run)[name].kill()
    out, error = parent.communicate(timeout=240)
    assert (parent.returncode, error) == (0, "")
    assert names(run) == FOUND
    assert not of_the_search(run)
    trials = read(run / "trials.csv")
    assert [row["trial"] for row in trials] == ["0000", "0001", "0002"][:count]
    assert {row["status"] for row in trials} == {"completed"}
    lines = [each for each in out.splitlines() if each.startswith("Trial ")]
    assert [each.split(" of ")[0] for each in lines] == [f"Trial {i + 1}" for i in range(count + 1)]
    assert all("best " in each for each in lines)
    assert " left" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_parent_nothing_is_left_running(line, tmp_path, way):
    run = tmp_path / "run"
    arguments = [*line, "--max-trials", "6", "--workers", "2", "--output", run]
    parent = start(arguments)
    state = run / "search" / "oracle.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["end_order"])
    parent.send_signal(way)
    _, error = parent.communicate(timeout=120)
    wait_for(lambda: not of_the_search(run), 20)
    assert parent.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[way]
    if way == signal.SIGINT:
        assert "keeps the best model so far" in error
        assert names(run) == UNFINISHED
    assert main([*map(str, arguments), "--resume"]) == 0
    assert names(run) == FOUND
    assert len(read(run / "trials.csv")) == 6


@pytest.mark.slow
def test_as_on_several_machines(line, tmp_path):
    """The same command in each process, told by the environment alone what it is."""
    run = tmp_path / "run"
    where = {
        "KERASTUNER_ORACLE_IP": "127.0.0.1",
        "KERASTUNER_ORACLE_PORT": str(free_port("127.0.0.1")),
    }
    arguments = [*line, "--output", run]
    worker = start(arguments, KERASTUNER_TUNER_ID="tuner0", **where)
    chief = start(arguments, KERASTUNER_TUNER_ID="chief", **where)
    wait_for(lambda: (run / "search" / "oracle.json").exists())
    other = start([*arguments, "--epochs", "4"], KERASTUNER_TUNER_ID="tuner1", **where)
    said = [each.communicate(timeout=240) for each in (worker, chief, other)]
    assert [each.returncode for each in (worker, chief, other)] == [0, 0, 2]
    assert "Waiting  for the chief" in said[0][0]
    assert "Trial 3 of 3" in said[1][0]
    assert "epochs was 3 and is 4" in said[2][1]
    assert names(run) == FOUND
    # A search that had ended before a worker began may be an earlier one: it waits for its chief.
    late = start(arguments, KERASTUNER_TUNER_ID="tuner1", PYTHONUNBUFFERED="1", **where)
    assert "Waiting  for the chief" in late.stdout.readline()
    late.kill()
    late.communicate()
