"""Figures of trainings, over stages and over fits: their curves, and what an epoch takes."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_xfer.reports.histories import Period, join
from keras_xfer.reports.plots import COLORS, FAINT, new_figure, short, style, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TRAIN, _VALIDATION = COLORS[0], COLORS[1]
_MOST_ENTRIES = 12  # of a legend
_LINE = 13  # what a slanted name takes of the axes' width, in points


def plot_history(history: Any, *, stage_names: Sequence[str] | None = None) -> "Figure":
    """Draw loss and metrics by epoch, with a line wherever a new fit or stage of training begins.

    Args:
        history: What `model.fit` returns, its `.history` dict, or a DataFrame with one row an
            epoch (`history.csv`). The stages come from its `stage` column, if there is one. Of
            several fits, such as a frozen one and a fine-tuning one: a list of these, or a dict
            that names them.
        stage_names: Names of the stages in their order. `None`: those that the History of a
            `StagedUnfreezing` has, or "stage 1", "stage 2".

    Returns:
        A `matplotlib.figure.Figure`. Epochs, fits and stages are counted from 1, epochs on from one
        fit to the next.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        ValueError: `history` is none of these, or there are more stages than `stage_names`.

    Example:
    >>> figure = plot_history(
    ...     {
    ...         "frozen": {"loss": [2.0, 1.0], "accuracy": [0.3, 0.6]},
    ...         "fine-tuned": {"loss": [0.9, 0.6], "accuracy": [0.7, 0.8]},
    ...     }
    ... )
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['loss', 'accuracy']
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['frozen', 'fine-tuned']

    Reference:
        https://matplotlib.org/stable/gallery/user_interfaces/web_application_server_sgskip.html
    """
    table, periods = join(history, stage_names)
    metrics = _metrics(table)
    width = 9.5 if len(metrics) > 1 else 6
    names = _names(periods, width / len(metrics) - 0.9)
    longest = max((len(name.text) for name in names if name.slanted), default=0)
    figure = new_figure(width, 3.6 + 0.05 * longest)  # what a letter takes of the height
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
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        _mark_periods(axes, periods, names)
    return figure


def plot_timing(timing: Any, *, stage_names: Sequence[str] | None = None) -> "Figure":
    """Draw the seconds of each epoch, coloured by fit and stage, and what fine-tuning costs.

    The legend has the ratio fine-tuned : frozen, each later stage to the first. Where an
    `EpochTiming` has logged `step_seconds_median` it is that of a step, `slowdown` of
    `EpochTiming.by_stage`, which leaves out the tracing in a stage's first epoch; otherwise it is
    that of the medians shown.

    Args:
        timing: DataFrame, dict or History with `epoch_seconds` and, if there are stages, `stage`;
            such as `history.csv`; or an `EpochTiming`. Of several fits: a list of these, or a dict
            that names them. An `EpochTiming`, or its `table()`, that saw several fits without stages
            tells them apart itself.
        stage_names: Names of the stages in their order. `None`: "stage 1", "stage 2".

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        ValueError: There is no `epoch_seconds`, or there are more stages than `stage_names`.

    Example:
    >>> figure = plot_timing({"epoch_seconds": [3.0, 1.0, 4.0], "stage": [0, 0, 1]})
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['stage 1: median 2.0 s', 'stage 2: median 4.0 s (2.0 times stage 1)']

    Reference:
        https://keras.io/guides/transfer_learning/
    """
    table, periods = join(timing, stage_names)
    if "epoch_seconds" not in table:
        raise ValueError(
            "Expected a table with the column 'epoch_seconds': train with the callback "
            f"EpochTiming. Received: columns={list(table)}"
        )
    groups = _groups(table, periods)
    labels = _timing_labels(groups)
    if len(labels) > _MOST_ENTRIES:
        labels[_MOST_ENTRIES - 1 :] = [f"and {len(labels) - _MOST_ENTRIES + 1} more"]
    columns = 2 if max(map(len, labels), default=0) <= 26 else 1
    figure = new_figure(6, 3 + 0.2 * -(-len(labels) // columns))
    axes = figure.add_subplot()
    seconds = np.nan_to_num(table["epoch_seconds"].to_numpy(dtype=float))
    bars = [
        axes.bar(own.index + 1, seconds[own.index], width=0.8, color=COLORS[i % len(COLORS)])
        for i, own in enumerate(groups.values())
    ]
    axes.set_xlabel("epoch")
    axes.set_ylabel("seconds")
    axes.set_xlim(0.4, max(len(table), 1) + 0.6)
    style(axes)
    whole_numbers(axes)
    if labels:
        # Above the bars, never on them.
        legend = axes.legend(
            bars[: len(labels)],
            labels,
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            borderpad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _groups(table: "pd.DataFrame", periods: Sequence[Period]) -> dict[str, "pd.DataFrame"]:
    """The epochs of each stage of each fit, by its name."""
    rows: dict[tuple[int, int], list[int]] = {}
    names: dict[tuple[int, int], str] = {}
    for period in periods:
        key = period.fit, period.stage
        rows.setdefault(key, []).extend(range(period.start, period.end))
        names[key] = ", ".join(short(part, 22) for part in period.parts)
    groups: dict[str, pd.DataFrame] = {}
    for key, name in names.items():
        # Two that are called the same stay two.
        groups[name if name not in groups else f"{name} ({len(groups) + 1})"] = table.loc[rows[key]]
    return groups


def _timing_labels(groups: dict[str, "pd.DataFrame"]) -> list[str]:
    medians = [_median(own, "epoch_seconds") for own in groups.values()]
    steps = [_median(own, "step_seconds_median") for own in groups.values()]
    by_step = bool(np.isfinite(steps).all())
    typical = steps if by_step else medians
    first = next(iter(groups), "")
    labels: list[str] = []
    for name, median, own in zip(groups, medians, typical, strict=True):
        text = "not measured"
        if np.isfinite(median):
            text = f"median {median:,.1f} s" if median >= 0.1 else f"median {median:.3g} s"
        if labels and np.isfinite(own) and typical[0] > 0:
            ratio = own / typical[0]
            times = f"{ratio:,.1f}" if ratio >= 0.995 else f"{ratio:.2g}"
            text += f" ({'a step: ' if by_step else ''}{times} times {first})"
        labels.append(f"{name}: {text}" if name else text)
    return labels


def _median(table: "pd.DataFrame", column: str) -> float:
    values = table[column].to_numpy(dtype=float) if column in table else np.zeros(0)
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan


class _Name(NamedTuple):
    """What a period is called above the axes."""

    text: str
    middle: float  # in epochs
    shift: float = 0.0  # to the right, in points
    slanted: bool = False


def _names(periods: Sequence[Period], inches: float) -> list[_Name]:
    """Place the names over axes of this width so that none touches another."""
    if not any(period.parts for period in periods):
        return []
    names = [
        _Name("\n".join(short(part, 24) for part in period.parts), (period.start + period.end) / 2)
        for period in periods
    ]
    points = inches * 72 / periods[-1].end  # of an epoch
    gaps = [points * (right.middle - left.middle) for left, right in itertools.pairwise(names)]
    # A letter is about 5 points wide.
    widths = [5 * max(map(len, name.text.split("\n"))) + 8 for name in names]
    if all(
        gap >= (left + right) / 2
        for gap, (left, right) in zip(gaps, itertools.pairwise(widths), strict=True)
    ):
        return names
    # On a slant each needs the width of a line. A few names are moved to where there is room for
    # all of them; of many those without room are left out.
    placed: list[_Name] = []
    shift, room = 0.0, math.inf
    for name, gap in zip(names, [0.0, *gaps], strict=True):
        room += gap
        needed = max(shift + _LINE - room, 0.0)
        if len(names) <= 8 or needed < _LINE / 2:
            text = name.text.replace("\n", ", ")
            placed.append(_Name(text, name.middle, needed, slanted=True))
            shift, room = needed, 0.0
    return placed


def _mark_periods(axes: Any, periods: Sequence[Period], names: Sequence[_Name]) -> None:
    """Draw a line at each boundary, and the names above."""
    if not names:
        return
    axes.set_xlim(0.5, periods[-1].end + 0.5)
    for period in periods[1:]:
        axes.axvline(period.start + 0.5, color=FAINT, linestyle="--", linewidth=1)
    for name in names:
        axes.annotate(
            name.text,
            (name.middle + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(name.shift, 3),
            textcoords="offset points",
            ha="left" if name.slanted else "center",
            va="bottom",
            rotation=45 if name.slanted else 0,
            rotation_mode="anchor",
            fontsize=8,
            color=FAINT,
            parse_math=False,
        )


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
