"""One training from several: the epochs of fits one after the other, and what each is called."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.extras import require

if TYPE_CHECKING:
    import pandas as pd


class Period(NamedTuple):
    """One stage of one fit: the rows from `start` to before `end`."""

    parts: tuple[str, ...]  # of its name: fit, stage, both, or none for a single fit without stages
    start: int
    end: int
    fit: int
    stage: int

    @property
    def name(self) -> str:
        """The name on one line."""
        return ", ".join(self.parts)


def join(
    history: Any, stage_names: Sequence[str] | None = None
) -> tuple["pd.DataFrame", list[Period]]:
    """Put the epochs of all fits into one table; a metric that a fit did not log is NaN there."""
    pd = require("pandas")
    fits, names = _fits(history)
    tables = [_table(fit) for fit in fits]
    lengths = [len(table) for table in tables]
    columns = list(dict.fromkeys(column for table in tables for column in table))
    # Not pandas.concat, whose dtypes depend on the version where a fit has no values.
    joined = pd.DataFrame(
        {
            column: np.concatenate(
                [table.get(column, np.full(len(table), np.nan)) for table in tables]
            )
            for column in columns
        },
        index=range(sum(lengths)),
    )
    of_stages: list[Any]
    if stage_names is not None:
        of_stages = [stage_names] * len(fits)
    else:  # a fit of no epochs has names, and no stages
        pairs = zip(fits, tables, strict=True)
        of_stages = [
            getattr(fit, "stage_names", None) if "stage" in t else None for fit, t in pairs
        ]
    return joined, _periods(tables, names, of_stages)


def _periods(
    tables: Sequence["pd.DataFrame"],
    names: Sequence[str],
    stage_names: Sequence[Sequence[str] | None],
) -> list[Period]:
    stages = [_stages(table) for table in tables]
    _check_names(stage_names, stages, is_staged=any("stage" in table for table in tables))
    periods = []
    begin = 0
    for fit, (name, own, of_stages) in enumerate(zip(names, stages, stage_names, strict=True)):
        starts = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist()] if len(own) else []
        for start, end in zip(starts, [*starts[1:], len(own)], strict=False):
            stage = int(own[start])
            called = f"stage {stage + 1}" if of_stages is None else of_stages[stage]
            parts = (name,) if name else ()
            if "stage" in tables[fit] and (not name or len(starts) > 1):
                parts = (*parts, str(called))
            periods.append(Period(parts, begin + start, begin + end, fit, stage))
        begin += len(own)
    return periods


def _check_names(
    stage_names: Sequence[Sequence[str] | None], stages: Sequence[np.ndarray], *, is_staged: bool
) -> None:
    for names, own in zip(stage_names, stages, strict=True):
        needed = int(own.max()) + 1 if len(own) else 0
        if names is not None and (isinstance(names, str) or len(names) < needed or not is_staged):
            raise ValueError(
                f"Expected a name for each of the {needed} stages of the column 'stage'. Received: "
                f"stage_names={names!r}"
            )


def _fits(history: Any) -> tuple[list[Any], list[str]]:
    """List the histories and what they are called."""
    if isinstance(history, Mapping) and any(_is_history(each) for each in history.values()):
        fits, names = list(history.values()), [str(name) for name in history]
    elif isinstance(history, list | tuple) and not _are_rows(history):
        fits = list(history)
        names = [f"fit {i + 1}" for i in range(len(fits))] if len(fits) > 1 else [""] * len(fits)
    else:
        fits = _split_where_epochs_begin_anew(history)
        names = [f"fit {i + 1}" for i in range(len(fits))] if len(fits) > 1 else [""]
    for fit in fits:
        if not (_is_history(fit) or _are_rows(fit)):
            raise ValueError(
                "Expected what model.fit returns, its .history, a DataFrame with one row an epoch, "
                "or a list or dict of these, one a fit. Received: "
                f"{type(fit).__name__} in history={type(history).__name__}"
            )
    return fits, names


def _is_history(value: Any) -> bool:
    return (
        isinstance(value, Mapping | EpochTiming)
        or hasattr(value, "history")
        or hasattr(value, "columns")
    )


def _are_rows(value: Any) -> bool:
    """Tell a list of dicts with one number each, one an epoch, from a list of histories."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(row, Mapping) and row and all(map(_is_number, row.values())) for row in value
        )
    )


def _is_number(value: Any) -> bool:
    return value is None or np.ndim(value) == 0


def _split_where_epochs_begin_anew(history: Any) -> list[Any]:
    """Take the rows of an EpochTiming apart where a fit without stages began after another."""
    table = history.table() if isinstance(history, EpochTiming) else history
    if "epoch" not in getattr(table, "columns", ()):
        return [table]
    if "stage" in table and table["stage"].notna().any():
        return [table]  # as `by_stage` counts them
    starts = np.flatnonzero(np.diff(table["epoch"].to_numpy()) <= 0) + 1
    bounds = [0, *starts.tolist(), len(table)]
    return [table.iloc[a:b] for a, b in itertools.pairwise(bounds)]


def _table(fit: Any) -> "pd.DataFrame":
    pd = require("pandas")
    if isinstance(fit, EpochTiming):
        fit = fit.table()
    if not hasattr(fit, "columns"):
        fit = getattr(fit, "history", fit)
    if isinstance(fit, Mapping):
        length = max((len(values) for values in fit.values()), default=0)
        columns = {str(name): _spread(values, length) for name, values in fit.items()}
    else:
        rows = pd.DataFrame(fit)
        columns = {
            str(name): pd.to_numeric(rows[name], errors="coerce").to_numpy(float, na_value=np.nan)
            for name in rows
        }
    if len(columns.get("stage", ())) and np.isnan(columns["stage"]).all():
        del columns["stage"]  # what an EpochTiming has without a schedule
    return pd.DataFrame(columns)


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
