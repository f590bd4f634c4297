"""A chief and three workers on loopback, of which some are killed, come late or do wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import keras
import keras_tuner
import psutil
import pytest

from keras_xfer.tuner import DurableTuner, HyperTransfer, durable, records
from keras_xfer.tuner.workers import free_port, run_workers
from tests.tuner import searching
from tests.tuner.searching import FAILS, TRIALS, events

NAMES = ("chief", "tuner0", "tuner1", "tuner2")


class Scene:
    """A search under `run_workers`, in which something happens at each step."""

    def __init__(self, folder, kind="random", seconds=0.7):
        self.folder = folder
        self.options = {"kind": kind, "seconds": seconds}
        self.port = free_port("127.0.0.1")
        self.others = []
        self.killed = set()
        self.steps = []

    def command(self, **options):
        script = searching.__file__
        return [sys.executable, script, str(self.folder), json.dumps(self.options | options)]

    def run(self, *steps):
        """Take each step, which tells whether it could be taken, as soon as it can be."""
        self.steps = list(steps)
        run_workers(self.command(), 3, logs=self.folder / "logs", port=self.port, poll=self._poll)
        assert not self.steps, "the search was over too soon"
        assert not self.alive()

    def _poll(self):
        if self.steps and self.steps[0]():
            self.steps.pop(0)
        return sum(1 for what, *_ in events(self.folder) if what == "done")

    # What may happen.

    def kill(self, name):
        """A step: SIGKILL, of a worker in the middle of a trial."""

        def step():
            own = [each for each in events(self.folder) if each[1] == name]
            if not own or own[-1][0] != ("ready" if name == "chief" else "begin"):
                return False
            if name == "chief" and not self.ended():  # not before it has something to lose
                return False
            pid = int(own[-1][2])
            if pid in self.killed:  # and not started again yet
                return False
            os.kill(pid, signal.SIGKILL)
            self.killed.add(pid)
            return True

        return step

    def join(self, name, **options):
        """A step: one more worker, when some trial is over."""

        def step():
            if not self.ended():
                return False
            environment = {
                **os.environ,
                "KERASTUNER_TUNER_ID": name,
                "KERASTUNER_ORACLE_IP": "127.0.0.1",
                "KERASTUNER_ORACLE_PORT": str(self.port),
            }
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.others.append(subprocess.Popen(self.command(**options), env=environment, **pipes))
            return True

        return step

    def joined(self):
        """A step: it is there."""
        return any(each[1].startswith("late") for each in events(self.folder))

    def said(self):
        """What those that joined said, and their status."""
        told = [(each.communicate(timeout=60)[0], each.returncode) for each in self.others]
        self.others = []
        return told

    # What came of it.

    def state(self):
        return json.loads((self.folder / "search" / "oracle.json").read_text())

    def ended(self):
        path = self.folder / "search" / "oracle.json"
        return self.state()["end_order"] if path.exists() else []

    def alive(self):
        left = []
        for pid in {int(each[2]) for each in events(self.folder)}:
            if any(pid == other.pid for other in self.others):
                continue
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    left.append(pid)
            except psutil.NoSuchProcess:
                pass
        return left

    def check(self, why="this one always fails", trials=TRIALS):
        """Every trial is over, none was lost and none was counted twice."""
        state = self.state()
        assert len(state["start_order"]) == len(state["end_order"]) == trials
        assert len(set(state["end_order"])) == trials
        found = {
            path.parent.name.removeprefix("trial_"): json.loads(path.read_text())
            for path in (self.folder / "search").glob("trial_*/trial.json")
        }
        assert set(found) == set(state["end_order"])
        for trial, told in found.items():
            is_wrong = int(trial) == FAILS
            assert told["status"] == ("FAILED" if is_wrong else "COMPLETED")
            outcome = json.loads(
                (self.folder / "search" / f"trial_{trial}" / "outcome.json").read_text()
            )
            assert (why in outcome["error"]) is is_wrong
        done = Counter(each[3] for each in events(self.folder) if each[0] == "done")
        assert done == dict.fromkeys(set(found) - {each for each in found if int(each) == FAILS}, 1)


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    for process in made.others:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_whatever_happens_the_search_comes_to_its_end(scene):
    """A worker and the chief are killed, one more worker comes late, another would overwrite."""
    scene.run(
        scene.join("late0"),
        scene.join("late1", overwrite=True),
        scene.kill("tuner1"),
        scene.kill("chief"),
        scene.joined,
    )
    scene.check()
    (_, status), (said, refused) = scene.said()
    assert status == 0
    assert refused != 0
    assert "Expected overwrite=False in a worker ('late1')" in said
    lives = Counter(each[1] for each in events(scene.folder) if each[0] == "ready")
    assert (lives["chief"], lives["tuner1"]) == (2, 2)
    assert all(lives[name] == 1 for name in NAMES if name not in ("chief", "tuner1"))


def test_a_trial_that_kills_all_who_run_it_is_given_up(tmp_path, monkeypatch):
    oracle = durable(keras_tuner.oracles.RandomSearchOracle)("val_loss", max_trials=2, seed=1)
    hypermodel = HyperTransfer(2, backbones={"base": tiny()}, input_shape=(8, 8, 3))
    DurableTuner(oracle, hypermodel, directory=tmp_path)
    # A search of one process counts none: what was cut off in it is no death.
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    got = [oracle.create_trial("tuner0") for _ in range(4)]
    assert [trial.trial_id for trial in got] == ["0", "0", "0", "1"]
    assert oracle.trials["0"].status == "FAILED"
    assert oracle.end_order == ["0"]
    (outcome,) = records.outcomes(tmp_path / "search")
    assert outcome["error"] == "The process that ran it died, 3 times."
    # Another's deaths are not those of this worker's trial.
    assert oracle.create_trial("tuner0").trial_id == "1"
    assert oracle.create_trial("tuner1").status == "STOPPED"


def tiny():
    return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])


@pytest.mark.slow
def test_workers_that_a_trial_kills(tmp_path):
    scene = Scene(tmp_path)
    scene.options["dies"] = True
    scene.run()
    scene.check("The process that ran it died")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "funnel"])
@pytest.mark.parametrize("names", [["tuner0"], ["chief"], ["tuner2", "chief", "tuner2", "chief"]])
def test_kills(tmp_path, kind, names):
    scene = Scene(tmp_path, kind)
    scene.run(*(scene.kill(name) for name in names))
    scene.check(trials=TRIALS if kind == "random" else len(scene.state()["start_order"]))


@pytest.mark.slow
def test_a_killed_supervisor_takes_all_along_and_the_search_goes_on(tmp_path):
    scene = Scene(tmp_path)
    code = (
        "import sys; from keras_xfer.tuner.workers import run_workers;"
        "run_workers(sys.argv[2:], 3, logs=sys.argv[1])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "logs"), *scene.command()]
    )
    until = time.monotonic() + 120
    while len(scene.ended()) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while scene.alive():
        assert time.monotonic() < until
        time.sleep(0.05)
    before = scene.ended()
    scene.run()
    scene.check()
    assert scene.ended()[: len(before)] == before
