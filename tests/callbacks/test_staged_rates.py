"""The learning rates of stages. Oracle: gradient descent in NumPy, at rates written down here."""

import copy
import math

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from tests.stages import residual
from tests.stages.residual import BATCH, STEPS, assert_trained, compiled

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()
PARTS = ("head", "two", "one", "stem")
CosineDecay = keras.optimizers.schedules.CosineDecay


def cosine(first, step, steps):
    return first * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def same(rate):
    return dict.fromkeys(PARTS, rate)


# What a second stage that begins at "one" or "all" is given, and its rates at its step s.
CASES = {
    "float": ({"learning_rate": 0.05}, lambda s: same(0.05)),
    "dict": (
        {"learning_rate": {"head": 0.1, "backbone": 0.02}},
        lambda s: {**same(0.02), "head": 0.1},
    ),
    "layer decay": (
        {"learning_rate": 0.1, "layer_decay": 0.5},
        lambda s: {"head": 0.1, "two": 0.05, "one": 0.025, "stem": 0.0125},
    ),
    "layer decay of two rates": (
        {"learning_rate": {"head": 0.1, "backbone": 0.08}, "layer_decay": 0.5},
        lambda s: {"head": 0.1, "two": 0.08, "one": 0.04, "stem": 0.02},
    ),
    "schedule": ({"learning_rate": CosineDecay(0.1, 6)}, lambda s: same(cosine(0.1, s, 6))),
    "schedule of the backbone": (
        {"learning_rate": {"head": 0.1, "backbone": CosineDecay(0.1, 6)}},
        lambda s: {**same(cosine(0.1, s, 6)), "head": 0.1},
    ),
    "warm-up": (
        {"learning_rate": 0.1, "warmup_epochs": 1},
        lambda s: same(0.1 * min(1, (s + 1) / 4)),
    ),
    "half an epoch of warm-up": (
        {"learning_rate": 0.1, "warmup_epochs": 0.5},
        lambda s: same(0.1 * min(1, (s + 1) / 2)),
    ),
    "all together": (
        {
            "learning_rate": {"head": 0.1, "backbone": CosineDecay(0.08, 7)},
            "layer_decay": 0.5,
            "warmup_epochs": 1.5,
        },
        lambda s: {
            "head": 0.1 * min(1, (s + 1) / 6),
            "two": cosine(0.08, s, 7) * min(1, (s + 1) / 6),
            "one": cosine(0.08, s, 7) * min(1, (s + 1) / 6) * 0.5,
            "stem": cosine(0.08, s, 7) * min(1, (s + 1) / 6) * 0.25,
        },
    ),
}


def by_hand(start, rates_at, first=0.2):
    """The rates at each step: one epoch of the head, then two of what the case says."""
    thawed = PARTS[: 3 if start == "one" else 4]
    second = [{part: rates_at(s)[part] for part in thawed} for s in range(2 * STEPS)]
    return [{"head": first}] * STEPS + second


@pytest.mark.parametrize(("case", "start"), [*((case, "one") for case in CASES), ("dict", "all")])
def test_each_part_trains_at_its_rate_at_every_step(case, start):
    arguments, rates_at = CASES[case]
    model = compiled(keras.optimizers.SGD(9.0))
    schedule = [Stage(epochs=1, learning_rate=0.2), Stage(start, epochs=2, **arguments)]
    callbacks = [StagedUnfreezing(schedule)]
    history = model.fit(*residual.data(), epochs=3, callbacks=callbacks, **BATCH).history
    rates = by_hand(start, rates_at)
    assert_trained(model, rates)
    last_steps = rates[STEPS - 1 :: STEPS]
    np.testing.assert_allclose(history["learning_rate"], [r["head"] for r in last_steps], rtol=1e-5)
    np.testing.assert_allclose(
        history["backbone_learning_rate"],
        [r.get("one" if start == "one" else "stem", 0.0) for r in last_steps],
        rtol=1e-5,
    )


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs every step on its own")
def test_several_steps_in_one_execution():
    arguments, rates_at = CASES["all together"]
    model = compiled(keras.optimizers.SGD(9.0), run_eagerly=False, steps_per_execution=3)
    schedule = [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    model.fit(*residual.data(), epochs=3, callbacks=[StagedUnfreezing(schedule)], **BATCH)
    assert_trained(model, by_hand("one", rates_at))


def test_what_has_its_own_rate_from_the_first_stage_on():
    model = compiled(keras.optimizers.SGD(9.0))
    schedule = [Stage("two", epochs=1, learning_rate=0.1, warmup_epochs=1, layer_decay=0.5)]
    model.fit(*residual.data(), epochs=1, callbacks=[StagedUnfreezing(schedule)], **BATCH)
    assert_trained(model, [{"head": 0.025 * s, "two": 0.0125 * s} for s in (1, 2, 3, 4)])


def test_a_stage_without_a_rate_keeps_what_is_in_force():
    """A schedule goes on, counted from the step at which it came into force."""
    model = compiled(keras.optimizers.SGD(9.0))
    schedule = [
        Stage(epochs=1, learning_rate=0.2),
        Stage("two", epochs=1, learning_rate=CosineDecay(0.1, 8), layer_decay=0.5),
        Stage("two", epochs=1),
    ]
    model.fit(*residual.data(), epochs=3, callbacks=[StagedUnfreezing(schedule)], **BATCH)
    rates = [cosine(0.1, s, 8) for s in range(8)]
    assert_trained(model, [{"head": 0.2}] * 4 + [{"head": rate, "two": rate / 2} for rate in rates])


def test_a_schedule_that_the_model_was_compiled_with_is_kept_by_a_stage_without_a_rate():
    model = compiled(keras.optimizers.SGD(CosineDecay(0.1, 8)))
    schedule = [Stage(epochs=1), Stage("two", epochs=1, learning_rate=0.05)]
    callbacks = [StagedUnfreezing(schedule)]
    history = model.fit(*residual.data(), epochs=2, callbacks=callbacks, **BATCH).history
    rates = [{"head": cosine(0.1, s, 8)} for s in range(4)]
    # Keras reads a schedule of its own for the step that comes next.
    np.testing.assert_allclose(history["learning_rate"], [cosine(0.1, 4, 8), 0.05], rtol=1e-5)
    assert_trained(model, rates + [{"head": 0.05, "two": 0.05}] * 4)


def test_all_of_the_model_may_be_backbone():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), Backbone(residual.backbone_model(), name="base")])
    model.compile(keras.optimizers.SGD(9.0), "mse", run_eagerly=True)
    x, y = residual.data()
    y = np.concatenate([y, y[:, :1]], 1)
    with pytest.raises(ValueError, match="every layer is frozen"):
        model.fit(x, y, callbacks=[StagedUnfreezing([Stage(learning_rate=1.0)])], **BATCH)
    schedule = [
        Stage("two", epochs=1, learning_rate=0.1, layer_decay=0.5),
        Stage("one", epochs=1, learning_rate={"head": 0.1, "backbone": 0.02}),
    ]
    history = model.fit(x, y, epochs=2, callbacks=[StagedUnfreezing(schedule)], **BATCH).history
    np.testing.assert_allclose(history["learning_rate"], [0.05, 0.02])
    np.testing.assert_allclose(history["backbone_learning_rate"], [0.05, 0.02])


def test_mixed_precision_with_a_rate_for_each_block():
    keras.config.set_dtype_policy("mixed_float16")
    # A scale at which no step overflows and is skipped.
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(9.0), initial_scale=128)
    model = compiled(scaled)
    arguments, rates_at = CASES["all together"]
    schedule = [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    model.fit(*residual.data(), epochs=3, callbacks=[StagedUnfreezing(schedule)], **BATCH)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    keras.config.set_dtype_policy("float32")
    assert_trained(model, by_hand("one", rates_at), atol=5e-3)


def unknown_length():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(residual.data()).batch(8).filter(lambda x, y: True)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, at the end of any such
def test_a_warm_up_over_data_of_unknown_length():
    data = unknown_length()
    run = {"epochs": 3, "shuffle": False, "verbose": 0}
    model = compiled(keras.optimizers.SGD(9.0))
    first = [Stage(learning_rate=0.2, warmup_epochs=0.5)]
    with pytest.raises(ValueError, match="steps_per_epoch to fit. Received: warmup_epochs=0.5"):
        model.fit(data, callbacks=[StagedUnfreezing(first)], **run)
    arguments, rates_at = CASES["warm-up"]
    schedule = [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    model.fit(data, callbacks=[StagedUnfreezing(schedule)], **run)
    assert_trained(model, by_hand("one", rates_at))


def test_going_on_in_the_middle_of_a_schedule_counts_the_steps_that_are_over():
    """A new callback, as in a new process."""
    arguments, rates_at = CASES["all together"]
    schedule = [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    model = compiled(keras.optimizers.SGD(9.0))
    for epoch in range(3):
        model.fit(
            *residual.data(),
            initial_epoch=epoch,
            epochs=epoch + 1,
            callbacks=[StagedUnfreezing(schedule)],
            **BATCH,
        )
    assert_trained(model, by_hand("one", rates_at))


def test_going_on_in_the_middle_of_a_schedule_needs_to_know_the_steps_that_are_over():
    model = compiled(keras.optimizers.SGD(9.0))
    schedule = StagedUnfreezing([Stage("one", learning_rate=CosineDecay(0.1, 8))])
    run = {"initial_epoch": 1, "epochs": 2, "shuffle": False, "verbose": 0}
    with pytest.raises(ValueError, match="data of unknown length, 1 epochs into the stage"):
        model.fit(unknown_length(), callbacks=[schedule], **run)


def test_going_on_in_a_stage_without_a_rate_of_its_own():
    """What is in force there is what an earlier stage has said, not what the model was compiled
    with."""
    schedule = [
        Stage(epochs=1, learning_rate=0.2),
        Stage("one", epochs=1, learning_rate={"head": 0.1, "backbone": CosineDecay(0.08, 12)}),
        Stage("one", epochs=2),
    ]

    def rates(s):
        return {"head": 0.1, **dict.fromkeys(("two", "one"), cosine(0.08, s, 12))}

    model = compiled(keras.optimizers.SGD(9.0))
    x, y = residual.data()
    for begin, end in ((0, 3), (3, 4)):
        model.compile(keras.optimizers.SGD(9.0), "mse", run_eagerly=True)
        model.fit(
            x, y, initial_epoch=begin, epochs=end, callbacks=[StagedUnfreezing(schedule)], **BATCH
        )
    assert_trained(model, [{"head": 0.2}] * 4 + [rates(s) for s in range(12)])


@pytest.mark.parametrize("case", ["dict", "all together"])
def test_two_fits_equal_one(case):
    arguments, rates_at = CASES[case]
    schedule = StagedUnfreezing(
        [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    )
    model = compiled(keras.optimizers.SGD(9.0))
    x, y = residual.data()
    model.fit(x, y, epochs=2, callbacks=[schedule], **BATCH)
    model.fit(x, y, epochs=3, initial_epoch=2, callbacks=[schedule], **BATCH)
    assert_trained(model, by_hand("one", rates_at))


def test_a_second_fit_of_a_model_that_was_compiled_again_has_the_rates_of_the_stage():
    arguments, rates_at = CASES["all together"]
    schedule = StagedUnfreezing(
        [Stage(epochs=1, learning_rate=0.2), Stage("one", epochs=2, **arguments)]
    )
    model = compiled(keras.optimizers.SGD(9.0))
    x, y = residual.data()
    model.fit(x, y, epochs=2, callbacks=[schedule], **BATCH)
    model.compile(keras.optimizers.SGD(7.0), "mse", run_eagerly=True)
    model.fit(x, y, epochs=3, initial_epoch=2, callbacks=[schedule], **BATCH)
    assert_trained(model, by_hand("one", rates_at))


def test_gradual_unfreezing_in_one_fit():
    model = compiled(keras.optimizers.SGD(9.0))
    schedule = StagedUnfreezing.gradual(
        learning_rate={"head": 0.1, "backbone": 0.04}, layer_decay=0.5, num_stages=3
    )
    duplicate = copy.deepcopy(schedule)  # as KerasTuner does
    history = model.fit(*residual.data(), epochs=9, callbacks=[duplicate], **BATCH).history
    assert history["stage"] == [0, 1, 2]
    assert_trained(
        model,
        [{"head": 0.1}] * 4
        + [{"head": 0.1, "two": 0.04}] * 4
        + [{"head": 0.1, "two": 0.04, "one": 0.02}] * 4,
    )


def test_a_head_without_an_input_and_a_rate_of_its_own():
    """TensorFlow makes the head's weights in the first step of `fit`."""
    model = residual.model()
    inner = model.get_layer("base")
    keras.utils.set_random_seed(3)
    unbuilt = keras.Sequential([inner, keras.layers.Dense(3, name="head")])
    unbuilt.compile(keras.optimizers.SGD(9.0), "mse", run_eagerly=True)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if not seen:
                unbuilt.get_layer("head").set_weights(
                    residual.model().get_layer("head").get_weights()
                )
                seen.append(True)

    schedule = [Stage("two", epochs=1, learning_rate={"head": 0.1, "backbone": 0.02})]
    callbacks = [StagedUnfreezing(schedule), Watch()]
    unbuilt.fit(*residual.data(), epochs=1, callbacks=callbacks, **BATCH)
    assert_trained(unbuilt, [{"head": 0.1, "two": 0.02}] * 4)
