"""EpochTiming against a clock that only the test moves, and once against the real one."""

import copy
import json
import math
import sys
import time

import keras
import numpy as np
import pytest

from keras_xfer.callbacks import epoch_timing
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.stages.current import set_current_stage

pytestmark = pytest.mark.core

KEYS = {
    "epoch_seconds",
    "train_seconds",
    "validation_seconds",
    "first_step_seconds",
    "step_seconds_median",
    "step_seconds_p95",
    "samples_per_second",
}


class Clock(keras.callbacks.Callback):
    """A clock that a step moves by `steps[batch]` and a validation by `validation`.

    It stands before EpochTiming in the list, so a step has taken its time when that looks.
    """

    def __init__(self, steps, validation=0.0, before=0.0, after=0.0):
        super().__init__()
        self.now = 100.0
        self.steps, self.validation, self.before, self.after = steps, validation, before, after
        self.trained = 0

    def __call__(self):
        return self.now

    def on_epoch_begin(self, epoch, logs=None):
        self.now += self.before
        self.trained = 0

    def on_train_batch_end(self, batch, logs=None):
        self.now += sum(self.steps[self.trained : batch + 1])
        self.trained = batch + 1

    def on_test_end(self, logs=None):
        self.now += self.validation

    def on_epoch_end(self, epoch, logs=None):
        self.now += self.after


@pytest.fixture
def clock(monkeypatch):
    def install(*args, **kwargs):
        clock = Clock(*args, **kwargs)
        monkeypatch.setattr(epoch_timing, "perf_counter", clock)
        return clock

    return install


def make_model(cls=keras.Sequential, **compile_arguments):
    model = cls([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **compile_arguments)
    return model


def make_data(samples):
    return np.ones((samples, 3), "float32"), np.zeros((samples, 1), "float32")


def batches(samples, batch_size):
    x, y = make_data(samples)
    for start in range(0, samples, batch_size):
        yield x[start : start + batch_size], y[start : start + batch_size]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("validated", [False, True])
def test_every_number_of_an_epoch(clock, weighted, validated):
    clock = clock([5.0, 1.0, 1.0, 3.0], validation=2.0, before=7.0, after=0.5)
    x, y = make_data(29)  # batches of 8, 8, 8 and 5
    timing = EpochTiming()
    history = make_model().fit(
        x,
        y,
        sample_weight=np.full(29, 0.25) if weighted else None,
        validation_data=make_data(50) if validated else None,
        batch_size=8,
        epochs=2,
        verbose=0,
        callbacks=[clock, timing],
    )
    expected = {
        "epoch_seconds": 12.5 if validated else 10.5,
        "train_seconds": 10.0,
        "validation_seconds": 2.0 if validated else 0.0,
        "first_step_seconds": 5.0,
        "step_seconds_median": 1.0,
        "step_seconds_p95": np.quantile([1.0, 1.0, 3.0], 0.95),
        "samples_per_second": (8 + 8 + 5) / 5.0,
    }
    for epoch in range(2):
        logged = {key: history.history[key][epoch] for key in KEYS}
        assert logged == pytest.approx(expected)
        assert all(type(value) is float for value in logged.values())
        assert timing.rows[epoch] == {"epoch": epoch, "stage": None, **logged}
    json.dumps(timing.rows, allow_nan=False)


@pytest.mark.parametrize(
    ("warmup_steps", "median", "samples_per_second"),
    [(0, 2.0, 29 / 10), (1, 1.0, 21 / 5), (2, 2.0, 13 / 4), (4, math.nan, math.nan)],
)
def test_warmup_steps_are_left_out(clock, warmup_steps, median, samples_per_second):
    clock = clock([5.0, 1.0, 1.0, 3.0])
    timing = EpochTiming(warmup_steps=warmup_steps)
    x, y = make_data(29)
    make_model().fit(x, y, batch_size=8, verbose=0, callbacks=[clock, timing])
    row = timing.rows[0]
    assert row["step_seconds_median"] == pytest.approx(median, nan_ok=True)
    assert row["samples_per_second"] == pytest.approx(samples_per_second, nan_ok=True)
    assert row["first_step_seconds"] == 5.0
    assert row["train_seconds"] == 10.0


def test_reading_the_count_is_not_training(clock, monkeypatch):
    clock = clock([5.0, 1.0, 2.0, 3.0])
    counted = epoch_timing._counted

    def slowly_counted(model):
        clock.now += 9.0
        return counted(model)

    monkeypatch.setattr(epoch_timing, "_counted", slowly_counted)
    timing = EpochTiming()
    x, y = make_data(32)
    make_model().fit(x, y, batch_size=8, verbose=0, callbacks=[clock, timing])
    row = timing.rows[0]
    assert row["train_seconds"] == 11.0
    assert row["step_seconds_median"] == 2.0
    assert row["samples_per_second"] == 24 / 6


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs one step at a time")
def test_steps_per_execution(clock):
    clock = clock([4.0, 4.0, 1.0, 3.0, 6.0, 0.0])
    timing = EpochTiming()
    x, y = make_data(37)  # batches of 8, 8, 8, 8 and 5: executions of two, two and one
    make_model(steps_per_execution=2).fit(x, y, batch_size=8, verbose=0, callbacks=[clock, timing])
    row = timing.rows[0]
    assert row["first_step_seconds"] == 8.0
    assert row["step_seconds_median"] == pytest.approx(np.median([2.0, 2.0, 6.0]))
    assert row["step_seconds_p95"] == pytest.approx(np.quantile([2.0, 2.0, 6.0], 0.95))
    assert row["samples_per_second"] == pytest.approx((8 + 8 + 5) / 10)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_input_of_unknown_length(clock):
    clock = clock([5.0, 1.0, 1.0, 3.0, 99.0])
    timing = EpochTiming()
    make_model().fit(batches(29, 8), shuffle=False, verbose=0, callbacks=[clock, timing])
    assert timing.params["steps"] is None
    assert timing.rows[0]["samples_per_second"] == pytest.approx(21 / 5)
    assert timing.rows[0]["step_seconds_median"] == 1.0


def test_endless_input(clock):
    def forever():
        while True:
            yield from batches(29, 8)

    clock = clock([5.0, 1.0, 1.0, 3.0])
    timing = EpochTiming()
    model = make_model()
    model.fit(
        forever(),
        shuffle=False,
        steps_per_epoch=4,
        epochs=2,
        verbose=0,
        callbacks=[clock, timing],
    )
    assert [row["samples_per_second"] for row in timing.rows] == pytest.approx([21 / 5] * 2)


def test_epochs_without_validation(clock):
    clock = clock([1.0, 1.0], validation=3.0)
    x, y = make_data(16)
    history = make_model().fit(
        x,
        y,
        validation_data=(x, y),
        validation_freq=2,
        batch_size=8,
        epochs=4,
        verbose=0,
        callbacks=[clock, EpochTiming()],
    )
    assert history.history["validation_seconds"] == [0.0, 3.0, 0.0, 3.0]
    assert history.history["samples_per_second"] == [8.0] * 4


class OwnStep(keras.Sequential):
    def train_step(self, *args):
        return super().train_step(*args)


class OwnMetrics(keras.Sequential):
    @property
    def metrics(self):
        return super().metrics


@pytest.mark.parametrize("cls", [OwnStep, OwnMetrics])
def test_samples_are_unknown_where_the_model_counts_by_itself(clock, cls):
    clock = clock([5.0, 1.0, 1.0])
    timing = EpochTiming()
    x, y = make_data(24)
    make_model(cls).fit(x, y, batch_size=8, verbose=0, callbacks=[clock, timing])
    assert math.isnan(timing.rows[0]["samples_per_second"])
    assert timing.rows[0]["step_seconds_median"] == 1.0


def test_samples_are_unknown_where_a_float_cannot_count_them():
    model = make_model()
    x, y = make_data(8)
    model.fit(x, y, verbose=0)
    model.metrics[0].count.assign(2.0**24 - 1)
    assert epoch_timing._counted(model).samples == 2**24 - 1
    model.metrics[0].count.assign(2.0**24)
    assert epoch_timing._counted(model) is None


@pytest.mark.parametrize("validated", [False, True])
def test_an_earlier_callback_that_evaluates_at_the_end_of_an_epoch(clock, validated):
    other = make_data(64)[0] * 3, make_data(64)[1]

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(*other, batch_size=8, verbose=0)

    clock = clock([5.0, 1.0, 1.0], validation=2.0)
    timing = EpochTiming()
    x, y = make_data(24)
    make_model().fit(
        x,
        y,
        validation_data=(x, y) if validated else None,
        batch_size=8,
        verbose=0,
        callbacks=[clock, Evaluate(), timing],
    )
    rate = timing.rows[0]["samples_per_second"]
    assert rate == 8.0 if validated else math.isnan(rate)


def test_only_the_validation_of_fit_counts(clock):
    x, y = make_data(24)

    class EvaluateMidway(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                sync = getattr(self.model, "jax_state_sync", lambda: None)
                sync()
                self.model.evaluate(x, y, verbose=0, callbacks=[clock_callback, timing])

    clock_callback = clock([5.0, 1.0, 1.0], validation=4.0)
    timing = EpochTiming()
    model = make_model()
    callbacks = [clock_callback, timing, EvaluateMidway()]
    model.fit(x, y, validation_data=(x, y), batch_size=8, verbose=0, callbacks=callbacks)
    model.evaluate(x, y, verbose=0, callbacks=[clock_callback, timing])
    assert timing.rows[0]["validation_seconds"] == 4.0
    assert len(timing.rows) == 1


def test_one_callback_outside_of_a_list_is_called_from_threads():
    timing = EpochTiming()
    x, y = make_data(800)
    make_model().fit(
        x, y, validation_data=(x, y), batch_size=8, epochs=2, verbose=0, callbacks=timing
    )
    for row in timing.rows:
        assert 0 < row["train_seconds"] < row["epoch_seconds"]
        assert row["validation_seconds"] > 0
        assert row["samples_per_second"] > 0


def test_real_time():
    def slow():
        for batch in batches(40, 4):
            time.sleep(0.05)
            yield batch

    timing = EpochTiming()
    model = make_model()
    began = time.perf_counter()
    model.fit(slow(), shuffle=False, steps_per_epoch=10, verbose=0, callbacks=[timing])
    took = time.perf_counter() - began
    row = timing.rows[0]
    assert 0.4 < row["train_seconds"] <= row["epoch_seconds"] < took
    assert 0.02 < row["step_seconds_median"] < 0.5
    assert 4 / 0.5 < row["samples_per_second"] < 4 / 0.04


class Stages(keras.callbacks.Callback):
    """Logs a stage, and moves the clock slower in each."""

    def __init__(self, clock, lengths):
        super().__init__()
        self.clock = clock
        self.stages = [stage for stage, length in enumerate(lengths) for _ in range(length)]

    def on_epoch_begin(self, epoch, logs=None):
        stage = self.stages[epoch]
        first = epoch == 0 or self.stages[epoch - 1] != stage
        self.clock.steps = [20.0 if first else 1.0, *[1.0 + 2 * stage] * 2]

    def on_epoch_end(self, epoch, logs=None):
        logs["stage"] = self.stages[epoch]


def test_tables(clock):
    clock = clock([], validation=2.0)
    timing = EpochTiming()
    x, y = make_data(24)
    make_model().fit(
        x,
        y,
        validation_data=(x, y),
        batch_size=8,
        epochs=5,
        verbose=0,
        callbacks=[clock, Stages(clock, [2, 3]), timing],
    )
    table = timing.table()
    assert list(table["epoch"]) == [0, 1, 2, 3, 4]
    assert list(table["stage"]) == [0, 0, 1, 1, 1]
    assert set(table.columns) == {"epoch", "stage"} | KEYS
    assert list(table["first_step_seconds"]) == [20.0, 1.0, 20.0, 1.0, 1.0]
    assert list(table["step_seconds_median"]) == [1.0, 1.0, 3.0, 3.0, 3.0]

    by_stage = timing.by_stage()
    assert by_stage.to_dict("records") == [
        {
            "stage": 0,
            "epochs": 2,
            "epoch_seconds": 22.0 + 3.0 + 4.0,
            "train_seconds": 22.0 + 3.0,
            "validation_seconds": 4.0,
            "first_step_seconds": 20.0,
            "step_seconds_median": 1.0,
            "step_seconds_p95": 1.0,
            "samples_per_second": 8.0,
            "slowdown": 1.0,
        },
        {
            "stage": 1,
            "epochs": 3,
            "epoch_seconds": 26.0 + 7.0 + 7.0 + 6.0,
            "train_seconds": 26.0 + 7.0 + 7.0,
            "validation_seconds": 6.0,
            "first_step_seconds": 20.0,
            "step_seconds_median": 3.0,
            "step_seconds_p95": 3.0,
            "samples_per_second": pytest.approx(8 / 3),
            "slowdown": 3.0,
        },
    ]


def test_stage_that_is_not_yet_in_the_logs(clock):
    clock = clock([1.0, 1.0, 1.0, 1.0])
    timing = EpochTiming()
    model = make_model()
    begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: set_current_stage(model, 3))
    x, y = make_data(16)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[begin, clock, timing])
    # As an interrupted fit leaves it: the next, without a schedule, has no stage.
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[clock, timing])
    assert [row["stage"] for row in timing.rows] == [3, None]


def test_tables_without_a_schedule_and_without_rows(clock):
    assert len(EpochTiming().table()) == len(EpochTiming().by_stage()) == 0
    clock = clock([1.0, 1.0])
    timing = EpochTiming()
    x, y = make_data(16)
    make_model().fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[clock, timing])
    assert timing.table()["stage"].isna().all()
    assert len(timing.by_stage()) == 1
    assert timing.by_stage()["slowdown"].item() == 1.0


def test_tables_need_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "keras-xfer\[report\]"'):
        EpochTiming().table()


def test_rows_go_on_over_two_fits_of_a_deep_copy(clock):
    clock = clock([1.0, 1.0])
    timing = copy.deepcopy(EpochTiming())
    model = make_model()
    x, y = make_data(16)
    for initial_epoch in (0, 2):
        model.fit(
            x,
            y,
            batch_size=8,
            initial_epoch=initial_epoch,
            epochs=initial_epoch + 2,
            verbose=0,
            callbacks=[clock, timing],
        )
    assert [row["epoch"] for row in timing.rows] == [0, 1, 2, 3]
    assert copy.deepcopy(timing).rows == timing.rows


def test_a_new_process_goes_on_from_the_state(clock):
    clock = clock([1.0, 2.0, 3.0], validation=1.5)
    data = make_data(24)

    def train(timing, first, last, callbacks=()):
        make_model().fit(
            *data,
            validation_data=data,
            batch_size=8,
            initial_epoch=first,
            epochs=last,
            verbose=0,
            callbacks=[clock, timing, *callbacks],
        )

    whole, killed, resumed = EpochTiming(), EpochTiming(), EpochTiming()
    train(whole, 0, 4)
    train(killed, 0, 2)
    state = json.loads(json.dumps(killed.state_dict()))
    load = keras.callbacks.LambdaCallback(on_train_begin=lambda _: resumed.load_state_dict(state))
    train(resumed, 2, 4, [load])
    assert [row["epoch"] for row in resumed.rows] == [0, 1, 2, 3]
    assert resumed.rows == whole.rows
    assert len(resumed.table()) == 4
    assert len(state["rows"]) == len(killed.rows) == 2  # neither has grown with the other


def test_a_state_with_what_cannot_be_known():
    timing = EpochTiming(warmup_steps=9)
    make_model().fit(*make_data(8), verbose=0, callbacks=[timing])
    again = EpochTiming()
    again.load_state_dict(json.loads(json.dumps(timing.state_dict())))
    assert math.isnan(again.rows[0]["samples_per_second"])
    assert again.rows[0]["epoch_seconds"] == timing.rows[0]["epoch_seconds"] > 0


def test_driven_by_hand(clock):
    clock = clock([])
    timing = EpochTiming()
    timing.set_model(make_model())
    timing.on_train_begin()
    for epoch in range(2):
        if epoch == 0:  # the second epoch goes without
            timing.on_epoch_begin(epoch)
        for step, seconds in enumerate([5.0, 1.0, 2.0]):
            timing.on_train_batch_begin(step)
            clock.now += seconds
            timing.on_train_batch_end(step)
        logs = {}
        timing.on_epoch_end(epoch, logs)
        assert logs["train_seconds"] == logs["epoch_seconds"] == 8.0
        assert logs["step_seconds_median"] == 1.5
        assert math.isnan(logs["samples_per_second"])
    timing.on_train_end()


def test_an_epoch_of_no_steps(clock):
    clock = clock([])
    timing = EpochTiming()
    timing.set_model(make_model())
    timing.on_train_begin()
    timing.on_epoch_begin(0)
    clock.now += 1.5
    timing.on_epoch_end(0)
    row = timing.rows[0]
    assert row["epoch_seconds"] == 1.5
    assert row["train_seconds"] == row["validation_seconds"] == 0.0
    assert math.isnan(row["first_step_seconds"])
    assert math.isnan(row["step_seconds_median"])


def test_config_round_trip():
    timing = EpochTiming(warmup_steps=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(timing))
    assert isinstance(again, EpochTiming)
    assert again.get_config() == {"warmup_steps": 3}


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_wrong_warmup_steps(wrong):
    with pytest.raises(ValueError, match=r"int >= 0.*Received: warmup_steps="):
        EpochTiming(warmup_steps=wrong)


def test_training_is_the_same_with_and_without():
    x, y = make_data(29)
    weights = []
    for callbacks in ([], [EpochTiming()]):
        keras.utils.set_random_seed(1)
        model = make_model()
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
        weights.append(model.get_weights())
    for without, with_timing in zip(*weights, strict=True):
        np.testing.assert_array_equal(without, with_timing)
