"""A chief and its workers on this machine: started, restarted when they die, ended together."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_xfer.lifeline import Lifeline

LOOPBACK = "127.0.0.1"
_EVERYWHERE = {"0.0.0.0": LOOPBACK, "::": "::1", "[::]": "[::1]"}  # noqa: S104  # where to bind
_POLL_SECONDS = 0.25
_MOST_DEATHS = 5
_LAST_LINES = 5
_ENDING_SECONDS = 5.0  # that a process gets to end by itself
_FAREWELL_SECONDS = 5.0  # that a worker gets to ask once more after its last trial, and be told


class WorkerDiedError(RuntimeError):
    """A process of a search died again and again, and no trial ended in between."""


def run_workers(
    command: Sequence[str],
    num_workers: int,
    *,
    logs: str | os.PathLike[str],
    address: str = LOOPBACK,
    port: int | None = None,
    poll: Callable[[], int] | None = None,
    state: str | os.PathLike[str] | None = None,
    most_deaths: int = _MOST_DEATHS,
) -> None:
    """Run a command as the chief of a search and as its workers, until the search is over.

    Each of them gets KerasTuner's environment variables, its own log file, and its share of the
    machine: of the cores, of the GPUs where there are several. The chief gets no GPU. What dies is
    started again under the same id, so that it gets the trial that it had. No process outlives this
    call; nor this process, where the command calls `keras_xfer.lifeline.watch()`.

    Args:
        command: list of str, a program and its arguments, which calls `DurableTuner.search`.
        num_workers: int, how many workers beside the chief.
        logs: str or path of the folder for `chief.log`, `tuner0.log`, ….
        address: str, where the chief listens. Its port asks nobody who they are: whoever reaches it
            can read and write the search. On another address than loopback, workers of other
            machines are waited for. Defaults to `"127.0.0.1"`.
        port: int, where it listens there; None: one that is free.
        poll: function that is called several times a second and returns how many trials have ended.
        state: str or path of the search's `oracle.json`: a worker that joined by hand is waited for,
            on loopback too, while the file says that it is at a trial.
        most_deaths: int, how often one of them may die with no trial ended in between. Defaults to
            5.

    Raises:
        OSError: the chief cannot listen there.
        WorkerDiedError: one died too often. It names the log and its last lines.

    Example:

    >>> import sys, tempfile
    >>> logs = Path(tempfile.mkdtemp())
    >>> code = "import os; print(os.environ['KERASTUNER_TUNER_ID'])"
    >>> run_workers([sys.executable, "-c", code], 2, logs=logs)
    >>> [(logs / f"{name}.log").read_text().strip() for name in ("tuner0", "tuner1")]
    ['tuner0', 'tuner1']

    Reference:
        https://keras.io/guides/keras_tuner/distributed_tuning/
    """
    folder = Path(logs)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(address, port)
    chief_environment = _environment(address, port, "chief")
    chief_environment["CUDA_VISIBLE_DEVICES"] = "-1"
    shares = _shares(num_workers)
    with Lifeline() as lifeline, _terminated_as_exit():
        chief = _Process("chief", command, chief_environment, folder, lifeline)
        workers = [
            _Process(
                f"tuner{i}",
                command,
                {**_environment(_EVERYWHERE.get(address, address), port, f"tuner{i}"), **share},
                folder,
                lifeline,
            )
            for i, share in enumerate(shares)
        ]
        try:
            for process in (chief, *workers):
                process.start()
            while any(not each.has_ended for each in workers) and not chief.has_ended:
                time.sleep(_POLL_SECONDS)
                num_ended = poll() if poll is not None else 0
                for process in (chief, *workers):
                    process.look_after(num_ended, most_deaths)
            # Workers that are not of here may be at their last trials. The chief waits for them, but
            # ends half a minute late: on loopback not without need.
            names = {f"tuner{i}" for i in range(num_workers)}
            until = 0.0 if is_loopback(address) else math.inf
            while not chief.has_ended:
                if state is not None and _others_at_work(Path(state), names):
                    until = max(until, time.monotonic() + _FAREWELL_SECONDS)
                if time.monotonic() >= until:
                    break
                time.sleep(_POLL_SECONDS)
                chief.look_after(poll() if poll is not None else 0, most_deaths)
            if poll is not None:
                poll()
            if chief.has_ended:  # what still waits for it has come too late
                _end([each for each in workers if not each.ends_within(1.0)])
        finally:
            _end([chief, *workers])


def free_port(address: str, port: int | None = None) -> int:
    """Return a port that is free at an address.

    Two chiefs at one port would share it without a word, and with it their workers.

    Args:
        address: str, an address of this machine.
        port: int, the only one that will do; None: any.

    Returns:
        int.

    Raises:
        OSError: that port is taken, or there is no such address here.
    """
    host = address.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As a server would: what a chief that was killed left behind is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port or 0))
        found: int = probe.getsockname()[1]
        return found


def is_loopback(address: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return address in ("localhost", "::1", "[::1]") or address.startswith("127.")


def _others_at_work(state: Path, names: set[str]) -> bool:
    """Whether a worker of another name is at a trial, by what the chief has written."""
    try:
        told = json.loads(state.read_text("utf-8"))
    except FileNotFoundError:
        return False
    # A trial that ended is in the file as if it still ran until the next one begins.
    return any(
        name not in names and trial not in told["end_order"]
        for name, trial in told["ongoing_trials"].items()
    )


class _Process:
    """One of the processes, over all of its lives."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        lifeline: Lifeline,
    ) -> None:
        self.has_ended = False  # by itself, and well
        self._name = name
        self._command = list(command)
        self._environment = environment
        self._log = logs / f"{name}.log"
        self._lifeline = lifeline
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._num_ended = 0  # trials that had ended when it last died

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # the caller's own command
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in a terminal is for the parent, who ends them
                **self._lifeline.arguments(self._environment),
            )

    def look_after(self, num_ended: int, most_deaths: int) -> None:
        """Start it again if it has died."""
        status = None if self._process is None or self.has_ended else self._process.poll()
        if status is None:
            return
        if status == 0:
            self.has_ended = True
            return
        self._deaths = self._deaths + 1 if num_ended == self._num_ended else 1
        self._num_ended = num_ended
        if self._deaths >= most_deaths:
            raise WorkerDiedError(
                f"{self._name} died {self._deaths} times, the last time {_how(status)}, and no "
                f"trial ended in between. The last lines of {str(self._log)!r}:\n{self._tail()}"
            )
        self.start()

    def ends_within(self, seconds: float) -> bool:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return not self.is_alive()

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        lines = self._log.read_text("utf-8", "replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-_LAST_LINES:])


def _end(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + _ENDING_SECONDS
    for process in processes:
        if not process.ends_within(max(0.0, until - time.monotonic())):
            process.kill()


def _how(status: int) -> str:
    if status > 0:
        return f"with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-status).name}"
    return f"by signal {-status}"


def _environment(address: str, port: int, name: str) -> dict[str, str]:
    return {
        **os.environ,
        "KERASTUNER_TUNER_ID": name,
        "KERASTUNER_ORACLE_IP": address,
        "KERASTUNER_ORACLE_PORT": str(port),
        # gRPC would ask the proxy of the environment for its way to this machine.
        "no_grpc_proxy": ",".join({address, LOOPBACK}),
        "PYTHONUNBUFFERED": "1",  # what a killed process had said is in its log
    }


def _shares(num_workers: int) -> list[dict[str, str]]:
    """What each worker gets of this machine, where the user has not said it."""
    # macOS does not tell a process's cores from the machine's.
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
    threads = str(max(1, cores // num_workers))
    usual = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"), threads)
    gpus = _gpus()
    if num_workers > max(1, len(gpus)):  # several on one GPU: none takes all of its memory
        usual |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    share = {name: value for name, value in usual.items() if name not in os.environ}
    if len(gpus) < 2:
        return [share] * num_workers
    return [{**share, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(num_workers)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA has for them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that it ends its children."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:  # noqa: ARG001  # the signature of a handler
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
