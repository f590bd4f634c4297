"""An optimizer for other variables or other rates, with the state of the old one.

Two ways to carry a variable's state: its optimizer goes on as the object that it is, where all of
its variables train on at one rate; else a new one of the class gets the slots of those that do.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_xfer.retarget.grouped_optimizer import GroupedOptimizer, Rates, StageRate, number


def optimizer_for(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any], rates: Rates | None = None
) -> keras.optimizers.Optimizer:
    """An optimizer for exactly `variables`, with the state that `optimizer` has for them.

    Args:
        optimizer: the old one.
        variables: what trains from now on.
        rates: the rate of each group of variables; None keeps the rates in force.

    Returns:
        The same object where nothing but constant rates has changed.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer_for(optimizer.inner_optimizer, variables, rates)
        return optimizer if inner is optimizer.inner_optimizer else loss_scaled(optimizer, inner)
    if not optimizer.built:  # Keras would, in its first step, for what is trainable then
        optimizer.build(list(variables))
    new, rate_of = _members_for(optimizer, variables, rates)
    stays = _same(new, members_of(optimizer))
    if stays and (rates is None or _go_on(optimizer, rate_of)):
        return optimizer
    global_clipnorm = optimizer.global_clipnorm
    if len(new) == 1 and (rate_of[0] is None or rate_of[0].is_constant):
        new[0].global_clipnorm = global_clipnorm
        if rate_of[0] is not None:
            new[0].learning_rate = number(rate_of[0](0))
        return new[0]
    return grouped(new, variables, rate_of, global_clipnorm, int(optimizer._iterations.numpy()))


def check_known(optimizer: Any) -> None:
    """Raise the ValueError of an optimizer whose state is not carried from stage to stage."""
    if isinstance(unscaled(optimizer), keras.optimizers.MultiOptimizer):
        raise ValueError(
            "Expected one optimizer for all variables. Received: optimizer=MultiOptimizer. Compile "
            "with one of its optimizers: a Stage with learning_rate={'head': …, 'backbone': …} or "
            "layer_decay gives parts of the model rates of their own."
        )


def members_of(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """The optimizers of the groups; `optimizer` itself where it is not grouped."""
    return list(optimizer._members) if isinstance(optimizer, GroupedOptimizer) else [optimizer]


def unscaled(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """`optimizer` without its dynamic loss scale."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def learning_rate_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> float:
    """The rate at which `optimizer` trains `variable`."""
    key = optimizer._var_key(variable)
    for member in members_of(unscaled(optimizer)):
        if key in member._trainable_variables_indices:
            return number(member.learning_rate)
    raise ValueError(f"Expected a variable that trains. Received: {variable.path!r}.")


def head_learning_rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """The rate of the first group, as it is in a warm-up too."""
    return number(members_of(unscaled(optimizer))[0].learning_rate)


def kind_of(optimizer: keras.optimizers.Optimizer) -> str:
    """The class of `optimizer`, whatever wraps it."""
    return type(members_of(unscaled(optimizer))[0]).__name__


def steps_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many batches `optimizer` has been given, whatever it accumulates."""
    return int(unscaled(optimizer)._iterations.numpy())


def uses_ema(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `optimizer` keeps moving averages of the weights."""
    return any(member.use_ema for member in members_of(unscaled(optimizer)))


def _members_for(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any], rates: Rates | None
) -> tuple[list[keras.optimizers.Optimizer], list[StageRate | None]]:
    """An optimizer for each group of variables that have trained together and will train at one
    rate, and the rates: by rate, in each the longest trained first."""
    old = members_of(optimizer)
    key = optimizer._var_key
    # One that has not taken a step yet has no state to carry, and is of no age.
    sources = {
        key(variable): number
        for number, member in enumerate(old)
        for variable in member._trainable_variables
        if int(member._iterations.numpy())
    }
    in_force = _rates_in_force(optimizer)
    if rates is None:
        groups = {key(v): n for n, member in enumerate(old) for v in member._trainable_variables}
        rate_of = dict(enumerate(in_force))
        of_group = [groups.get(key(variable), 0) for variable in variables]
    else:
        groups = {key(v): n for n, (members, _) in enumerate(rates) for v in members}
        rate_of = {n: rate for n, (_, rate) in enumerate(rates)}
        if lost := [variable.path for variable in variables if key(variable) not in groups]:
            raise ValueError(
                f"Expected a learning rate for every variable that trains. Received: none for {lost}."
            )
        of_group = [groups[key(variable)] for variable in variables]
    cells: dict[tuple[int, int], list[Any]] = {}
    for variable, group in zip(variables, of_group, strict=True):
        cells.setdefault((group, sources.get(key(variable), len(old))), []).append(variable)
    step = int(optimizer._iterations.numpy())
    made: list[keras.optimizers.Optimizer] = []
    made_rates: list[StageRate | None] = []
    for (group, source), of_cell in sorted(cells.items(), key=lambda cell: cell[0]):
        rate = rate_of[group]
        if rates is not None and rate is not None:
            rate = rate.beginning_at(step + rate.first_step)
        if rate is None and source == len(old):
            rate = _scheduled(old[group], step)
        made.append(_member(old, source, of_cell, rate, suffix=f"_{len(made)}" if made else ""))
        made_rates.append(rate)
    return made, made_rates


def _member(
    old: Sequence[keras.optimizers.Optimizer],
    source: int,
    variables: list[Any],
    rate: StageRate | None,
    suffix: str,
) -> keras.optimizers.Optimizer:
    """The optimizer of one group: the old one that it comes from, or a new one."""
    # A rate of ours is written into the optimizer's variable; Keras does not let go of a schedule.
    changes: dict[str, Any] = (
        {} if rate is None else {"learning_rate": number(rate(rate.first_step))}
    )
    unstepped = [m for m in old if not int(m._iterations.numpy())]
    if source == len(old):
        for member in unstepped:  # nothing of it to lose: it may be the one
            if _same(member._trainable_variables, variables) and _can_have(member, rate):
                return member
        return fresh(old[0], variables, suffix, **changes)
    member = old[source]
    if len(member._trainable_variables) == len(variables) and _can_have(member, rate):
        return member
    return _rebuilt(member, variables, **changes)


def _scheduled(member: keras.optimizers.Optimizer, step: int) -> StageRate | None:
    """The schedule that `member` has of its own as it goes on, for one that begins at `step`."""
    steps = int(member._iterations.numpy())
    if not steps or not isinstance(
        member._learning_rate, keras.optimizers.schedules.LearningRateSchedule
    ):
        return None
    return StageRate(member._learning_rate, first_step=step - steps)


def _can_have(member: keras.optimizers.Optimizer, rate: StageRate | None) -> bool:
    return rate is None or isinstance(member._learning_rate, keras.Variable)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _rates_in_force(optimizer: keras.optimizers.Optimizer) -> list[StageRate | None]:
    """The rate of each member, as the schedule and those who set it have made it."""
    if not isinstance(optimizer, GroupedOptimizer):
        return [GroupedOptimizer._rate_of(optimizer)]
    factor = number(optimizer._factor)
    return [
        None
        if rate is None
        else StageRate(rate.learning_rate, rate.scale * factor, rate.warmup_steps, rate.first_step)
        for rate in optimizer._rates
    ]


def _go_on(optimizer: keras.optimizers.Optimizer, rates: Sequence[StageRate | None]) -> bool:
    """Give `optimizer`, whose members stay, its rates without another train step, if that can be."""
    if not isinstance(optimizer, GroupedOptimizer):
        (rate,) = rates
        if rate is not None and not rate.is_constant:
            return False
        if rate is not None:
            optimizer.learning_rate = number(rate(0))
        return True
    if not all(rate is not None and rate.is_constant for rate in [*rates, *optimizer._rates]):
        return False
    optimizer._rates = list(rates)
    optimizer._scale_rates(1.0)
    return True


def grouped(
    members: Sequence[keras.optimizers.Optimizer],
    variables: Sequence[Any],
    rates: Sequence[StageRate | None],
    global_clipnorm: float | None,
    iterations: int,
) -> GroupedOptimizer:
    """One optimizer of several, built for `variables`."""
    for member in members:
        member.global_clipnorm = None  # the groups are clipped together
        if not any(map(member._use_weight_decay, member._trainable_variables)):
            # On torch Keras raises where all that it is to decay is excluded. Tried on Keras 3.15.1.
            vars(member)["_apply_weight_decay"] = _decay_nothing
    key = members[0]._var_key
    group_of = {key(v): i for i, m in enumerate(members) for v in m._trainable_variables}
    optimizer = GroupedOptimizer(
        members,
        [group_of[key(variable)] for variable in variables],
        rates=rates,
        global_clipnorm=global_clipnorm,
        loss_scale_factor=members[0].loss_scale_factor,
    )
    optimizer.build(variables)
    optimizer._iterations.assign(iterations)
    optimizer._scale_rates(1.0)
    return optimizer


def _decay_nothing(variables: Sequence[Any]) -> None:
    """What weight decay does to a group that is excluded from it."""


def loss_scaled(
    old: keras.optimizers.LossScaleOptimizer, inner: keras.optimizers.Optimizer
) -> keras.optimizers.LossScaleOptimizer:
    """`inner`, which is built, under the loss scale that `old` has reached."""
    new = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=old.initial_scale, dynamic_growth_steps=old.dynamic_growth_steps
    )
    new.build(inner._trainable_variables)
    if old.built:
        copy(old.step_counter, new.step_counter)
        copy(old.dynamic_scale, new.dynamic_scale)
    return new


def fresh(
    like: keras.optimizers.Optimizer, variables: Sequence[Any], suffix: str = "", **changes: Any
) -> keras.optimizers.Optimizer:
    """A new optimizer with the configuration of `like`, built for `variables`."""
    config = {**like.get_config(), "name": like.name + suffix}
    if not isinstance(like._learning_rate, keras.Variable):
        config["learning_rate"] = like._learning_rate  # a function cannot be told in words
    new = type(like).from_config({**config, **changes})
    # What exclude_from_weight_decay was told is in no configuration.
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(like, name):
            setattr(new, name, getattr(like, name))
    new.build(list(variables))
    if new.use_ema:
        # Keras begins them at 0; who looks before the first step would see a weight of 0.
        averages = new._model_variables_moving_average
        for variable, average in zip(variables, averages, strict=True):
            if average is not None:
                copy(variable, average)
    return new


def _rebuilt(
    old: keras.optimizers.Optimizer, variables: Sequence[Any], **changes: Any
) -> keras.optimizers.Optimizer:
    """A new optimizer for some of `old`'s variables, with `old`'s state for them."""
    new = fresh(old, variables, **changes)
    at = [old._get_variable_index(variable) for variable in variables]
    targets = dict(slots(new))
    for name, value in slots(old):
        # Muon has a slot for some variables only, so maybe for none of these.
        if name == "_learning_rate" or name not in targets:
            continue
        sources, of_new = ([value], [targets[name]])
        if isinstance(value, list):
            sources, of_new = [value[k] for k in at], targets[name]
        for source, target in zip(sources, of_new, strict=True):
            if isinstance(source, keras.Variable):
                copy(source, target)
    return new


def slots(optimizer: keras.optimizers.Optimizer) -> Iterator[tuple[str, Any]]:
    """The state of an optimizer that is built, attribute by attribute: a variable, or a list with
    an entry for each variable that it trains, as Keras's optimizers keep it.

    Raises:
        ValueError: the optimizer keeps state elsewhere.
    """
    found: set[int] = set()
    for name, value in sorted(vars(optimizer).items()):
        if name in ("_variables", "_trainable_variables"):
            continue
        if isinstance(value, keras.Variable):
            of_name = [value]
        elif isinstance(value, list) and len(value) == len(optimizer._trainable_variables):
            value = list(value)  # on TensorFlow a list that tracks its items
            of_name = [each for each in value if isinstance(each, keras.Variable)]
        else:
            continue
        if of_name:
            found.update(map(id, of_name))
            yield name, value
    if lost := [variable.path for variable in optimizer.variables if id(variable) not in found]:
        raise ValueError(
            "Expected an optimizer that keeps its state in attributes: one variable, or a list "
            "with an entry for each variable that it trains. Received: "
            f"optimizer={optimizer.name!r} ({type(optimizer).__name__}) with {lost} kept elsewhere. "
            "Compile the model again to start with a fresh optimizer."
        )


def copy(source: keras.Variable, target: keras.Variable) -> None:
    """Assign the value of `source` to `target`."""
    # On JAX an assignment shares the buffer, and a train step may not donate one twice.
    target.assign(keras.ops.copy(source))
