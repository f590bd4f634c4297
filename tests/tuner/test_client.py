"""A worker whose chief is gone for a while, or is that of another search."""

import json
import threading
import time
from concurrent import futures

import grpc
import keras
import keras_tuner
import pytest
from keras_tuner.src import protos
from keras_tuner.src.distribute.oracle_chief import OracleServicer

from keras_xfer.tuner import DurableTuner, client, durable
from tests.tuner import hypermodels

FatalError = keras_tuner.errors.FatalError
SPACE = {**hypermodels.FIXED, "learning_rate": (0.001, 0.1), "head_epochs": 1}


@pytest.fixture
def at(monkeypatch):
    """Makes this process a worker of the chief at a port."""

    def worker(port):
        monkeypatch.setenv("KERASTUNER_TUNER_ID", "tuner0")
        monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
        monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(port))

    return worker


@pytest.fixture
def chief(at):
    """Serves an oracle, as KerasTuner's chief does; returns what serves it."""
    servers = []

    def serve(oracle):
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
        servicer = OracleServicer(oracle)
        protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
        at(server.add_insecure_port("127.0.0.1:0"))
        server.start()
        servers.append(server)
        return servicer

    yield serve
    for server in servers:
        server.stop(None).wait()


def tuner(folder, seed=1, max_trials=1):
    oracle = durable(keras_tuner.oracles.RandomSearchOracle)(
        objective="val_loss", max_trials=max_trials, seed=seed
    )
    made = hypermodels.hypermodel(space=SPACE, max_stages=1)
    return DurableTuner(oracle, made, directory=folder, seed=1)


def search(made, at_epoch_end=None):
    x, y = hypermodels.data(16)
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=at_epoch_end)] if at_epoch_end else []
    made.search(x, y, validation_data=(x, y), batch_size=8, verbose=0, callbacks=callbacks)


# --- Whose trial it is -----------------------------------------------------------------------


def test_a_worker_and_its_chief(tmp_path, chief):
    """What comes over the wire is rounded to single precision, what is on the disk is not."""
    oracle = tuner(tmp_path, max_trials=2).oracle
    chief(oracle)
    search(tuner(tmp_path, max_trials=2))
    assert [trial.status for trial in oracle.trials.values()] == ["COMPLETED"] * 2


@pytest.mark.parametrize("has_trial", [False, True])
def test_the_chief_of_another_search(tmp_path, chief, monkeypatch, has_trial):
    """It came up at the same port; nothing of its trials is run here."""
    monkeypatch.setattr(client, "_LAG_SECONDS", 0.0)
    if has_trial:
        tuner(tmp_path / "mine", seed=2).oracle.create_trial("tuner0")
    oracle = tuner(tmp_path / "theirs").oracle
    chief(oracle)
    with pytest.raises(FatalError, match="that of another search"):
        search(tuner(tmp_path / "mine"), lambda epoch, logs: pytest.fail("it trains"))
    assert oracle.trials["0"].status == "RUNNING"
    assert not list((tmp_path / "mine").rglob("outcome.json"))


def test_what_a_shared_disk_shows_late(tmp_path, chief):
    chief(tuner(tmp_path).oracle)
    made = tuner(tmp_path)
    path = tmp_path / "search" / "trial_0" / "trial.json"
    trial = made.oracle.create_trial("tuner0")
    content = path.read_text()
    path.unlink()
    threading.Timer(0.3, path.write_text, [content]).start()
    client.check_given(path, trial.hyperparameters.values)
    assert path.exists()


def test_the_chief_of_another_search_while_it_trained(tmp_path, chief):
    mine, theirs = (tuner(tmp_path / name, seed=n).oracle for n, name in enumerate("ab"))
    theirs.create_trial("tuner0")
    serving = chief(mine)
    with pytest.raises(FatalError, match="to know trial '0' as it gave it"):
        search(tuner(tmp_path / "a"), lambda epoch, logs: setattr(serving, "oracle", theirs))
    assert not theirs.trials["0"].metrics.exists("val_loss")
    assert theirs.trials["0"].status == "RUNNING"
    assert not list(tmp_path.rglob("outcome.json"))


def test_a_failure_of_what_another_worker_has_ended(tmp_path, chief):
    """Both had the trial: its outcome stays that of the one that completed it."""
    oracle = tuner(tmp_path).oracle
    chief(oracle)
    outcome = tmp_path / "search" / "trial_0" / "outcome.json"

    def ended_by_another(epoch, logs):
        outcome.write_text(json.dumps({"of": "the other"}))
        oracle.update_trial("0", {"val_loss": 0.5})
        trial = oracle.trials["0"]
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
        raise RuntimeError("out of memory")

    search(tuner(tmp_path), ended_by_another)
    assert json.loads(outcome.read_text()) == {"of": "the other"}
    assert (oracle.trials["0"].status, oracle.trials["0"].score) == ("COMPLETED", 0.5)


# --- A chief that is gone --------------------------------------------------------------------


class Broken(grpc.RpcError):
    def __init__(self, code):
        super().__init__()
        self._code = grpc.StatusCode[code]

    def code(self):
        return self._code

    def details(self):
        return "made up"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_a_call_is_repeated_however_long_it_waited(at, later, code):
    at(1)
    errors = [Broken(code), Broken(code)]

    def call(trial):
        if errors:
            later(3600 if len(errors) == 2 else 1)  # KerasTuner's, for a chief to come
            raise errors.pop()
        return f"{trial} ended"

    assert client._patient(call, "end_trial")("7") == "7 ended"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN"])
def test_what_comes_to_nothing_ends_the_worker_and_not_its_trial(at, later, code):
    at(1)
    calls = []

    def call():
        calls.append(later(200))
        raise Broken(code)

    with pytest.raises(FatalError, match=f"127.0.0.1:1 to end_trial.*Received: {code}, made up"):
        client._patient(call, "end_trial")()
    assert len(calls) == (1 if code == "UNKNOWN" else 3)


class Client:
    """In place of KerasTuner's."""

    class Stub:
        def __init__(self, channel):
            self.channel = channel

    def __init__(self):
        self._oracle, self.stub, self.told = None, self.Stub(None), []

    def get_trial(self, trial_id):
        self.told.append(trial_id)
        raise Broken("UNAVAILABLE")  # which is for the calls of the trial to say


def test_a_worker_says_that_it_is_at_its_trial(at, monkeypatch):
    at(1)
    monkeypatch.setattr(client, "BEAT_SECONDS", 0.01)
    its = Client()
    until = time.monotonic() + 10
    with client.PatientClient(its).at_work("7"):
        while len(its.told) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
    time.sleep(0.05)
    told = list(its.told)
    assert set(told) == {"7"}
    time.sleep(0.05)
    assert its.told == told  # no longer
