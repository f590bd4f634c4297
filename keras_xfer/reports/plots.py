"""Figures of predictions, and what all figures share.

None of them touches pyplot, so no window opens and nothing leaks.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_xfer.extras import require
from keras_xfer.reports import pictures
from keras_xfer.reports.predictions import COLUMNS, given_predictions
from keras_xfer.reports.tables import most_wrong

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TRAIN, _VALIDATION = COLORS[0], COLORS[1]
INK, FAINT = "#333333", "#888888"
_MOST_BARS = 40
_PICTURE_SIDE = 200  # pixels


def plot_confusion(table: "pd.DataFrame") -> "Figure":
    """Draw a confusion matrix, coloured by the share of each class's images.

    Args:
        table: DataFrame of `confusion_table`: one row a label, one column a prediction. Up to 20
            classes the counts are written into it.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
    >>> import pandas as pd
    >>> figure = plot_confusion(pd.DataFrame([[9, 1], [2, 8]], ["cat", "dog"], ["cat", "dog"]))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['9', '1', '2', '8']
    """
    counts = table.to_numpy(dtype=float)
    classes = len(counts)
    names = [short(name) for name in table.index]
    side = float(np.clip(0.42 * classes, 3, 8.5))
    # "compressed" is matplotlib's constrained layout for square axes: it leaves no label outside.
    figure = new_figure(side + 2.2, side + 1.4, layout="compressed")
    axes = figure.add_subplot()
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    if classes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.ax.yaxis.set_major_formatter(require("matplotlib.ticker").PercentFormatter(1))
        bar.outline.set_visible(False)
        bar.set_label("share of the class's images", color=INK, fontsize=9)
        bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    # More names than fit are thinned out evenly.
    step = -(-classes // 40)
    ticks = list(range(0, classes, max(step, 1)))
    shown = [names[i] for i in ticks]
    size = 9 if classes <= 20 else 6.5
    upright = classes > 3 or any(len(name) > 10 for name in names)
    axes.set_xticks(ticks, shown, rotation=90 if upright else 0, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, shown, fontsize=size, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    style(axes, grid=False)
    axes.spines[:].set_visible(False)
    if classes <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else INK
                axes.text(
                    column, row, f"{count:.0f}", ha="center", va="center", color=color, fontsize=8
                )
    return figure


def plot_class_scores(table: "pd.DataFrame") -> "Figure":
    """Draw precision, recall and F1 of each class, the worst class on top.

    Args:
        table: DataFrame of `classification_table`. Of more than 40 classes the 40 with the lowest
            F1 are drawn.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
    >>> import pandas as pd
    >>> scores = pd.DataFrame(
    ...     {"precision": [0.9, 0.5], "recall": [0.8, 0.7], "f1-score": [0.85, 0.6]},
    ...     index=["cat", "dog"],
    ... )
    >>> [label.get_text() for label in plot_class_scores(scores).axes[0].get_yticklabels()]
    ['dog', 'cat']
    """
    if list(table.index[-2:]) == ["macro avg", "weighted avg"]:
        table = table.iloc[:-2]
    drawn = table.sort_values("f1-score", kind="stable").head(_MOST_BARS)
    figure = new_figure(6.5, 1.3 + 0.26 * max(len(drawn), 2))
    axes = figure.add_subplot()
    rows = np.arange(len(drawn))
    axes.barh(rows, drawn["f1-score"], color=COLORS[5], height=0.62, label="F1")
    for column, marker, color in (("precision", "D", _TRAIN), ("recall", "o", _VALIDATION)):
        axes.scatter(drawn[column], rows, marker=marker, s=22, color=color, label=column, zorder=3)
    axes.set_yticks(rows, [short(name) for name in drawn.index], parse_math=False)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    if len(drawn) < len(table):
        axes.set_xlabel(f"score (the {len(drawn)} lowest of {len(table)} classes)")
    else:
        axes.set_xlabel("score")
    style(axes)
    axes.grid(visible=False, axis="y")
    if len(drawn):
        axes.legend(
            frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
        )
    return figure


def plot_most_wrong(
    predictions: "pd.DataFrame | str | os.PathLike[str]",
    n: int = 9,
    *,
    root: str | os.PathLike[str] | None = None,
    images: Any = None,
) -> "Figure":
    r"""Show the images of the wrong predictions that the model was surest of.

    Args:
        predictions: DataFrame of `predictions_table`, or the path of a `predictions.csv`.
        n: Int, the most images to show. Defaults to 9.
        root: Folder that `file` is relative to. `None`: the current one.
        images: Images that do not lie in files: an array or sequence that the predictions were made
            of, in their order, or a dict by `file`, or batches such as a `tf.data.Dataset` in the
            same order again. Each of one or three channels, uint8 or floats in [0, 255] or in
            [0, 1].

    Returns:
        A `matplotlib.figure.Figure`. A file that is not there any more leaves its place grey.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        ValueError: `predictions` lacks a column; `images` lacks an image, or they are not of these
            shapes and values; both `root` and `images` are given.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame(
    ...     [["0", "cat", "dog", 0.98, False]],
    ...     columns=["file", "label", "prediction", "probability", "correct"],
    ... )
    >>> plot_most_wrong(predictions, images=np.zeros((1, 28, 28))).axes[0].get_title()
    'dog, 98.0%\nis cat'
    """
    if root is not None and images is not None:
        raise ValueError(
            "Expected `root`, where images lie in files, or `images`. Received: both. Leave one out"
        )
    # The index is then the number of the row.
    table = given_predictions(predictions, COLUMNS).reset_index(drop=True)
    wrong = most_wrong(table, n)
    files = [str(file) for file in wrong["file"]]
    shown: Sequence[Image | None]
    if images is None:
        shown = [pictures.thumbnail(Path(root or "", file), _PICTURE_SIDE) for file in files]
    else:
        shown = pictures.from_arrays(images, files, wrong.index.tolist(), _PICTURE_SIDE)
    columns = min(3, len(wrong)) or 1
    lines = -(-len(wrong) // columns) or 1
    figure = new_figure(2.3 * columns, 2.6 * lines)
    for i, (row, picture) in enumerate(zip(wrong.itertuples(), shown, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.imshow(np.full((1, 1, 3), 221, "uint8") if picture is None else np.asarray(picture))
        axes.set_axis_off()
        answer = f"{short(row.prediction, 16)}, {row.probability:.1%}"
        axes.set_title(
            f"{answer if row.prediction else 'no prediction'}\nis {short(row.label, 20)}",
            fontsize=9,
            color=INK,
            parse_math=False,
        )
    return figure


def new_figure(width: float, height: float, layout: str = "constrained") -> "Figure":
    """An empty white figure, its sides in inches, that pyplot does not know of."""
    figure: Figure = require("matplotlib.figure").Figure(
        figsize=(width, height), layout=layout, facecolor="white"
    )
    return figure


def style(axes: Any, *, grid: bool = True) -> None:
    """Leave two spines, in grey, and a faint grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    if grid:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)


def whole_numbers(axes: Any) -> None:
    """Put the ticks of the horizontal axis at whole numbers."""
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, nbins=8))


def short(name: Any, longest: int = 28) -> str:
    """A name on one line, cut to `longest` letters."""
    text = " ".join(str(name).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
