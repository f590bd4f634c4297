"""The chief as a worker sees it: gone for a while, or that of another search.

Tried on keras-tuner 1.4.8, in which
- a worker says nothing while it trains, so that a chief that comes back takes it for dead;
- whatever goes wrong with a call to the chief is the failure of the trial;
- a worker takes trials from whichever chief listens at its port, and tells it of any.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras_tuner

# How often a worker says that it is at its trial, and looks for a chief that is gone.
BEAT_SECONDS = 5.0
# How long a worker repeats a call that broke off. (One that finds no chief waits an hour for it, by
# KerasTuner.)
_PATIENCE_SECONDS = 300.0
_PAUSE_SECONDS = 0.2
# How long what the chief has written may not be seen on a shared disk.
_LAG_SECONDS = 60.0


class PatientClient:
    """A worker's view of the oracle, which asks again where the chief is gone for a while.

    A call that comes to nothing all the same ends the worker, and not the trial alone: the trial is
    run again when the worker is started again, and has not failed.

    Args:
        client: KerasTuner's client.
    """

    def __init__(self, client: Any) -> None:
        import grpc  # keras-tuner's own requirement

        self._client = client
        self._oracle = vars(client)["_oracle"]  # as in KerasTuner's own client
        self.multi_worker = False
        self.should_report = True
        # By itself a channel looks ever more seldom for a chief that is gone, up to two minutes
        # apart: it would find the worker silent that long when it is back.
        pause = int(1000 * BEAT_SECONDS)
        options = [(f"grpc.{end}_reconnect_backoff_ms", pause) for end in ("min", "max")]
        client.stub = type(client.stub)(grpc.insecure_channel(_where(), options=options))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return _patient(value, name) if callable(value) else value

    @contextlib.contextmanager
    def at_work(self, trial_id: str) -> Iterator[None]:
        """Tell the chief, for as long as the block runs, that this worker is at a trial.

        Args:
            trial_id: str, of the trial.
        """
        import grpc

        over = threading.Event()

        def tell() -> None:
            while not over.wait(BEAT_SECONDS):
                with contextlib.suppress(grpc.RpcError):  # the calls of the trial will say it
                    self._client.get_trial(trial_id)

        # It is not waited for: where the chief is gone it waits for that.
        threading.Thread(target=tell, name="at work", daemon=True).start()
        try:
            yield
        finally:
            over.set()


def check_given(path: Path, values: Mapping[str, Any]) -> None:
    """Raise if the chief gave a trial that is not one of this folder.

    The chief writes a trial's file before it gives the trial away.

    Args:
        path: path of the trial's `trial.json` in this worker's folder.
        values: the values that the chief gave.

    Raises:
        keras_tuner.errors.FatalError: the file is not there, or holds others.
    """
    until = time.monotonic() + _LAG_SECONDS
    while not is_of(_written(path), values):
        if time.monotonic() > until:
            raise keras_tuner.errors.FatalRuntimeError(
                f"Expected in {path} the trial that the chief at {_where()} gave. Received: none, "
                "or another. The chief is that of another search, or this worker has another "
                "folder: give it the chief's, on a disk that both share."
            )
        time.sleep(_PAUSE_SECONDS)


def check_known(trial: Any, values: Mapping[str, Any]) -> None:
    """Raise if a trial, as the chief has it, is not the one that this worker was given.

    Args:
        trial: KerasTuner's `Trial`, as the chief has it.
        values: the values that the chief gave.

    Raises:
        keras_tuner.errors.FatalError: it has others.
    """
    if not is_of(trial.hyperparameters.values, values):
        raise keras_tuner.errors.FatalRuntimeError(
            f"Expected the chief at {_where()} to know trial {trial.trial_id!r} as it gave it. "
            f"Received: values={trial.hyperparameters.values!r} in place of {dict(values)!r}. It is "
            "that of another search, or of one begun anew. Start this worker again."
        )


def is_of(held: Mapping[str, Any] | None, values: Mapping[str, Any]) -> bool:
    """Whether what is held of a trial is of these values; its build may have added others."""
    return held is not None and values.items() <= held.items()


def _written(path: Path) -> dict[str, Any] | None:
    """The values in a `trial.json` as a chief would give them, whose floats are single."""
    try:
        config = json.loads(path.read_text("utf-8"))["hyperparameters"]
    except (OSError, ValueError):  # not there yet, or replaced on another machine just now
        return None
    proto = keras_tuner.HyperParameters.from_config(config).to_proto()
    values: dict[str, Any] = keras_tuner.HyperParameters.from_proto(proto).values
    return values


def _patient(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    import grpc

    gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

    def asking(*args: Any, **kwargs: Any) -> Any:
        until = None
        while True:
            try:
                return call(*args, **kwargs)
            except grpc.RpcError as error:
                # From here on: to wait for the chief is no part of it.
                until = until or time.monotonic() + _PATIENCE_SECONDS
                if error.code() not in gone or time.monotonic() > until:
                    raise keras_tuner.errors.FatalRuntimeError(
                        f"Expected an answer of the chief at {_where()} to {name}(). Received: "
                        f"{error.code().name}, {error.details()}. Look into what the chief says, "
                        "start it again, and then this worker: it goes on with the trial that it "
                        "had."
                    ) from error
                time.sleep(_PAUSE_SECONDS)

    return asking


def _where() -> str:
    return f"{os.environ['KERASTUNER_ORACLE_IP']}:{os.environ['KERASTUNER_ORACLE_PORT']}"
