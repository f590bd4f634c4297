"""Make a running `fit` train another set of variables.

Keras builds its optimizer and its compiled train step for the variables that are trainable when
`fit` begins; changing `trainable` later is ignored (TensorFlow), refused (torch) or destroys the
model (JAX). `retarget` changes all of it together, between two steps of one `fit`. This is the
one file that touches the internals of trainers and optimizers. Tried on Keras 3.15.1.

Variables that were already training keep their optimizer, the object itself, with its slots and
its step count. Newly thawed ones get a fresh optimizer of the same class and configuration, whose
step count begins at 0: under the old step count Adam's first update would be several times the
learning rate.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras


def retarget(
    model: keras.Model, change: Callable[[], None], *, learning_rate: float | None = None
) -> None:
    """Run `change`, which sets trainable flags, and train from now on what is trainable then.

    Call it between two steps: in a callback's `on_epoch_begin`, `on_epoch_end` or
    `on_train_batch_end`, on TensorFlow, JAX or torch, with any optimizer; outside of `fit` too.

    Args:
        model: a compiled `keras.Model`.
        change: called once, with the model's variables up to date.
        learning_rate: float, the rate of all that trains; None keeps the rates in force.

    Raises:
        ValueError: the model is not compiled, nothing is trainable after `change`, or the
            optimizer holds state that belongs to no variable.

    Example:

    >>> class ThawLater(keras.callbacks.Callback):
    ...     def on_epoch_begin(self, epoch, logs=None):
    ...         if epoch == 5:
    ...             base = self.model.get_layer("backbone")
    ...             retarget(self.model, lambda: base.unfreeze(-20), learning_rate=1e-5)

    Reference:
        https://keras.io/guides/transfer_learning/
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            "Expected a compiled model. Received: model="
            f"{model.name!r}, which has no optimizer: call model.compile(...) first."
        )
    if keras.backend.backend() == "jax":
        # Between two steps of an epoch the values live outside of the model; bring them back
        # while its variables are still in the order in which they went out.
        model.jax_state_sync()
    change()
    variables = model.trainable_variables
    if not variables and model.built:
        raise ValueError(
            "Expected something to train. Received: a model of which every layer is frozen: "
            "add a head, or let the first stage thaw some of the backbone."
        )
    optimizer = model.optimizer
    with _distribution_scope(model):
        if optimizer.built:  # else Keras builds it, in the first step, for what is trainable then
            optimizer = _optimizer_for(optimizer, variables)
        if learning_rate is not None:
            optimizer = _with_learning_rate(optimizer, variables, learning_rate)
    if optimizer is not model.optimizer:
        _install(model, optimizer)


@keras.saving.register_keras_serializable(package="keras_xfer")
class GroupedOptimizer(keras.optimizers.Optimizer):
    """Several optimizers, each for its group of variables, that look like one.

    What `retarget` gives a model once variables have joined that began later. The first group is
    the one that has trained longest: `learning_rate` and `iterations` read it, and setting
    `learning_rate` scales all groups in proportion, so that ReduceLROnPlateau and
    LearningRateScheduler work beside a schedule. keras.optimizers.MultiOptimizer has neither:
    https://github.com/keras-team/keras/pull/22897

    Args:
        optimizers: list of Keras optimizers, one a group.
        groups: list of int, the group of each trainable variable of the model, in order.
        global_clipnorm: float or None, over the gradients of all groups together.
        loss_scale_factor: float or None, that of the optimizers.
        name: str or None.

    Raises:
        ValueError: it is built for another number of variables than `groups` has.

    Example:

    >>> adam = [keras.optimizers.Adam(1e-3), keras.optimizers.Adam(1e-4)]
    >>> optimizer = GroupedOptimizer(adam, groups=[1, 1, 0, 0])
    >>> optimizer.learning_rate = 1e-2
    >>> round(float(adam[1].learning_rate), 6)
    0.001

    Reference:
        https://keras.io/api/optimizers/
    """

    def __init__(
        self,
        optimizers: Sequence[keras.optimizers.Optimizer],
        groups: Sequence[int],
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            learning_rate=0.0,
            global_clipnorm=global_clipnorm,
            loss_scale_factor=loss_scale_factor,
            name=name,
        )
        self._untrack_variable(self._learning_rate)  # the groups have their own
        self._groups = [int(group) for group in groups]
        self._members = list(optimizers)

    def build(self, variables: Sequence[Any]) -> None:
        """Build each optimizer for its group of `variables`."""
        if self.built:
            return
        if len(variables) != len(self._groups):
            raise ValueError(
                f"Expected the {len(self._groups)} variables that this optimizer trained when it "
                f"was made. Received: {len(variables)} variables. What is trainable has changed "
                "since: compile the model again (load it with compile=False first)."
            )
        for member, of_member in zip(self._members, self._split(variables), strict=True):
            if not member.built:
                member.build(of_member)
        super().build(list(variables))

    def _split(self, items: Sequence[Any]) -> list[list[Any]]:
        """`items`, one for each variable that this was built for, by group."""
        split: list[list[Any]] = [[] for _ in self._members]
        for group, item in zip(self._groups, items, strict=True):
            split[group].append(item)
        return split

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Let each optimizer apply the gradients of its group."""
        if trainable_variables is not None:
            if not self.built:
                self.build(list(trainable_variables))
            self._check_variables_are_known(trainable_variables)
            by_key = {
                self._var_key(variable): grad
                for grad, variable in zip(grads, trainable_variables, strict=True)
            }
            grads = [by_key.get(self._var_key(v)) for v in self._trainable_variables]
        if all(grad is None for grad in grads):
            raise ValueError("No gradients provided for any variable.")
        split = zip(
            self._members,
            self._split(self._clip_together(list(grads))),
            self._split(self._trainable_variables),
            strict=True,
        )
        for member, of_member, variables in split:
            if any(grad is not None for grad in of_member):
                member.apply(of_member, variables)
            else:  # an optimizer without any gradient raises; the other groups must not notice
                warnings.warn(
                    "Gradients do not exist for variables "
                    f"{[variable.path for variable in variables]}: they are thawed but the loss "
                    "does not depend on them.",
                    stacklevel=2,
                )
        self._iterations.assign_add(1)

    def _clip_together(self, grads: list[Any]) -> list[Any]:
        """The global norm is that of all groups, not of each."""
        if not self.global_clipnorm:
            return grads
        scale = self.loss_scale_factor or 1.0
        squares = [keras.ops.sum(keras.ops.square(g / scale)) for g in grads if g is not None]
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.stack(squares)))
        factor = self.global_clipnorm / keras.ops.maximum(norm, self.global_clipnorm)
        return [grad if grad is None else grad * factor for grad in grads]

    @property
    def variables(self) -> list[Any]:
        """The variables of all groups."""
        return [*self._variables, *(v for member in self._members for v in member.variables)]

    @property
    def learning_rate(self) -> Any:
        """The rate of the first group; setting it scales the others in proportion."""
        return self._members[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        first = float(self._members[0].learning_rate)
        ratios = [
            float(member.learning_rate) / first if first else 1.0 for member in self._members[1:]
        ]
        self._members[0].learning_rate = value
        for member, ratio in zip(self._members[1:], ratios, strict=True):
            member.learning_rate = value * ratio

    @property
    def iterations(self) -> Any:
        """The steps of the first group."""
        return self._members[0].iterations

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Let each optimizer end its group: moving averages become the weights."""
        if not self.built:
            return
        for member, variables in zip(self._members, self._split(var_list), strict=True):
            member.finalize_variable_values(variables)

    def get_config(self) -> dict[str, Any]:
        """The configuration, with that of each optimizer."""
        return {
            "name": self.name,
            "optimizers": [keras.saving.serialize_keras_object(m) for m in self._members],
            "groups": list(self._groups),
            "global_clipnorm": self.global_clipnorm,
            "loss_scale_factor": self.loss_scale_factor,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """An optimizer from `get_config`."""
        optimizers = [
            keras.saving.deserialize_keras_object(each, custom_objects=custom_objects)
            for each in config["optimizers"]
        ]
        return cls(**{**config, "optimizers": optimizers})


# --- The trainer -----------------------------------------------------------------------------


def _distribution_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    """Under tf.distribute variables must be made inside the strategy's scope."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def _install(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Give `model` another optimizer and a train step that uses it."""
    model.optimizer = optimizer
    # What `save` writes as the compiled optimizer has no public setter but `compile`, which
    # would reset metrics and loss in the middle of `fit`.
    model._compile_config.config["optimizer"] = optimizer
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
    if keras.backend.backend() == "jax":
        # Compiled for one split into trainable and other variables; they are made again when used.
        model.test_function = None
        model.predict_function = None


# --- The optimizer ---------------------------------------------------------------------------


def _optimizer_for(
    optimizer: keras.optimizers.Optimizer, variables: list[Any]
) -> keras.optimizers.Optimizer:
    """An optimizer for exactly `variables`, with the state that `optimizer` has for them."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _optimizer_for(optimizer.inner_optimizer, variables)
        if inner is optimizer.inner_optimizer:
            return optimizer
        return _loss_scaled(optimizer, inner, variables)
    key = optimizer._var_key
    wanted = {key(variable) for variable in variables}
    if wanted == set(map(key, optimizer._trainable_variables)):
        return optimizer
    grouped = isinstance(optimizer, GroupedOptimizer)
    members = []
    for member in optimizer._members if grouped else [optimizer]:
        kept = [v for v in member._trainable_variables if key(v) in wanted]
        if not kept or not int(member._iterations.numpy()):
            continue  # nothing of it trains on, or it has not taken a step yet
        whole = len(kept) == len(member._trainable_variables)
        members.append(member if whole else _rebuilt(member, kept))
    trained = {key(v) for member in members for v in member._trainable_variables}
    if new := [variable for variable in variables if key(variable) not in trained]:
        members.append(_fresh(members[0] if members else optimizer, new, f"_{len(members)}"))
    if len(members) == 1:
        members[0].global_clipnorm = optimizer.global_clipnorm
        return members[0]
    return _grouped(members, variables, optimizer.global_clipnorm)


def _grouped(
    members: list[keras.optimizers.Optimizer],
    variables: list[Any],
    global_clipnorm: float | None,
) -> GroupedOptimizer:
    for member in members:
        if global_clipnorm and member.gradient_accumulation_steps:
            raise ValueError(
                "Expected an optimizer with global_clipnorm or with gradient_accumulation_steps: "
                "the norm over groups that accumulate separately is not defined. Received: "
                f"global_clipnorm={global_clipnorm}, gradient_accumulation_steps="
                f"{member.gradient_accumulation_steps}. Use clipnorm instead."
            )
        member.global_clipnorm = None  # the groups are clipped together
    key = members[0]._var_key
    group_of = {key(v): i for i, m in enumerate(members) for v in m._trainable_variables}
    optimizer = GroupedOptimizer(
        members,
        [group_of[key(variable)] for variable in variables],
        global_clipnorm=global_clipnorm,
        loss_scale_factor=members[0].loss_scale_factor,
    )
    optimizer.build(variables)
    _copy(members[0]._iterations, optimizer._iterations)
    return optimizer


def _loss_scaled(
    old: keras.optimizers.LossScaleOptimizer,
    inner: keras.optimizers.Optimizer,
    variables: list[Any],
) -> keras.optimizers.LossScaleOptimizer:
    """`inner` under the loss scale that `old` has reached."""
    new = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=old.initial_scale, dynamic_growth_steps=old.dynamic_growth_steps
    )
    if old.built:
        new.build(variables)
        _copy(old.step_counter, new.step_counter)
        _copy(old.dynamic_scale, new.dynamic_scale)
    return new


def _fresh(
    like: keras.optimizers.Optimizer, variables: list[Any], suffix: str = "", **changes: Any
) -> keras.optimizers.Optimizer:
    """A new optimizer with the configuration of `like`, built for `variables`."""
    if isinstance(like, GroupedOptimizer):
        like = like._members[0]
    new = _unbuilt(like, name=like.name + suffix, **changes)
    new.build(variables)
    return new


def _unbuilt(like: keras.optimizers.Optimizer, **changes: Any) -> keras.optimizers.Optimizer:
    """A new optimizer with the configuration of `like`."""
    new = type(like).from_config({**like.get_config(), **changes})
    # What exclude_from_weight_decay was told is in no configuration.
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(like, name):
            setattr(new, name, getattr(like, name))
    return new


def _rebuilt(
    old: keras.optimizers.Optimizer, variables: list[Any], **changes: Any
) -> keras.optimizers.Optimizer:
    """A new optimizer for some of `old`'s variables, with `old`'s state for them.

    Keras optimizers keep a list for each kind of slot, with an entry for each variable.
    """
    new = _fresh(old, variables, **changes)
    at = [old._get_variable_index(variable) for variable in variables]
    carried = {id(new._learning_rate)}
    for name, value in vars(old).items():
        if name in ("_variables", "_trainable_variables", "_learning_rate"):
            continue
        if isinstance(value, keras.Variable):
            pairs = [(getattr(new, name), value)]
        elif isinstance(value, list) and len(value) == len(old._trainable_variables):
            pairs = [(getattr(new, name)[i], value[k]) for i, k in enumerate(at)]
        else:
            continue
        for target, source in pairs:
            if isinstance(source, keras.Variable):
                _copy(source, target)
                carried.add(id(target))
    if lost := [variable.path for variable in new.variables if id(variable) not in carried]:
        raise ValueError(
            "Expected an optimizer that keeps its state in attributes: one variable, or a list "
            "with an entry for each variable that it trains. Received: "
            f"optimizer={old.name!r} ({type(old).__name__}) with {lost} kept elsewhere. Compile "
            "the model again to start with a fresh optimizer."
        )
    return new


def _copy(source: keras.Variable, target: keras.Variable) -> None:
    # On JAX an assignment shares the buffer, and a train step may not donate one twice.
    target.assign(keras.ops.copy(source))


def _with_learning_rate(
    optimizer: keras.optimizers.Optimizer, variables: list[Any], learning_rate: float
) -> keras.optimizers.Optimizer:
    """`optimizer` with all groups at `learning_rate`; another object only where its rate was a
    schedule, which Keras does not let go of."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _with_learning_rate(optimizer.inner_optimizer, variables, learning_rate)
        if inner is optimizer.inner_optimizer:
            return optimizer
        return _loss_scaled(optimizer, inner, variables)
    if isinstance(optimizer, GroupedOptimizer):
        members = [
            _with_learning_rate(member, member._trainable_variables, learning_rate)
            for member in optimizer._members
        ]
        if all(new is old for new, old in zip(members, optimizer._members, strict=True)):
            return optimizer
        return _grouped(members, variables, optimizer.global_clipnorm)
    if not isinstance(optimizer._learning_rate, keras.Variable):
        rate = float(learning_rate)
        if not optimizer.built:
            return _unbuilt(optimizer, learning_rate=rate)
        return _rebuilt(optimizer, optimizer._trainable_variables, learning_rate=rate)
    optimizer.learning_rate = learning_rate
    return optimizer
