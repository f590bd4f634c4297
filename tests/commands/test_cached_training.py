"""`keras-xfer train --cache`, and `keras-xfer cache`."""

import errno
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_xfer.cli import main
from keras_xfer.commands import caching, job
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.commands.runs import FEATURES, RunFolder
from keras_xfer.commands.screen import Screen
from keras_xfer.features import FeatureCache
from tests.commands.test_hub import network
from tests.test_cli import OUTPUTS, SMALL, failed, fill, names, read, without_times

WITHOUT = ("--augment", "none")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("photos") / "photos", count=9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a network whose features are of about 1, as those of a pretrained one."""
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet(
        input_shape=(32, 32, 3), include_top=False, pooling="avg", weights=None, alpha=0.25
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(np.random.default_rng(0).random((64, 32, 32, 3), "float32") * 2 - 1, training=True)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    model.save_weights(path)
    return path


def train(line):
    """Without the time that a report takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda run, **_: (run / "report.html").touch())
        return main(line)


@pytest.fixture(scope="module")
def arguments(photos, weights):
    """Two epochs of the head, then two of the top."""
    return [
        *("train", str(photos), "--weights", str(weights), *SMALL, "--seed", "3"),
        *("--epochs", "4", "--head-epochs", "2", "--unfreeze", "conv_pw_12", "--batch-size", "5"),
        *("--learning-rate", "0.01", "--class-weights"),
    ]


@pytest.fixture(scope="module")
def uncached(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uncached"
    assert train([*arguments, *WITHOUT, "--no-cache", "--output", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "of" / "features"


@pytest.fixture(scope="module")
def cached(arguments, cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "cached"
    assert train([*arguments, *WITHOUT, "--cache", str(cache), "--output", str(run)]) == 0
    return run


def same_epochs(run, other, epochs=None):
    rows, expected = (without_times(read(each / "history.csv")) for each in (run, other))
    expected = expected[:epochs]
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for name in rows[0]:
        values = [[float(row[name]) for row in each] for each in (rows, expected)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)


def same(run, other):
    """The same training, to rounding."""
    same_epochs(run, other)
    rows, expected = (read(each / "predictions.csv") for each in (run, other))
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    values = [[float(row["probability"]) for row in each] for each in (rows, expected)]
    np.testing.assert_allclose(*values, rtol=1e-3)


def shards(cache):
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*.npy")}


def stages_of(run):
    return json.loads((run / "metrics.json").read_text())["stages"]


# train


def test_a_stage_that_is_not_cached_has_the_same_order(arguments, uncached, tmp_path):
    line = [*arguments, *WITHOUT, "--epochs", "3", "--cache", str(tmp_path / "cache")]
    assert train([*line, "--output", str(tmp_path / "a")]) == 0
    same_epochs(tmp_path / "a", uncached, 3)
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["stages"]["fine-tuning"]["cached"].startswith(
        "uncached, it lasts a single epoch"
    )


def test_the_same_history_with_and_without_a_cache(cached, uncached):
    losses = [float(row["loss"]) for row in read(uncached / "history.csv")]
    assert max(losses) - min(losses) > 0.1  # it learns: the order of the images shows
    same(cached, uncached)
    assert names(cached) == names(uncached) == OUTPUTS


def test_metrics_say_where_each_stage_was_cut(cached, uncached):
    stages = stages_of(cached)
    assert stages["head"]["cached"].startswith("cached at the head, 100%")
    assert "conv_pw_12" in stages["fine-tuning"]["cached"]
    metrics = json.loads((cached / "metrics.json").read_text())
    epochs = sum(float(row["epoch_seconds"]) for row in read(cached / "history.csv"))
    assert metrics["feature_seconds"] > 0
    assert metrics["training_seconds"] == pytest.approx(epochs + metrics["feature_seconds"])
    assert all("cached" not in stage for stage in stages_of(uncached).values())


def test_another_schedule_finds_the_features_of_an_earlier_run(
    arguments, cached, cache, tmp_path, capfd
):
    """Of the training and the validation images, in both stages."""
    before = shards(cache)
    assert len(list(cache.glob("*/manifest.json"))) == 4
    path = tmp_path / "stages.yaml"
    path.write_text(
        "- {epochs: 9, patience: 1, learning_rate: 1.0e+2, name: high}\n"
        "- {unfreeze: conv_pw_12, epochs: 2, learning_rate: {head: 1e-3, backbone: 1e-4}}\n"
    )
    run = tmp_path / "run"
    line = [each for each in arguments if each not in ("--head-epochs", "--unfreeze", "conv_pw_12")]
    line.remove("2")
    line += [*WITHOUT, "--stages", str(path), "--output", str(run)]
    assert train([*line, "--cache", str(cache)]) == 0
    said = capfd.readouterr().out
    assert shards(cache) == before
    rows = read(run / "history.csv")
    high = [row for row in rows if row["stage"] == "0"]
    assert len(high) < 9  # patience has ended it
    assert [row["stage"] for row in rows[len(high) :]] == ["1", "1"]
    np.testing.assert_allclose(float(rows[-1]["backbone_learning_rate"]), 1e-4, rtol=1e-5)
    assert list(stages_of(run)) == ["high", "stage 2"]
    for words in ("high: cached at the head", "stage 2: cached"):
        assert f"Cache    {words}" in said


KILLED_IN = """
import os, signal, sys
import keras
from keras_xfer.cli import main
def kill(self, epoch, logs=None):
    if epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
keras.callbacks.TerminateOnNaN.on_epoch_begin = kill
main(sys.argv[1:])
"""


def test_killed_in_the_second_stage_it_goes_on(arguments, cached, tmp_path, capfd, monkeypatch):
    """By default, without a --cache; and it ends as the run that was never killed."""
    run = tmp_path / "run"
    line = [*arguments, *WITHOUT, "--output", str(run)]
    done = subprocess.run([sys.executable, "-c", KILLED_IN, *line], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    before = shards(run / FEATURES)
    assert len(before) == 8
    found = []
    features = FeatureCache.features

    def watched(self, *args, **kwargs):
        given = features(self, *args, **kwargs)
        found.append(shards(run / FEATURES))
        return given

    monkeypatch.setattr(FeatureCache, "features", watched)
    status = main([*line, "--resume", "--no-cache"])
    failed(capfd, status, "--resume", "cached was True and is False")
    assert train([*line, "--resume"]) == 0
    said = capfd.readouterr().out
    assert "Resumed  after epoch 3" in said
    assert found == [before] * 2  # of the second stage alone, and not computed
    assert names(run) == OUTPUTS
    same(run, cached)
    rows = [without_times(read(each / "history.csv")) for each in (run, cached)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_augmented_passes_are_kept_as_views(photos, weights, tmp_path):
    """In 16 bits."""
    run, folder = tmp_path / "run", tmp_path / "cache"
    line = ["train", str(photos), "--weights", str(weights), *SMALL, "--output", str(run)]
    line += ["--epochs", "2", "--unfreeze", "none", "--mixed-precision"]
    assert train([*line, "--cache", str(folder), "--views", "2"]) == 0
    kept = {path.parent for path in shards(folder)}
    views = [sorted(entry.glob("features-0-view-?-00000.npy")) for entry in kept]
    assert sorted(map(len, views)) == [1, 2]  # the validation images are not augmented
    first, second = map(np.load, max(views, key=len))
    assert first.shape == second.shape
    assert (first != second).any(axis=1).all()
    assert json.loads((run / "run.json").read_text())["views"] == 2
    assert keras.config.dtype_policy().name == "float32"


def test_what_a_module_of_tensorflow_hub_gives_is_kept(photos, tmp_path):
    module = network(tmp_path / "module")
    run = tmp_path / "run"
    line = ["train", str(photos), "--hub", str(module), "--output", str(run), *WITHOUT]
    assert train([*line, "--epochs", "3", "--head-epochs", "2", "--batch-size", "8"]) == 0
    assert stages_of(run)["head"]["cached"].startswith("cached at the head")
    assert stages_of(run)["fine-tuning"]["cached"].startswith("uncached")


# By default


@pytest.mark.parametrize(
    ("options", "caches"),
    [
        ({"augment": "none"}, True),
        ({"augment": "none", "hub": "module"}, True),
        ({"augment": "none", "cached": False}, False),
        ({}, False),
        ({"augment": "strong"}, False),
        ({"augment": "strong", "cached": True, "views": 2}, True),
        ({"augment": "none", "weights": None}, False),
    ],
)
def test_by_default_there_is_a_cache_where_nothing_moves(options, caches):
    recipe = Recipe(**options)
    assert recipe.caches is recipe.to_dict()["cached"] is caches
    assert "cache" not in recipe.to_dict()  # a run goes on with another folder


# What a user can mend


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache", "k"], ["--augment light", "--views N", "--augment none"]),
        (["--cache", "k", "--augment", "strong"], ["--augment strong", "--views N"]),
        (["--cache", "k", "--views", "1"], ["--views", "at least 2"]),
        (["--cache", "k", "--views", "many"], ["--views", "many"]),
        (["--cache", "k", "--views", "2", *WITHOUT], ["--views", "--augment light"]),
        (["--views", "2"], ["--views", "--cache DIR"]),
        (["--views", "2", "--no-cache"], ["--views", "--cache DIR"]),
        (["--views", "2", *WITHOUT], ["--views", "--augment light"]),
        (["--cache", "k", "--no-cache"], ["--cache", "--no-cache"]),
        (["--cache", "k", *WITHOUT, "--weights", "none"], ["--cache", "--weights none"]),
        (["--views", "2", "--weights", "none"], ["--views", "--weights none"]),
        (["--cache", "PHOTOS/k", *WITHOUT], ["--cache", "folder of images"]),
        (["--cache", "RUN", *WITHOUT], ["--cache", "holds --output"]),
        (["--cache", "RUN/..", *WITHOUT], ["--cache", "holds --output"]),
        (["--cache", __file__, *WITHOUT], ["--cache", "is a file"]),
        (["--cache", str(Path(__file__).parent), *WITHOUT], ["--cache", "holds", "new folder"]),
    ],
)
def test_wrong_options(options, words, photos, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "run"
    told = [each.replace("PHOTOS", str(photos)).replace("RUN", str(run)) for each in options]
    failed(capfd, main(["train", str(photos), "--output", str(run), *told]), *words)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, ["disk is full", "--no-cache"]), (errno.EACCES, ["Make it writable"])],
)
def test_a_disk_that_refuses_features(number, words, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    monkeypatch.setattr(FeatureCache, "features", refuse)
    with pytest.raises(UsageError) as caught:
        caching.RunCache(tmp_path / "cache", Screen(io.StringIO())).features()
    for word in (str(tmp_path / "cache"), *words):
        assert word in str(caught.value)


# The features in a run's folder


def test_a_runs_own_features_last_as_long_as_it_can_go_on(tmp_path):
    run = RunFolder(tmp_path / "run")

    def keep():
        (run / FEATURES / "entry").mkdir(parents=True)
        (run / FEATURES / "entry" / "shard").touch()

    with run.writing({"seed": 1}):
        keep()
    assert names(run.path) == {"run.json"}
    with pytest.raises(ZeroDivisionError), run.writing({"seed": 1}):
        keep() or 1 / 0
    assert names(run.path) == set()
    # Killed before an epoch was over: what was computed is found again, but by --resume alone.
    with run.writing({"seed": 1}):
        pass
    keep()
    with run.writing({"seed": 1}, resume=True):
        assert (run / FEATURES / "entry" / "shard").exists()
    keep()
    with run.writing({"seed": 2}):
        assert not (run / FEATURES).exists()


def test_what_is_left_of_a_runs_features_is_repaired(tmp_path):
    """Half removed, or left by another version."""
    run = RunFolder(tmp_path / "run")
    (run / FEATURES / "entry").mkdir(parents=True)
    caching.own(run, Screen(io.StringIO()))
    assert not (run / FEATURES / "entry").exists()


def test_somebody_elses_features_are_refused(tmp_path):
    (tmp_path / FEATURES).mkdir(parents=True)
    with pytest.raises(UsageError, match="holds unfinished/features"):
        RunFolder(tmp_path)


# cache


def test_info_and_clear(tmp_path, capfd):
    cache = tmp_path / "cache"
    extractor = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    for value in range(2):
        FeatureCache(cache).features(extractor, np.full((4, 2), value))
    held = sum(path.stat().st_size for path in cache.glob("[!.]*/*"))
    assert main(["cache", "info", str(cache)]) == 0
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 4  # a header, two entries, the total
    assert {line.split()[0] for line in said[1:-1]} == {
        path.name[:12] for path in cache.glob("[!.]*/")
    }
    assert said[-1] == f"2 entries, {held:,} bytes"

    opened = FeatureCache(cache).features(extractor, np.full((4, 2), 9))
    assert main(["cache", "clear", str(cache)]) == 0
    said = capfd.readouterr().out
    assert f"Removed {held:,} bytes\n1 entry stayed" in said
    (left,) = cache.glob("[!.]*/")
    assert left.name[:12] in said
    np.testing.assert_allclose(opened[0][0], extractor(np.full((4, 2), 9)), rtol=1e-6)
    del opened
    assert main(["cache", "clear", str(cache)]) == 0
    assert "stayed" not in capfd.readouterr().out
    assert main(["cache", "info", str(cache)]) == 0
    assert capfd.readouterr().out == f"No features are kept in {cache}\n"


@pytest.mark.parametrize("action", ["info", "clear"])
def test_what_is_no_cache_is_refused(action, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "keras_xfer_features.json").write_text('{"format": 999}')
    failed(capfd, main(["cache", action, str(tmp_path / "none")]), "no such folder", "none")
    failed(capfd, main(["cache", action, str(tmp_path / "mine")]), "letter.txt", "FeatureCache")
    failed(capfd, main(["cache", action, str(tmp_path / "mine" / "letter.txt")]), "a file")
    failed(capfd, main(["cache", action, str(tmp_path / "newer")]), "999")
    failed(capfd, main(["cache", action]), "DIR")
    failed(capfd, main(["cache"]), "ACTION")
    assert (tmp_path / "mine" / "letter.txt").exists()
