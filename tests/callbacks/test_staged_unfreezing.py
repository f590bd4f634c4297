import copy

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from tests import schedules
from tests.schedules import BATCH, compiled

pytestmark = pytest.mark.core

RATES = [1e-2, 5e-3, 1e-3]
STARTS = [None, "high", "all"]


def stages(epochs=2):
    return [
        Stage(start, epochs=epochs, learning_rate=rate)
        for start, rate in zip(STARTS, RATES, strict=True)
    ]


def by_hand(make, epochs=2):
    """The same schedule as a sequence of plain Keras calls: each stage compiles and fits, and
    each group of variables has an optimizer from when it joined."""
    model = schedules.model()
    x, y = schedules.data()
    of = {}
    for start, rate in zip(STARTS, RATES, strict=True):
        if start:
            model.get_layer("base").unfreeze(start)
        new = make(rate)
        for variable in model.trainable_variables:
            of.setdefault(id(variable), new)
        for optimizer in of.values():
            optimizer.learning_rate = rate
        model.compile(
            keras.optimizers.MultiOptimizer(lambda variable: of[id(variable)]),
            schedules.LOSS(from_logits=True),
        )
        model.fit(x, y, epochs=epochs, **BATCH)
    return model


@pytest.mark.parametrize(
    "make",
    [
        keras.optimizers.Adam,
        lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1, clipnorm=0.1),
    ],
    ids=["adam", "sgd", "adamw"],
)
def test_it_equals_the_schedule_written_by_hand(make):
    model = compiled(make(1e-2))
    x, y = schedules.data()
    model.fit(x, y, epochs=6, callbacks=[StagedUnfreezing(stages())], **BATCH)
    schedules.assert_equal_weights(model, by_hand(make))


def test_history_says_what_trained():
    model = compiled(keras.optimizers.Adam(0.5))
    x, y = schedules.data()
    history = model.fit(x, y, epochs=6, callbacks=[StagedUnfreezing(stages())], **BATCH).history
    assert history["stage"] == [0, 0, 1, 1, 2, 2]
    # head 4*3+3; high 8*4+4; low 6*8+8; BatchNormalization is frozen
    assert history["trainable_params"] == [15, 15, 51, 51, 107, 107]
    np.testing.assert_allclose(history["learning_rate"], np.repeat(RATES, 2), rtol=1e-6)
    np.testing.assert_allclose(
        history["backbone_learning_rate"], [0, 0, *np.repeat(RATES[1:], 2)], rtol=1e-6
    )


def test_each_stage_trains_its_layers_from_its_first_step():
    model = compiled(keras.optimizers.Adam(1e-2))
    x, y = schedules.data()
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            inner = model.get_layer("base").model
            seen.append([schedules.value(inner.get_layer(name).kernel) for name in ("low", "high")])

    start = [
        schedules.value(model.get_layer("base").model.get_layer(n).kernel) for n in ("low", "high")
    ]
    one_batch = x[:8], y[:8]
    model.fit(*one_batch, epochs=3, callbacks=[StagedUnfreezing(stages(1)), Watch()], **BATCH)
    moved = [
        [bool((a != b).any()) for a, b in zip(now, before, strict=True)]
        for now, before in zip(seen, [start, *seen[:-1]], strict=True)
    ]
    assert moved == [[False, False], [False, True], [True, True]]


def test_training_stops_after_the_last_stage():
    model = compiled("adam")
    x, y = schedules.data()
    history = model.fit(x, y, epochs=50, callbacks=[StagedUnfreezing(stages(1))], **BATCH)
    assert history.epoch == [0, 1, 2]


def test_a_last_stage_without_epochs_lasts_to_the_end():
    model = compiled("adam")
    x, y = schedules.data()
    schedule = StagedUnfreezing([Stage(epochs=1), Stage("all", learning_rate=1e-4)])
    assert model.fit(x, y, epochs=4, callbacks=[schedule], **BATCH).history["stage"] == [0, 1, 1, 1]


def test_two_fits_equal_one():
    x, y = schedules.data()
    schedule = StagedUnfreezing(stages())
    twice = compiled(keras.optimizers.Adam(1e-2))
    first = twice.fit(x, y, epochs=3, callbacks=[schedule], **BATCH).history
    second = twice.fit(x, y, epochs=6, initial_epoch=3, callbacks=[schedule], **BATCH).history
    assert first["stage"] + second["stage"] == [0, 0, 1, 1, 2, 2]
    once = compiled(keras.optimizers.Adam(1e-2))
    once.fit(x, y, epochs=6, callbacks=[StagedUnfreezing(stages())], **BATCH)
    schedules.assert_equal_weights(twice, once)


def test_a_second_fit_begins_at_the_first_stage():
    x, y = schedules.data()
    schedule = StagedUnfreezing(stages(1))
    model = compiled("adam")
    model.fit(x, y, epochs=3, callbacks=[schedule], **BATCH)
    base = schedules.weights(model.get_layer("base"))
    history = model.fit(x, y, epochs=1, callbacks=[schedule], **BATCH).history
    assert history["stage"] == [0]
    assert history["trainable_params"] == [15]
    for now, then in zip(model.get_layer("base").get_weights(), base, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_backbone_left_thawed_is_frozen_by_the_first_stage():
    model = compiled("adam")
    model.get_layer("base").unfreeze("all")
    model.compile("adam", schedules.LOSS(from_logits=True))
    before = schedules.weights(model.get_layer("base"))
    x, y = schedules.data()
    model.fit(x, y, epochs=1, callbacks=[StagedUnfreezing(stages(1))], **BATCH)
    for now, then in zip(model.get_layer("base").get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_validation_and_other_callbacks_beside_it(tmp_path):
    model = compiled(keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    x, y = schedules.data()
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            rates.append([float(m.learning_rate) for m in model.optimizer._members])

    halve = keras.callbacks.ReduceLROnPlateau(
        "val_loss", factor=0.5, patience=1, min_delta=100.0, mode="min"
    )
    schedule = [Stage(epochs=1, learning_rate=1e-2), Stage("high", epochs=4, learning_rate=1e-3)]
    history = model.fit(
        x,
        y,
        epochs=5,
        validation_data=(x, y),
        callbacks=[
            StagedUnfreezing(schedule),
            halve,
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.LambdaCallback(),
        ],
        **BATCH,
    ).history
    assert history["stage"] == [0, 1, 1, 1, 1]
    assert len(history["val_accuracy"]) == 5
    assert history["learning_rate"][1] == pytest.approx(1e-3)
    assert history["learning_rate"][-1] < 5e-4
    assert float(model.optimizer.learning_rate) == pytest.approx(history["learning_rate"][-1] / 2)
    assert (tmp_path / "log.csv").read_text().startswith("epoch,accuracy,backbone_learning_rate")


def test_a_copy_made_before_training_works_and_leaves_the_original_alone():
    """KerasTuner deep-copies callbacks for each execution."""
    schedule = StagedUnfreezing(stages(1))
    duplicate = copy.deepcopy(schedule)
    model = compiled("adam")
    x, y = schedules.data()
    history = model.fit(x, y, epochs=3, callbacks=[duplicate], **BATCH).history
    assert history["stage"] == [0, 1, 2]
    assert not schedule._planned


def test_the_backbone_is_found_by_name_or_alone():
    def base(name):
        return Backbone(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), name=name)

    inputs = keras.Input((4,))
    one, two = base("one"), base("two")
    model = keras.Model(inputs, keras.layers.Dense(1)(one(inputs) + two(inputs)))
    model.compile("sgd", "mse")
    x = np.ones((8, 4), "float32")
    run = {"epochs": 2, **BATCH}
    schedule = [Stage(epochs=1), Stage("all", epochs=1, learning_rate=1e-3)]
    with pytest.raises(ValueError, match="'one', 'two'"):
        model.fit(x, x[:, :1], callbacks=[StagedUnfreezing(schedule)], **run)
    with pytest.raises(ValueError, match="'one', 'two'"):
        model.fit(x, x[:, :1], callbacks=[StagedUnfreezing(schedule, backbone="three")], **run)
    for which in ("two", two):
        model.fit(x, x[:, :1], callbacks=[StagedUnfreezing(schedule, backbone=which)], **run)
        assert two.trainable
        assert not one.trainable
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Wrap the pretrained model"):
        plain.fit(x, x[:, :1], callbacks=[StagedUnfreezing(schedule)], **run)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_a_nested_and_a_subclassed_model(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Classifier(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = schedules.model()

        def call(self, inputs, training=None):
            return self.inner(inputs, training=training)

    model = Classifier()
    model.compile(keras.optimizers.Adam(1e-2), schedules.LOSS(from_logits=True))
    x, y = schedules.data()
    model.fit(x, y, epochs=6, callbacks=[StagedUnfreezing(stages())], **BATCH)
    schedules.assert_equal_weights(model, by_hand(keras.optimizers.Adam))
    # What its own code makes is frozen again, and so not what the optimizer was saved for.
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="compile the model again"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    schedules.assert_equal_weights(loaded, model)


@pytest.mark.parametrize("rate", [1e-2, keras.optimizers.schedules.CosineDecay(1.0, 10)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_that_is_built_by_its_first_step(rate, scaled):
    """TensorFlow makes the head's weights and the optimizer's in the first step of `fit`."""
    keras.utils.set_random_seed(1)
    built = schedules.model()
    model = keras.Sequential([built.get_layer("base"), keras.layers.Dense(3, name="head")])
    optimizer = keras.optimizers.SGD(rate)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, schedules.LOSS(from_logits=True))
    x, y = schedules.data()
    history = model.fit(x, y, epochs=3, callbacks=[StagedUnfreezing(stages(1))], **BATCH).history
    assert history["trainable_params"] == [15, 51, 107]
    np.testing.assert_allclose(history["learning_rate"], RATES, rtol=1e-6)


def test_it_prints_what_begins(capsys):
    model = compiled("adam")
    x, y = schedules.data()
    schedule = [
        Stage(epochs=1, learning_rate=1e-2, name="head"),
        Stage("high", epochs=1, learning_rate=1e-3),
    ]
    model.fit(x, y, epochs=2, callbacks=[StagedUnfreezing(schedule, verbose=1)], **BATCH)
    out = capsys.readouterr().out
    assert (
        "Epoch 1: stage 1 (head) of 2 trains the head, 15 parameters at learning rate 0.01" in out
    )
    assert (
        "Epoch 2: stage 2 of 2 trains unfreeze='high', 51 parameters at learning rate 0.001" in out
    )


def test_errors_come_before_training():
    model = compiled("adam")
    before = schedules.weights(model)
    x, y = schedules.data()
    with pytest.raises(TypeError, match="list of keras_xfer.Stage"):
        StagedUnfreezing(["all"])
    for schedule in ([Stage(epochs=1), Stage("lwo", learning_rate=1e-3)],):
        with pytest.raises(ValueError, match=r"Stage 2: .*'low'"):
            model.fit(x, y, epochs=3, callbacks=[StagedUnfreezing(schedule)], **BATCH)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_beginning_after_the_end_is_refused():
    model = compiled("adam")
    x, y = schedules.data()
    with pytest.raises(ValueError, match="of the schedule, which has 3"):
        model.fit(x, y, epochs=9, initial_epoch=3, callbacks=[StagedUnfreezing(stages(1))], **BATCH)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(keras.optimizers.Adam(1e-2))
    x, y = schedules.data()
    model.fit(x, y, epochs=3, callbacks=[StagedUnfreezing(stages(1))], **BATCH)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert int(model.optimizer.iterations) == 12
