"""Tables, plots and the report of a training run."""

from keras_xfer.reports.history_plots import plot_history, plot_timing
from keras_xfer.reports.html import write_report
from keras_xfer.reports.plots import plot_class_scores, plot_confusion, plot_most_wrong
from keras_xfer.reports.predictions import (
    predict_probabilities,
    predictions_table,
    read_predictions,
)
from keras_xfer.reports.search_plots import plot_objective, plot_parallel_coordinates
from keras_xfer.reports.tables import classification_table, confusion_table, most_wrong

__all__ = [
    "classification_table",
    "confusion_table",
    "most_wrong",
    "plot_class_scores",
    "plot_confusion",
    "plot_history",
    "plot_most_wrong",
    "plot_objective",
    "plot_parallel_coordinates",
    "plot_timing",
    "predict_probabilities",
    "predictions_table",
    "read_predictions",
    "write_report",
]
