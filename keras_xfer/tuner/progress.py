"""The progress of a search: a line for each trial that ends, the best so far, the time left."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_xfer.tuner import records


class SearchProgress:
    """Tells of each trial that has ended since it was last asked, whichever process ran it.

    Args:
        project: path of the search's project folder.
        objective: KerasTuner's objective.
        planned: how many trials each round has; None where that is not known.
        workers: int, how many run trials at the same time.
        say: function that takes a line.

    Attributes:
        num_ended: int, trials that have ended, of which it has told.
    """

    def __init__(
        self,
        project: Path,
        objective: Any,
        planned: Sequence[int] | None,
        *,
        workers: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self._project = project
        self._objective = objective
        self._planned = planned
        self._workers = workers
        self._say = say
        self._told: dict[str, dict[str, Any]] = {}
        # What an earlier call of the same search did is no news.
        self._told.update((each["trial"], each) for each in records.outcomes(project))

    @property
    def num_ended(self) -> int:
        """How many trials have ended."""
        return len(self._told)

    def update(self) -> None:
        """Tell of what has ended."""
        for outcome in records.outcomes(self._project):
            if outcome["trial"] not in self._told:
                self._told[outcome["trial"]] = outcome
                self._say(self._line(outcome))

    def seconds_left(self) -> float | None:
        """What the remaining trials will take, by what those of their round took; None where that
        cannot be told yet."""
        if self._planned is None:
            return None
        left = 0.0
        for number, count in enumerate(self._planned):
            taken = [each["seconds"] for each in self._told.values() if each["round"] == number]
            if len(taken) < count:
                if not taken:
                    return None
                left += (count - len(taken)) * sum(taken) / len(taken)
        return left / self._workers

    def _line(self, outcome: dict[str, Any]) -> str:
        of = "" if self._planned is None else f" of {sum(self._planned)}"
        text = f"Trial {len(self._told)}{of}"
        if outcome["status"] == "failed":
            reason = outcome["error"].strip().splitlines()[-1] if outcome["error"] else "?"
            text += f", failed: {reason[:200]}"
        else:
            text += f", {outcome['stage']}: {self._objective.name} {outcome['score']:.4g}"
        best = self._best()
        if best is not None:
            text += f"; best {best['score']:.4g} (trial {best['trial']})"
        text += f"; {_time(outcome['seconds'])}"
        left = self.seconds_left()
        return text if not left else f"{text}, about {_time(left)} left"

    def _best(self) -> dict[str, Any] | None:
        scored = [each for each in self._told.values() if not math.isnan(each["score"])]
        pick = max if self._objective.direction == "max" else min
        return pick(scored, key=lambda each: each["score"], default=None)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
