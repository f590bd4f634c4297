"""The whole state of a training as plain data, and back: weights, flags, optimizer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_xfer import freezing
from keras_xfer.retarget.carrying import (
    fresh,
    grouped,
    loss_scaled,
    members_of,
    slots,
    steps_of,
    unscaled,
)
from keras_xfer.retarget.grouped_optimizer import GroupedOptimizer, StageRate, number
from keras_xfer.retarget.trainer import distribution_scope, install, sync

# What a schedule changes in an optimizer's configuration.
_CHANGING = ("name", "learning_rate", "global_clipnorm")


def capture(model: keras.Model, *, live_rates: bool = False) -> dict[str, Any]:
    """Take the state of a training: all variables of the model with its seed generators, which of
    them train, and the optimizer's state by the variable that it belongs to.

    Args:
        model: a built `keras.Model`, between two steps.
        live_rates: bool, leave each `StageRate` as it is, for a state that stays in this process:
            a schedule of the user's own need not be one that can be saved. Defaults to `False`.

    Returns:
        A tree of dicts, lists, strings, numbers, None and NumPy arrays that nothing else changes.

    Raises:
        ValueError: the optimizer holds state that belongs to no variable, or trains a variable that
            is not the model's.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> before = capture(model)
    >>> _ = model.fit(np.ones((4, 2)), np.zeros((4, 1)), verbose=0)
    >>> restore(model, before)
    >>> bool((model.get_weights()[0] == before["variables"][0]).all())
    True

    Reference:
        https://keras.io/api/models/model_saving_apis/
    """
    sync(model)
    optimizer = getattr(model, "optimizer", None)
    state = {
        "variables": values_of(model.variables),
        "trainable": freezing.thawed(model, by_place=True),
        "optimizer": None if optimizer is None else _captured(optimizer, model.variables),
        "other_optimizers": {
            name: _captured(other, model.variables)
            for name, other in other_optimizers(model).items()
        },
    }
    return state if live_rates else as_data(state)


def restore(model: keras.Model, state: Mapping[str, Any]) -> None:
    """Bring `model` back to what `capture` found, whatever trains now.

    An optimizer of another class than the captured one is left as it is, for what then trains.

    Args:
        model: a `keras.Model`, between two steps: the same, or made by the same code.
        state: what `capture` returned.

    Raises:
        ValueError: the model has other variables than the captured one.
    """
    sync(model)
    variables = model.variables
    _check_shapes(variables, state["variables"])
    with distribution_scope(model):
        for variable, value in zip(variables, state["variables"], strict=True):
            variable.assign(value)
        freezing.restore_thawed(model, state["trainable"], by_place=True)
        for name, other in other_optimizers(model).items():
            if name in state["other_optimizers"]:
                setattr(model, name, _restored(other, state["other_optimizers"][name], variables))
        if state["optimizer"] is None or getattr(model, "optimizer", None) is None:
            return
        optimizer = _restored(model.optimizer, state["optimizer"], variables)
    if optimizer is not model.optimizer:
        install(model, optimizer)


def as_data(state: Any) -> Any:
    """A state or a configuration as dicts and lists of one's own: without Keras's kinds of them,
    which follow the optimizer, and with each `StageRate` as data too. `restore` takes both."""
    if isinstance(state, StageRate):
        return as_data(state.get_config())
    if isinstance(state, Mapping):
        return {name: as_data(value) for name, value in state.items()}
    return [as_data(each) for each in state] if isinstance(state, list | tuple) else state


def values_of(variables: Iterable[Any]) -> list[np.ndarray]:
    """Copies of the values of Keras variables, which nothing else changes."""
    return [_value(variable) for variable in variables]


def compiled_rate(model: keras.Model) -> Any:
    """The learning rate that an optimizer which has not taken a step yet was made with, as plain
    data; None where it has."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or steps_of(optimizer):
        return None
    rate = members_of(unscaled(optimizer))[0]._learning_rate
    if isinstance(rate, keras.Variable):
        return float(f"{number(rate):.7g}")  # as it was written, before it was float32
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return {"class_name": type(rate).__name__, "config": as_data(rate.get_config())}
    return getattr(rate, "__qualname__", type(rate).__name__)  # a function


def optimizer_differences(model: keras.Model, state: Mapping[str, Any]) -> list[str]:
    """In words, how the optimizer of `model` is configured otherwise than the captured one, but for
    what a schedule changes."""
    captured, optimizer = state["optimizer"], getattr(model, "optimizer", None)
    if captured is None or optimizer is None:
        return []
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    found = []
    if scaled != (captured["loss_scale"] is not None):
        found.append(f"loss scaling was {'off' if scaled else 'on'} and is {_on(scaled)}")
    member, then = members_of(unscaled(optimizer))[0], captured["members"][0]
    if type(member).__name__ != then["class"]:
        return [*found, f"the optimizer was {then['class']} and is {type(member).__name__}"]
    now = as_data(member.get_config())
    found += [
        f"{name} of {then['class']} was {then['config'].get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*now, *then["config"]} - set(_CHANGING))
        if now.get(name) != then["config"].get(name)
    ]
    clipnorm = unscaled(optimizer).global_clipnorm
    if clipnorm != captured["global_clipnorm"]:
        found.append(f"global_clipnorm was {captured['global_clipnorm']!r} and is {clipnorm!r}")
    return found


def other_optimizers(model: keras.Model) -> dict[str, Any]:
    """Optimizers of the model's own, besides that of `compile`, by attribute."""
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer) and value is not model.optimizer
    }


def _on(scaled: bool) -> str:
    return "on" if scaled else "off"


def _value(variable: keras.Variable) -> np.ndarray:
    # A copy: what a backend gives may be the buffer that the next step writes to.
    value = np.array(keras.ops.convert_to_numpy(variable), copy=True)
    # bfloat16 is not NumPy's own, so its files do not know it; float32 holds each of its values.
    return value.astype("float32") if value.dtype.kind == "V" else value


def _check_shapes(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    now = [tuple(variable.shape) for variable in variables]
    then = [np.shape(value) for value in values]
    if now == then:
        return
    first = next((i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b), None)
    where = (
        ""
        if first is None
        else f"; the first that differs is {variables[first].path!r} of shape {now[first]}, which "
        f"was {then[first]}"
    )
    raise ValueError(
        "Expected a model with the same variables as the one whose state was captured. Received: "
        f"{len(now)} variables in place of {len(then)}{where}."
    )


# --- The optimizer ---------------------------------------------------------------------------


def _captured(optimizer: Any, variables: Sequence[Any]) -> dict[str, Any]:
    inner = unscaled(optimizer)
    place = {inner._var_key(variable): i for i, variable in enumerate(variables)}
    if foreign := [v.path for v in inner._trainable_variables if inner._var_key(v) not in place]:
        raise ValueError(
            f"Expected an optimizer of the model's own variables. Received: it trains {foreign}, "
            "which the model does not track: make them attributes of one of its layers."
        )

    def places(of: Any) -> list[int]:
        return [place[inner._var_key(variable)] for variable in of._trainable_variables]

    is_grouped = isinstance(inner, GroupedOptimizer)
    rates = inner._rates if is_grouped else [None]
    return {
        "loss_scale": None if inner is optimizer else _loss_scale(optimizer),
        "built": bool(inner.built),
        "grouped": is_grouped,
        "variables": places(inner),
        "iterations": int(inner._iterations.numpy()),
        "factor": float(inner._factor.numpy()) if is_grouped else 1.0,
        "global_clipnorm": inner.global_clipnorm,
        "members": [
            {
                "class": type(member).__name__,
                "config": as_data(member.get_config()),
                "rate": rate,
                "variables": places(member),
                "slots": {
                    name: [None if each is None else _value(each) for each in value]
                    if isinstance(value, list)
                    else _value(value)
                    for name, value in slots(member)
                },
            }
            for member, rate in zip(members_of(inner), rates, strict=True)
        ],
    }


def _loss_scale(optimizer: keras.optimizers.LossScaleOptimizer) -> dict[str, np.ndarray]:
    if not optimizer.built:
        return {"step_counter": np.array(0), "dynamic_scale": np.array(optimizer.initial_scale)}
    return {
        "step_counter": _value(optimizer.step_counter),
        "dynamic_scale": _value(optimizer.dynamic_scale),
    }


def _restored(optimizer: Any, state: Mapping[str, Any], variables: Sequence[Any]) -> Any:
    """The optimizer of `state`: `optimizer` itself where it has the same groups, else a new one."""
    inner = unscaled(optimizer)
    like = members_of(inner)[0]
    if type(like).__name__ != state["members"][0]["class"]:
        return optimizer
    if not state["built"] and state["grouped"]:
        return optimizer
    if not state["built"]:  # as Keras builds it in its first step
        trains = [i for i, variable in enumerate(variables) if variable.trainable]
        (member,) = state["members"]
        state = {**state, "variables": trains, "members": [{**member, "variables": trains}]}
    made = inner
    if not state["built"] or not _has_groups(inner, state, variables):
        made = _made(like, state, variables)
    for member, of_member in zip(members_of(made), state["members"], strict=True):
        _assign_slots(member, of_member["slots"])
    made._iterations.assign(state["iterations"])
    if state["grouped"]:
        made._factor.assign(state["factor"])
    if inner is optimizer:
        return made
    scaled = optimizer if made is inner else loss_scaled(optimizer, made)
    if not scaled.built:
        scaled.build(made._trainable_variables)
    if state["loss_scale"] is not None:
        scaled.step_counter.assign(state["loss_scale"]["step_counter"])
        scaled.dynamic_scale.assign(state["loss_scale"]["dynamic_scale"])
    return scaled


def _has_groups(inner: Any, state: Mapping[str, Any], variables: Sequence[Any]) -> bool:
    if not inner.built or isinstance(inner, GroupedOptimizer) != state["grouped"]:
        return False
    place = {inner._var_key(variable): i for i, variable in enumerate(variables)}
    rates = inner._rates if state["grouped"] else [None]
    now = [
        (
            [place.get(inner._var_key(variable)) for variable in member._trainable_variables],
            _schedule(as_data(member.get_config())),
        )
        for member in members_of(inner)
    ]
    then = [_rate(each["rate"]) for each in state["members"]]
    return now == [
        (each["variables"], _schedule(each["config"])) for each in state["members"]
    ] and all(
        one is other if one is None else one.is_same(other)
        for one, other in zip(rates, then, strict=True)
    )


def _rate(rate: Any) -> StageRate | None:
    """A rate as it was captured, or as plain data."""
    return StageRate.from_config(dict(rate)) if isinstance(rate, Mapping) else rate


def _schedule(config: Mapping[str, Any]) -> Any:
    """The rate in an optimizer's configuration, where no variable holds it."""
    rate = config["learning_rate"]
    return None if isinstance(rate, int | float) else rate


def _made(like: Any, state: Mapping[str, Any], variables: Sequence[Any]) -> Any:
    members = []
    for of_member in state["members"]:
        changes = {name: of_member["config"][name] for name in _CHANGING}
        if _schedule(of_member["config"]) == _schedule(as_data(like.get_config())) is not None:
            del changes["learning_rate"]  # it may be a function, which cannot be told in words
        members.append(fresh(like, [variables[i] for i in of_member["variables"]], **changes))
    if not state["grouped"]:
        return members[0]
    return grouped(
        members,
        [variables[i] for i in state["variables"]],
        [_rate(each["rate"]) for each in state["members"]],
        state["global_clipnorm"],
        state["iterations"],
    )


def _assign_slots(member: Any, values: Mapping[str, Any]) -> None:
    for name, slot in slots(member):
        value = values.get(name)  # none where the configuration was another
        targets, sources = ([slot], [value])
        if isinstance(slot, list):
            targets, sources = slot, value if isinstance(value, list) else [None] * len(slot)
        for target, source in zip(targets, sources, strict=True):
            if isinstance(target, keras.Variable) and source is not None:
                target.assign(source)
