"""A funnel that is killed with SIGKILL at random moments, again and again, ends as one that never
was: each candidate once, in every round the same trials with the same scores, bit for bit."""

import json
import multiprocessing
import os
import signal
import time

import keras
import numpy as np
import pandas as pd
import pytest

from tests.tuner import killed_search

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL"),
    pytest.mark.timeout(1800),
]

KILLS = int(os.environ.get("KERAS_XFER_KILLS", "100"))  # of the slow test, all seeds together


@pytest.fixture(scope="module")
def start():
    """Starts a search in a process of its own, forked from one that has imported Keras."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tuner.killed_search"])

    def begin(folder):
        process = context.Process(target=killed_search.run, args=(str(folder),), daemon=True)
        process.start()
        return process

    return begin


def finish(process):
    process.join(300)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The folder of a search that never was killed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(tmp_path_factory.mktemp("first")))  # which alone waits for the import of Keras
    began = time.perf_counter()
    finish(start(folder))
    return folder, time.perf_counter() - began


def trials(folder):
    """Of each trial what its file says, without what a clock told."""
    found = {}
    for path in sorted((folder / "search").glob("trial_*/trial.json")):
        state = json.loads(path.read_text())
        metrics = state["metrics"]["metrics"]
        metrics = {k: v for k, v in metrics.items() if "second" not in k and "step_" not in k}
        found[state["trial_id"]] = {**state, "metrics": metrics}
    return found


def tables(folder):
    read = [pd.read_csv(folder / name) for name in ("trials.csv", "trial_epochs.csv")]
    return [
        table[[name for name in table if "second" not in name and not name.startswith("step_")]]
        for table in read
    ]


def over(folder):
    """The trials that are over, with their outcomes, clocks included."""
    done = {k for k, v in trials(folder).items() if v["status"] == "COMPLETED"}
    paths = {k: folder / "search" / f"trial_{k}" / "outcome.json" for k in done}
    return {k: (path.read_bytes(), path.stat().st_mtime_ns) for k, path in paths.items()}


def killed_again_and_again(start, folder, generator, most, seconds):
    """Run to the end, killed at most so often; how many kills hit."""
    kills, known = 0, {}
    while True:
        process = start(folder)
        if kills < most:
            process.join(generator.uniform(0.05, 0.8) * seconds)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join(60)
                kills += 1
        else:
            finish(process)
        assert process.exitcode in (0, -signal.SIGKILL)
        now = over(folder)
        assert now.items() >= known.items(), "what was over was run again, or is lost"
        known = now
        for path in (folder / "search").rglob("[!.]*.json"):
            json.loads(path.read_text())
        if process.exitcode == 0:
            return kills


def check(folder, expected):
    assert trials(folder) == trials(expected)
    for mine, theirs in zip(tables(folder), tables(expected), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    assert not (folder / "features").exists()
    mine, theirs = (keras.saving.load_model(each / "best_model.keras")
                    for each in (folder, expected))  # fmt: skip
    for one, other in zip(mine.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]


def check_kills(start, tmp_path, undisturbed, count, seed):
    generator = np.random.default_rng(seed)
    expected, seconds = undisturbed
    kills = searches = 0
    while kills < count:
        folder = tmp_path / f"search {searches}"
        most = min(6, count - kills)
        kills += killed_again_and_again(start, folder, generator, most, seconds)
        check(folder, expected)
        searches += 1
    print(f"{kills} kills in {searches} searches")


def test_the_search_itself(undisturbed):
    """What the others are compared with has all rounds, and each candidate once."""
    folder, _ = undisturbed
    found = trials(folder)
    rounds = [each["hyperparameters"]["values"]["tuner/round"] for each in found.values()]
    assert [rounds.count(n) for n in range(3)] == [count for count, _ in killed_search.ROUNDS]
    assert {each["status"] for each in found.values()} == {"COMPLETED"}
    table, epochs = tables(folder)
    assert len(table) == len(set(table["trial"])) == killed_search.PLAN["max_trials"]
    assert len(epochs) == 6 * 2 + 3 * 2 + 2 * 2


def test_some_kills(start, tmp_path, undisturbed):
    check_kills(start, tmp_path, undisturbed, 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills(start, tmp_path, undisturbed, seed):
    """A hundred; `KERAS_XFER_KILLS` in place of them."""
    check_kills(start, tmp_path, undisturbed, KILLS // 4, seed)
