"""`run_workers` with commands that take no time, in place of searches."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from keras_xfer.tuner import workers
from keras_xfer.tuner.workers import WorkerDiedError, free_port, is_loopback, run_workers

EVERYWHERE = "0.0.0.0"  # noqa: S104  # what is tested

# What a command may use: its name, the folder that it works in, and how often it was started. As
# the command `keras-xfer` does it loads no framework.
SAYS_WHO = """
import os, pathlib, signal, sys, time
sys.argv[0] = "keras-xfer"
from keras_xfer import lifeline
lifeline.watch()
name, here = os.environ["KERASTUNER_TUNER_ID"], pathlib.Path(sys.argv[1])
lives = len(list(here.glob(f"{name}.life*")))
(here / f"{name}.life{lives}").write_text(str(os.getpid()))
"""


def command(code, here):
    return [sys.executable, "-c", SAYS_WHO + code, str(here)]


def pids(here):
    """Of all that were started, and have written who they are."""
    texts = [path.read_text() for path in Path(here).glob("*.life*")]
    return [int(text) for text in texts if text]


def gone(here, seconds=0.0):
    """Whether none of them is left."""
    until = time.monotonic() + seconds
    while True:
        left = [pid for pid in pids(here) if _is_alive(pid)]
        if not left or time.monotonic() > until:
            return not left
        time.sleep(0.05)


def _is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


SHOWS_ENVIRONMENT = """
names = ["KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "TF_NUM_INTRAOP_THREADS",
         "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
print(*(os.environ.get(each) for each in names), flush=True)
if name == "chief":
    time.sleep(60)
"""


def test_each_gets_its_variables_its_log_and_its_share(tmp_path, monkeypatch):
    for each in ("TF_NUM_INTRAOP_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # what the user says holds
    began = time.monotonic()
    run_workers(command(SHOWS_ENVIRONMENT, tmp_path), 2, logs=tmp_path / "logs")
    assert time.monotonic() - began < 50  # the chief is ended, not waited for
    told = {path.stem: path.read_text().split() for path in (tmp_path / "logs").iterdir()}
    assert set(told) == {"chief", "tuner0", "tuner1"}
    ports = {words[1] for words in told.values()}
    assert len(ports) == 1
    assert int(ports.pop()) > 1023
    assert {words[0] for words in told.values()} == {"127.0.0.1"}
    half = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [told[name][2:4] for name in ("tuner0", "tuner1")] == [[half, "7"]] * 2
    assert told["chief"][4] == "-1"
    assert gone(tmp_path)


def test_cores_are_shared_out_where_a_process_does_not_know_its_own(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [each["TF_NUM_INTRAOP_THREADS"] for each in workers._shares(2)] == ["4", "4"]


def test_gpus_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    run_workers(command(SHOWS_ENVIRONMENT, tmp_path), 3, logs=tmp_path)
    told = [(tmp_path / f"{name}.log").read_text().split()[4] for name in ("tuner0", "tuner1")]
    assert told == ["2", "5"]
    assert (tmp_path / "tuner2.log").read_text().split()[4] == "2"
    assert (tmp_path / "chief.log").read_text().split()[4] == "-1"


def test_what_dies_lives_again_under_its_name(tmp_path):
    code = """
print("life", lives, flush=True)
if name == "chief" and lives:
    time.sleep(60)
if name == "tuner0" and not lives or name == "chief":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "tuner1":
    time.sleep(1.5)
    sys.exit(3 if lives == 0 else 0)
"""
    run_workers(command(code, tmp_path), 2, logs=tmp_path)
    lives = {
        name: len(list(tmp_path.glob(f"{name}.life*"))) for name in ("chief", "tuner0", "tuner1")
    }
    assert lives == {"chief": 2, "tuner0": 2, "tuner1": 2}
    assert (tmp_path / "tuner0.log").read_text().split() == ["life", "0", "life", "1"]
    assert gone(tmp_path)


def test_what_dies_again_and_again_is_given_up_with_its_last_words(tmp_path):
    code = """
if name != "tuner1":
    time.sleep(60)
print("first\\n\\n" + "\\n".join(f"line {i}" for i in range(9)), flush=True)
sys.exit(4)
"""
    with pytest.raises(WorkerDiedError, match="tuner1 died 3 times.*exit status 4") as caught:
        run_workers(command(code, tmp_path), 2, logs=tmp_path, most_deaths=3)
    said = str(caught.value)
    assert str(tmp_path / "tuner1.log") in said
    assert said.splitlines()[1:] == [f"line {i}" for i in range(4, 9)]
    assert len(list(tmp_path.glob("tuner1.life*"))) == 3
    assert gone(tmp_path)


def test_deaths_with_trials_in_between_are_forgiven(tmp_path):
    code = """
if name == "chief":
    time.sleep(60)
(here / "trials").open("a").write("x")
time.sleep(0.6)
sys.exit(1 if lives < 4 else 0)
"""
    trials = tmp_path / "trials"

    def ended():
        return len(trials.read_text()) if trials.exists() else 0

    run_workers(command(code, tmp_path), 1, logs=tmp_path, poll=ended, most_deaths=2)
    assert len(list(tmp_path.glob("tuner0.life*"))) == 5


def test_a_chief_that_is_done_ends_workers_that_come_too_late(tmp_path):
    code = 'time.sleep(0.5 if name in ("chief", "tuner0") else 60)'
    began = time.monotonic()
    run_workers(command(code, tmp_path), 2, logs=tmp_path)
    assert time.monotonic() - began < 50
    assert gone(tmp_path)


def test_what_does_not_want_to_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_xfer.tuner.workers._ENDING_SECONDS", 0.3)
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"{name}.deaf").touch()
if name == "tuner0":
    while not (here / "chief.deaf").exists():
        time.sleep(0.01)
else:
    time.sleep(60)
"""
    run_workers(command(code, tmp_path), 1, logs=tmp_path)
    assert gone(tmp_path)


def test_workers_of_other_machines_are_waited_for(tmp_path):
    """The chief of an address that others reach is not ended with the workers of this machine."""
    code = """
print(os.environ["KERASTUNER_ORACLE_IP"], flush=True)
if name == "chief":
    time.sleep(1.5)
    (here / "done").touch()
"""
    run_workers(command(code, tmp_path), 1, logs=tmp_path, address=EVERYWHERE)
    assert (tmp_path / "done").exists()
    assert (tmp_path / "chief.log").read_text().strip() == EVERYWHERE
    assert (tmp_path / "tuner0.log").read_text().strip() == "127.0.0.1"


def test_a_worker_that_joined_by_hand_is_waited_for(tmp_path, monkeypatch):
    """On loopback too, for as long as the chief has a trial of it."""
    monkeypatch.setattr(workers, "_FAREWELL_SECONDS", 0.2)
    code = """
import json
def tell(ended):
    state = {"ongoing_trials": {"tuner0": "1", "late0": "2"}, "end_order": ended}
    (here / "next").write_text(json.dumps(state))
    (here / "next").rename(here / "oracle.json")
if name == "chief":
    tell(["1"])
    time.sleep(1.5)
    (here / "done").touch()
    tell(["1", "2"])
    time.sleep(60)
while not (here / "oracle.json").exists():
    time.sleep(0.01)
"""
    began = time.monotonic()
    run_workers(command(code, tmp_path), 1, logs=tmp_path, state=tmp_path / "oracle.json")
    assert time.monotonic() - began < 50
    assert (tmp_path / "done").exists()
    assert gone(tmp_path)


def test_an_exception_ends_all(tmp_path):
    class OfTheCaller(Exception):  # noqa: N818
        pass

    def poll():
        if len(pids(tmp_path)) == 3:
            raise OfTheCaller
        return 0

    with pytest.raises(OfTheCaller):
        run_workers(command("time.sleep(60)", tmp_path), 2, logs=tmp_path, poll=poll)
    assert gone(tmp_path)


PARENT = """
import importlib.util, sys
sys.argv[0] = "keras-xfer"
# By its path: the package around it loads KerasTuner.
spec = importlib.util.spec_from_file_location("workers", sys.argv[1])
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)
workers.run_workers(sys.argv[3:], 2, logs=sys.argv[2])
"""


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_children_do_not_outlive_their_parent(tmp_path, way):
    line = [sys.executable, "-c", PARENT, workers.__file__, str(tmp_path)]
    line += command("time.sleep(60)", tmp_path)
    parent = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(pids(tmp_path)) == 3, 60)
    assert all(_is_alive(pid) for pid in pids(tmp_path))
    parent.send_signal(getattr(signal, way))
    status = parent.wait(30)
    assert status == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": -2}[way]
    assert gone(tmp_path, seconds=0.0 if way != "SIGKILL" else 10.0)


def test_ports():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC listens
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1") != port
    assert free_port("127.0.0.1", port) == port
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")  # of the documentation: no machine's


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.1.1", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, (EVERYWHERE, "192.168.0.2", "::", "chief.example.com")))


def test_outside_of_the_main_thread(tmp_path):
    """Where no signals can be handled."""
    done = []
    code = "time.sleep(60 if name == 'chief' else 0)"

    def run():
        run_workers(command(code, tmp_path), 1, logs=tmp_path)
        done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert done
