"""The progress of a search: a line for each trial that ends, the best so far, the time left."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_xfer.reports.trials import reason
from keras_xfer.tuner import records


class SearchProgress:
    """Tells of each trial that has ended since it was last asked, whichever process ran it.

    Args:
        project: path of the search's project folder.
        objective: KerasTuner's objective.
        planned: how many trials each round has, or all of them together; None where that is not
            known.
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

    def seconds_left(self) -> tuple[float, bool] | None:
        """What the remaining trials will take, by what those of their round took.

        Returns:
            the seconds, and whether some trial of each round has told them (else of the last round
            before it, which trains less); None where nothing can be told yet.
        """
        if self._planned is None:
            return None
        left, known, is_sure = 0.0, math.nan, True
        for number, count in enumerate(self._planned):
            taken = [
                each["seconds"]
                for each in self._told.values()
                if each["round"] == number or len(self._planned) == 1
            ]
            if taken:
                known = sum(taken) / len(taken)
            is_sure = is_sure and bool(taken)
            if len(taken) < count:
                left += (count - len(taken)) * known
        return None if math.isnan(left) else (left / self._workers, is_sure)

    def _line(self, outcome: dict[str, Any]) -> str:
        of = "" if self._planned is None else f" of {sum(self._planned)}"
        text = f"Trial {len(self._told)}{of}"
        if outcome["status"] == "failed":
            text += f", failed: {reason(outcome['error'])[:200]}"
        else:
            text += f", {outcome['stage']}: {self._objective.name} {outcome['score']:.4g}"
        best = self._best()
        if best is not None:
            text += f"; best {best['score']:.4g} (trial {best['candidate']})"
        text += f"; {_time(outcome['seconds'])}"
        left, is_sure = self.seconds_left() or (0.0, True)
        return f"{text}, {'about' if is_sure else 'at least'} {_time(left)} left" if left else text

    def _best(self) -> dict[str, Any] | None:
        scored = [each for each in self._told.values() if not math.isnan(each["score"])]
        sign = -1 if self._objective.direction == "max" else 1
        return min(scored, key=lambda each: (sign * each["score"], each["trial"]), default=None)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
