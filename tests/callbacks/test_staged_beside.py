"""Keras's own callbacks beside StagedUnfreezing, before and after it in the list."""

import csv

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from keras_xfer.retarget.carrying import head_learning_rate_of
from keras_xfer.retarget.trainer import sync
from tests.callbacks.test_staged_transitions import MIN, Score
from tests.stages import residual
from tests.stages.residual import BATCH, compiled

pytestmark = pytest.mark.core

TWO = [
    Stage(epochs=2, learning_rate=0.1),
    Stage("one", epochs=3, learning_rate={"head": 0.08, "backbone": 0.04}, layer_decay=0.5),
]
ORDERS = pytest.mark.parametrize("before", [True, False])


def run(callback, before, *, model=None, values=(1, 2, 3, 4, 5), stages=TWO, **kwargs):
    schedule = StagedUnfreezing(stages)
    pair = [callback, schedule] if before else [schedule, callback]
    return (model or compiled(keras.optimizers.SGD(9.0))).fit(
        *residual.data(),
        callbacks=[Score(values), *pair],
        **{"epochs": 5, **BATCH, "batch_size": 32, **kwargs},
    )


def test_an_optimizer_of_several_is_refused_before_anything_trains():
    several = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    )
    with pytest.raises(ValueError, match="MultiOptimizer.*'head'"):
        run(keras.callbacks.History(), True, model=compiled(several))


@ORDERS
def test_early_stopping(before):
    stop = keras.callbacks.EarlyStopping("score", mode="min", patience=2)
    assert run(stop, before).history["stage"] == [0, 0, 1]


@ORDERS
def test_a_rate_that_is_reduced_on_a_plateau(before):
    halve = keras.callbacks.ReduceLROnPlateau("score", mode="min", factor=0.5, patience=1)
    history = run(halve, before, values=[1, 2, 3, 0, 0]).history
    # Halved after epochs 1, 2 and 4; a stage begins with its own rates.
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.1, 0.08, 0.04, 0.04], rtol=1e-6)
    np.testing.assert_allclose(history["backbone_learning_rate"], [0, 0, 0.02, 0.01, 0.01], rtol=1e-6)  # fmt: skip


@ORDERS
@pytest.mark.parametrize(
    ("schedule", "head", "lowest"),
    [
        (lambda epoch: 0.1 / (epoch + 1), [0.1, 0.05, 0.1 / 3, 0.025, 0.02], [0, 0, 0.25, 0.25, 0.25]),
        (lambda epoch, rate: rate / 2, [0.05, 0.025, 0.04, 0.02, 0.01], [0, 0, 0.25, 0.25, 0.25]),
    ],
    ids=["absolute", "relative"],
)  # fmt: skip
def test_a_scheduler_of_the_rate_sets_the_head_s_and_scales_the_others(
    schedule, head, lowest, before
):
    model = compiled(keras.optimizers.SGD(9.0))
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    history = run(scheduler, before, model=model, batch_size=8).history
    np.testing.assert_allclose(history["learning_rate"], head, rtol=1e-6)
    backbone = np.multiply(head, lowest)
    np.testing.assert_allclose(history["backbone_learning_rate"], backbone, rtol=1e-6)
    rates = [{"head": h, "two": 2 * o, "one": o} for h, o in zip(head, backbone, strict=True)]
    residual.assert_trained(model, [rate for rate in rates for _ in range(residual.STEPS)])


@ORDERS
def test_the_log_in_a_file_has_the_columns(before, tmp_path):
    run(keras.callbacks.CSVLogger(tmp_path / "log.csv"), before)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["0", "0", "1", "1", "1"]
    assert [row["trainable_params"] for row in rows] == ["15", "15", "55", "55", "55"]
    rates = [float(row["backbone_learning_rate"]) for row in rows]
    np.testing.assert_allclose(rates, [0, 0, 0.02, 0.02, 0.02], rtol=1e-6)
    assert float(rows[0]["learning_rate"]) == pytest.approx(0.1)


@ORDERS
def test_tensorboard(before, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("tensorflow")
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    logged = []
    board._log_epoch_metrics = lambda epoch, logs: logged.append(dict(logs))
    run(board, before)
    assert [logs["stage"] for logs in logged] == [0, 0, 1, 1, 1]
    assert logged[-1]["backbone_learning_rate"] == pytest.approx(0.02)


@ORDERS
def test_a_checkpoint_goes_on_where_it_was_saved(before, tmp_path):
    path = str(tmp_path / "{epoch}.keras")
    model = compiled(keras.optimizers.Adam(9.0))
    stages = [
        Stage(epochs=1, learning_rate=0.1),
        Stage("two", epochs=1, learning_rate=0.05),
        Stage(
            "one",
            epochs=2,
            learning_rate={
                "head": 0.08,
                "backbone": keras.optimizers.schedules.CosineDecay(0.04, 9),
            },
            layer_decay=0.5,
            warmup_epochs=1.5,
        ),
    ]
    run(keras.callbacks.ModelCheckpoint(path), before, model=model, stages=stages, batch_size=8)
    loaded = keras.saving.load_model(path.format(epoch=3))
    loaded.run_eagerly = True
    rest = run(keras.callbacks.Callback(), before, model=loaded, stages=stages, batch_size=8, initial_epoch=3)  # fmt: skip
    assert rest.history["stage"] == [2]
    for mine, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


# --- Other models ----------------------------------------------------------------------------

RATES = {"head": 0.08, "backbone": 0.04}


def fitted(model, x, y):
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    schedule = StagedUnfreezing(
        [Stage(epochs=1), Stage("one", epochs=1, learning_rate=RATES, layer_decay=0.5)],
        backbone="base",
        restore_best=True,
        monitor="loss",
    )
    history = model.fit(x, y, epochs=2, callbacks=[schedule], **BATCH).history
    np.testing.assert_allclose(history["learning_rate"], [0.01, 0.08], rtol=1e-6)
    np.testing.assert_allclose(history["backbone_learning_rate"], [0, 0.02], rtol=1e-6)
    return history


def test_a_backbone_in_a_nested_model_with_several_inputs_and_another_backbone():
    keras.utils.set_random_seed(1)
    one, two, number = keras.Input((6,)), keras.Input((6,)), keras.Input((1,))
    base = Backbone(residual.backbone_model(), name="base")
    other = Backbone(residual.backbone_model(), name="other")
    inner = keras.Model([one, two], keras.layers.Concatenate()([base(one), other(two)]))
    x = keras.layers.Concatenate()([inner([one, two]), number])
    model = keras.Model([one, two, number], keras.layers.Dense(3, name="head")(x))
    x, y = residual.data()
    before = [weight.copy() for weight in other.get_weights()]
    head = (4 + 4 + 1) * 3 + 3
    assert fitted(model, [x, x, x[:, :1]], y)["trainable_params"] == [head, head + 2 * (4 * 4 + 4)]
    for mine, theirs in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_subclassed_model():
    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.base = Backbone(residual.backbone_model(), name="base")
            self.top = keras.layers.Dense(3)

        def call(self, inputs):
            return self.top(self.base(inputs))

    x, y = residual.data()
    assert fitted(Classifier(), x, y)["trainable_params"] == [15, 55]


def test_the_callback_uses_the_model_of_its_fit():
    """One callback, two models one after the other: nothing of the first is left."""
    schedule = StagedUnfreezing(
        [Stage(epochs=1, learning_rate=0.1), Stage("two", epochs=1, learning_rate=0.1)],
        restore_best=True,
        **MIN,
    )
    for values in ([1, 2], [5, 6]):
        model = compiled(keras.optimizers.SGD(9.0))
        history = model.fit(
            *residual.data(), epochs=2, callbacks=[Score(values), schedule], **BATCH
        ).history
        assert history["stage"] == [0, 1]
        residual.assert_trained(model, [{"head": 0.1}] * residual.STEPS)


class Rates(keras.callbacks.Callback):
    """Notes the head's rate of each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        sync(self.model)
        self.steps.append(head_learning_rate_of(self.model.optimizer))


@ORDERS
@pytest.mark.parametrize("schedule", [lambda epoch: 0.04, lambda epoch, rate: rate])
def test_a_scheduler_of_the_rate_in_a_warm_up_sets_what_it_rises_to(before, schedule):
    rates = Rates()
    stages = [Stage("one", epochs=2, learning_rate=0.04, warmup_epochs=1)]
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    pair = [scheduler, StagedUnfreezing(stages)]
    model = compiled(keras.optimizers.SGD(9.0))
    x, y = residual.data()
    model.fit(
        x, y, epochs=2, callbacks=[*(pair if before else pair[::-1]), rates],
        **{**BATCH, "batch_size": len(x) // 4},
    )  # fmt: skip
    np.testing.assert_allclose(rates.steps, [0.01, 0.02, 0.03, *[0.04] * 5], rtol=1e-6)


def test_a_stage_never_runs_the_compiled_step_of_another():
    """Who keeps the train function, keeps on JAX what it has compiled, which jax.jit finds by the
    function; and all functions `model.train_step` are equal."""
    kept, rates = [], Rates()

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept.append(self.model.train_function)

    decay = keras.optimizers.schedules.ExponentialDecay
    stages = [
        Stage("one", epochs=1, learning_rate=decay(0.02, 10, 0.5)),
        Stage("one", epochs=1, learning_rate=decay(0.01, 10, 0.5)),
    ]
    model = compiled(keras.optimizers.SGD(9.0), run_eagerly=False)
    x, y = residual.data()
    model.fit(
        x, y, epochs=2, callbacks=[StagedUnfreezing(stages), Keep(), rates],
        **{**BATCH, "batch_size": len(x) // 2},
    )  # fmt: skip
    np.testing.assert_allclose(
        rates.steps, [0.02, 0.02 * 0.5**0.1, 0.01, 0.01 * 0.5**0.1], rtol=1e-6
    )
