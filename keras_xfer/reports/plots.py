"""Figures of a training run. None of them touches pyplot, so no window opens and nothing leaks."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from keras_xfer.reports._extra import require

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TRAIN, _VALIDATION = COLORS[0], COLORS[1]
INK, FAINT = "#333333", "#888888"
_MOST_BARS = 40


def plot_history(history: Any) -> "Figure":
    """Draw loss and metrics by epoch, with a line wherever a new stage of training begins.

    Args:
        history: What `model.fit` returns, its `.history` dict, or a DataFrame with one row an
            epoch (`history.csv`). The stages come from its `stage` column, if there is one.

    Returns:
        A `matplotlib.figure.Figure`. Epochs and stages are counted from 1.

    Raises:
        ImportError: pandas or matplotlib is not installed.

    Example:
    >>> figure = plot_history(
    ...     {"loss": [2.0, 1.0], "val_loss": [2.1, 1.5], "accuracy": [0.3, 0.6], "stage": [0, 1]}
    ... )
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['loss', 'accuracy']

    Reference:
        https://matplotlib.org/stable/gallery/user_interfaces/web_application_server_sgskip.html
    """
    table = _history_table(history)
    metrics = _metrics(table)
    figure = new_figure(9.5, 3.6) if len(metrics) > 1 else new_figure(6, 3.6)
    epochs = np.arange(1, len(table) + 1)
    marker = "o" if len(table) <= 30 else None
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        for column, color, label in (
            (metric, _TRAIN, "training"),
            (f"val_{metric}", _VALIDATION, "validation"),
        ):
            if column in table:
                values = table[column].to_numpy(dtype=float)
                known = np.isfinite(values)  # a line runs through epochs without validation
                axes.plot(
                    epochs[known], values[known], color=color, marker=marker, ms=3.5, label=label
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric.replace("_", " "), parse_math=False)
        style(axes)
        whole_numbers(axes)
        _draw_stages(axes, table)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    return figure


def plot_timing(timing: Any) -> "Figure":
    """Draw the seconds of each epoch, coloured by stage.

    Args:
        timing: DataFrame, dict or History with `epoch_seconds` and, if there are stages, `stage`;
            such as `EpochTiming.table()` or `history.csv`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        ValueError: There is no `epoch_seconds`.

    Example:
    >>> figure = plot_timing({"epoch_seconds": [3.0, 1.0, 4.0], "stage": [0, 0, 1]})
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['stage 1: median 2.0 s', 'stage 2: median 4.0 s']
    """
    table = _history_table(timing)
    if "epoch_seconds" not in table:
        raise ValueError(
            "Expected a table with the column 'epoch_seconds': train with the callback "
            f"EpochTiming. Received: columns={list(table)}"
        )
    figure = new_figure(6, 3.2)
    axes = figure.add_subplot()
    seconds = table["epoch_seconds"].to_numpy(dtype=float)
    epochs = np.arange(1, len(table) + 1)
    stages = _stages(table)
    for i, stage in enumerate(dict.fromkeys(stages.tolist())):
        own = stages == stage
        finite = seconds[own][np.isfinite(seconds[own])]
        median = f"median {np.median(finite):.3g} s" if len(finite) else "not measured"
        if len(finite) and np.median(finite) >= 0.1:
            median = f"median {np.median(finite):,.1f} s"
        axes.bar(
            epochs[own],
            np.nan_to_num(seconds[own]),
            width=0.8,
            color=COLORS[i % len(COLORS)],
            label=f"stage {stage + 1}: {median}" if "stage" in table else median,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("seconds")
    axes.set_xlim(0.4, max(len(table), 1) + 0.6)
    style(axes)
    whole_numbers(axes)
    if len(table):
        # Above the bars, never on them.
        axes.legend(
            frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0
        )
    return figure


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
    predictions: "pd.DataFrame", n: int = 9, *, root: str | os.PathLike[str] | None = None
) -> "Figure":
    r"""Show the images of the wrong predictions that the model was surest of.

    Args:
        predictions: DataFrame of `predictions_table`.
        n: Int, the most images to show. Defaults to 9.
        root: Folder that `file` is relative to. `None`: the current one.

    Returns:
        A `matplotlib.figure.Figure`. An image that is not there any more leaves its place grey.

    Raises:
        ImportError: pandas or matplotlib is not installed.

    Example:
    >>> import pandas as pd
    >>> predictions = pd.DataFrame(
    ...     [["1.png", "cat", "dog", 0.98, False]],
    ...     columns=["file", "label", "prediction", "probability", "correct"],
    ... )
    >>> plot_most_wrong(predictions).axes[0].get_title()
    'dog, 98.0%\nis cat'
    """
    from keras_xfer.reports.tables import most_wrong

    rows = list(most_wrong(predictions, n).itertuples())
    columns = min(3, len(rows)) or 1
    lines = -(-len(rows) // columns) or 1
    figure = new_figure(2.3 * columns, 2.6 * lines)
    for i, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, i + 1)
        picture = thumbnail(Path(root or "", str(row.file)), 200)
        axes.imshow(np.full((1, 1, 3), 221, "uint8") if picture is None else np.asarray(picture))
        axes.set_axis_off()
        axes.set_title(
            f"{short(row.prediction, 16)}, {row.probability:.1%}\nis {short(row.label, 20)}",
            fontsize=9,
            color=INK,
            parse_math=False,
        )
    return figure


def thumbnail(path: Path, side: int) -> Image.Image | None:
    """Read an image no larger than `side` pixels; `None` where there is none that can be read."""
    try:
        with Image.open(path, formats=("BMP", "DIB", "GIF", "JPEG", "PNG", "WEBP")) as image:
            image.draft("RGB", (side, side))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((side, side))
            if small.has_transparency_data:
                small = small.convert("RGBA")
                small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
            return small.convert("RGB")
    except Exception:  # a damaged file can raise anything; a report is made without its picture
        return None


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


def _draw_stages(axes: Any, table: "pd.DataFrame") -> None:
    if "stage" not in table or not len(table):
        return
    stages = _stages(table)
    starts = [0, *(np.flatnonzero(np.diff(stages)) + 1).tolist()]
    axes.set_xlim(0.5, len(table) + 0.5)
    for start in starts:
        if start:
            axes.axvline(start + 0.5, color=FAINT, linestyle="--", linewidth=1)
    if len(starts) <= 8:  # more names would run into each other
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
            middle = (start + end) / 2 + 0.5
            name = f"stage {stages[start] + 1}" if len(starts) <= 4 else str(stages[start] + 1)
            axes.annotate(
                name,
                (middle, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=FAINT,
            )


def _history_table(history: Any) -> "pd.DataFrame":
    pd = require("pandas")
    if hasattr(history, "history"):
        history = history.history
    if not isinstance(history, Mapping):
        table = pd.DataFrame(history)
    else:
        length = max((len(values) for values in history.values()), default=0)
        table = pd.DataFrame({name: _spread(values, length) for name, values in history.items()})
    return table


def _spread(values: Any, length: int) -> np.ndarray:
    """Put values that exist every few epochs (`validation_freq`) at those epochs."""
    values = np.asarray(values, dtype=float)
    if len(values) == length or len(values) == 0:
        return np.resize(values, length) if len(values) else np.full(length, np.nan)
    step = length // len(values)
    spread = np.full(length, np.nan)
    spread[step - 1 :: step][: len(values)] = values
    return spread


def _stages(table: "pd.DataFrame") -> np.ndarray:
    if "stage" not in table:
        return np.zeros(len(table), int)
    return table["stage"].ffill().fillna(0).to_numpy().astype(int)


def _metrics(table: "pd.DataFrame") -> list[str]:
    """Choose the loss and at most one metric more, the accuracy where there is one."""
    columns = [str(column) for column in table]
    metrics = [
        column
        for column in columns
        if column != "loss" and (f"val_{column}" in columns or "accuracy" in column)
    ]
    metrics = [column for column in metrics if not column.startswith("val_")] or [
        column.removeprefix("val_") for column in metrics
    ]
    metrics.sort(key=lambda column: "accuracy" not in column)
    return ["loss", *metrics[:1]]


def short(name: Any, longest: int = 28) -> str:
    """A name on one line, cut to `longest` letters."""
    text = " ".join(str(name).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
