import io
import itertools
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from keras_xfer.reports import plot_objective, plot_parallel_coordinates

NAN = float("nan")
DASH = "\N{EN DASH}"
ODD = ["$\\frac{$", "<script>alert(1)</script>", "a_b^c$d$", "_hidden", "x" * 200, "two\nlines"]


def search(scores, *, direction="max", status=None, **columns):
    """Trials as the search writes them; `hp_x` stands for the column `hp.x`."""
    count = len(scores)
    if status is None:
        status = ["failed" if np.isnan(score) else "completed" for score in scores]
    return pd.DataFrame(
        {
            "trial": [f"{i:02}" for i in range(count)],
            "stage": "",
            "status": status,
            "objective": "val_accuracy" if direction == "max" else "val_loss",
            "direction": direction,
            "score": scores,
            "best_epoch": [NAN if np.isnan(score) else 3 for score in scores],
            "epochs": 4,
            "seconds": 30.0,
            **{key.replace("hp_", "hp."): value for key, value in columns.items()},
            "error": "",
        }
    )


def draw(figure):
    figure.savefig(io.BytesIO(), format="png")
    return figure


def heights(axes, column):
    """Where each trial crosses an axis, by the trial's name."""
    return {line.get_label(): line.get_ydata()[column] for line in axes.lines}


def names(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def ticks(axes, column):
    """The texts beside one upright axis and their heights."""
    place = axes.get_xticks()[column]
    return {text.get_text(): text.xy[1] for text in axes.texts if text.xy[0] == place}


def luminance(color):
    red, green, blue = matplotlib.colors.to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def dots(axes):
    """Every dot but the ring around the best: (x, y, colour, label)."""
    return [
        (x, y, to_hex(each.get_facecolor()[0]), each.get_label())
        for each in axes.collections
        if len(each.get_facecolor())
        for x, y in each.get_offsets()
    ]


# Parallel coordinates.


def test_every_completed_trial_is_a_line_from_axis_to_axis():
    trials = search(
        [0.5, NAN, 0.9, 0.7, 0.6, 0.8],
        status=["completed", "failed", "completed", "completed", "interrupted", "running"],
        hp_units=[64, 128, 128, 256, 64, 64],
        hp_same=[1] * 6,
    )
    axes = draw(plot_parallel_coordinates(trials)).axes[0]
    assert names(axes) == ["units", "val accuracy"]
    assert sorted(line.get_label() for line in axes.lines) == ["00", "02", "03"]
    units, scores = heights(axes, 0), heights(axes, 1)
    for heights_, values in (
        (units, {"00": 64, "02": 128, "03": 256}),
        (scores, {"00": 0.5, "02": 0.9, "03": 0.7}),
    ):
        low, high = min(values.values()), max(values.values())
        for trial, value in values.items():
            assert heights_[trial] == pytest.approx((value - low) / (high - low))
    assert ticks(axes, 0) == pytest.approx({"64": 0, "128": 1 / 3, "256": 1})
    for line in axes.lines:
        np.testing.assert_array_equal(line.get_xdata(), axes.get_xticks())
    caption = axes.get_xlabel().replace("\n", " ")
    assert "3 completed trials" in caption
    assert "trial 02, val accuracy 0.9" in caption
    assert "left out: 1 failed, 1 interrupted, 1 running" in caption


def test_what_is_constant_among_the_drawn_trials_has_no_axis():
    trials = search(
        [0.5, 0.6, NAN],
        hp_a=["x", "x", "y"],  # differs in the failed trial alone
        hp_b=[0.5, None, None],  # is active in one of the two
        hp_c=[None, None, 1.0],
    )
    assert names(plot_parallel_coordinates(trials).axes[0]) == ["b", "val accuracy"]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([1e-4, 1e-3, 2e-3], False),  # 1.3 decades
        ([1.0, 10.0, 40.0], True),  # 1.6 decades
        ([0.0, 1e-3, 1e-2], False),
        ([-1.0, 10.0, 100.0], False),
    ],
)
def test_numbers_over_decades_stand_at_their_logarithm(values, log):
    axes = draw(plot_parallel_coordinates(search([0.1, 0.2, 0.3], hp_rate=values))).axes[0]
    drawn = np.log10(values) if log else np.array(values)
    expected = (drawn - drawn.min()) / (drawn.max() - drawn.min())
    found = heights(axes, 0)
    np.testing.assert_allclose([found["00"], found["01"], found["02"]], expected, atol=1e-12)


def test_ticks_stand_where_their_numbers_belong():
    rates = 10 ** np.linspace(-4.7, -1.2, 9)
    axes = draw(plot_parallel_coordinates(search(np.linspace(0.1, 0.9, 9), hp_rate=rates))).axes[0]
    low, high = np.log10(rates[0]), np.log10(rates[-1])
    assert ticks(axes, 0) == pytest.approx(
        {
            text: (np.log10(float(text)) - low) / (high - low)
            for text in ("1e-4", "1e-3", "1e-2")  # no other power of ten lies between
        }
    )
    scores = ticks(axes, 1)
    assert len(scores) >= 3
    assert scores == pytest.approx({text: (float(text) - 0.1) / 0.8 for text in scores})


def test_categories_stand_at_equal_distances():
    trials = search(
        [0.1, 0.2, 0.3, 0.4],
        hp_backbone=["b", "a", "c", "b"],
        hp_flag=[True, False, False, None],
        hp_mixed=["7", "none", "7", "8"],
    )
    axes = draw(plot_parallel_coordinates(trials)).axes[0]
    assert ticks(axes, 0) == {"a": 0.0, "b": 0.5, "c": 1.0}
    assert heights(axes, 0) == {"00": 0.5, "01": 0.0, "02": 1.0, "03": 0.5}
    flags = ticks(axes, 1)
    assert flags.pop(DASH) < 0
    assert flags == {"False": 0.0, "True": 1.0}
    assert ticks(axes, 2) == {"7": 0.0, "8": 0.5, "none": 1.0}


def test_values_that_are_not_active_stand_below_the_axis():
    trials = search([0.1, 0.2, 0.3], hp_rate=[1e-4, NAN, 1e-2], hp_head=["a", "b", ""])
    axes = draw(plot_parallel_coordinates(trials)).axes[0]
    for column, inactive in ((0, "01"), (1, "02")):
        found = heights(axes, column)
        below = found.pop(inactive)
        assert below < 0 <= min(found.values())
        assert ticks(axes, column)[DASH] == below
        assert axes.get_ylim()[0] < below
    assert DASH not in ticks(axes, 2)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_better_a_trial_the_darker_and_the_nearer(direction):
    scores = [0.5, 0.9, 0.3, 0.7, 0.8]
    trials = search(scores, direction=direction, hp_units=[1, 2, 3, 4, 5])
    figure = draw(plot_parallel_coordinates(trials))
    axes, bar = figure.axes
    order = np.argsort(scores) if direction == "max" else np.argsort(scores)[::-1]
    best_last = [f"{i:02}" for i in order]
    by_name = {line.get_label(): line for line in axes.lines}
    shades = [luminance(by_name[name].get_color()) for name in best_last]
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == len(scores)
    layers = [by_name[name].get_zorder() for name in best_last]
    assert layers == sorted(layers)
    widths = [by_name[name].get_linewidth() for name in best_last]
    assert widths[-1] >= 2 * max(widths[:-1])
    # The bar gives a colour the number that the last axis gives its lines.
    texts = [label.get_text() for label in bar.get_yticklabels()]
    assert dict(zip(texts, bar.get_yticks(), strict=True)) == pytest.approx(ticks(axes, 1))
    (gradient,) = [each.cmap for each in bar.collections if each.get_array() is not None]
    for name, height in heights(axes, 1).items():
        assert to_hex(gradient(height)) == to_hex(by_name[name].get_color())


def test_of_equal_trials_the_earlier_is_the_best():
    axes = draw(plot_parallel_coordinates(search([0.5, 0.5, 0.5], hp_a=[1, 2, 3]))).axes[0]
    thick = max(axes.lines, key=lambda line: line.get_linewidth())
    assert thick.get_label() == "00"
    assert set(heights(axes, 1).values()) == {0.5}
    assert ticks(axes, 1) == {"0.5": 0.5}


def test_one_trial_alone():
    trials = search([0.5], hp_a=[1], hp_b=["x"])
    axes = draw(plot_parallel_coordinates(trials)).axes[0]
    assert len(axes.lines) == 1
    assert names(axes) == ["val accuracy"]
    assert "no hyperparameter varies" in axes.get_xlabel().replace("\n", " ")
    (line,) = draw(plot_objective(trials)).axes[0].lines
    assert line.get_ydata().tolist() == [0.5]


def test_a_loss_over_decades_stands_at_its_logarithm_and_an_accuracy_does_not():
    scores = [0.01, 0.1, 1.0]
    falling = search(scores, direction="min", hp_a=[1, 2, 3])
    rising = search(scores, hp_a=[1, 2, 3])
    for trials, middle, scale in ((falling, 0.5, "log"), (rising, 0.09 / 0.99, "linear")):
        assert heights(plot_parallel_coordinates(trials).axes[0], 1)["01"] == pytest.approx(middle)
        assert draw(plot_objective(trials)).axes[0].get_yscale() == scale


def test_scores_close_together_keep_different_ticks():
    trials = search([0.999912, 0.999934, 0.999987], hp_a=[1, 2, 3])
    assert len(ticks(draw(plot_parallel_coordinates(trials)).axes[0], 1)) >= 2


def many(count=40, parameters=12):
    random = np.random.default_rng(0)
    kinds = itertools.cycle(
        [
            lambda: random.choice(["EfficientNetV2B0", "MobileNetV3Small", "ResNet50V2"], count),
            lambda: 10 ** random.uniform(-6, -1, count),
            lambda: random.choice([64, 128, 256, 512], count),
            lambda: np.where(random.random(count) > 0.5, random.uniform(0, 0.5, count), NAN),
        ]
    )
    columns = {f"hp_a_rather_long_name_{i}": next(kinds)() for i in range(parameters)}
    return search(random.uniform(0.1, 0.9, count), **columns)


def test_no_label_of_many_axes_lies_on_another():
    figure = draw(plot_parallel_coordinates(many()))
    axes = figure.axes[0]
    assert len(axes.lines) == 40
    assert len(names(axes)) == 13
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    # Rotated names are apart if their baselines are: the distance of two parallels.
    labels = axes.get_xticklabels()
    angle = np.deg2rad(labels[0].get_rotation())
    apart = np.diff([axes.transData.transform((x, 0))[0] for x in axes.get_xticks()])
    letter = labels[0].get_fontsize() / 72 * figure.dpi
    assert (apart * np.sin(angle) > 1.2 * letter).all()
    page = figure.bbox
    for box in [*boxes, *(label.get_window_extent(renderer) for label in labels)]:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1


def test_few_short_names_are_not_rotated_and_do_not_touch():
    figure = draw(plot_parallel_coordinates(search([0.1, 0.2], hp_a=[1, 2], hp_b=["x", "y"])))
    labels = figure.axes[0].get_xticklabels()
    assert {label.get_rotation() for label in labels} == {0}
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


# The objective over the trials.


@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_best_so_far_is_the_running_extreme(direction):
    scores = [NAN, 0.5, 0.3, NAN, 0.8, 0.2, 0.8, NAN]
    axes = draw(plot_objective(search(scores, direction=direction))).axes[0]
    (line,) = axes.lines
    filled = np.array([0.5, 0.3, 0.3, 0.8, 0.2, 0.8, 0.8])  # a failed trial changes nothing
    extreme = np.maximum if direction == "max" else np.minimum
    np.testing.assert_array_equal(line.get_ydata(), extreme.accumulate(filled))
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5, 6, 7])
    assert line.get_drawstyle() == "steps-post"
    (best,) = axes.texts
    assert best.get_text() == (
        "best: 0.8 (trial 04)" if direction == "max" else "best: 0.2 (trial 05)"
    )
    assert best.xy == ((4, 0.8) if direction == "max" else (5, 0.2))


def test_dots_by_stage_and_crosses_on_the_lower_edge():
    trials = search(
        [0.5, 0.6, NAN, 0.7, NAN, 0.9, NAN],
        status=[*["completed"] * 2, "failed", "completed", "running", "interrupted", "completed"],
    )
    trials["stage"] = ["head", "fine-tuning", "head", "head", "", "head", "head"]
    axes = draw(plot_objective(trials)).axes[0]
    found = {}
    for x, y, color, label in dots(axes):
        found.setdefault(label, []).append((x, y, color))
    assert [dot[:2] for dot in found["head"]] == [(0, 0.5), (3, 0.7)]
    assert [dot[:2] for dot in found["fine-tuning"]] == [(1, 0.6)]
    assert found["head"][0][2] != found["fine-tuning"][0][2]
    assert [dot[0] for dot in found["failed"]] == [2]
    assert [dot[0] for dot in found["no final score"]] == [4, 5, 6]
    edge = {dot[1] for label in ("failed", "no final score") for dot in found[label]}
    assert len(edge) == 1
    assert 0 < edge.pop() < 0.1  # of the axes' height
    marks = {
        each.get_label(): each.get_paths()[0].vertices.tobytes()
        for each in axes.collections
        if each.get_label() in found
    }
    assert len(set(marks.values())) == 4
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["best so far", "head", "fine-tuning", "failed", "no final score"]
    assert axes.get_xlabel() == "trial (3 min 30 s in all)"
    assert axes.get_ylabel() == "val accuracy"


@pytest.mark.parametrize(
    ("trials", "places"),
    [
        (["00", "01", "02"], [0, 1, 2]),
        (["1", "2", "4"], [1, 2, 4]),
        (["2", "1", "3"], [1, 2, 3]),
        (["a", "b", "c"], [1, 2, 3]),
        (["7001", "7002", "9000"], [1, 2, 3]),
        (["²", "³", "x"], [1, 2, 3]),
    ],
)
def test_trials_stand_at_their_numbers_where_these_give_an_order(trials, places):
    table = search([0.1, 0.2, 0.3]).assign(trial=trials)
    (line,) = draw(plot_objective(table)).axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), places)


# Both.


@pytest.mark.parametrize("plot", [plot_parallel_coordinates, plot_objective])
def test_a_file_is_drawn_as_its_table_is(plot, tmp_path):
    trials = search(
        [0.5, NAN, 0.9, 0.7],
        hp_rate=[1e-4, 1e-3, NAN, 1e-2],
        hp_backbone=["NA", "b", "None", None],
        hp_flag=[True, False, False, None],
    )
    trials["stage"] = ["head", "", "head", "fine-tuning"]
    trials.to_csv(tmp_path / "trials.csv", index=False)

    def content(figure):
        axes = draw(figure).axes[0]
        return (
            [(line.get_label(), line.get_xydata().tolist()) for line in axes.lines],
            [text.get_text() for text in axes.texts],
            names(axes),
            dots(axes),
        )

    expected = content(plot(trials))
    assert content(plot(tmp_path / "trials.csv")) == expected
    assert content(plot(str(tmp_path / "trials.csv"))) == expected


@pytest.mark.parametrize("plot", [plot_parallel_coordinates, plot_objective])
def test_names_are_drawn_as_they_are(plot):
    # A dollar sign would start mathematics, and an unbalanced brace would end in an exception.
    trials = search(np.linspace(0.1, 0.6, 6)).assign(objective=ODD[0], trial=ODD, stage=ODD)
    for name in ODD:
        trials[f"hp.{name}"] = ODD[::-1]
    axes = draw(plot(trials)).axes[0]
    if plot is plot_objective:
        shown = [text.get_text().strip() for text in axes.get_legend().get_texts()][1:]
        assert axes.get_ylabel() == ODD[0]
    else:
        shown = names(axes)[:-1]
        assert {*ODD[:1], *ODD[2:4], "two lines"} <= set(ticks(axes, 0))
    assert shown == [*ODD[:4], "x" * 27 + "…", "two lines"]


@pytest.mark.parametrize("plot", [plot_parallel_coordinates, plot_objective])
@pytest.mark.parametrize(
    "trials",
    [
        search([-1.0, 0.0, 5.0], hp_a=[0, 1, 2]),
        search([1e-9, 2e-9], direction="min", hp_a=[1e9, 3e12]),
        search([1e6, float("inf"), 3.0], status=["completed"] * 3, direction="min", hp_a=[1, 2, 3]),
        search([0.5, 0.6], hp_a=["inf", "-inf"]),
        search(np.linspace(0, 1, 300), hp_a=[f"category {i}" for i in range(300)]),
        search([0.3, 0.3, 0.3], direction="min", hp_a=[1, 1, 2]),
        search([NAN, NAN, 0.5], hp_a=[1, 2, 3]),
        many(),
    ],
)
def test_odd_searches_are_drawn(plot, trials):
    axes = draw(plot(trials)).axes[0]
    finite = int(np.isfinite(trials["score"]).sum())
    drawn = (
        len(axes.lines)
        if plot is plot_parallel_coordinates
        else len([dot for dot in dots(axes) if dot[3] == "completed"])
    )
    assert drawn == finite


@pytest.mark.parametrize("plot", [plot_parallel_coordinates, plot_objective])
def test_tables_that_cannot_be_drawn(plot, tmp_path):
    trials = search([0.5, 0.6], hp_a=[1, 2])
    with pytest.raises(ValueError, match=r"\['score'\] are missing.*Received: 'trials' with"):
        plot(trials.drop(columns="score"))
    (tmp_path / "history.csv").write_text("epoch,loss\n0,1.0\n")
    with pytest.raises(ValueError, match=r"Received: '.*history\.csv' with the columns \['epoch'"):
        plot(tmp_path / "history.csv")
    with pytest.raises(FileNotFoundError):
        plot(tmp_path / "gone.csv")
    failed = search([NAN, NAN, 0.5], status=["failed", "completed", "running"], hp_a=[1, 2, 3])
    with pytest.raises(
        ValueError,
        match=r"at least one trial.*1 failed, 1 completed without a score, 1 running\. Draw",
    ):
        plot(failed)
    (tmp_path / "trials.csv").write_text("")
    for nothing in (trials.iloc[:0], tmp_path / "trials.csv"):
        with pytest.raises(ValueError, match=r"Received: no trials\. Draw them when"):
            plot(nothing)
    for direction in (["max", "min"], ["maximize"] * 2):
        with pytest.raises(ValueError, match=r"'direction' to be 'max' in all rows.*Received"):
            plot(trials.assign(direction=direction))


def test_parallel_coordinates_without_hyperparameters():
    with pytest.raises(ValueError, match=r"hp\.<name>.*Received: columns=\['trial'.*nothing was"):
        plot_parallel_coordinates(search([0.5]))
    draw(plot_objective(search([0.5])))


def test_the_table_is_left_as_it_was():
    trials = search([0.5, NAN, 0.9], hp_a=[1.0, NAN, 3.0], hp_b=["x", None, "y"])
    before = trials.copy(deep=True)
    plot_parallel_coordinates(trials)
    plot_objective(trials)
    pd.testing.assert_frame_equal(trials, before)


def test_pyplot_is_left_alone():
    before = (pyplot.get_backend(), dict(matplotlib.rcParams))
    draw(plot_parallel_coordinates(many(3, 2)))
    draw(plot_objective(many(3, 2)))
    assert pyplot.get_fignums() == []
    assert (pyplot.get_backend(), dict(matplotlib.rcParams)) == before


def test_a_missing_library_names_the_extra(monkeypatch):
    trials = search([0.5, 0.6], hp_a=[1, 2])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (plot_parallel_coordinates, plot_objective):
        with pytest.raises(ImportError, match=r"keras-xfer\[report\]"):
            plot(trials)
