import io
import itertools

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_xfer import Backbone, EpochTiming, Stage, StagedUnfreezing
from keras_xfer.reports import plot_history, plot_timing

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


def test_a_history_brings_the_names_of_its_stages():
    base = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model = keras.Sequential([keras.Input((2,)), Backbone(base), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    stages = [Stage(epochs=1, name="frozen"), Stage("all", epochs=1, learning_rate=1e-3)]
    x, y = np.zeros((4, 2)), np.zeros((4, 1))
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[StagedUnfreezing(stages)])
    assert names(plot_history(history).axes[0]) == ["frozen", "stage 2"]
    plain = model.fit(x, y, epochs=1, verbose=0)  # a History of its own, which has no stages
    assert names(plot_history([history, plain]).axes[0])[-1] == "fit 2"
    assert names(plot_history(history, stage_names=["a", "b"]).axes[0]) == ["a", "b"]


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
        "stage 2: median 5.0 s (3.3 times stage 1)",
    ]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_timing_without_seconds():
    with pytest.raises(ValueError, match="EpochTiming"):
        plot_timing({"loss": [1.0]})
    draw(plot_timing({"epoch_seconds": [float("nan"), 1.0]}))
    draw(plot_timing({"epoch_seconds": []}))


# Several fits.

FROZEN = {"loss": [3.0, 2.0], "val_loss": [3.5, 2.5], "epoch_seconds": [2.0, 2.0]}
TUNED = {"loss": [1.0, 0.5, 0.2], "accuracy": [0.7, 0.8, 0.9], "epoch_seconds": [5.0, 6.0, 7.0]}
STAGED = {**TUNED, "stage": [0, 0, 1]}


def marks(axes):
    """Where dashed lines stand."""
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def names(axes):
    return [text.get_text() for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def as_history(logs):
    history = keras.callbacks.History()
    history.history = logs
    return history


@pytest.mark.parametrize("form", [dict, pd.DataFrame, as_history])
def test_the_epochs_of_fits_run_on(form):
    for axes in draw(plot_history([form(FROZEN), form(TUNED)])).axes:
        assert marks(axes) == [2.5]
        assert names(axes) == ["fit 1", "fit 2"]
    loss, accuracy = draw(plot_history((form(FROZEN), form(TUNED)))).axes
    np.testing.assert_array_equal(
        lines(loss)["training"].get_xydata(), [[1, 3], [2, 2], [3, 1], [4, 0.5], [5, 0.2]]
    )
    # What a fit did not log is not drawn.
    np.testing.assert_array_equal(lines(loss)["validation"].get_xdata(), [1, 2])
    np.testing.assert_array_equal(lines(accuracy)["training"].get_xdata(), [3, 4, 5])


def test_a_dict_names_the_fits():
    axes = draw(plot_history({"frozen": FROZEN, "$fine$": as_history(TUNED)})).axes[0]
    assert names(axes) == ["frozen", "$fine$"]
    assert marks(axes) == [2.5]
    assert names(plot_history({"only": FROZEN}).axes[0]) == ["only"]
    assert names(plot_history([FROZEN]).axes[0]) == []


def test_stages_inside_fits():
    axes = draw(plot_history([FROZEN, STAGED])).axes[0]
    assert names(axes) == ["fit 1", "fit 2\nstage 1", "fit 2\nstage 2"]
    assert marks(axes) == [2.5, 4.5]
    axes = draw(plot_history({"a": STAGED, "b": FROZEN}, stage_names=["top", "all"])).axes[0]
    assert names(axes) == ["a\ntop", "a\nall", "b"]
    assert marks(axes) == [2.5, 3.5]


def test_stages_have_the_names_given():
    assert names(plot_history(STAGED, stage_names=["head", "all"]).axes[0]) == ["head", "all"]
    for history, given in ((STAGED, ["head"]), (FROZEN, ["head"]), (STAGED, "ab"), (STAGED, [])):
        with pytest.raises(ValueError, match="Received: stage_names="):
            plot_history(history, stage_names=given)


@pytest.mark.parametrize("history", [[FROZEN, [1.0]], {"a": FROZEN, "b": [1.0]}, "history.csv", 3])
def test_what_is_no_history_is_an_error(history):
    with pytest.raises(ValueError, match="Expected what model.fit returns"):
        plot_history(history)


def test_rows_are_one_history():
    rows = [{"loss": 2.0, "stage": None}, {"loss": 1.0, "stage": None}]
    axes = draw(plot_history(rows)).axes[0]
    np.testing.assert_array_equal(lines(axes)["training"].get_ydata(), [2, 1])
    assert names(axes) == []


@pytest.mark.parametrize(
    "history",
    [
        [STAGED] * 3,
        {f"the fit that is called {i}": FROZEN for i in range(8)},
        [{"loss": [1.0]}, {"loss": [1.0] * 2}, {"loss": np.ones(100)}],
    ],
)
def test_every_name_has_its_place(history):
    figure = plot_history(history)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
        assert len(boxes) == len(marks(axes)) + 1
        if axes.texts[0].get_rotation() == 0:
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        else:  # lines of 8 points, at 45 degrees
            left = np.array([box.x0 for box in boxes])
            assert (np.diff(left) * 72 / figure.dpi > 8 * 2**0.5).all()


@pytest.mark.parametrize("timing", [[FROZEN, TUNED], {"fit 1": FROZEN, "fit 2": TUNED}])
def test_the_ratio_of_two_fits(timing):
    figure = draw(plot_timing(timing))
    assert legend(figure) == ["fit 1: median 2.0 s", "fit 2: median 6.0 s (3.0 times fit 1)"]
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [2, 2, 5, 6, 7]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([1, 2, 3, 4, 5])


def test_the_ratio_of_stages_by_their_names():
    history = {"epoch_seconds": [4.0, 1.0, 1.0], "stage": [0, 1, 1]}
    assert legend(plot_timing(history, stage_names=["cold", "$warm"])) == [
        "cold: median 4.0 s",
        "$warm: median 1.0 s (0.25 times cold)",
    ]
    assert legend(plot_timing([FROZEN, STAGED]))[1:] == [
        "fit 2, stage 1: median 5.5 s (2.8 times fit 1)",
        "fit 2, stage 2: median 7.0 s (3.5 times fit 1)",
    ]


def test_the_ratio_leaves_out_tracing_where_steps_are_timed():
    # Both first epochs trace for 9 seconds; a step takes 0.1 s, then 0.25 s.
    history = {
        "epoch_seconds": [10.0, 11.5],
        "step_seconds_median": [0.1, 0.25],
        "stage": [0, 1],
    }
    assert legend(plot_timing(history))[1] == "stage 2: median 11.5 s (a step: 2.5 times stage 1)"


def test_the_ratio_is_that_of_epoch_timing():
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    model = keras.Sequential([keras.Input((4,)), Backbone(base), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    timing = EpochTiming()
    stages = [Stage(epochs=2, learning_rate=0.1), Stage(-1, epochs=2, learning_rate=0.1)]
    history = model.fit(
        np.ones((32, 4)),
        np.ones((32, 1)),
        batch_size=4,
        epochs=4,
        verbose=0,
        callbacks=[timing, StagedUnfreezing(stages)],
    )
    slowdown = timing.by_stage()["slowdown"][1]
    for given in (timing, history):
        text = legend(draw(plot_timing(given)))[1]
        assert text.startswith("stage 2: median ")
        ratio = float(text.partition("(a step: ")[2].partition(" times stage 1)")[0])
        assert ratio == pytest.approx(slowdown, rel=0.06)


def test_one_epoch_timing_over_two_fits():
    timing = EpochTiming()
    nan = dict.fromkeys(["step_seconds_median"], float("nan"))
    timing.rows = [
        {"epoch": epoch, "stage": None, "epoch_seconds": seconds, **nan}
        for epoch, seconds in ((0, 1.0), (1, 1.0), (0, 3.0), (1, 5.0), (2, 3.0))
    ]
    for given in (timing, timing.table()):
        assert legend(plot_timing(given)) == [
            "fit 1: median 1.0 s",
            "fit 2: median 3.0 s (3.0 times fit 1)",
        ]
    assert names(plot_history(timing).axes[0]) == ["fit 1", "fit 2"]
    timing.rows = timing.rows[:2]
    assert legend(plot_timing(timing)) == ["median 1.0 s"]


def test_a_long_legend_is_cut():
    figure = draw(plot_timing([{"epoch_seconds": [1.0]}] * 20))
    assert len(figure.axes[0].patches) == 20
    assert legend(figure)[-2:] == ["fit 11: median 1.0 s (1.0 times fit 1)", "and 9 more"]


def test_pyplot_is_left_alone():
    before = (pyplot.get_backend(), dict(matplotlib.rcParams))
    draw(plot_history([HISTORY, HISTORY]))
    draw(plot_timing(HISTORY))
    assert pyplot.get_fignums() == []
    assert (pyplot.get_backend(), dict(matplotlib.rcParams)) == before
