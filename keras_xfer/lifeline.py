"""A child process that ends when its parent is gone, however that ended.

What is killed by SIGKILL can end nobody. So the parent holds one end of a pipe and each child
watches the other: when the parent is gone, the kernel closes its end.
"""

import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

_VARIABLE = "KERAS_XFER_LIFELINE"
_STATUS = 70  # of a child that ends so


class Lifeline:
    r"""The parent's end, a context manager.

    Example:

    >>> import subprocess, sys
    >>> code = (
    ...     "import sys; sys.argv[0] = 'keras-xfer'\n"  # which loads no framework
    ...     "from keras_xfer import lifeline; lifeline.watch(); sys.stdin.read()"
    ... )
    >>> with Lifeline() as line:
    ...     arguments = line.arguments(os.environ)
    ...     child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, **arguments)
    >>> child.wait()
    70
    >>> child.stdin.close()
    """

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._write)
        os.close(self._read)

    def arguments(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """What `subprocess.Popen` needs to start a child with this environment."""
        return {"env": {**environment, _VARIABLE: str(self._read)}, "pass_fds": [self._read]}


def is_watched() -> bool:
    """Whether this process is the child of one that holds a `Lifeline`."""
    return _VARIABLE in os.environ


def watch() -> None:
    """In a child: end this process as soon as its parent is gone. Elsewhere, do nothing."""
    if is_watched():
        threading.Thread(
            target=_wait, args=(int(os.environ[_VARIABLE]),), name="lifeline", daemon=True
        ).start()


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):  # which nobody writes to: it returns at the end alone
        pass
    os._exit(_STATUS)
