"""A line that says how far a long piece of work is."""

import sys
import time

# Shorter work is done before anybody asks.
_SILENT_SECONDS = 2.0
_LINE_SECONDS = 10.0  # where lines cannot be overwritten


class Progress:
    """Rows done, rows a second and the time left, on one line of stdout.

    Args:
        what: str, what is done.
        total: int, rows of the whole, or None where nobody knows.
        verbose: `"auto"` (once it takes longer than two seconds), 0 (never) or 1 (always).
    """

    def __init__(self, what: str, total: int | None, verbose: str | int) -> None:
        self._what = what
        self._total = total
        self._begun = time.monotonic()
        now = self._begun
        self._next = {"auto": now + _SILENT_SECONDS, 0: float("inf"), 1: now}[verbose]
        self._shown = False
        self._rows = 0

    def add(self, rows: int) -> None:
        """Count rows that were done."""
        self._rows += rows
        if time.monotonic() >= self._next:
            self._show()

    def close(self) -> None:
        """End the line."""
        if self._shown or self._next <= time.monotonic():
            self._show()
            if sys.stdout.isatty():
                sys.stdout.write("\n")
            sys.stdout.flush()

    def _show(self) -> None:
        now = time.monotonic()
        speed = self._rows / max(now - self._begun, 1e-9)
        line = f"{self._what}: {self._rows:,}"
        if self._total is not None:
            left = (self._total - self._rows) / max(speed, 1e-9)
            line += f"/{self._total:,}"
            ending = f", {_duration(left)} left" if left > 0 else ""
        else:
            ending = ""
        line += f" images, {speed:,.0f} images/s{ending}"
        terminal = sys.stdout.isatty()
        sys.stdout.write(f"\r{line:<78}" if terminal else f"{line}\n")
        sys.stdout.flush()
        self._shown = True
        self._next = now + (0.2 if terminal else _LINE_SECONDS)


def check_verbose(verbose: object) -> None:
    """Refuse what is no choice."""
    if verbose not in ("auto", 0, 1):
        raise ValueError(f"Expected verbose to be 'auto', 0 or 1. Received: verbose={verbose!r}.")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
