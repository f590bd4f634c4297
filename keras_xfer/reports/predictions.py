"""What a classifier answers, image by image: from a model and data, or from a predictions.csv."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_xfer.extras import require
from keras_xfer.reports.batches import batches, count, filled

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["file", "label", "prediction", "probability", "correct"]


def predict_probabilities(
    model: keras.Model, data: Any, *, from_logits: bool | None = None
) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """Run a classifier over labelled images, keeping each answer beside its file and its label.

    One pass over `data`, so a shuffling dataset keeps answers and labels together.

    Args:
        model: Classifier with one output, `(batch, classes)`, or `(batch, 1)` for the second of two
            classes: probabilities or logits.
        data: Arrays `(x, y)` or `(x, y, sample_weight)`, where `x` may be a dict or list of inputs,
            or strings; or batches of the same: a `keras.utils.PyDataset` such as
            `keras_xfer.images.ImageDataset`, a `tf.data.Dataset`, a torch `DataLoader`, a generator
            or any other iterable that ends. Without labels: `(x,)`. `y`: class indices `(batch,)`
            or `(batch, 1)`, or one-hot rows.
        from_logits: Bool, whether the model answers logits, to be made probabilities by a softmax,
            or by a sigmoid for one output. `None`: what the loss says that the model is compiled
            with; `False` where there is none.

    Returns:
        A list of the files (`data.files` where `data` has them, otherwise running numbers), an int
        array of the labels or `None` without labels, and a float64 array of the probabilities
        `(images, classes)`.

    Raises:
        ValueError: The output is not of that shape, or outside [0, 1]; `y` is none of these, or of
            another length than `x`; `data` has no end.

    Example:
    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, keras.layers.Softmax()(inputs))
    >>> files, labels, probabilities = predict_probabilities(
    ...     model, (np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 0]))
    ... )
    >>> files, labels.tolist(), probabilities.round(2).tolist()
    (['0', '1'], [0, 0], [[1.0, 0.0], [0.0, 1.0]])

    Reference:
        https://keras.io/api/models/model_training_apis/#predict-method
    """
    # Taken first: a dataset draws its next order when a pass is over.
    order = getattr(data, "order", None)
    files = getattr(data, "files", None)
    labels: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    for own, probabilities in probabilities_by_batch(model, data, from_logits=from_logits):
        answers.append(probabilities)
        if own is not None:
            labels.append(own)
    joined = np.concatenate(answers) if answers else np.zeros((0, 0))
    if files is None:
        names = [str(i) for i in range(len(joined))]
    else:
        names = [files[i] for i in (range(len(files)) if order is None else order)]
    return names, np.concatenate(labels) if labels else None, joined


def predictions_table(
    model: keras.Model,
    data: Any,
    class_names: Sequence[str],
    *,
    from_logits: bool | None = None,
) -> "pd.DataFrame":
    """List what a classifier says of each labelled image: the content of `predictions.csv`.

    Args:
        model: Classifier, see `predict_probabilities`, which also gives all probabilities.
        data: Labelled images, see `predict_probabilities`.
        class_names: Names of the classes in index order.
        from_logits: Bool, whether the model answers logits. `None`: what its loss says, see
            `predict_probabilities`.

    Returns:
        A DataFrame with one row an image and the columns `file`, `label`, `prediction` (class
        names), `probability` (of the prediction) and `correct`. Where the model answers NaN the
        prediction is an empty string, and not correct.

    Raises:
        ImportError: pandas is not installed.
        ValueError: `data` has no images or no labels, or outputs, labels and `class_names` do not
            agree.

    Example:
    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, keras.layers.Softmax()(inputs))
    >>> data = (np.array([[9.0, 0.0], [0.0, 9.0]]), np.array([0, 0]))
    >>> predictions_table(model, data, ["cat", "dog"])[["label", "prediction", "correct"]]
      label prediction  correct
    0   cat        cat     True
    1   cat        dog    False

    Reference:
        https://keras.io/api/models/model_training_apis/#predict-method
    """
    pd = require("pandas")
    answers = predict_probabilities(model, data, from_logits=from_logits)
    return pd.DataFrame(prediction_columns(*answers, class_names), columns=COLUMNS)


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


def given_predictions(predictions: Any, columns: Sequence[str]) -> "pd.DataFrame":
    """Take predictions as a table that has these columns, or from the path of a predictions.csv."""
    if isinstance(predictions, str | os.PathLike):
        return read_predictions(predictions)
    missing = [column for column in columns if column not in getattr(predictions, "columns", ())]
    if missing:
        has = list(getattr(predictions, "columns", ()))
        raise ValueError(
            f"Expected a DataFrame with the columns {list(columns)}, or the path of a "
            f"predictions.csv. Received: predictions={type(predictions).__name__} with the columns "
            f"{has}. predictions_table makes one from a model and data."
        )
    return predictions


def probabilities_by_batch(
    model: keras.Model, data: Any, *, from_logits: bool | None = None
) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Yield the labels and the probabilities of each batch, see `predict_probabilities`."""
    if from_logits is None:
        from_logits = _is_trained_on_logits(model)
    most, is_odd = 0, False
    for inputs, labels in batches(data):
        rows = count(inputs)
        # The last batch is the odd one as a rule: filled up it needs no trace or compilation of its
        # own. Where others are odd too they are left to Keras, which generalizes its trace.
        if rows < most and not is_odd:
            inputs, is_odd = filled(inputs, most), True
        most = max(most, rows)
        outputs = keras.tree.flatten(model.predict_on_batch(inputs))
        if len(outputs) != 1:
            raise ValueError(
                f"Expected a classifier with one output. Received: a model with {len(outputs)}. "
                "Make one of the output to report on: keras.Model(model.inputs, model.outputs[0])."
            )
        yield labels, _probabilities(np.asarray(outputs[0][:rows], "float64"), from_logits)


def prediction_columns(
    files: Sequence[str],
    labels: np.ndarray | None,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Make the columns of a predictions.csv from what `predict_probabilities` returns.

    It needs no pandas, which `keras-xfer train` may have to do without.
    """
    classes = len(class_names)
    if not len(probabilities):
        raise ValueError(
            "Expected at least one image. Received: data without any. A generator that has run "
            "before has none left."
        )
    if labels is None:
        raise ValueError(
            "Expected labelled data, batches of (x, y). Received batches of x alone: use "
            "predict_probabilities for images without labels."
        )
    if probabilities.shape[1] != classes:
        raise ValueError(
            "Expected one class name for each of the model's outputs. Received: "
            f"len(class_names)={classes}, model outputs={probabilities.shape[1]}"
        )
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"Expected labels in [0, {classes}). Received labels from {labels.min()} to "
            f"{labels.max()}: give the class names in index order, one for each class."
        )
    names = np.array([*class_names, ""], dtype=object)
    known = np.isfinite(probabilities).all(axis=1)
    best = np.where(known, np.where(known[:, None], probabilities, 0).argmax(axis=1), classes)
    return {
        "file": list(files),
        "label": names[labels],
        "prediction": names[best],
        "probability": np.where(known, probabilities.max(axis=1), np.nan),
        "correct": best == labels,
    }


def _is_trained_on_logits(model: keras.Model) -> bool:
    """Ask the loss. A name such as "binary_crossentropy" means probabilities, as in Keras."""
    losses = keras.tree.flatten(getattr(model, "loss", None))
    return any(getattr(loss, "from_logits", False) is True for loss in losses)


def _probabilities(outputs: np.ndarray, from_logits: bool) -> np.ndarray:
    if outputs.ndim != 2:
        raise ValueError(
            "Expected a classifier with output (batch, classes). Received: model output of shape "
            f"(batch, {', '.join(map(str, outputs.shape[1:]))})"
        )
    one = outputs.shape[1] == 1
    if from_logits:
        from scipy import special

        outputs = special.expit(outputs) if one else special.softmax(outputs, axis=1)
    if np.nanmin(outputs, initial=0) < -1e-3 or np.nanmax(outputs, initial=1) > 1 + 1e-3:
        raise ValueError(
            "Expected probabilities in [0, 1]. Received outputs from "
            f"{np.nanmin(outputs):.3g} to {np.nanmax(outputs):.3g}: if these are logits, pass "
            "from_logits=True, or end the model with a softmax (or, for one output, a sigmoid)."
        )
    return np.hstack([1 - outputs, outputs]) if one else outputs
