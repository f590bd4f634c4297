"""What the report says of a hyperparameter search."""

import math
from typing import TYPE_CHECKING, Any

from keras_xfer.reports._numbers import duration, number
from keras_xfer.reports.plots import short
from keras_xfer.reports.search_plots import plot_objective, plot_parallel_coordinates
from keras_xfer.reports.trials import (
    NOT_ACTIVE,
    Hyperparameter,
    failures,
    has_score,
    hyperparameters,
    left_out,
    ranked,
)

if TYPE_CHECKING:
    import pandas as pd

_MOST_TRIALS = 10  # of the table in the page; trials.csv holds all
_MOST_ERRORS = 10


def search_section(trials: "pd.DataFrame") -> dict[str, Any]:
    """Put together the section of a search, its figures not yet encoded.

    `trials`: as `read_trials` gives them.
    """
    order = ranked(trials)
    varying = [each for each in hyperparameters(order) if each.varies]
    seconds = float(trials["seconds"].sum())
    errors = failures(trials)
    return {
        "count": len(trials),
        "duration": duration(seconds) if seconds > 0 else "",
        "completed": int(has_score(trials).sum()),
        "left_out": left_out(trials),
        "objective": str(trials["objective"].iloc[0]).replace("_", " ") if len(trials) else "",
        "figures": {
            "objective": plot_objective(trials) if len(order) else None,
            "parallel": plot_parallel_coordinates(trials) if varying else None,
        },
        "columns": [each.name for each in varying],
        "rows": [
            {
                "trial": trial["trial"],
                "score": number(trial["score"]),
                "stage": trial["stage"],
                "epochs": _if_known(trial["epochs"], ",.0f"),
                "seconds": _if_known(trial["seconds"], ",.1f"),
                "cells": [_cell(each, i) for each in varying],
            }
            for i, (_, trial) in enumerate(order.head(_MOST_TRIALS).iterrows())
        ],
        "failed": sum(count for _, count in errors),
        "errors": [(short(error, 400), count) for error, count in errors[:_MOST_ERRORS]],
        "more_errors": max(len(errors) - _MOST_ERRORS, 0),
    }


def _if_known(value: float, style: str) -> str:
    return "" if math.isnan(value) else format(value, style)


def _cell(parameter: Hyperparameter, trial: int) -> str:
    name = parameter.names[trial]
    if name is None:
        return NOT_ACTIVE
    return name if parameter.numbers is None else number(float(parameter.numbers[trial]))
