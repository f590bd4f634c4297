"""Every optimizer of Keras over a transition.

Oracles: a plain optimizer of the class that never heard of one, alone on the variables that trained
before, and another, begun at the transition, alone on those that join. Both are given the gradients
that the grouped one is given. What follows bit for bit has kept all its state.
"""

import keras
import numpy as np
import pytest

from keras_xfer.retarget import GroupedOptimizer, StageRate
from keras_xfer.retarget.carrying import members_of, optimizer_for, unscaled
from tests import schedules
from tests.retarget import hand

BACKEND = keras.backend.backend()
NORM = 0.5  # below that of every set of gradients here
RATE = 1e-2
FIRST, LAST = 2, 6  # the steps of the transition and the end

OPTIONS = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.3},
    "clipnorm": {"clipnorm": 0.4},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": NORM},
    "accumulation": {"gradient_accumulation_steps": 2},
    "ema": {"use_ema": True, "ema_momentum": 0.7},
    "ema_overwriting": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2},
    "loss_scale_factor": {"loss_scale_factor": 8.0},
    "dynamic_loss_scale": {"dynamic": True},
    "schedule": {"schedule": True},
}
PAIRS = {
    "+".join(names): {key: value for name in names for key, value in OPTIONS[name].items()}
    for names in [
        ("weight_decay", "clipnorm", "ema", "schedule"),
        ("weight_decay", "clipvalue", "accumulation", "dynamic_loss_scale"),
        ("global_clipnorm", "ema_overwriting", "loss_scale_factor"),
        ("global_clipnorm", "accumulation", "ema", "loss_scale_factor"),
    ]
}
CORE = ("SGD", "Adam", "Adafactor", "Nadam", "Muon", "ScheduleFreeAdamW")


def _crossing():
    """Classes, options, and whether to split: options in pairs, and one at a time if slow."""
    last = list(PAIRS)[-1]
    for make in schedules.optimizers():
        name_of = make.__name__
        for name, options in {**OPTIONS, **PAIRS}.items():
            marks = [] if name in PAIRS or name == "plain" else [pytest.mark.slow]
            yield pytest.param(make, options, False, id=f"{name_of}-{name}", marks=marks)
        for name, core in (("plain", CORE), (last, ("SGD", "Adam"))):
            marks = [pytest.mark.core] if name_of in core else []
            options = {**OPTIONS, **PAIRS}[name]
            yield pytest.param(make, options, True, id=f"{name_of}-{name}-split", marks=marks)


def made(make, schedule=False, dynamic=False, **options):
    rate = keras.optimizers.schedules.CosineDecay(RATE, 10) if schedule else RATE
    if make is keras.optimizers.SGD:
        options["momentum"] = 0.9
    optimizer = make(rate, **options)
    if not dynamic:
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)


@pytest.mark.parametrize(("make", "options", "split"), list(_crossing()))
def test_old_ones_go_on_and_new_ones_begin_like_plain_optimizers(make, options, split):
    """With `split` the two that trained together get a group each, so none is the old object."""
    scale = options.get("loss_scale_factor") or (4.0 if options.get("dynamic") else 1.0)
    norm = options.get("global_clipnorm")
    alone = {**options, "dynamic": False, "global_clipnorm": None, "loss_scale_factor": None}
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    old, new = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    optimizer, old_oracle, new_oracle = (
        made(make, **options),
        made(make, **alone),
        made(make, **alone),
    )
    optimizer.build(head)
    old_oracle.build(old)
    if options.get("schedule"):  # in force is the rate that it has come to
        new_oracle.learning_rate = _From(new_oracle._learning_rate, FIRST)
    new_oracle.build(new)

    held = []
    for step in range(LAST):
        if step == FIRST:
            rate = StageRate(RATE)
            rates = [([each], rate) for each in head] + [(late, rate)] if split else None
            optimizer = optimizer_for(optimizer, [*late, *head], rates)
            assert isinstance(unscaled(optimizer), GroupedOptimizer)
            assert len(members_of(unscaled(optimizer))) == (3 if split else 2)
            if options.get("use_ema"):
                averages = unscaled(optimizer)._model_variables_moving_average
                hand.assert_same(averages[:2], late)
        training = [*late, *head] if step >= FIRST else head
        hand.apply(optimizer, hand.gradients(step, training, scale))
        grads = hand.gradients(step, [*new, *old] if step >= FIRST else old)
        if norm and options.get("gradient_accumulation_steps"):
            held.append(grads)
            if len(held) == 2:  # plain Keras clips the mean
                mean = [(a + b) / 2 for a, b in zip(*held, strict=True)]
                grads = [2 * c - a for c, a in zip(hand.clipped(mean, norm), held[0], strict=True)]
                held = []
        elif norm:
            grads = hand.clipped(grads, norm)
        if step >= FIRST:
            hand.apply(new_oracle, grads[:2])
        hand.apply(old_oracle, grads[-2:])

    exact = {"atol": 2e-6} if norm else {}
    hand.assert_same(head, old, **exact)
    hand.assert_same(late, new, **exact)
    assert any((now != then).any() for now, then in zip(
        hand.values(late), hand.values(hand.variables(hand.LATE)), strict=True
    ))  # fmt: skip
    if options.get("use_ema"):
        averages = unscaled(optimizer)._model_variables_moving_average
        hand.assert_same(averages[:2], new_oracle._model_variables_moving_average, **exact)
        hand.assert_same(averages[2:], old_oracle._model_variables_moving_average, **exact)
    if options.get("dynamic"):
        assert int(optimizer.step_counter) == LAST
        assert float(optimizer.dynamic_scale) == 4.0


class _From(keras.optimizers.schedules.LearningRateSchedule):
    """`schedule` from its step `first` on."""

    def __init__(self, schedule, first):
        self.schedule, self.first = schedule, first

    def __call__(self, step):
        return self.schedule(step + self.first)


# --- What groups share -----------------------------------------------------------------------


def _joined(optimizer, head, late, rates=None, steps=2):
    """`optimizer` after `steps` steps of `head` alone, then for `late` too."""
    optimizer.build(head)
    for step in range(steps):
        hand.apply(optimizer, hand.gradients(step, head))
    return optimizer_for(optimizer, [*late, *head], rates)


@pytest.mark.core
def test_groups_that_accumulate_out_of_step_are_clipped_by_what_each_has_so_far():
    """The head is updated at odd steps, what joined at step 3 at even ones. Oracle: NumPy."""
    steps, rate = 2, 0.1
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    expected = dict(zip([*hand.LATE, *hand.HEAD], hand.values([*late, *head]), strict=True))
    optimizer = keras.optimizers.SGD(rate, gradient_accumulation_steps=steps, global_clipnorm=NORM)
    optimizer = _joined(optimizer, head, late, steps=3)
    held = {name: np.zeros_like(value) for name, value in expected.items()}
    count = dict.fromkeys(expected, 0)
    for step in range(7):
        names = list(expected) if step >= 3 else list(hand.HEAD)
        if step >= 3:
            hand.apply(optimizer, hand.gradients(step, [*late, *head]))
        grads = hand.gradients(step, [v for v in [*late, *head] if v.name in names])
        for name, grad in zip(names, grads, strict=True):
            held[name] = held[name] + grad
            count[name] += 1
        means = [held[name] / count[name] for name in names]
        for name, mean in zip(names, hand.clipped(means, NORM), strict=True):
            if count[name] == steps:
                expected[name] = expected[name] - rate * mean
                held[name], count[name] = np.zeros_like(mean), 0
    for variable in [*late, *head]:
        np.testing.assert_allclose(variable.numpy(), expected[variable.name], atol=1e-6)


@pytest.mark.core
def test_a_norm_below_the_threshold_changes_nothing():
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    optimizer = _joined(keras.optimizers.SGD(0.1, global_clipnorm=1e3), head, late)
    before = hand.values(late)
    hand.apply(optimizer, hand.gradients(2, [*late, *head]))
    for variable, value, grad in zip(late, before, hand.gradients(2, late), strict=True):
        np.testing.assert_allclose(variable.numpy(), value - 0.1 * grad, atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("by", ["var_list", "var_names"])
def test_what_is_excluded_from_weight_decay_stays_excluded(by):
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    told = {"var_list": [head[1], late[1]], "var_names": ["bias"]}[by]
    optimizer.exclude_from_weight_decay(**{by: told})
    optimizer = _joined(optimizer, head, late, [([v], StageRate(0.1)) for v in [*head, *late]])
    before = hand.values([*late, *head])
    hand.apply(optimizer, [np.zeros_like(value) for value in before])
    for variable, value in zip([*late, *head], before, strict=True):
        kept = value if variable.name.endswith("bias") else value * (1 - 0.5 * 0.1)
        np.testing.assert_allclose(variable.numpy(), kept, rtol=1e-6)


@pytest.mark.core
def test_weight_decay_is_at_the_rate_of_the_group():
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    rates = [(head, StageRate(0.1)), (late, StageRate(0.01))]
    optimizer = _joined(keras.optimizers.AdamW(0.1, weight_decay=0.5), head, late, rates)
    before = hand.values(late)
    hand.apply(optimizer, [np.zeros_like(value) for value in hand.values([*late, *head])])
    for variable, value in zip(late, before, strict=True):
        np.testing.assert_allclose(variable.numpy(), value * (1 - 0.5 * 0.01), rtol=1e-6)


def _quarter():
    return 0.25


@pytest.mark.core
def test_a_function_as_rate_is_kept():
    """It has no words that Keras would read back."""
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    optimizer = _joined(keras.optimizers.SGD(_quarter), head, late)
    before = hand.values(late)
    hand.apply(optimizer, hand.gradients(2, [*late, *head]))
    for variable, value, grad in zip(late, before, hand.gradients(2, late), strict=True):
        np.testing.assert_allclose(variable.numpy(), value - 0.25 * grad, atol=1e-6)


@pytest.mark.core
def test_the_old_object_goes_on_where_it_can():
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    adam = keras.optimizers.Adam(RATE)
    optimizer = _joined(adam, head, late)
    first, second = members_of(optimizer)
    assert first is adam
    assert optimizer_for(optimizer, [*late, *head]) is optimizer
    again = optimizer_for(optimizer, [*late, *head], [([*late, *head], StageRate(1e-3))])
    assert members_of(again)[0] is adam
    assert float(again.learning_rate) == pytest.approx(1e-3)
    hand.apply(again, hand.gradients(2, [*late, *head]))
    assert optimizer_for(again, head) is adam
    assert optimizer_for(again, late) is second
    assert (int(adam.iterations), int(second.iterations)) == (3, 1)


@pytest.mark.core
def test_a_global_norm_outlives_the_groups():
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    optimizer = _joined(keras.optimizers.SGD(0.1, global_clipnorm=NORM), head, late)
    hand.apply(optimizer, hand.gradients(2, [*late, *head]))
    alone = optimizer_for(optimizer, late)
    assert not isinstance(alone, GroupedOptimizer)
    assert alone.global_clipnorm == NORM
    third = hand.variables({"third_kernel": (2, 2)})
    assert all(
        member.global_clipnorm is None
        for member in members_of(optimizer_for(alone, [*third, *late]))
    )


@pytest.mark.core
def test_a_variable_without_a_rate_is_refused():
    head, late = hand.variables(hand.HEAD), hand.variables(hand.LATE)
    with pytest.raises(ValueError, match="learning rate for every variable.*late_kernel"):
        _joined(keras.optimizers.SGD(0.1), head, late, [(head, StageRate(0.1))])
