import keras
import numpy as np
import pytest

from keras_xfer.retarget import GroupedOptimizer, StageRate, retarget
from tests import schedules
from tests.retarget import hand
from tests.schedules import BATCH, compiled

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()


class Rates(keras.callbacks.Callback):
    """The rate of each group as each batch ends."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        members = self.model.optimizer._members
        self.seen.append([float(hand.values([m._learning_rate])[0]) for m in members])


def grouped(model, head, base):
    head_weights, base_weights = model.get_layer("head").weights, model.get_layer("base").weights
    retarget(
        model,
        lambda: model.get_layer("base").unfreeze("all"),
        learning_rate=[(head_weights, head), (base_weights, base)],
    )


# --- StageRate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (StageRate(0.5), [0.5, 0.5, 0.5, 0.5]),
        (StageRate(0.5, scale=0.1), [0.05, 0.05, 0.05, 0.05]),
        (StageRate(0.5, warmup_steps=2), [0.25, 0.5, 0.5, 0.5]),
        (StageRate(0.5, warmup_steps=2, first_step=2), [0.25, 0.25, 0.25, 0.5]),
        (
            StageRate(keras.optimizers.schedules.CosineDecay(0.5, 3)),
            [0.25 * (1 + np.cos(np.pi * s / 3)) for s in range(4)],
        ),
        (
            StageRate(keras.optimizers.schedules.CosineDecay(0.5, 3), 0.1, 2, 1),
            [0.025, 0.025, 0.025 * (1 + np.cos(np.pi / 3)), 0.025 * (1 + np.cos(np.pi * 2 / 3))],
        ),
    ],
)
def test_the_rate_at_each_step(rate, expected):
    assert [float(rate(step)) for step in range(4)] == pytest.approx(expected, abs=1e-7)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rate))
    assert [float(again(step)) for step in range(4)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "scale"])
def test_a_rate_that_is_none_is_refused(name, wrong):
    with pytest.raises(ValueError, match=f"Expected {name} to be finite"):
        StageRate(**{"learning_rate": 1.0, name: wrong})


# --- Rates that change in the train step -----------------------------------------------------


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_rates_follow_the_steps_of_the_stage(steps_per_execution):
    """Oracle: the schedules themselves, called in Python."""
    if BACKEND == "torch" and steps_per_execution > 1:
        pytest.skip("torch takes one step at a time")
    cosine = keras.optimizers.schedules.CosineDecay(1e-2, 6)
    model = compiled(keras.optimizers.Adam(1e-2), steps_per_execution=steps_per_execution)
    x, y = schedules.data()
    model.fit(x, y, **BATCH)
    grouped(model, StageRate(cosine, warmup_steps=3), StageRate(1e-3, scale=0.5, warmup_steps=4))
    rates = Rates()
    model.fit(x, y, epochs=2, callbacks=[rates], **BATCH)
    expected = [
        (float(cosine(s)) * min((s + 1) / 3, 1), 5e-4 * min((s + 1) / 4, 1)) for s in range(8)
    ]
    ends = slice(steps_per_execution - 1, None, steps_per_execution)
    np.testing.assert_allclose(rates.seen, expected[ends], atol=1e-8)


def test_a_changing_rate_is_the_one_that_is_applied():
    """SGD moves by rate times gradient. Oracle: NumPy."""
    variable, cosine = (
        keras.Variable([1.0]),
        keras.optimizers.schedules.CosineDecay(0.1, 4),
    )
    optimizer = GroupedOptimizer([keras.optimizers.SGD(0.1)], [0], [StageRate(cosine)])
    optimizer.build([variable])
    expected = 1.0
    for step in range(6):
        hand.apply(optimizer, [np.ones(1, "float32")])
        expected -= float(cosine(step))
        assert variable.numpy()[0] == pytest.approx(expected, abs=1e-6)


def test_whoever_sets_the_rate_scales_all_groups():
    optimizers = [keras.optimizers.Adam(1e-2), keras.optimizers.Adam(1e-4)]
    optimizer = GroupedOptimizer(optimizers, groups=[0, 1])
    for rate in (1e-3, 0.0, 5e-3):
        optimizer.learning_rate = rate
        assert float(optimizer.learning_rate) == pytest.approx(rate)
        assert float(optimizers[1].learning_rate) == pytest.approx(rate / 100)


def test_what_the_rate_was_scaled_by_holds_in_the_steps_after():
    cosine = keras.optimizers.schedules.CosineDecay(1e-2, 8)
    model = compiled(keras.optimizers.SGD(1e-2))
    grouped(model, StageRate(cosine), StageRate(1e-3, warmup_steps=6))
    x, y = schedules.data()
    rates = Rates()

    def halved(epoch, rate):
        return rate / 2 if epoch == 1 else rate

    later = keras.callbacks.LearningRateScheduler(halved)
    model.fit(x, y, epochs=2, callbacks=[later, rates], **BATCH)
    expected = [
        [float(cosine(s)) * factor, 1e-3 * min((s + 1) / 6, 1) * factor]
        for s, factor in enumerate([1.0] * 4 + [0.5] * 4)
    ]
    np.testing.assert_allclose(rates.seen, expected, rtol=1e-5)
    # And over a transition that keeps the rates: the next step is the ninth.
    retarget(model, lambda: model.get_layer("base").unfreeze("high"))
    again = Rates()
    model.fit(x[:8], y[:8], callbacks=[again], **BATCH)
    np.testing.assert_allclose(again.seen, [[0.0, 5e-4]], atol=1e-9)


def test_reduce_on_plateau_and_the_log_see_one_rate():
    model = compiled(keras.optimizers.SGD(1e-2))
    grouped(model, StageRate(1e-2), StageRate(1e-3))
    x, y = schedules.data()
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e9)
    history = model.fit(x, y, epochs=3, callbacks=[reduce], **BATCH).history
    assert history["learning_rate"] == pytest.approx([1e-2, 1e-2, 1e-3])
    assert {name for name in history if "learning_rate" in name} == {"learning_rate"}
    first, second = model.optimizer._members
    assert float(second.learning_rate) / float(first.learning_rate) == pytest.approx(0.1)


def test_a_rate_cannot_be_scaled_from_zero():
    optimizer = GroupedOptimizer([keras.optimizers.SGD(0.0)], [0])
    optimizer.learning_rate = 0.0
    with pytest.raises(ValueError, match="rate other than 0"):
        optimizer.learning_rate = 1e-3


# --- One optimizer to everybody --------------------------------------------------------------


def test_it_saves_and_reloads_with_its_rates(tmp_path):
    model = compiled(keras.optimizers.Adam(1e-2))
    x, y = schedules.data()
    model.fit(x, y, **BATCH)
    cosine = keras.optimizers.schedules.CosineDecay(1e-2, 20)
    grouped(model, StageRate(cosine, warmup_steps=3), StageRate(1e-3, warmup_steps=6))
    model.fit(x, y, **BATCH)
    model.optimizer.learning_rate = float(model.optimizer.learning_rate) / 2
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    hand.assert_same(model.optimizer.variables, loaded.optimizer.variables)
    one, other = Rates(), Rates()
    model.fit(x, y, callbacks=[one], **BATCH)
    loaded.fit(x, y, callbacks=[other], **BATCH)
    assert one.seen == other.seen
    assert one.seen[-1] == pytest.approx([float(cosine(7)) / 2, 5e-4])
    schedules.assert_equal_weights(model, loaded)


def test_every_group_ends_with_its_own_averages():
    """Variables of two groups by turns; oracle: an average in NumPy."""
    variables = hand.variables({"a": (2,), "b": (2,), "c": (2,), "d": (2,)})
    starts = hand.values(variables)
    sgd = [keras.optimizers.SGD(r, use_ema=True, ema_momentum=0.5) for r in (0.1, 0.01)]
    optimizer = GroupedOptimizer(sgd, groups=[0, 1, 0, 1])
    optimizer.build(variables)
    expected = []
    for start, variable, rate in zip(starts, variables, (0.1, 0.01, 0.1, 0.01), strict=True):
        value = average = start
        for step in range(3):
            value = value - rate * hand.gradients(step, [variable])[0]
            average = value if step == 0 else 0.5 * average + 0.5 * value
        expected.append(average)
    for step in range(3):
        hand.apply(optimizer, hand.gradients(step, variables))
    hand.assert_same(optimizer._model_variables_moving_average, expected, atol=1e-6)
    optimizer.finalize_variable_values(variables)
    hand.assert_same(variables, expected, atol=1e-6)


def test_swapped_averages_are_those_of_all_groups():
    model = compiled(keras.optimizers.SGD(1e-2, use_ema=True, ema_momentum=0.5))
    x, y = schedules.data()
    grouped(model, StageRate(1e-2), StageRate(1e-3))
    before = hand.values(model.trainable_variables)
    model.fit(x[:8], y[:8], callbacks=[keras.callbacks.SwapEMAWeights(True)], **BATCH)
    # After one step the average is the weight; it must not be that of another variable.
    assert [v.shape for v in before] == [tuple(v.shape) for v in model.trainable_variables]
    hand.assert_same(model.trainable_variables, model.optimizer._model_variables_moving_average)


def test_flags_that_somebody_changed_do_not_break_the_end_of_fit():
    optimizer = GroupedOptimizer([keras.optimizers.SGD(0.1)], [0, 0])
    variables = hand.variables(hand.HEAD)
    optimizer.build(variables)
    optimizer.finalize_variable_values(variables[:1])


def test_without_averages_it_has_none():
    optimizer = GroupedOptimizer([keras.optimizers.SGD(0.1)], [0])
    assert not hasattr(optimizer, "_model_variables_moving_average")


def test_its_weights_can_be_set():
    def built():
        adam = [keras.optimizers.Adam(1e-2), keras.optimizers.Adam(1e-4)]
        optimizer = GroupedOptimizer(adam, groups=[0, 1])
        variables = hand.variables(hand.HEAD)
        optimizer.build(variables)
        return optimizer, variables

    one, variables = built()
    hand.apply(one, hand.gradients(0, variables))
    other, _ = built()
    other.set_weights(hand.values(one.variables))
    hand.assert_same(one.variables, other.variables)


def test_some_of_its_variables_may_be_applied():
    optimizer = GroupedOptimizer([keras.optimizers.SGD(1.0), keras.optimizers.SGD(0.1)], [0, 1])
    one, other = hand.variables(hand.HEAD)
    before = hand.values([one, other])
    optimizer.build([one, other])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        hand.apply(optimizer, [np.ones(2, "float32")], [other])
    hand.assert_same([one], before[:1])
    np.testing.assert_allclose(other.numpy(), before[1] - 0.1, rtol=1e-6)
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None, None], [one, other])
    with pytest.raises(ValueError, match="Unknown variable"):
        hand.apply(optimizer, [np.ones(1, "float32")], hand.variables({"x": (1,)}))


def test_another_number_of_variables_trains_at_the_rate_of_the_first_group():
    grouped = GroupedOptimizer(
        [keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.1)], groups=[0, 1]
    )
    variable = keras.Variable(1.0)
    with pytest.warns(UserWarning, match="compile the model again"):
        grouped.build([variable])
    grouped.apply([keras.ops.convert_to_tensor(1.0)], [variable])
    assert float(hand.values([variable])[0]) == 0.5


def test_the_rate_that_is_read_cannot_be_assigned_to():
    model = compiled(keras.optimizers.SGD(1.0))
    grouped(model, StageRate(0.5), StageRate(0.1))
    with pytest.raises(AttributeError):
        model.optimizer.learning_rate.assign(0.25)  # which would change the head's alone
    assert float(hand.values([model.optimizer.learning_rate])[0]) == 0.5
