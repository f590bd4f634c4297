"""`SearchResult`: what a search found."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from keras_xfer import files
from keras_xfer.reports.trials import reason
from keras_xfer.tuner import records

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TRIALS = "trials.csv"
TRIAL_EPOCHS = "trial_epochs.csv"
BEST_MODEL = "best_model.keras"


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        trials: DataFrame of one row a candidate: `trial`, `stage` (how far it came), `status`
            (`"completed"`, `"failed"` or `"interrupted"`), `objective`, `direction`, `score`,
            `best_epoch` (from 0), `epochs`, `seconds`, its hyperparameters as `hp.*`, `error` (the
            traceback). It is in `trials.csv` too.
        epochs: DataFrame of one row an epoch: `trial`, `execution`, `epoch`, `stage` and the logs.
            It is in `trial_epochs.csv` too.
        best_hyperparameters: `keras_tuner.HyperParameters` of the best trial.
        best_score: float, its objective.
        best_model_path: path of the best model, a `.keras` file.
        interrupted: bool, whether the search was ended by Ctrl-C.

    Example:

    >>> import pandas as pd
    >>> row = {"objective": "val_accuracy", "direction": "max", "score": 0.9, "status": "completed"}
    >>> trials = pd.DataFrame([{"trial": "00", "stage": "head", **row, "hp.dropout": 0.1}])
    >>> result = SearchResult(trials, trials, None, 0.9, Path("best.keras"), False)
    >>> len(result.plot_objective().axes)
    1

    Reference:
        https://keras.io/guides/keras_tuner/getting_started/
    """

    trials: "pd.DataFrame"
    epochs: "pd.DataFrame"
    best_hyperparameters: Any
    best_score: float
    best_model_path: Path
    interrupted: bool

    def load_best_model(self) -> keras.Model:
        """Load the best model, images of range [0, 255] in.

        It is loaded with `safe_mode=True`: one that holds a HubModule, which runs a SavedModel's
        code, is for `keras.saving.load_model(result.best_model_path, safe_mode=False)`.
        """
        return keras.saving.load_model(self.best_model_path)

    def plot_objective(self) -> "Figure":
        """Draw the objective of each trial in the order in which they began, and the best so far."""
        from keras_xfer.reports import plot_objective

        return plot_objective(self.trials)

    def plot_parallel_coordinates(self) -> "Figure":
        """Draw each trial as a line through its hyperparameters to its objective."""
        from keras_xfer.reports import plot_parallel_coordinates

        return plot_parallel_coordinates(self.trials)


def search_result(tuner: Any, folder: Path, *, interrupted: bool = False) -> SearchResult:
    """Gather what a search found, and write its tables and its best model.

    Args:
        tuner: a `DurableTuner`, no worker.
        folder: path, where the files go.
        interrupted: bool, whether it was ended before its end.

    Returns:
        SearchResult.

    Raises:
        RuntimeError: no trial came to an end.
        KeyboardInterrupt: nor had one, when it was interrupted.
    """
    table, epochs = write_tables(tuner, folder)
    best = best_trial(tuner)
    if best is None:
        if interrupted:
            raise KeyboardInterrupt("Interrupted before the first trial was over")
        failed = table[table["status"] == "failed"]
        first = failed["error"].iloc[0].strip() if len(failed) else "there was no trial"
        raise RuntimeError(
            f"Expected a trial to come to an end. Received: {len(failed)} that failed, the first by "
            f"{reason(first)}. Mend it and call again, which begins anew; {folder / TRIALS} holds all "
            f"errors, the first of them:\n{first}"
        )
    model = tuner.load_model(best)
    with files.replacing(folder / BEST_MODEL) as temporary:
        model.save(temporary)
    return SearchResult(
        table, epochs, best.hyperparameters, float(best.score), folder / BEST_MODEL, interrupted
    )


def write_tables(tuner: Any, folder: Path) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Write `trials.csv` and `trial_epochs.csv`.

    Args:
        tuner: a `DurableTuner`, no worker.
        folder: path, where they go.

    Returns:
        tuple of the two, see `SearchResult`.
    """
    trials, project = tuner.oracle.trials, Path(tuner.project_dir)
    table = records.trials_table(project, trials, tuner.oracle.objective)
    epochs = records.epochs_table(project, trials)
    files.write_text(folder / TRIALS, table.to_csv(index=False))
    files.write_text(folder / TRIAL_EPOCHS, epochs.to_csv(index=False))
    return table, epochs


def best_trial(tuner: Any) -> Any:
    """Return the best trial of those that came to an end, the first of equals; None if none has.

    Args:
        tuner: a `DurableTuner`, no worker.

    Returns:
        KerasTuner's `Trial`, or None.
    """
    sign = -1 if tuner.oracle.objective.direction == "max" else 1
    completed = [trial for trial in tuner.oracle.trials.values() if trial.status == "COMPLETED"]
    return min(completed, key=lambda each: (sign * each.score, each.trial_id), default=None)
