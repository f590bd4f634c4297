"""What a command shows while it works: lines that stay, and one that is written over."""

import math
import sys
from typing import Any, TextIO

import keras


class Screen:
    """A terminal, or a file that takes its place.

    Args:
        stream: Where to write. Defaults to `sys.stdout` as it is when something is written.

    Example:
    >>> Screen().line("Images  100")
    Images  100
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._passing = 0  # letters of the line that is to be written over

    def line(self, text: str = "") -> None:
        """Write a line that stays.

        Args:
            text: The line.
        """
        self.passing("")
        self._write(text + "\n")

    def passing(self, text: str) -> None:
        """Write a line that the next one takes the place of; nothing where there is no terminal.

        Args:
            text: The line.
        """
        if text and not self._out().isatty():
            return
        if self._passing:
            self._write("\r" + " " * self._passing + "\r")
        self._write(text)
        self._passing = len(text)

    def progress(self, what: str) -> "Progress":
        """Return a function of (done, in all) that shows how far something is.

        Args:
            what: What is being done.
        """
        return Progress(self, what)

    def _out(self) -> TextIO:
        return self._stream or sys.stdout

    def _write(self, text: str) -> None:
        if text:
            self._out().write(text)
            self._out().flush()


class Progress:
    """Shows a percentage, whenever it changes."""

    def __init__(self, screen: Screen, what: str) -> None:
        self._screen = screen
        self._what = what
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        """Show the percentage that `done` is of `total`."""
        percent = 100 * done // max(total, 1)
        if percent != self._shown:
            self._shown = percent
            self._screen.passing(f"{self._what} {percent} %")


class EpochLines(keras.callbacks.Callback):
    """Writes a line an epoch, and how far the running one is.

    Args:
        screen: A `Screen`.
        stage_names: List of str, the names of the stages.
    """

    def __init__(self, screen: Screen, stage_names: list[str]) -> None:
        super().__init__()
        self._screen = screen
        self._names = stage_names
        self._epoch = 0
        self._progress: Progress | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Say where `fit_staged` cuts each stage, and why."""
        for name, boundary in zip(self._names, self.params.get("boundaries", ()), strict=False):
            self._screen.line(f"Cache    {name}: {boundary.text}")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Begin a line."""
        self._epoch = epoch
        self._progress = self._screen.progress(f"epoch {epoch + 1}/{self.params['epochs']}")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Show how far the epoch is."""
        if self._progress is not None and self.params.get("steps"):
            self._progress(batch + 1, self.params["steps"])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the line."""
        logs = logs or {}
        total = self.params["epochs"]
        name = self._names[int(logs["stage"])]
        rate = float(logs["samples_per_second"])
        self._screen.line(
            f"epoch {epoch + 1:{len(str(total))}}/{total}"
            f"  {name:{max(map(len, self._names))}}"
            f"  loss {float(logs['loss']):.3f}"
            f"  accuracy {float(logs['accuracy']):6.1%}"
            f"  validation {float(logs['val_accuracy']):6.1%}"
            f"  {seconds(float(logs['epoch_seconds']))}"
            + ("" if math.isnan(rate) else f"  {rate:,.0f} images/s")
        )


def seconds(value: float) -> str:
    """Write a duration as people read it.

    Args:
        value: Float, seconds.

    Returns:
        Str.

    Example:
    >>> seconds(0.123), seconds(12.3), seconds(3725)
    ('0.12 s', '12.3 s', '62 min 05 s')
    """
    if value < 10:
        return f"{value:.2f} s"
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def counted(number: int, what: str, many: str | None = None) -> str:
    """Write a number with its noun.

    Args:
        number: Int.
        what: The noun for one.
        many: The noun for several. Defaults to `what` with an s.

    Returns:
        Str.

    Example:
    >>> counted(1, "image"), counted(2000, "image"), counted(2, "class", "classes")
    ('1 image', '2,000 images', '2 classes')
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"
