"""Figures of a hyperparameter search: which values did well, and when the best was found."""

import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_xfer.extras import require
from keras_xfer.reports._numbers import duration, number, numbers
from keras_xfer.reports.plots import (
    COLORS,
    FAINT,
    INK,
    new_figure,
    short,
    style,
    whole_numbers,
)
from keras_xfer.reports.trials import (
    NOT_ACTIVE,
    Hyperparameter,
    has_score,
    hyperparameters,
    left_out,
    ranked,
    read_trials,
    require_completed,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P")
_DECADES = 1.5  # positive numbers spread over more are drawn by their logarithm
_INACTIVE = -0.13  # where an axis has its dash, below its lowest value
_APART = 0.055  # ticks of an axis are at least so far from each other
_LETTER = 0.068  # inches that a letter is wide, on average


def plot_parallel_coordinates(trials: "pd.DataFrame | str | os.PathLike[str]") -> "Figure":
    """Draw each completed trial of a search as a line through its hyperparameters to its score.

    Shows which values the good trials have in common, where a table of trials does not. The
    better a trial, the darker its line; the best one is thick.

    Args:
        trials: DataFrame with one row a trial, in the order in which they began, or path of its
            CSV file (`trials.csv`): the columns `trial`, `status`, `objective`, `direction`
            ("max" or "min"), `score`, and one named `hp.<name>` for each hyperparameter, empty
            in a trial where it was not active.

    Returns:
        A `matplotlib.figure.Figure`: one upright axis for each hyperparameter that varies, the
        last one for the score. Positive numbers spread over more than one and a half decades stand
        at their logarithm, a score that is to rise excepted; a value that is not active stands
        at the dash below.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        OSError: The file cannot be read.
        ValueError: A column is missing, there is no column `hp.<name>`, or no trial has completed
            with a finite score.

    Example:
    >>> figure = plot_parallel_coordinates(
    ...     {
    ...         "trial": ["0", "1", "2"],
    ...         "status": ["completed", "completed", "failed"],
    ...         "objective": "val_accuracy",
    ...         "direction": "max",
    ...         "score": [0.7, 0.9, None],
    ...         "hp.learning_rate": [1e-2, 1e-4, 1e-3],
    ...     }
    ... )
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['learning_rate', 'val accuracy']

    Reference:
        https://doi.org/10.1007/BF01898350
    """
    table = read_trials(trials)
    require_completed(table)
    if not hyperparameters(table):
        raise ValueError(
            "Expected trials with a column named hp.<name> for each hyperparameter, such as "
            f"'hp.learning_rate'. Received: columns={list(table)}. In this search nothing was "
            "searched, so that there is nothing to draw but plot_objective."
        )
    best_last = ranked(table)[::-1]
    scores = best_last["score"].to_numpy(dtype=float)
    objective = str(best_last["objective"].iloc[0]).replace("_", " ")
    minimize = bool(best_last["direction"].iloc[0] == "min")
    scales = [_scale(each) for each in hyperparameters(best_last) if each.varies]
    scales.append(_number_scale(objective, scores, log=minimize and _spread_over_decades(scores)))

    # Upright axes stand as far apart as the labels between them need, in inches.
    gaps = [_gap(scale) for scale in scales]
    places = np.cumsum([0.0, *gaps[1:]])
    widths = [_LETTER * 1.15 * len(scale.name) for scale in scales]
    crowded = any((widths[i - 1] + widths[i]) / 2 > gaps[i] - 0.15 for i in range(1, len(scales)))
    width = max(5.0, gaps[0] + float(places[-1]) + 1.6)
    figure = new_figure(width, 4.6 if crowded else 4.2)
    axes = figure.add_subplot()
    _draw_trials(axes, best_last, scales, places, dark_is_high=not minimize)
    _draw_scales(axes, scales, places)
    _name_scales(axes, scales, places, rotated=crowded)
    _draw_color_bar(figure, axes, scales[-1], dark_is_high=not minimize)
    caption = textwrap.fill(_caption(table, objective), int(width / _LETTER))
    axes.set_xlabel(caption, fontsize=9, labelpad=10, parse_math=False)
    return figure


def plot_objective(trials: "pd.DataFrame | str | os.PathLike[str]") -> "Figure":
    """Draw the score of each trial of a search in the order of the trials, and the best so far.

    Shows whether the search still finds better ones, and so whether to go on with it.

    Args:
        trials: DataFrame with one row a trial, in the order in which they began, or path of its
            CSV file (`trials.csv`): the columns `trial`, `status`, `objective`, `direction`
            ("max" or "min") and `score`; if they are there, the dots are told apart by `stage`
            and the label adds up `seconds`.

    Returns:
        A `matplotlib.figure.Figure`. Trials stand at their number where `trial` is one that rises
        from row to row, otherwise they are counted from 1. Those without a score are marked
        on the lower edge. Scores that are to fall stand at their logarithm where they are
        positive and spread over more than one and a half decades.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        OSError: The file cannot be read.
        ValueError: A column is missing, or no trial has completed with a finite score.

    Example:
    >>> figure = plot_objective(
    ...     {
    ...         "trial": ["0", "1", "2"],
    ...         "status": "completed",
    ...         "objective": "val_accuracy",
    ...         "direction": "max",
    ...         "score": [0.7, 0.9, 0.8],
    ...     }
    ... )
    >>> figure.axes[0].lines[0].get_ydata().tolist()  # the best so far
    [0.7, 0.9, 0.9]

    Reference:
        https://doi.org/10.1145/3097983.3098043
    """
    table = read_trials(trials)
    require_completed(table)
    objective = str(table["objective"].iloc[0])
    minimize = bool(table["direction"].iloc[0] == "min")
    completed = has_score(table).to_numpy(dtype=bool)
    scores = np.where(completed, table["score"].to_numpy(dtype=float), np.nan)
    counted = _trial_numbers(table)

    figure = new_figure(max(6.5, min(3 + 0.07 * len(table), 12.0)), 3.8)
    axes = figure.add_subplot()
    first = int(np.flatnonzero(completed)[0])
    so_far = (np.fmin if minimize else np.fmax).accumulate(scores)
    axes.step(
        counted[first:],
        so_far[first:],
        where="post",
        color=FAINT,
        linewidth=1.5,
        label="best so far",
    )
    stages = table["stage"].to_numpy()
    for i, stage in enumerate(dict.fromkeys(stages[completed].tolist())):
        own = completed & (stages == stage)
        axes.scatter(
            counted[own],
            scores[own],
            s=34,
            color=COLORS[i % len(COLORS)],
            marker=_MARKERS[i % len(_MARKERS)],
            edgecolor="white",
            linewidth=0.6,
            label=_legend_text(stage or "completed"),
            zorder=3,
        )
    failed = (table["status"] == "failed").to_numpy(dtype=bool)
    for own, marker, label in (
        (failed, "x", "failed"),
        (~completed & ~failed, "|", "no final score"),
    ):
        if own.any():
            axes.scatter(
                counted[own],
                np.full(own.sum(), 0.025),
                s=24,
                color=INK,
                marker=marker,
                linewidth=1.2,
                label=label,
                transform=axes.get_xaxis_transform(),  # on the lower edge, whatever the scores
                zorder=3,
            )
    if minimize and _spread_over_decades(scores[completed]):
        _by_logarithm(axes)
    # Below the lowest there is place for the best one's value, and for the marks on the edge.
    axes.margins(y=0.22 if minimize and not completed.all() else 0.13)
    axes.set_xlim(counted[0] - 0.6, counted[-1] + 0.6)
    _mark_best(axes, ranked(table), counted, minimize=minimize)
    _label_trials(axes, table, objective)
    if len(table) <= 8:
        axes.set_xticks(counted)
    return figure


class _Scale(NamedTuple):
    """One upright axis: where on it each trial is (0: lowest value, 1: highest), and its ticks."""

    name: str
    positions: np.ndarray
    ticks: list[tuple[float, str]]


def _scale(parameter: Hyperparameter) -> _Scale:
    if parameter.numbers is not None:
        values = parameter.numbers
        log = _spread_over_decades(values[np.isfinite(values)])
        return _number_scale(parameter.name, values, log=log)
    names = sorted({name for name in parameter.names if name is not None})
    places = {name: i / (len(names) - 1) if len(names) > 1 else 0.5 for i, name in enumerate(names)}
    positions = np.array([places.get(name, _INACTIVE) for name in parameter.names])  # type: ignore[arg-type]
    return _with_inactive(
        parameter.name, positions, [(place, short(name, 22)) for name, place in places.items()]
    )


def _number_scale(name: str, values: np.ndarray, *, log: bool) -> _Scale:
    known = np.unique(values[np.isfinite(values)])
    marks = known
    if len(known) > 6 or any(float(f"{value:.4g}") != value for value in known):
        marks = _round_numbers(float(known[0]), float(known[-1]), log=log)
    if log:
        values, known, drawn = np.log10(values), np.log10(known), np.log10(marks)
    else:
        drawn = marks
    low, width = known[0], known[-1] - known[0]
    where = (drawn - low) / width if width else np.full(len(drawn), 0.5)
    positions = (values - low) / width if width else np.where(np.isfinite(values), 0.5, np.nan)
    positions = np.where(np.isfinite(positions), positions, _INACTIVE)
    ticks = list(zip(where.tolist(), numbers(marks.tolist()), strict=True))
    return _with_inactive(name, positions, ticks)


def _with_inactive(name: str, positions: np.ndarray, ticks: list[tuple[float, str]]) -> _Scale:
    """Thin out ticks that would touch, and add the one of trials that have no value."""
    kept: list[tuple[float, str]] = []
    for place, text in sorted(ticks):
        if not kept or place - kept[-1][0] >= _APART:
            kept.append((place, text))
    if (positions == _INACTIVE).any():
        kept.insert(0, (_INACTIVE, NOT_ACTIVE))
    return _Scale(name, positions, kept)


def _round_numbers(low: float, high: float, *, log: bool) -> np.ndarray:
    """Choose round numbers between two, or the number itself where they are the same."""
    ticker = require("matplotlib.ticker")
    if low == high:
        return np.array([low])
    if log:
        subs = (1.0,) if high / low >= 1e3 else (1.0, 3.0)
        marks = ticker.LogLocator(subs=subs, numticks=12).tick_values(low, high)
    else:
        marks = ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    marks = marks[(marks >= low) & (marks <= high)]
    return marks if len(marks) > 1 else np.array([low, high])


def _spread_over_decades(values: np.ndarray) -> bool:
    return bool(
        len(values) and values.min() > 0 and np.log10(values.max() / values.min()) > _DECADES
    )


def _gap(scale: _Scale) -> float:
    return max(0.95, _LETTER * max(len(text) for _, text in scale.ticks) + 0.35)


def _color_map(*, dark_is_high: bool) -> Any:
    # The dark end stands out on white paper: it is the good one.
    return require("matplotlib").colormaps["viridis_r" if dark_is_high else "viridis"]


def _draw_trials(
    axes: Any,
    best_last: "pd.DataFrame",
    scales: Sequence[_Scale],
    places: np.ndarray,
    *,
    dark_is_high: bool,
) -> None:
    color_map = _color_map(dark_is_high=dark_is_high)
    count = len(best_last)
    alpha = float(np.clip(40 / count, 0.35, 0.85))
    for i, trial in enumerate(best_last["trial"]):
        best = i == count - 1
        axes.plot(
            places,
            [scale.positions[i] for scale in scales],
            color=color_map(float(scales[-1].positions[i])),
            alpha=1.0 if best else alpha,
            linewidth=3.4 if best else 1.3,
            marker="o",
            markersize=6.5 if best else 3,
            solid_joinstyle="round",
            zorder=2 + i / count,
            label=str(trial),
        )


def _draw_scales(axes: Any, scales: Sequence[_Scale], places: np.ndarray) -> None:
    axes.vlines(places, 0, 1, color=INK, linewidth=1, zorder=3.5)
    for scale, place in zip(scales, places, strict=True):
        if (scale.positions == _INACTIVE).any():
            axes.vlines(place, _INACTIVE, 0, color=FAINT, linewidth=1, linestyle=":", zorder=1)
        for height, text in scale.ticks:
            axes.annotate(
                text,
                (place, height),
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=11 if text == NOT_ACTIVE else 8,
                color=INK,
                zorder=4,
                parse_math=False,
                # Lines pass beneath the labels, which stay readable.
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.6},
            )


def _name_scales(axes: Any, scales: Sequence[_Scale], places: np.ndarray, *, rotated: bool) -> None:
    axes.xaxis.tick_top()
    axes.set_xticks(
        places,
        [short(scale.name) for scale in scales],
        fontsize=9.5,
        rotation=25 if rotated else 0,
        ha="left" if rotated else "center",
        parse_math=False,
    )
    axes.set_yticks([])
    style(axes, grid=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    inactive = any((scale.positions == _INACTIVE).any() for scale in scales)
    axes.set_ylim((_INACTIVE if inactive else 0) - 0.05, 1.05)
    axes.set_xlim(-0.12, float(places[-1]) + 0.12)
    axes.xaxis.set_label_position("bottom")


def _draw_color_bar(figure: "Figure", axes: Any, scale: _Scale, *, dark_is_high: bool) -> None:
    """Colours stand for positions on the last axis, so the bar has that axis's ticks."""
    colors = require("matplotlib.colors")
    mappable = require("matplotlib.cm").ScalarMappable(
        colors.Normalize(0, 1), _color_map(dark_is_high=dark_is_high)
    )
    bar = figure.colorbar(mappable, ax=axes, aspect=28, pad=0.02, fraction=0.06)
    bar.outline.set_visible(False)
    bar.set_ticks([place for place, _ in scale.ticks], labels=[text for _, text in scale.ticks])
    bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    bar.set_label(short(scale.name), color=INK, fontsize=9, parse_math=False)


def _caption(table: "pd.DataFrame", objective: str) -> str:
    order = ranked(table)
    trials = "1 completed trial" if len(order) == 1 else f"{len(order):,} completed trials"
    best = f"thick: trial {short(order['trial'].iloc[0])}, {short(objective)} "
    parts = [trials, best + number(float(order["score"].iloc[0]))]
    if left_out(table):
        parts.append(f"left out: {left_out(table)}")
    if not any(each.varies for each in hyperparameters(order)):
        parts.append("no hyperparameter varies")
    return "; ".join(parts)


def _trial_numbers(table: "pd.DataFrame") -> np.ndarray:
    """Trials by the names they have elsewhere, "07" at 7, where those give an order."""
    in_order = np.arange(1, len(table) + 1)
    if not all(name.isascii() and name.isdigit() for name in table["trial"]):
        return in_order
    named = np.array([int(name) for name in table["trial"]])
    rising = (np.diff(named) > 0).all() and named[-1] <= 2 * len(table)
    return named if rising else in_order


def _mark_best(axes: Any, order: "pd.DataFrame", counted: np.ndarray, *, minimize: bool) -> None:
    place, score = int(counted[order.index[0]]), float(order["score"].iloc[0])
    low, high = axes.get_xlim()
    share = (place - low) / (high - low)
    axes.scatter(
        [place],
        [score],
        s=130,
        facecolor="none",
        edgecolor=INK,
        linewidth=1.4,
        zorder=4,
    )
    axes.annotate(
        f"best: {number(score)} (trial {short(order['trial'].iloc[0])})",
        (place, score),
        xytext=(0, -11 if minimize else 11),
        textcoords="offset points",
        ha="left" if share < 0.15 else "right" if share > 0.85 else "center",
        va="top" if minimize else "bottom",
        fontsize=9,
        color=INK,
        parse_math=False,
    )


def _label_trials(axes: Any, table: "pd.DataFrame", objective: str) -> None:
    seconds = float(table["seconds"].sum())
    in_all = f" ({duration(seconds)} in all)" if seconds > 0 else ""
    axes.set_xlabel(f"trial{in_all}")
    axes.set_ylabel(short(objective.replace("_", " ")), parse_math=False)
    style(axes)
    whole_numbers(axes)
    letters = sum(len(label) + 5 for label in axes.get_legend_handles_labels()[1])
    legend = axes.legend(
        frameon=False,
        fontsize=9,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=6 if letters < 75 else 3,
        borderpad=0,
        columnspacing=1.4,
        handletextpad=0.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _by_logarithm(axes: Any) -> None:
    ticker = require("matplotlib.ticker")
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    subs = (1.0,) if high / low >= 1e3 else (1.0, 3.0)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _legend_text(name: str) -> str:
    text = short(name)
    return f" {text}" if text.startswith("_") else text  # matplotlib hides labels with "_" in front
