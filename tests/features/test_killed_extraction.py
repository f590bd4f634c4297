"""Three processes want the same features and are killed with SIGKILL at random moments, again and
again: in the end every feature is right, and no shard was computed twice that was complete."""

import contextlib
import multiprocessing
import os
import signal

import keras
import numpy as np
import pytest

from tests.features import killed_extraction

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL"),
    pytest.mark.timeout(1800),
]

KILLS = int(os.environ.get("KERAS_XFER_KILLS", "100"))  # of the slow test, all seeds together
SHARDS = -(-killed_extraction.ROWS // killed_extraction.ROWS_PER_SHARD)


@pytest.fixture(scope="module")
def start():
    """Starts an extraction in a process of its own, forked from one that has imported Keras."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.features.killed_extraction"])

    def begin(folder, kind):
        process = context.Process(
            target=killed_extraction.extract, args=(str(folder), kind), daemon=True
        )
        process.start()
        return process

    return begin


def killed_until_one_ends(start, folder, kind, generator, most):
    """How many kills hit before one of three processes ended, or `most`."""
    processes = [start(folder, kind) for _ in range(3)]
    kills = 0
    while kills < most:
        i = int(generator.integers(3))
        processes[i].join(generator.uniform(0.05, 0.7))
        if any(process.exitcode is not None for process in processes):
            break
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(processes[i].pid, signal.SIGKILL)
        processes[i].join(60)
        assert processes[i].exitcode in (0, -signal.SIGKILL)
        kills += processes[i].exitcode != 0
        processes[i] = start(folder, kind)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return kills


def check(folder, kind, monkeypatch):
    monkeypatch.setattr(keras.Model, "predict_on_batch", None)  # nothing is left to compute
    data = killed_extraction.features(folder, kind)
    batches = [data[i] for i in range(len(data))]
    features, rows = (np.concatenate(leaves) for leaves in zip(*batches, strict=True))
    assert rows.tolist() == killed_extraction.Y.tolist()
    expected = killed_extraction.X @ killed_extraction.KERNEL
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    events = killed_extraction.log_of(folder).read_text().split("\n")[:-1]
    written = set()
    for event in events:
        what, shard = event.split()
        assert shard not in written, f"shard {shard} was complete"
        if what == "end":
            written.add(shard)
    assert {event.split()[1] for event in events} == {str(i) for i in range(SHARDS)}
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]
    monkeypatch.undo()


def check_kills(start, tmp_path, count, seed, monkeypatch):
    generator = np.random.default_rng(seed)
    kills = runs = 0
    while kills < count:
        kind = ("batches", "arrays")[runs % 2]
        folder = tmp_path / f"run {runs}"
        kills += killed_until_one_ends(start, folder, kind, generator, count - kills)
        check(folder, kind, monkeypatch)
        runs += 1
    print(f"{keras.backend.backend()}: {kills} kills in {runs} extractions")


def test_some_kills(start, tmp_path, monkeypatch):
    check_kills(start, tmp_path, 5, 0, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills(start, tmp_path, monkeypatch, seed):
    """A hundred; `KERAS_XFER_KILLS` in place of them."""
    check_kills(start, tmp_path, KILLS // 4, seed, monkeypatch)
