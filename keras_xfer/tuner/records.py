"""The record of a search: one row a trial, one row an epoch."""

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_xfer import files
from keras_xfer.extras import require

if TYPE_CHECKING:
    import pandas as pd

OUTCOME = "outcome.json"
EPOCHS = "epochs.csv"
FILES = (OUTCOME, EPOCHS)
HYPERPARAMETER = "hp."
_OWN = "tuner/"  # what tuners add to the hyperparameters of a trial
_STAGES = ("head", "fine-tuning")
_NO_NUMBER = "The objective is not a number."


def write_success(folder: Path, trial: Any, objective: Any, results: Any, seconds: float) -> None:
    """Write what a trial did.

    Args:
        folder: path of the trial's folder.
        trial: KerasTuner's `Trial`.
        objective: KerasTuner's objective.
        results: list of History, one an execution.
        seconds: float, that the trial took.
    """
    rows = [row for number, each in enumerate(results) for row in _epochs(number, each)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(folder / EPOCHS, text.getvalue())
    stage = max((int(row.get("stage", 0)) for row in rows), default=0)
    best = _best(results, objective)
    failed = math.isnan(best["score"])  # as KerasTuner takes it
    files.write_json(
        folder / OUTCOME,
        {
            **_who(folder, trial),
            "status": "failed" if failed else "completed",
            "stage": _STAGES[min(stage, 1)],
            **best,
            "epochs": len({row["epoch"] for row in rows}),
            "seconds": seconds,
            "error": _NO_NUMBER if failed else "",
        },
    )


def write_failure(folder: Path, trial: Any, seconds: float, error: str) -> None:
    """Write why a trial failed.

    Args:
        folder: path of the trial's folder.
        trial: KerasTuner's `Trial`.
        seconds: float, until then.
        error: str, the traceback.
    """
    outcome = {**_who(folder, trial), "status": "failed", "stage": "", "score": math.nan}
    outcome |= {"best_epoch": None, "epochs": 0, "seconds": seconds, "error": error}
    files.write_json(folder / OUTCOME, outcome)


def _who(folder: Path, trial: Any) -> dict[str, Any]:
    """A trial, and the candidate that it is a round of, which the tables name."""
    values = trial.hyperparameters.values
    candidate = trial.trial_id
    if values.get("tuner/trial_id"):
        parent = folder.parent / f"trial_{values['tuner/trial_id']}" / OUTCOME
        candidate = _read_outcome(parent)["candidate"] if parent.exists() else candidate
    return {
        "trial": trial.trial_id,
        "candidate": candidate,
        "round": values.get("tuner/round", 0),
    }


def outcomes(project: Path) -> list[dict[str, Any]]:
    """What the trials did that are over, in the order in which they ended.

    Args:
        project: path of the search's project folder.

    Returns:
        list of dict.
    """
    found = []
    for path in project.glob(f"trial_*/{OUTCOME}"):
        with contextlib.suppress(FileNotFoundError):  # of a trial that just now begins anew
            found.append((path.stat().st_mtime, path.parent.name, _read_outcome(path)))
    return [outcome for _, _, outcome in sorted(found, key=lambda each: each[:2])]


def trials_table(project: Path, trials: Mapping[str, Any], objective: Any) -> "pd.DataFrame":
    """One row a candidate: what a trial and those that went on from it came to.

    Args:
        project: path of the search's project folder.
        trials: KerasTuner's `Trial` by id.
        objective: KerasTuner's objective.

    Returns:
        DataFrame: `trial`, `stage`, `status`, `objective`, `direction`, `score`, `best_epoch` (from
        0), `epochs`, `seconds`, `hp.*`, `error`.
    """
    pd = require("pandas")
    rows: dict[str, dict[str, Any]] = {}
    lineages = lineage(trials)
    for trial_id, trial in sorted(trials.items()):
        first = lineages[trial_id][0]
        outcome = _outcome(project, trial)
        row = rows.setdefault(
            first,
            {
                "trial": first,
                "stage": "",
                "status": "",
                "objective": objective.name,
                "direction": objective.direction,
                "score": math.nan,
                "best_epoch": None,
                "epochs": 0,
                "seconds": 0.0,
                "error": "",
            },
        )
        row |= hyperparameters(trial)  # a finalist has others of what acts once the backbone thaws
        if row["status"] != "completed":  # what failed later is told by `error` and `stage`
            row["status"] = outcome["status"]
        row["stage"] = outcome["stage"] or row["stage"]
        row["epochs"] += outcome["epochs"]
        row["seconds"] += outcome["seconds"]
        row["error"] = outcome["error"] or row["error"]
        if _is_better(outcome["score"], row["score"], objective.direction):
            row["score"], row["best_epoch"] = outcome["score"], outcome["best_epoch"]
    names = sorted({n for row in rows.values() for n in row if n.startswith(HYPERPARAMETER)})
    columns = ["trial", "stage", "status", "objective", "direction", "score", "best_epoch"]
    columns += ["epochs", "seconds", *names, "error"]
    table = pd.DataFrame([rows[key] for key in sorted(rows)], columns=columns)
    return table.astype({"best_epoch": "Int64"})


def epochs_table(project: Path, trials: Mapping[str, Any]) -> "pd.DataFrame":
    """One row an epoch of each candidate, as `trial` of `trials_table` names it.

    Args:
        project: path of the search's project folder.
        trials: KerasTuner's `Trial` by id.

    Returns:
        DataFrame: `trial`, `execution`, `epoch` (from 0), `stage`, and the logs, of a metric that is a
        vector its mean.
    """
    pd = require("pandas")
    parts = []
    for trial_id, ancestors in sorted(lineage(trials).items()):
        path = project / f"trial_{trial_id}" / EPOCHS
        if path.exists():
            part = pd.read_csv(path)
            part.insert(0, "trial", ancestors[0])
            parts.append(part)
    if not parts:
        return pd.DataFrame(columns=["trial", "execution", "epoch"])
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values(["trial", "execution", "epoch"], ignore_index=True)


def read(project: Path, trial_id: str) -> dict[str, Any]:
    """What one trial did, that is over."""
    return _read_outcome(project / f"trial_{trial_id}" / OUTCOME)


def history(project: Path, trials: Mapping[str, Any], trial_id: str) -> list[dict[str, Any]]:
    """The epochs of a trial and of those that it went on from, the first execution of each.

    Args:
        project: path of the search's project folder.
        trials: KerasTuner's `Trial` by id.
        trial_id: str.

    Returns:
        list of dict, one an epoch: `epoch` (from 0), `stage` and the logs.
    """
    rows = []
    for ancestor in lineage(trials)[trial_id]:
        with (project / f"trial_{ancestor}" / EPOCHS).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.pop("execution") == "0":
                    rows.append({name: _number(text) for name, text in row.items()})
    return sorted(rows, key=lambda row: row["epoch"])


def hyperparameters(trial: Any) -> dict[str, Any]:
    """The hyperparameters of a trial that act in it, by their names in the table."""
    values = trial.hyperparameters.values
    return {
        HYPERPARAMETER + name: value
        for name, value in values.items()
        if not name.startswith(_OWN) and trial.hyperparameters.is_active(name)
    }


def lineage(trials: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each trial with those that it went on from, the first of them first."""
    found: dict[str, list[str]] = {}
    for trial_id in sorted(trials):
        parent = trials[trial_id].hyperparameters.values.get("tuner/trial_id")
        found[trial_id] = [*found[parent], trial_id] if parent in found else [trial_id]
    return found


def _epochs(number: int, history: Any) -> Iterator[dict[str, Any]]:
    for index, epoch in enumerate(history.epoch):
        logs = {
            # Of a metric that is a vector (F1Score) the mean, as KerasTuner writes it.
            name: float(np.mean(np.asarray(values[index])))
            for name, values in history.history.items()
            if index < len(values)
        }
        if "stage" in logs:
            logs["stage"] = int(logs["stage"])
        yield {"execution": number, "epoch": epoch, **logs}


def _best(results: Sequence[Any], objective: Any) -> dict[str, Any]:
    """The mean over executions of each one's best value, as KerasTuner scores a trial."""
    scores, epochs = [], []
    for history in results:
        logs = history.history
        values = [
            objective.get_value({name: each[i] for name, each in logs.items() if i < len(each)})
            for i in range(len(history.epoch))
        ]
        known = [(value, i) for i, value in enumerate(values) if not math.isnan(value)]
        if known:
            pick = max if objective.direction == "max" else min
            value, index = pick(known, key=lambda pair: pair[0])
            scores.append(value)
            epochs.append(history.epoch[index])
    if not scores:
        return {"score": math.nan, "best_epoch": None}
    return {"score": float(np.mean(scores)), "best_epoch": epochs[0] if len(epochs) == 1 else None}


def _outcome(project: Path, trial: Any) -> dict[str, Any]:
    path = project / f"trial_{trial.trial_id}" / OUTCOME
    if path.exists() and trial.status != "RUNNING":
        outcome = _read_outcome(path)
        if trial.status == "FAILED" and outcome["status"] == "completed":
            outcome["status"] = "failed"  # its objective is none, or not a number
            outcome["error"] = trial.message or _NO_NUMBER
        return outcome
    status = {"RUNNING": "interrupted", "COMPLETED": "completed"}.get(trial.status, "failed")
    score = math.nan if trial.score is None else float(trial.score)
    return {
        "status": status,
        "stage": "",
        "score": score,
        "best_epoch": None,
        "epochs": 0,
        "seconds": 0.0,
        "error": trial.message or "",
    }


def _read_outcome(path: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {**outcome, "score": float(outcome["score"]), "seconds": float(outcome["seconds"])}


def _number(text: str) -> float:
    """A number of a CSV file, an int where it is one; NaN where there was none."""
    return int(text) if text.isdecimal() else float(text or "nan")


def _is_better(value: float, than: float, direction: str) -> bool:
    if math.isnan(value):
        return False
    return math.isnan(than) or (value > than if direction == "max" else value < than)
