"""What a classifier answered, image by image and class by class, as pandas DataFrames."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_xfer.reports._extra import require

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["file", "label", "prediction", "probability", "correct"]


def predict_probabilities(
    model: keras.Model, data: Any
) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """Run a classifier over labelled images, keeping each answer beside its file and its label.

    One pass over `data`, so a shuffling dataset keeps answers and labels together.

    Args:
        model: Classifier whose output is `(batch, classes)` probabilities, or `(batch, 1)`, the
            probability of the second of two classes.
        data: `(x, y)` arrays, or batches of `(x, y)`, `(x, y, sample_weight)` or `(x,)`: a
            `keras.utils.PyDataset` such as `keras_xfer.images.ImageDataset`, a `tf.data.Dataset`,
            a torch `DataLoader`, or any other finite iterable. `y`: class indices or one-hot rows.

    Returns:
        A list of the files (`data.files` where `data` has them, otherwise running numbers), an int
        array of the labels or `None` without labels, and a float64 array of the probabilities
        `(images, classes)`.

    Raises:
        ValueError: The output is not of that shape, or outside [0, 1].

    Example:
    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, keras.layers.Softmax()(inputs))
    >>> files, labels, probabilities = predict_probabilities(
    ...     model, (np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 0]))
    ... )
    >>> files, labels.tolist(), probabilities.round(2).tolist()
    (['0', '1'], [0, 0], [[1.0, 0.0], [0.0, 1.0]])
    """
    # Taken first: a dataset draws its next order when a pass is over.
    order = getattr(data, "order", None)
    files = getattr(data, "files", None)
    labels: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    for batch in _batches(data):
        x, *rest = batch
        outputs.append(_numpy(model.predict_on_batch(_native(x))))
        if rest:
            labels.append(_class_indices(_numpy(rest[0])))
    probabilities = _probabilities(outputs)
    if files is None:
        names = [str(i) for i in range(len(probabilities))]
    else:
        names = [files[i] for i in (range(len(files)) if order is None else order)]
    return names, np.concatenate(labels) if labels else None, probabilities


def predictions_table(model: keras.Model, data: Any, class_names: Sequence[str]) -> "pd.DataFrame":
    """List what a classifier says of each labelled image: the content of `predictions.csv`.

    Args:
        model: Classifier, see `predict_probabilities`, which also gives all probabilities.
        data: Labelled images, see `predict_probabilities`.
        class_names: Names of the classes in index order.

    Returns:
        A DataFrame with one row an image and the columns `file`, `label`, `prediction` (class
        names), `probability` (of the prediction) and `correct`. Where the model answers NaN the
        prediction is an empty string, and not correct.

    Raises:
        ImportError: pandas is not installed.
        ValueError: `data` has no labels, or outputs, labels and `class_names` do not agree.

    Example:
    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, keras.layers.Softmax()(inputs))
    >>> data = (np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 0]))
    >>> predictions_table(model, data, ["cat", "dog"])[["label", "prediction", "correct"]]
      label prediction  correct
    0   cat        cat     True
    1   cat        dog    False
    """
    pd = require("pandas")
    files, labels, probabilities = predict_probabilities(model, data)
    classes = len(class_names)
    if labels is None:
        raise ValueError(
            "Expected labelled data, batches of (x, y). Received batches of x alone: use "
            "predict_probabilities for images without labels."
        )
    if len(probabilities) and probabilities.shape[1] != classes:
        raise ValueError(
            "Expected one class name for each of the model's outputs. Received: "
            f"len(class_names)={classes}, model outputs={probabilities.shape[1]}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"Expected labels in [0, {classes}). Received labels from {labels.min()} to "
            f"{labels.max()}: give the class names in index order, one for each class."
        )
    names = np.array([*class_names, ""], dtype=object)
    known = np.isfinite(probabilities).all(axis=1)
    best = np.where(known, np.where(known[:, None], probabilities, 0).argmax(axis=1), classes)
    highest = probabilities.max(axis=1) if len(probabilities) else np.zeros(0)
    return pd.DataFrame(
        {
            "file": files,
            "label": names[labels],
            "prediction": names[best],
            "probability": np.where(known, highest, np.nan),
            "correct": best == labels,
        },
        columns=COLUMNS,
    )


def read_predictions(filepath: str | os.PathLike[str]) -> "pd.DataFrame":
    r"""Read a `predictions.csv` as it was written.

    `pandas.read_csv` alone takes a class called "NA" for a missing value and "7" for a number.

    Args:
        filepath: Path of the file.

    Returns:
        A DataFrame like that of `predictions_table`.

    Raises:
        ImportError: pandas is not installed.
        ValueError: The file lacks one of the columns.

    Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/predictions.csv"
    >>> with open(path, "w") as file:
    ...     _ = file.write("file,label,prediction,probability,correct\n1.png,7,NA,0.5,False")
    >>> read_predictions(path)[["label", "prediction"]].iloc[0].tolist()
    ['7', 'NA']
    """
    pd = require("pandas")
    table = pd.read_csv(filepath, dtype=str, keep_default_na=False, encoding="utf-8")
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise ValueError(
            f"Expected the columns {COLUMNS}, without {missing} it is no predictions.csv. "
            f"Received: filepath={os.fspath(filepath)!r} with the columns {list(table)}"
        )
    table["probability"] = pd.to_numeric(table["probability"], errors="coerce")
    table["correct"] = table["correct"].str.lower() == "true"
    return table


def confusion_table(
    predictions: "pd.DataFrame", class_names: Sequence[str] | None = None
) -> "pd.DataFrame":
    """Count how often each class was taken for each other.

    Args:
        predictions: DataFrame of `predictions_table`.
        class_names: Classes and their order. `None`: those that occur, sorted.

    Returns:
        A square DataFrame of counts: one row a label, one column a prediction. Images without a
        prediction are in no column.

    Raises:
        ImportError: pandas is not installed.
        ValueError: A label or prediction is not in `class_names`.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame({"label": ["a", "a", "b"], "prediction": ["a", "b", "b"]})
    >>> confusion_table(predictions).loc["a"].tolist()
    [1, 1]

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.metrics.confusion_matrix.html
    """
    pd = require("pandas")
    class_names, labels, answers = _indices(predictions, class_names)
    counts = np.zeros((len(class_names), len(class_names)), int)
    known = answers >= 0
    np.add.at(counts, (labels[known], answers[known]), 1)
    return pd.DataFrame(
        counts,
        index=pd.Index(class_names, name="label"),
        columns=pd.Index(class_names, name="prediction"),
    )


def classification_table(
    predictions: "pd.DataFrame", class_names: Sequence[str] | None = None
) -> "pd.DataFrame":
    """Score each class: scikit-learn's `classification_report` as a DataFrame.

    Args:
        predictions: DataFrame of `predictions_table`.
        class_names: Classes and their order. `None`: those that occur, sorted.

    Returns:
        A DataFrame with one row a class, then `macro avg` (every class counts alike) and
        `weighted avg` (every image does), and the columns `precision`, `recall`, `f1-score`, in
        [0, 1], and `support`, the number of images. A score without images is 0.

    Raises:
        ImportError: pandas is not installed.
        ValueError: A label or prediction is not in `class_names`.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame({"label": ["a", "a", "b"], "prediction": ["a", "b", "b"]})
    >>> classification_table(predictions).loc["a"].round(2).tolist()
    [1.0, 0.5, 0.67, 2.0]

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.metrics.classification_report.html
    """
    pd = require("pandas")
    class_names, labels, answers = _indices(predictions, class_names)
    classes = len(class_names)
    support = np.bincount(labels, minlength=classes)
    answered = np.bincount(answers[answers >= 0], minlength=classes)
    right = np.bincount(labels[labels == answers], minlength=classes)
    precision = _ratio(right, answered)
    recall = _ratio(right, support)
    f1 = _ratio(2 * right, support + answered)
    table = pd.DataFrame(
        {"precision": precision, "recall": recall, "f1-score": f1, "support": support},
        index=pd.Index(list(class_names), name="class", dtype=object),
    )
    scores = np.stack([precision, recall, f1])
    total = int(support.sum())
    macro = scores.mean(axis=1) if classes else np.zeros(3)
    weighted = _ratio((scores * support).sum(axis=1), np.full(3, total))
    averages = pd.DataFrame(
        [[*macro, total], [*weighted, total]],
        columns=table.columns,
        index=pd.Index(["macro avg", "weighted avg"], name="class", dtype=object),
    )
    return pd.concat([table, averages]).astype({"support": int})


def most_wrong(predictions: "pd.DataFrame", n: int = 9) -> "pd.DataFrame":
    """Pick the wrong predictions that the model was surest of: the first to look at.

    Args:
        predictions: DataFrame of `predictions_table`.
        n: Int, the most rows to return. Defaults to 9.

    Returns:
        At most `n` rows of `predictions`, the surest first.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame(
    ...     {"file": ["1", "2", "3"], "probability": [0.6, 0.9, 0.99], "correct": [0, 0, 1]}
    ... ).astype({"correct": bool})
    >>> most_wrong(predictions)["file"].tolist()
    ['2', '1']
    """
    wrong = predictions[~predictions["correct"].astype(bool)]
    return wrong.sort_values("probability", ascending=False, kind="stable").head(n)


def _batches(data: Any, batch_size: int = 32) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, tuple):
        for start in range(0, len(data[0]), batch_size):
            yield tuple(part[start : start + batch_size] for part in data)
        return
    for batch in data:
        yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _native(x: Any) -> Any:
    """Turn a tf.data batch into NumPy where another backend runs."""
    if hasattr(x, "numpy") and not keras.ops.is_tensor(x):
        return x.numpy()
    return x


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(_native(value)))


def _class_indices(y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] > 1:
        return y.argmax(axis=1)
    return y.reshape(-1).astype(int)


def _probabilities(outputs: list[np.ndarray]) -> np.ndarray:
    if not outputs:
        return np.zeros((0, 0))
    joined = np.concatenate(outputs).astype("float64")
    if joined.ndim != 2:
        raise ValueError(
            "Expected a classifier with output (batch, classes). Received: model output of shape "
            f"(batch, {', '.join(map(str, joined.shape[1:]))})"
        )
    if np.nanmin(joined, initial=0) < -1e-3 or np.nanmax(joined, initial=1) > 1 + 1e-3:
        raise ValueError(
            "Expected probabilities in [0, 1]. Received outputs from "
            f"{np.nanmin(joined):.3g} to {np.nanmax(joined):.3g}: if these are logits, end the "
            "model with a softmax (or, for one output, a sigmoid)."
        )
    return np.hstack([1 - joined, joined]) if joined.shape[1] == 1 else joined


def _indices(
    predictions: "pd.DataFrame", class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Class indices of labels and predictions; -1 for an image without a prediction."""
    labels = [str(name) for name in predictions["label"]]
    answers = [str(name) for name in predictions["prediction"]]
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


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
