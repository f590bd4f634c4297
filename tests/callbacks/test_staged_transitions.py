"""When stages end, and what they go back to."""

import json

import keras
import numpy as np
import pytest

from keras_xfer import Stage, StagedUnfreezing
from keras_xfer.retarget.carrying import head_learning_rate_of
from tests.stages import residual
from tests.stages.residual import BATCH, compiled

pytestmark = pytest.mark.core

NAN = float("nan")
MIN = {"monitor": "score", "mode": "min"}


class Score(keras.callbacks.Callback):
    """Logs what it is told to, epoch by epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.values[epoch]


def run(values, schedule, model=None, epochs=None, beside=(), **kwargs):
    model = model or compiled(keras.optimizers.Adam(1e-2))
    return model.fit(
        *residual.data(),
        epochs=epochs or len(values),
        callbacks=[Score(values), schedule, *beside],
        **{**BATCH, "batch_size": 32, **kwargs},  # one step an epoch
    ).history


def driven(values, schedule, first_epoch=0, model=None):
    """The stages of a `fit` that trains nothing: the hooks called by hand, which is fast."""
    schedule.set_model(model or compiled(keras.optimizers.SGD(1e-2)))
    schedule.set_params({"steps": 4})
    schedule.model.stop_training = False
    schedule.on_train_begin()
    stages = []
    for epoch in range(first_epoch, len(values)):
        logs = {"score": values[epoch]}
        schedule.on_epoch_begin(epoch)
        schedule.on_epoch_end(epoch, logs)
        stages.append(logs["stage"])
        if schedule.model.stop_training:
            break
    schedule.on_train_end()
    return stages


@pytest.mark.parametrize(
    ("arguments", "values", "stages"),
    [
        # the first value is an improvement; 2 epochs without one end the stage
        ({"mode": "min"}, [3, 2, 2, 2, 9, 8, 7, 6], [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"mode": "max"}, [3, 2, 2, 2, 9, 8, 7, 6], [0, 0, 0, 1, 1, 1, 1]),
        ({"mode": "max"}, [1, 2, 1, 3, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]),
        ({"mode": "min", "min_delta": 0.5}, [3, 2.6, 2.6, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]),
        ({"mode": "min", "min_delta": 0.3}, [3, 2.6, 2.6, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]),
        ({"mode": "min"}, [NAN, NAN, NAN, NAN, NAN], [0, 0, 1, 1]),
        ({"mode": "min"}, [1, NAN, NAN, 5, 4, 3, 2], [0, 0, 0, 1, 1, 1, 1]),
        ({"mode": "min"}, [NAN, 3, NAN, NAN, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_patience_ends_a_stage_and_the_last_one_ends_training(arguments, values, stages):
    schedule = StagedUnfreezing(
        [Stage(patience=2), Stage("two", learning_rate=1e-3, patience=2)],
        monitor="score",
        **arguments,
    )
    assert driven(values, schedule) == stages


def test_a_stage_that_ends_early_lets_the_others_begin_earlier():
    schedule = StagedUnfreezing(
        [
            Stage(epochs=4, patience=1),
            Stage("two", learning_rate=1e-3, epochs=2, patience=9),
            Stage("all", learning_rate=1e-4, epochs=2),
        ],
        **MIN,
    )
    assert run([2, 2, 2, 2, 2, 2, 2, 2], schedule)["stage"] == [0, 0, 1, 1, 2, 2]
    improving = [8, 7, 6, 5, 4, 3, 2, 1]
    assert driven(improving, schedule) == [0, 0, 0, 0, 1, 1, 2, 2]


def test_patience_goes_on_in_a_second_fit():
    schedule = StagedUnfreezing([Stage(patience=3), Stage("two", learning_rate=1e-3)], **MIN)
    model = compiled(keras.optimizers.Adam(1e-2))
    values = [1, 2, 2, 2, 2, 2]
    assert driven(values[:3], schedule, model=model) == [0, 0, 0]
    assert driven(values, schedule, first_epoch=3, model=model) == [0, 1, 1]
    # From the beginning again it forgets what it has seen.
    assert driven(values[:4], schedule, model=model) == [0, 0, 0, 0]


def test_epochs_without_validation_are_not_counted():
    stages = [Stage(patience=1), Stage("two", learning_rate=1e-3)]
    schedule = StagedUnfreezing(stages, min_delta=1e3)
    validation = {"validation_data": residual.data(), "validation_freq": 2}
    history = run([0] * 6, schedule, **validation)
    assert history["stage"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "monitor='val_loss'.*no validation_data"),
        ({"monitor": "scroe", "mode": "min"}, "monitor='scroe', while the logs are .*'score'"),
        ({"monitor": "score"}, "Pass mode='max' or mode='min'"),
    ],
)
def test_what_is_not_logged_cannot_be_compared(arguments, match):
    with pytest.raises(ValueError, match=match):
        run([1, 1], StagedUnfreezing([Stage(patience=1)], **arguments))
    with pytest.raises(ValueError, match=match):
        run([1, 1], StagedUnfreezing([Stage()], restore_best=True, **arguments))


def test_a_schedule_that_compares_nothing_needs_no_log():
    assert run([1, 1], StagedUnfreezing([Stage()], monitor="nothing"))["stage"] == [0, 0]


# --- Going back to the best ------------------------------------------------------------------


def state(model):
    """The weights, and all that the optimizer keeps but its rate, by name."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    members = getattr(inner, "_members", [inner])
    return (
        [np.array(weight) for weight in model.get_weights()],
        {
            variable.path: np.array(keras.ops.convert_to_numpy(variable))
            for member in members
            for variable in member.variables
            if variable.name != "learning_rate"
        },
    )


class Watch(keras.callbacks.Callback):
    """Records the state at the beginning and at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.begin, self.end, self.rates = {}, {}, {}

    def on_epoch_begin(self, epoch, logs=None):
        self.begin[epoch] = state(self.model)

    def on_epoch_end(self, epoch, logs=None):
        self.end[epoch] = state(self.model)


def assert_same(now, then, *, more=False):
    for mine, theirs in zip(now[0], then[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert set(now[1]) >= set(then[1]) if more else set(now[1]) == set(then[1])
    for name, theirs in then[1].items():
        np.testing.assert_array_equal(now[1][name], theirs, err_msg=name)


THREE = [
    Stage(epochs=3, learning_rate=1e-2),
    Stage("two", epochs=2, learning_rate={"head": 1e-2, "backbone": 1e-3}),
    Stage("all", epochs=2, learning_rate={"head": 1e-2, "backbone": 1e-3}),
]


@pytest.mark.parametrize("eager", [True, False])
def test_the_next_stage_begins_with_the_best_epoch(eager):
    watch = Watch()
    model = compiled(keras.optimizers.Adam(1.0), run_eagerly=eager)
    schedule = StagedUnfreezing(THREE, restore_best=True, **MIN)
    run([5, 4, 6, 3, 9, 2, 8], schedule, model, beside=[watch])
    assert_same(watch.begin[3], watch.end[1], more=True)
    assert_same(watch.begin[5], watch.end[3], more=True)
    assert_same(state(model), watch.end[5])
    for fresh in set(watch.begin[5][1]) - set(watch.end[3][1]):
        assert not watch.begin[5][1][fresh].any(), fresh
    # and not with what would have been there without it
    assert (watch.begin[3][0][-1] != watch.end[2][0][-1]).any()


def test_the_best_epoch_may_belong_to_an_earlier_stage():
    watch = Watch()
    model = compiled(keras.optimizers.Adam(1.0))
    schedule = StagedUnfreezing(THREE, restore_best=True, **MIN)
    history = run([5, 1, 6, 3, 9, 4, 8], schedule, model, beside=[watch])
    assert_same(watch.begin[3], watch.end[1], more=True)
    assert_same(watch.begin[5], watch.end[1], more=True)  # "two" trained and goes back too
    for fresh in set(watch.begin[5][1]) - set(watch.end[1][1]):
        assert not watch.begin[5][1][fresh].any(), fresh
    assert history["trainable_params"] == [15] * 3 + [35] * 2 + [83] * 2
    np.testing.assert_allclose(history["backbone_learning_rate"], [0] * 3 + [1e-3] * 4)
    assert_same(state(model), watch.end[1])


def test_after_an_earlier_stage_a_stage_without_a_rate_has_that_of_the_one_before_it():
    schedule = StagedUnfreezing([*THREE[:2], Stage("two", epochs=1)], restore_best=True, **MIN)
    history = run([5, 1, 6, 3, 9, 4], schedule)
    np.testing.assert_allclose(history["backbone_learning_rate"], [0] * 3 + [1e-3] * 3)


def test_a_fit_that_goes_on_after_going_back_has_the_rates_of_its_stage():
    schedule = StagedUnfreezing(
        [Stage(epochs=1, learning_rate=1e-2), Stage(learning_rate=1e-3)], restore_best=True, **MIN
    )
    model = compiled(keras.optimizers.Adam(1.0))
    values = [1, 2, 2, 2]
    run(values, schedule, model, epochs=2)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-2)  # of epoch 0
    history = run(values, schedule, model, epochs=4, initial_epoch=2)
    np.testing.assert_allclose(history["learning_rate"], [1e-3, 1e-3], rtol=1e-6)


def test_the_last_epoch_may_be_the_best(capsys):
    watch = Watch()
    model = compiled(keras.optimizers.Adam(1.0))
    run(
        [2, 1],
        StagedUnfreezing([Stage()], restore_best=True, verbose=1, **MIN),
        model,
        beside=[watch],
    )
    assert_same(state(model), watch.end[1])
    assert "Back to" not in capsys.readouterr().out
    run([1, 2], StagedUnfreezing([Stage()], restore_best=True, verbose=1, **MIN), model)
    assert "Back to epoch 1, the best so far: score = 1" in capsys.readouterr().out


def test_without_any_finite_value_there_is_no_best():
    watch = Watch()
    model = compiled(keras.optimizers.Adam(1.0))
    run([NAN, NAN], StagedUnfreezing([Stage()], restore_best=True, **MIN), model, beside=[watch])
    assert_same(state(model), watch.end[1])


def test_mixed_precision_goes_back_too():
    keras.config.set_dtype_policy("mixed_float16")
    watch = Watch()
    model = compiled(keras.optimizers.Adam(1.0))
    run(
        [5, 4, 6, 3, 9, 2, 8],
        StagedUnfreezing(THREE, restore_best=True, **MIN),
        model,
        beside=[watch],
    )
    assert_same(watch.begin[3], watch.end[1], more=True)
    assert_same(state(model), watch.end[5])


# --- Averages of the weights -----------------------------------------------------------------


class Averages(keras.callbacks.Callback):
    """Before all others: the weights and their averages at the end of each epoch; after all others:
    the weights at the beginning of each."""

    def __init__(self):
        super().__init__()
        self.raw, self.average = {}, {}

    def on_epoch_end(self, epoch, logs=None):
        variables = self.model.trainable_variables
        self.raw[epoch] = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
        averages = self.model.optimizer._model_variables_moving_average
        self.average[epoch] = [np.array(keras.ops.convert_to_numpy(v)) for v in averages]


def averaged():
    return compiled(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))


def values_of(variables):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_values(now, then):
    for mine, theirs in zip(now, then, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("swap_on_epoch", "before"), [(True, True), (True, False), (False, True)])
def test_averages_are_restored_and_left_in_the_model(before, swap_on_epoch):
    model, averages, watch = averaged(), Averages(), Watch()
    schedule = StagedUnfreezing(
        [Stage(epochs=3, learning_rate=0.1), Stage("two", epochs=3, learning_rate=0.1)],
        restore_best=True,
        **MIN,
    )
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    pair = [swap, schedule] if before else [schedule, swap]
    values = [5, 4, 6, 3, 2, 9]
    model.fit(
        *residual.data(),
        epochs=6,
        callbacks=[averages, Score(values), *pair, watch],
        **BATCH,
    )
    head = watch.begin[3][0][-2:]
    assert_values(head, averages.raw[1])
    assert_values(values_of(model.trainable_variables), averages.average[4])


@pytest.mark.parametrize("restore_best", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_schedule_that_ends_before_fit_leaves_the_averages_in_the_model(before, restore_best):
    model, averages = averaged(), Averages()
    schedule = StagedUnfreezing(
        [Stage(epochs=1, learning_rate=0.1), Stage("two", epochs=1, learning_rate=0.1)],
        restore_best=restore_best,
        **MIN,
    )
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    pair = [swap, schedule] if before else [schedule, swap]
    callbacks = [averages, Score([2, 1]), *pair]
    model.fit(*residual.data(), epochs=9, callbacks=callbacks, **BATCH)
    assert (averages.raw[1][0] != averages.average[1][0]).any()
    assert_values(values_of(model.trainable_variables), averages.average[1])


# --- What a backup holds ---------------------------------------------------------------------


def test_the_state_of_a_schedule_survives_json():
    stages = [Stage(patience=3, learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 20)), Stage("two", learning_rate=1e-3)]  # fmt: skip
    values = [1, 2, 2, 2, 2, 2]
    model = compiled(keras.optimizers.Adam(1e-2))
    schedule = StagedUnfreezing(stages, **MIN)
    run(values, schedule, model, epochs=3)
    saved = json.loads(json.dumps(schedule.state_dict()))

    class Resume(keras.callbacks.Callback):
        def __init__(self, schedule):
            super().__init__()
            self.schedule = schedule

        def on_train_begin(self, logs=None):
            assert self.schedule.differences(saved) == []
            self.schedule.load_state_dict(saved)

    again = StagedUnfreezing(stages, **MIN)
    run_on = {"epochs": 6, "initial_epoch": 3}
    assert run(values, again, model, beside=[Resume(again)], **run_on)["stage"] == [0, 1, 1]
    # without it the epochs of the first fit are forgotten
    assert run(values, StagedUnfreezing(stages, **MIN), model, **run_on)["stage"] == [0, 0, 0]


def test_how_long_an_epoch_of_unknown_length_was_survives_too():
    stages = [Stage(epochs=1), Stage("two", learning_rate=1e-3, warmup_epochs=1)]

    def resumed(state, steps):
        schedule = StagedUnfreezing(stages)
        schedule.set_model(compiled(keras.optimizers.SGD(1e-2)))
        schedule.set_params({"steps": steps})
        schedule.on_train_begin()
        schedule.load_state_dict(state)
        schedule.on_epoch_begin(1)
        return head_learning_rate_of(schedule.model.optimizer)

    begun = StagedUnfreezing(stages)
    driven([0], begun)
    state = begun.state_dict()
    assert resumed(state, None) == pytest.approx(1e-3 / 4)
    assert resumed(state, 8) == pytest.approx(1e-3 / 8)  # told, and other than it was
    with pytest.raises(ValueError, match="data of unknown length"):
        resumed({**state, "steps_per_epoch": None}, None)


def test_what_differs_is_named():
    def planned(stages, **kwargs):
        schedule = StagedUnfreezing(stages, **{**MIN, **kwargs})
        schedule.set_model(compiled("adam"))
        schedule.on_train_begin()
        return schedule

    stages = [Stage(epochs=2), Stage("two", learning_rate=1e-3)]
    state = planned(stages).state_dict()
    assert planned(stages).differences(state) == []
    other = planned([Stage(epochs=3), Stage("two", learning_rate=1e-3, name="top")], min_delta=0.5)
    assert other.differences(state) == [
        "min_delta was 0.0 and is 0.5",
        "epochs of stage 1 was 2 and is 3",
    ]  # a stage may be called otherwise
    assert planned([*stages[:1]], mode="max", restore_best=True).differences(state) == [
        "mode was 'min' and is 'max'",
        "restore_best was False and is True",
        "the schedule had 2 stages and has 1",
    ]
    assert planned(stages, monitor="loss").differences(state) == [
        "monitor was 'score' and is 'loss'"
    ]
    other.load_state_dict(state)  # refused: it stays as it was
    assert other.state_dict()["progress"] is None
