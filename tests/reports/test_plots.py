import io
import sys
import warnings

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from PIL import Image

from keras_xfer.reports import (
    plot_class_scores,
    plot_confusion,
    plot_history,
    plot_most_wrong,
    plot_timing,
)
from keras_xfer.reports.plots import thumbnail

HISTORY = {
    "loss": [3.0, 2.0, 1.0, 0.5],
    "val_loss": [3.1, 2.1, 1.2, 0.9],
    "accuracy": [0.1, 0.4, 0.6, 0.8],
    "val_accuracy": [0.1, 0.3, 0.5, 0.7],
    "stage": [0, 0, 1, 1],
    "learning_rate": [1e-3] * 4,
    "epoch_seconds": [2.0, 1.0, 4.0, 6.0],
}


def draw(figure):
    figure.savefig(io.BytesIO(), format="png")
    return figure


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_history_draws_what_was_logged():
    loss, accuracy = draw(plot_history(HISTORY)).axes
    assert loss.get_ylabel() == "loss"
    assert accuracy.get_ylabel() == "accuracy"
    np.testing.assert_array_equal(
        lines(loss)["validation"].get_xydata(), [[1, 3.1], [2, 2.1], [3, 1.2], [4, 0.9]]
    )
    np.testing.assert_array_equal(lines(accuracy)["training"].get_ydata(), HISTORY["accuracy"])


def test_a_line_stands_where_a_stage_begins():
    for axes in plot_history(HISTORY).axes:
        upright = [
            line.get_xdata()[0]
            for line in axes.lines
            if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
        ]
        assert upright == [2.5]  # between the second epoch and the third
        assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2"]


def test_history_takes_what_fit_returns_and_frames():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    fitted = model.fit(np.zeros((4, 2)), np.zeros(4), epochs=2, validation_split=0.5, verbose=0)
    for history in (fitted, fitted.history, pd.DataFrame(fitted.history)):
        figure = draw(plot_history(history))
        assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "mae"]
        np.testing.assert_allclose(
            lines(figure.axes[0])["training"].get_ydata(), fitted.history["loss"]
        )


def test_validation_every_second_epoch():
    history = {"loss": [4.0, 3.0, 2.0, 1.0], "val_loss": [3.5, 1.5]}
    axes = draw(plot_history(history)).axes[0]
    np.testing.assert_array_equal(lines(axes)["validation"].get_xydata(), [[2, 3.5], [4, 1.5]])


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"loss": []},
        {"loss": [1.0]},
        {"loss": [float("nan")] * 3, "val_loss": [float("nan")] * 3},
        {"accuracy": [0.5, 0.6]},
        {"loss": [1.0, 2.0], "stage": [0, float("nan")]},
        {"loss": np.arange(40.0), "stage": np.arange(40)},
        {"loss": [1.0, float("inf")]},
    ],
)
def test_odd_histories_are_drawn(history):
    draw(plot_history(history))
    draw(plot_history(pd.DataFrame(history)))


def test_timing_by_stage():
    figure = draw(plot_timing(pd.DataFrame(HISTORY)))
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == HISTORY["epoch_seconds"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "stage 1: median 1.5 s",
        "stage 2: median 5.0 s",
    ]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_timing_without_seconds():
    with pytest.raises(ValueError, match="EpochTiming"):
        plot_timing({"loss": [1.0]})
    draw(plot_timing({"epoch_seconds": [float("nan"), 1.0]}))
    draw(plot_timing({"epoch_seconds": []}))


@pytest.mark.parametrize("classes", [0, 1, 2, 10, 20, 21, 120])
def test_confusion_of_any_size(classes):
    names = [f"class {i}" for i in range(classes)]
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    if classes:
        counts[0] = 0  # a class without images
    axes = draw(plot_confusion(pd.DataFrame(counts, names, names))).axes[0]
    texts = [int(text.get_text()) for text in axes.texts]
    assert texts == (counts[counts > 0].tolist() if classes <= 20 else [])
    if classes:
        shown = axes.images[0].get_array()
        totals = np.maximum(counts.sum(1, keepdims=True), 1)
        np.testing.assert_allclose(shown, counts / totals)
        assert 1 <= len(axes.get_yticklabels()) <= 40


@pytest.mark.parametrize("classes", [0, 1, 3, 120])
def test_class_scores_begin_with_the_worst(classes):
    f1 = np.linspace(1, 0, classes)
    scores = pd.DataFrame(
        {"precision": f1, "recall": f1, "f1-score": f1, "support": 1},
        index=[f"class {i}" for i in range(classes)],
    )
    averages = pd.DataFrame(
        [[0.5, 0.5, 0.5, classes]] * 2, ["macro avg", "weighted avg"], scores.columns
    )
    axes = draw(plot_class_scores(pd.concat([scores, averages]))).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"class {i}" for i in range(classes)][::-1][:40]


def test_names_are_drawn_as_they_are():
    # A dollar sign would start mathematics, and an unbalanced brace would end in an exception.
    names = [r"$\frac{$", "a$b$c", "x" * 200]
    counts = pd.DataFrame(np.eye(3), names, names)
    labels = [text.get_text() for text in draw(plot_confusion(counts)).axes[0].get_yticklabels()]
    assert labels[:2] == names[:2]
    assert labels[2] == "x" * 27 + "…"
    scores = pd.DataFrame(dict.fromkeys(["precision", "recall", "f1-score"], 0.5), names)
    draw(plot_class_scores(scores))


def test_most_wrong_shows_images(tmp_path):
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_text("text")
    table = pd.DataFrame(
        [
            ["red.png", "a", "b", 0.9, False],
            ["gone.png", "a", "b", 0.8, False],
            ["bad.png", "a", "$", float("nan"), False],
            ["red.png", "a", "a", 1.0, True],
        ],
        columns=["file", "label", "prediction", "probability", "correct"],
    )
    axes = draw(plot_most_wrong(table, root=tmp_path)).axes
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["b, 90.0%", "b, 80.0%", "$, nan%"]
    assert axes[0].images[0].get_array()[0, 0].tolist() == [200, 0, 0]
    assert len(draw(plot_most_wrong(table.iloc[:0])).axes) == 0


def test_thumbnails(tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "x.jpg")
    assert thumbnail(tmp_path / "x.jpg", 100).size == (100, 50)
    Image.new("RGBA", (4, 4)).save(tmp_path / "x.png")
    assert thumbnail(tmp_path / "x.png", 100).getpixel((0, 0)) == (255, 255, 255)
    assert thumbnail(tmp_path / "gone.jpg", 100) is None


def test_pyplot_is_left_alone():
    before = (pyplot.get_backend(), dict(matplotlib.rcParams))
    draw(plot_history(HISTORY))
    draw(plot_timing(HISTORY))
    assert pyplot.get_fignums() == []
    assert (pyplot.get_backend(), dict(matplotlib.rcParams)) == before


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with warnings.catch_warnings(), pytest.raises(ImportError, match=r"keras-xfer\[report\]"):
        plot_history({"loss": [1.0]})
