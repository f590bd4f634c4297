"""A training that is killed with SIGKILL at random moments, again and again, ends as one that never
was: the same weights, optimizer slots and History, bit for bit."""

import functools
import multiprocessing
import os
import signal
import time

import keras
import numpy as np
import pytest

from keras_xfer.bundle import read_bundle
from tests import killed_training

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL"),
    pytest.mark.timeout(1800),
]

KILLS = int(os.environ.get("KERAS_XFER_KILLS", "100"))  # of the slow test, all seeds together
BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def processes():
    """Starts a training in a process of its own, forked from one that has imported Keras."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_training"])
    idle = context.Process(target=int)  # what the first process alone pays: the import of Keras
    idle.start()
    finish(idle)

    def start(folder, cached=False):
        process = context.Process(
            target=killed_training.train, args=(str(folder), cached), daemon=True
        )
        process.start()
        return process

    return start


def finish(process, timeout=120):
    process.join(timeout)
    assert process.exitcode == 0
    process.close()


def outcome(folder):
    return read_bundle(folder / "outcome.zip")


def differing(one, other, where="outcome"):
    """The places in which two trees differ; arrays bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differing(one[key], other[key], f"{where}[{key!r}]")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differing(a, b, f"{where}[{i}]")]
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        same = one.dtype == other.dtype and np.array_equal(
            one.view("uint8") if one.ndim else one, other.view("uint8") if other.ndim else other
        )
        return [] if same else [where]
    same = one == other or (one != one and other != other)  # NaN
    return [] if same else [f"{where}: {one!r} and {other!r}"]


def killed_again_and_again(start, folder, moments, seconds):
    """Run to the end, killed at each of `moments` in turn; how many of them hit."""
    kills = 0
    for moment in moments:
        process = start(folder)
        process.join(moment * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        done = process.exitcode == 0
        process.close()
        kills += not done
        if done:
            return kills
    finish(start(folder))
    return kills


def check_kills(start, tmp_path, count, seed):
    if BACKEND == "jax":
        finish(start(tmp_path / "warm"))  # which fills the cache of compiled programs
    began = time.perf_counter()
    finish(start(tmp_path / "reference"))
    seconds = time.perf_counter() - began
    expected = outcome(tmp_path / "reference")
    assert expected["epochs"] == list(range(killed_training.EPOCHS))
    assert len(set(expected["history"]["stage"])) == 3
    generator = np.random.default_rng(seed)
    kills = runs = 0
    while kills < count:
        folder = tmp_path / f"run {runs}"
        moments = [generator.uniform(0.05, 1.0) for _ in range(min(4, count - kills))]
        kills += killed_again_and_again(start, folder, moments, seconds)
        assert not differing(expected, outcome(folder)), f"after kills at {moments}"
        runs += 1
    print(f"{BACKEND}: {kills} kills in {runs} trainings of {seconds:.1f} s")


def test_some_kills(processes, tmp_path):
    check_kills(processes, tmp_path, 6 if BACKEND == "tensorflow" else 3, seed=0)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles for long")
def test_some_kills_of_a_training_on_cached_features(processes, tmp_path):
    check_kills(functools.partial(processes, cached=True), tmp_path, 3, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills(processes, tmp_path, seed):
    """A hundred on TensorFlow, twenty on JAX and torch; `KERAS_XFER_KILLS` in place of a hundred."""
    check_kills(processes, tmp_path, KILLS // (4 if BACKEND == "tensorflow" else 20), seed)
