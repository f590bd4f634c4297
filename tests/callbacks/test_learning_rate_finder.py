"""The learning rate finder: its curve against NumPy, its suggestions against curves with a known
answer, and the training after it against one without."""

import random
import sys

import keras
import numpy as np
import pytest

from keras_xfer import LearningRateCurve, find_learning_rate
from keras_xfer.callbacks.learning_rate_finder import longest_valley, steepest_descent
from keras_xfer.retarget import GroupedOptimizer, StageRate
from tests.schedules import LOSS, data, value

pytestmark = pytest.mark.core

SEARCH = {"batch_size": 8, "steps": 5, "start": 1e-3, "divergence": None}
RATES = np.geomspace(1e-3, 0.3, 7)
PLAIN = {"batch_size": 4, "start": 1e-3, "end": 0.3, "steps": 7, "divergence": None}


# --- The curve, against gradient descent in NumPy -------------------------------------------


def line_data():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(16, 2)).astype("float32")
    return x, (x @ [[1.0], [-2.0]] + 0.5).astype("float32")


def line(optimizer="sgd", by_name=False, **kwargs):
    inputs = keras.Input((2,), name="a")
    outputs = keras.layers.Dense(1, kernel_initializer="zeros")(inputs)
    model = keras.Model({"a": inputs} if by_name else inputs, outputs)
    model.compile(optimizer, "mse", run_eagerly=True, **kwargs)
    return model


def by_hand(sample_weight=None, bias_scale=1.0, steps=7):
    """The loss of each batch before its update, of gradient descent on the squared error."""
    x, y = (array.astype("float64") for array in line_data())
    weight = np.ones(16) if sample_weight is None else sample_weight
    kernel, bias, losses = np.zeros((2, 1)), 0.0, []
    for step in range(steps):
        at = slice(4 * (step % 4), 4 * (step % 4) + 4)
        error = x[at] @ kernel + bias - y[at]
        of_batch = weight[at, None]
        losses.append(np.mean(of_batch * error**2))
        kernel = kernel - RATES[step] * 2 * x[at].T @ (of_batch * error) / 4
        bias = bias - RATES[step] * bias_scale * 2 * np.mean(of_batch * error)
    return np.array(losses)


class Batches(keras.utils.PyDataset):
    ended = 0

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x, y = line_data()
        return x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    def on_epoch_end(self):
        self.ended += 1


class Readable:
    def __iter__(self):
        return (Batches()[i] for i in range(4))


def tf_dataset(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


def torch_loader(x, y):
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=4
    )


SOURCES = {
    "arrays": lambda x, y: (x, y),
    "dict": lambda x, y: ({"a": x}, y),
    "tf.data": lambda x, y: (tf_dataset(x, y),),
    "PyDataset": lambda _x, _y: (Batches(),),
    "DataLoader": lambda x, y: (torch_loader(x, y),),
    "iterable": lambda _x, _y: (Readable(),),
    "generator": lambda _x, _y: ((Batches()[i % 4] for i in range(20)),),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_curve_is_that_of_one_step_at_each_rate(source):
    model = line(by_name=source == "dict")
    curve = find_learning_rate(model, *SOURCES[source](*line_data()), shuffle=False, **PLAIN)
    np.testing.assert_allclose(curve.learning_rates, RATES)
    np.testing.assert_allclose(curve.losses, by_hand(), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_the_losses_are_averaged_with_weights_that_sum_to_one(smoothing):
    curve = find_learning_rate(line(), *line_data(), shuffle=False, smoothing=smoothing, **PLAIN)
    expected = [
        np.average(curve.losses[: i + 1], weights=smoothing ** np.arange(i, -1, -1.0))
        for i in range(7)
    ]
    np.testing.assert_allclose(curve.smoothed_losses, expected)


def test_a_generator_ends_the_search():
    batches = (Batches()[i] for i in range(3))
    curve = find_learning_rate(line(), batches, **PLAIN)
    np.testing.assert_allclose(curve.losses, by_hand(steps=3), rtol=1e-4)


def test_arrays_and_py_datasets_are_shuffled_unless_told_otherwise():
    for source in (line_data(), (Batches(),)):
        curve = find_learning_rate(line(), *source, **PLAIN)
        assert not np.allclose(curve.losses, by_hand(), rtol=1e-2)


def test_a_py_dataset_is_not_told_of_an_epoch():
    batches = Batches()
    find_learning_rate(line(), batches, **PLAIN)
    assert batches.ended == 0


def test_samples_are_weighted():
    x, y = line_data()
    weight = np.random.default_rng(0).random(16)
    curve = find_learning_rate(line(), x, y, sample_weight=weight, shuffle=False, **PLAIN)
    np.testing.assert_allclose(curve.losses, by_hand(weight), rtol=1e-4)


def test_classes_are_weighted():
    x, _ = line_data()
    y = np.arange(16).reshape(16, 1) % 2
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", "binary_crossentropy", run_eagerly=True)
    losses = [
        find_learning_rate(
            model, x, y, class_weight=weight, shuffle=False, **{**PLAIN, "end": 2e-3}
        ).losses
        for weight in (None, {0: 3.0, 1: 3.0})
    ]
    np.testing.assert_allclose(losses[1][0], 3 * losses[0][0], rtol=1e-5)


def test_groups_keep_their_proportion():
    members = [keras.optimizers.SGD(0.2), keras.optimizers.SGD(0.02)]
    model = line(GroupedOptimizer(members, groups=[0, 1]))
    curve = find_learning_rate(model, *line_data(), shuffle=False, **PLAIN)
    np.testing.assert_allclose(curve.losses, by_hand(bias_scale=0.1), rtol=1e-4)
    assert float(members[0].learning_rate) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"learning_rate": keras.optimizers.schedules.ExponentialDecay(5.0, 1, 0.5)},
    ],
    ids=["accumulation", "schedule"],
)
def test_every_step_updates_at_the_rate_searched(settings):
    model = line(keras.optimizers.SGD(**settings))
    curve = find_learning_rate(model, *line_data(), shuffle=False, **PLAIN)
    np.testing.assert_allclose(curve.losses, by_hand(), rtol=1e-4)


def test_it_stops_where_the_loss_diverges():
    curve = find_learning_rate(line(), *line_data(), steps=40, end=100.0, smoothing=0.5)
    assert len(curve.losses) < 40
    ratio = curve.smoothed_losses / np.minimum.accumulate(curve.smoothed_losses)
    assert ratio[-1] > 4
    assert (ratio[:-1] <= 4).all()


def test_it_stops_where_the_loss_is_not_finite():
    with np.errstate(over="ignore", invalid="ignore"):
        curve = find_learning_rate(
            line(), *line_data(), steps=12, start=1.0, end=1e30, divergence=None
        )
    assert len(curve.losses) < 12
    assert np.isfinite(curve.losses).all()


# --- What is left as it was ------------------------------------------------------------------


def model_with_state(optimizer, **kwargs):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )
    model.compile(optimizer(), LOSS(from_logits=True), metrics=["accuracy"], **kwargs)
    return model


def scheduled_groups():
    decay = keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.9)
    members = [keras.optimizers.Adam(0.05), keras.optimizers.Adam(0.005)]
    rates = [StageRate(decay), StageRate(decay, scale=0.1)]
    return GroupedOptimizer(members, groups=[1, 1, 1, 1, 0, 0], rates=rates)


OPTIMIZERS = {
    "groups": scheduled_groups,
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "mixed_float16": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9), momentum=0.9
        ),
        initial_scale=2.0**6,
        dynamic_growth_steps=3,
    ),
}


# Where this is faster; what is compiled is compiled with the groups.
EAGER = {} if keras.backend.backend() == "jax" else {"run_eagerly": True}


def state(model):
    """All of the training that can be seen from outside."""
    found = {
        "variables": [value(v) for v in [*model.variables, *model.optimizer.variables]],
        "optimizer": id(model.optimizer),
        "built": model.optimizer.built,
        "train_function": id(model.train_function),
        "metrics": [value(v) for v in model.metrics_variables],
        "trainable": [layer.trainable for layer in model.layers],
        "stop": model.stop_training,
        "steps_per_execution": model.steps_per_execution,
        "random": (random.getstate(), [np.asarray(each) for each in np.random.get_state()[1:]]),
    }
    if keras.backend.backend() == "torch":
        found["gradients"] = [
            None if v.value.grad is None else v.value.grad.numpy().copy()
            for v in model.trainable_variables
        ]
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_equal(other[name], one[name], err_msg=name)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="its train steps are stateless")
def test_other_optimizers_of_the_model_are_left_as_they_were():
    class Two(keras.Sequential):
        def train_step(self, *args):
            logs = super().train_step(*args)
            kernel = self.layers[0].kernel
            self.extra.apply([keras.ops.ones_like(kernel)], [kernel])
            return logs

    model = Two([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile("sgd", LOSS(from_logits=True), run_eagerly=True)
    model.extra = extra = keras.optimizers.SGD(0.1, momentum=0.9)
    x, y = data()
    model.fit(x, y, verbose=0)
    before = [value(v) for v in extra.variables]
    find_learning_rate(model, x, y, **SEARCH)
    assert model.extra is extra
    np.testing.assert_equal([value(v) for v in extra.variables], before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_later_fit_is_what_it_would_have_been(name):
    """Shuffled, with Dropout and BatchNormalization: searched before the first fit and between two."""
    x, y = data()
    ends = []
    if name == "mixed_float16":
        keras.config.set_dtype_policy("mixed_float16")
    for searches in (True, False):
        model = model_with_state(OPTIMIZERS[name], **({} if name == "groups" else EAGER))
        history = []
        for _ in range(2):
            before = state(model)
            if searches:
                curve = find_learning_rate(model, x, y, **SEARCH)
                assert np.ptp(curve.losses) > 0
                assert_same(before, state(model))
            history.append(model.fit(x, y, batch_size=8, epochs=1, verbose=0).history)
        ends.append([history, state(model)["variables"]])
    np.testing.assert_equal(ends[0], ends[1])


def test_the_search_between_two_fits_is_that_of_a_fresh_optimizer():
    """On JAX the step that the fit before has compiled, for the same shapes, must not be run."""
    x, y = data()
    trained = model_with_state(scheduled_groups)
    trained.fit(x, y, batch_size=8, epochs=1, verbose=0)
    fresh = model_with_state(scheduled_groups)
    for mine, theirs in zip(fresh.variables, trained.variables, strict=True):
        mine.assign(value(theirs))
    # The head has come down its schedule by four steps; its proportion to the rest is the same.
    curves = []
    for model in (fresh, trained):
        keras.utils.set_random_seed(1)
        curves.append(find_learning_rate(model, x, y, **SEARCH, end=0.1).losses)
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_all_is_put_back_after_an_exception(error):
    x, y = data()

    def interrupted():
        for i in range(4):
            if i == 3:
                np.random.random(4)
                raise error("in the middle")
            yield x[:8], y[:8]

    model = model_with_state(OPTIMIZERS["accumulation"], **EAGER)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    before = state(model)
    with pytest.raises(error, match="in the middle"):
        find_learning_rate(model, interrupted(), **SEARCH)
    assert_same(before, state(model))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone keeps state outside")
def test_a_step_that_is_interrupted_on_jax_leaves_nothing_to_be_written_later():
    x, y = data()
    model = model_with_state(OPTIMIZERS["accumulation"])
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    before = state(model)
    sync, calls = model.jax_state_sync, []

    def interrupted():
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        sync()

    model.jax_state_sync = interrupted
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(model, x, y, **SEARCH)
    del model.jax_state_sync
    model.jax_state_sync()
    assert_same(before, state(model))
    assert "train_step" not in vars(model)


def test_an_unbuilt_model_is_built_from_the_first_batch():
    x, y = data()
    weights = []
    for searches in (True, False):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)])
        model.compile("adam", LOSS(from_logits=True), run_eagerly=True)
        if searches:
            find_learning_rate(model, x, y, **SEARCH)
            assert model.built
            assert not model.optimizer.built
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    np.testing.assert_equal(weights[0], weights[1])


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch has one step an execution")
def test_one_step_is_taken_at_a_time():
    model = line(steps_per_execution=4)
    curve = find_learning_rate(model, *line_data(), shuffle=False, **PLAIN)
    np.testing.assert_allclose(curve.losses, by_hand(), rtol=1e-4)
    assert model.steps_per_execution == 4


# --- What it suggests ------------------------------------------------------------------------


def test_the_steepest_descent_of_a_logistic_curve_is_its_middle():
    rates = np.geomspace(1e-6, 1.0, 61)
    losses = 1 / (1 + np.exp(3 * (np.log(rates) - np.log(1e-3))))
    assert steepest_descent(rates, losses) == pytest.approx(1e-3)
    assert longest_valley(rates, losses) == pytest.approx(1e-2)  # two thirds from 1e-6 to 1


def test_the_steepest_descent_is_over_the_logarithm_of_the_rate():
    rates = np.array([1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.4, 0.8])
    # Down by 1, 1, 1 a decade, then by 1, 1, 1 an octave: fastest there, though by step the same.
    assert steepest_descent(rates, np.array([9.0, 8, 7, 6, 5, 4, 3.5])) == pytest.approx(0.2)
    # And down by 3 a decade, then by 0.5 an octave, which is 1.7 a decade.
    assert steepest_descent(rates, np.array([16.0, 13, 10, 9.5, 9, 8.5, 8])) <= 1e-3


def test_a_fall_after_the_minimum_is_no_descent():
    rates = np.geomspace(1e-4, 1.0, 9)
    losses = np.array([2.0, 1.9, 1.5, 1.0, 0.9, 8.0, 30.0, 2.0, 40.0])
    assert steepest_descent(rates, losses) == pytest.approx(rates[2])


def test_the_valley_is_two_thirds_down_the_longest_descent():
    rates = np.geomspace(1e-5, 1.0, 31)
    at = np.arange(31)
    # Up to 10 % until step 6, down until step 24, up again.
    losses = np.where(at <= 6, 1 + at / 60, np.where(at <= 24, 1.1 - (at - 6) / 20, 0.2 + at - 24))
    assert longest_valley(rates, losses) == pytest.approx(rates[18])
    noisy = losses.copy()
    noisy[[10, 15]] += 0.12  # above their neighbours: passed over
    assert longest_valley(rates, noisy) == pytest.approx(rates[18])


def test_the_valley_is_the_longest_not_the_deepest():
    rates = np.geomspace(1e-5, 1.0, 12)
    losses = np.array([5, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 9, 1, 20, 30, 40])
    assert longest_valley(rates, losses) == pytest.approx(rates[2 * 8 // 3])


def curve_of(losses, low=1e-5):
    losses = np.asarray(losses, dtype=float)
    return LearningRateCurve(np.geomspace(low, 1.0, len(losses)), losses, losses)


def test_a_suggestion_leaves_out_the_first_tenth():
    losses = np.concatenate([[100.0, 90.0, 50.0], np.linspace(40, 10, 17), np.full(10, 300.0)])
    curve = curve_of(losses)
    assert curve.steepest >= curve.learning_rates[3]
    assert curve.suggestion == curve.valley == pytest.approx(curve.learning_rates[3 + 2 * 16 // 3])


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [1.0, 1.0], [1.0]], ids=str)
def test_a_loss_that_never_falls_suggests_nothing_and_says_so(losses):
    curve = curve_of(losses)
    for name in ("valley", "steepest", "suggestion"):
        with pytest.raises(ValueError, match="that never do. Take a larger `end`"):
            getattr(curve, name)
    assert "never falls" in str(curve)
    pytest.importorskip("matplotlib")
    assert len(curve.plot().axes[0].lines) == 2


def test_a_curve_says_what_it_suggests():
    curve = curve_of([2.0, 1.9, 1.4, 1.2, 3.0], low=1e-4)
    assert str(curve) == "5 learning rates from 0.0001 to 1: valley 0.01, steepest 0.01"
    with pytest.raises(ValueError, match="read-only"):
        curve.losses[0] = 0.0


def test_a_curve_is_of_arrays_of_one_length():
    with pytest.raises(ValueError, match="one length"):
        LearningRateCurve(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="one length"):
        LearningRateCurve(np.ones(0), np.ones(0), np.ones(0))


def test_a_plot_marks_both_suggestions_on_a_log_axis():
    pytest.importorskip("matplotlib")
    curve = curve_of([2.0, 2.0, 1.9, 1.4, 1.3, 1.2, 3.0])
    figure = curve.plot()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    marked = {line.get_label().split(":")[0]: line.get_xdata()[0] for line in axes.lines[2:]}
    assert marked == {"valley": curve.valley, "steepest": curve.steepest}
    figure.canvas.draw()


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="keras-xfer\\[report\\]"):
        curve_of([2.0, 1.0]).plot()


# --- What it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.0}, "start to be a finite float > 0"),
        ({"start": "x"}, "start to be a finite float > 0"),
        ({"start": 1.0, "end": 1.0}, "end to be a finite float > start"),
        ({"end": np.inf}, "end to be a finite float"),
        ({"steps": 1}, "steps to be an int >= 2"),
        ({"steps": 2.0}, "steps to be an int >= 2"),
        ({"smoothing": 1.0}, "smoothing to be"),
        ({"divergence": 1.0}, "divergence to be"),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_learning_rate(line(), *line_data(), **arguments)


def test_a_model_without_an_optimizer_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="call model.compile"):
        find_learning_rate(model, *line_data())


def test_a_frozen_model_is_refused():
    model = line()
    model.trainable = False
    with pytest.raises(ValueError, match="every layer is frozen"):
        find_learning_rate(model, *line_data())


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="without a single batch"):
        find_learning_rate(line(), np.ones((0, 2)), np.ones((0, 1)))


def test_what_is_no_data_is_refused():
    with pytest.raises(ValueError, match="Expected arrays"):
        find_learning_rate(line(), 3)


def test_a_loss_that_is_never_finite_is_refused():
    x, y = line_data()
    model = line()
    before = state(model)
    with pytest.raises(ValueError, match="a loss of nan on the first batch"):
        find_learning_rate(model, x, y * np.nan)
    assert_same(before, state(model))


def test_groups_at_a_rate_of_0_are_refused():
    members = [keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.1)]
    model = line(GroupedOptimizer(members, groups=[0, 1]))
    before = state(model)
    with pytest.raises(ValueError, match="keep the groups' proportion"):
        find_learning_rate(model, *line_data())
    assert_same(before, state(model))
