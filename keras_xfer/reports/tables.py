"""Predictions class by class, as pandas DataFrames; the metrics are scikit-learn's."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_xfer.extras import require
from keras_xfer.reports.predictions import given_predictions

if TYPE_CHECKING:
    import pandas as pd

_SCORES = ["precision", "recall", "f1-score", "support"]
_AVERAGES = ["macro avg", "weighted avg"]


def confusion_table(
    predictions: "pd.DataFrame | str | os.PathLike[str]", class_names: Sequence[str] | None = None
) -> "pd.DataFrame":
    """Count how often each class was taken for each other.

    Args:
        predictions: DataFrame of `predictions_table`, or the path of a `predictions.csv`.
        class_names: Classes and their order. `None`: those that occur, sorted.

    Returns:
        A square DataFrame of counts: one row a label, one column a prediction. Images without a
        prediction are in no column.

    Raises:
        ImportError: pandas is not installed.
        ValueError: A label or prediction is not in `class_names`, or `predictions` holds none.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame({"label": ["a", "a", "b"], "prediction": ["a", "b", "b"]})
    >>> confusion_table(predictions).loc["a"].tolist()
    [1, 1]

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.metrics.confusion_matrix.html
    """
    from sklearn.metrics import confusion_matrix

    pd = require("pandas")
    names, labels, answers = _indices(predictions, class_names)
    counts = np.zeros((len(names), len(names)), int)
    if len(labels):  # scikit-learn refuses none
        with warnings.catch_warnings():
            # It advises to pass `labels`, which it has been, whenever there is one class.
            warnings.filterwarnings("ignore", message="A single label was found")
            counts = confusion_matrix(labels, answers, labels=range(len(names)))
    return pd.DataFrame(
        counts, index=pd.Index(names, name="label"), columns=pd.Index(names, name="prediction")
    )


def classification_table(
    predictions: "pd.DataFrame | str | os.PathLike[str]", class_names: Sequence[str] | None = None
) -> "pd.DataFrame":
    """Score each class: scikit-learn's `classification_report` as a DataFrame.

    Args:
        predictions: DataFrame of `predictions_table`, or the path of a `predictions.csv`.
        class_names: Classes and their order. `None`: those that occur, sorted.

    Returns:
        A DataFrame with one row a class, then `macro avg` (every class counts alike) and
        `weighted avg` (every image does), and the columns `precision`, `recall`, `f1-score`, in
        [0, 1], and `support`, the number of images. A score without images is 0. An image without a
        prediction counts as one that its class was not recalled in.

    Raises:
        ImportError: pandas is not installed.
        ValueError: A label or prediction is not in `class_names`, or `predictions` holds none.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame({"label": ["a", "a", "b"], "prediction": ["a", "b", "b"]})
    >>> classification_table(predictions).loc["a"].round(2).tolist()
    [1.0, 0.5, 0.67, 2.0]

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.metrics.classification_report.html
    """
    from sklearn.metrics import classification_report

    pd = require("pandas")
    names, labels, answers = _indices(predictions, class_names)
    # Scored by index: a class may be called "macro avg".
    rows = [*map(str, range(len(names))), *_AVERAGES]
    scores = dict.fromkeys(rows, dict.fromkeys(_SCORES, 0))
    if len(labels):  # scikit-learn refuses none
        scores = classification_report(
            labels, answers, labels=range(len(names)), output_dict=True, zero_division=0
        )
    return pd.DataFrame(
        [scores[row] for row in rows],
        columns=_SCORES,
        index=pd.Index([*names, *_AVERAGES], name="class", dtype=object),
    ).astype(dict.fromkeys(_SCORES, float) | {"support": int})


def most_wrong(predictions: "pd.DataFrame | str | os.PathLike[str]", n: int = 9) -> "pd.DataFrame":
    """Pick the wrong predictions that the model was surest of: the first to look at.

    Args:
        predictions: DataFrame of `predictions_table`, or the path of a `predictions.csv`.
        n: Int, the most rows to return. Defaults to 9.

    Returns:
        At most `n` rows of `predictions`, the surest first.

    Raises:
        ValueError: `predictions` lacks a column.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame(
    ...     {"file": ["1", "2", "3"], "probability": [0.6, 0.9, 0.99], "correct": [0, 0, 1]}
    ... ).astype({"correct": bool})
    >>> most_wrong(predictions)["file"].tolist()
    ['2', '1']
    """
    table = given_predictions(predictions, ["probability", "correct"])
    wrong = table[~table["correct"].astype(bool)]
    return wrong.sort_values("probability", ascending=False, kind="stable").head(n)


def _indices(
    predictions: "pd.DataFrame | str | os.PathLike[str]", class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Class names, and the indices of labels and predictions; -1 for no prediction."""
    table = given_predictions(predictions, ["label", "prediction"])
    labels = [str(name) for name in table["label"]]
    answers = [str(name) for name in table["prediction"].fillna("")]
    if class_names is None:
        class_names = sorted({*labels, *answers} - {""})
    index = {name: i for i, name in enumerate(class_names)}
    unknown = sorted({*labels, *answers} - {"", *index})
    if unknown or ("" in labels and "" not in index):
        raise ValueError(
            f"Expected the labels and predictions to be among the {len(index)} class names, but "
            f"{(unknown or [''])[0]!r} is not. Received: class_names={list(class_names)[:10]}"
        )
    return (
        list(class_names),
        np.array([index[name] for name in labels], int),
        np.array([index.get(name, -1) for name in answers], int),
    )
