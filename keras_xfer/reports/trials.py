"""The trials of a hyperparameter search: read, ranked, and what differs between them."""

import os
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_xfer.extras import require

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ["trial", "status", "objective", "direction", "score"]
_TEXTS = ["trial", "stage", "status", "objective", "direction", "error"]
_NUMBERS = ["score", "best_epoch", "epochs", "seconds"]
_PREFIX = "hp."
NOT_ACTIVE = "\N{EN DASH}"  # what stands for the value of a hyperparameter that was not active


class Hyperparameter(NamedTuple):
    """One column of trials: numbers, or names where one value is not a number.

    `numbers` is NaN and `names` is `None` in a trial where the hyperparameter was not active.
    """

    name: str
    numbers: np.ndarray | None
    names: list[str | None]

    @property
    def varies(self) -> bool:
        """Whether any two trials differ in it."""
        return len(set(self.names)) > 1


def read_trials(trials: Any) -> "pd.DataFrame":
    """Take trials as a table or from the file `trials.csv`, and give every column its type.

    What may be empty is an empty string in a column of text, and NaN in one of numbers.
    Hyperparameters are columns of str, and `None` where one was not active.
    """
    pd = require("pandas")
    source = "trials"
    if isinstance(trials, str | os.PathLike):
        source = os.fspath(trials)
        try:
            # A backbone may be called "NA".
            table = pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8")
        except pd.errors.EmptyDataError:
            table = pd.DataFrame(columns=NEEDED)
    else:
        table = pd.DataFrame(trials).reset_index(drop=True)
    missing = [column for column in NEEDED if column not in table]
    if missing:
        raise ValueError(
            f"Expected the trials of a search, with the columns {NEEDED}; {missing} are missing. "
            f"Received: {source!r} with the columns {list(table)}. Give the trials.csv that the "
            "search wrote, or a DataFrame of it."
        )
    columns: dict[str, Any] = {}
    for column in _TEXTS:
        values = table[column] if column in table else [""] * len(table)
        columns[column] = ["" if pd.isna(value) else str(value) for value in values]
    for column in _NUMBERS:
        values = table[column] if column in table else np.full(len(table), np.nan)
        columns[column] = pd.to_numeric(pd.Series(values), errors="coerce").astype(float)
    for column in table:
        if str(column).startswith(_PREFIX):
            values = [
                None if pd.isna(value) or value == "" else str(value) for value in table[column]
            ]
            columns[str(column)] = pd.Series(values, dtype=object)
    table = pd.DataFrame(columns)
    directions = set(table["direction"])
    if len(table) and not (len(directions) == 1 and directions <= {"max", "min"}):
        raise ValueError(
            "Expected the column 'direction' to be 'max' in all rows, or 'min' in all rows. "
            f"Received: {source!r} with {sorted(directions)}. Give the trials of one search."
        )
    return table


def has_score(table: "pd.DataFrame") -> "pd.Series[bool]":
    """Mark the completed trials whose score is a number."""
    return (table["status"] == "completed") & np.isfinite(table["score"])


def ranked(table: "pd.DataFrame") -> "pd.DataFrame":
    """Sort the completed trials, the best first; of equal ones the earlier."""
    completed = table[has_score(table)]
    lower_first = (completed["direction"] == "min").all()
    return completed.sort_values("score", ascending=bool(lower_first), kind="stable")


def require_completed(table: "pd.DataFrame") -> None:
    """Raise the ValueError of a search without a result."""
    if has_score(table).any():
        return
    raise ValueError(
        "Expected at least one trial with the status 'completed' and a finite score. Received: "
        f"{left_out(table) or 'no trials'}. Draw them when a trial has completed; the column "
        "'error' says why one failed."
    )


def left_out(table: "pd.DataFrame") -> str:
    """Count the trials that have no score to compare: `2 failed, 1 running`."""
    rest = table[~has_score(table)]
    counts = Counter(
        "completed without a score" if status == "completed" else status or "without a status"
        for status in rest["status"]
    )
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def hyperparameters(table: "pd.DataFrame") -> list[Hyperparameter]:
    """Read the columns `hp.…`, in their order."""
    pd = require("pandas")
    found = []
    for column in table:
        if str(column).startswith(_PREFIX):
            names: list[str | None] = [
                None if pd.isna(value) else str(value) for value in table[column]
            ]
            active = np.array([name is not None for name in names], bool)
            numbers = pd.to_numeric(pd.Series(names, dtype=object), errors="coerce").to_numpy(float)
            is_number = bool(np.isfinite(numbers[active]).all())
            found.append(
                Hyperparameter(str(column)[len(_PREFIX) :], numbers if is_number else None, names)
            )
    return found


def failures(table: "pd.DataFrame") -> list[tuple[str, int]]:
    """List what the failed trials say, and how many say it, the most frequent first."""
    failed = table[table["status"] == "failed"]
    return Counter(reason(error) for error in failed["error"]).most_common()


def reason(error: str) -> str:
    """Return the line that names the exception: of a traceback the first one after its frames."""
    lines = [line.rstrip() for line in error.splitlines() if line.strip()]
    headers = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    if headers:  # of a chain of exceptions the last is the one that was raised
        lines = [line for line in lines[headers[-1] + 1 :] if not line.startswith(" ")] or lines
    return lines[0].strip() if lines else ""
