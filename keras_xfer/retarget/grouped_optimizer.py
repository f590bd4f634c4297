"""Several optimizers that look like one, and their rates."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras


@keras.saving.register_keras_serializable(package="keras_xfer")
class StageRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of one group of variables in one stage.

    At the stage's step s (from 0) it is `learning_rate`, or `learning_rate(s)` of a schedule, times
    `scale`, times `(s + 1) / warmup_steps` as long as that is below 1.

    Args:
        learning_rate: float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        scale: float, the factor of layer decay. Defaults to 1.
        warmup_steps: int, how many steps the linear warm-up takes. Defaults to 0.
        first_step: int, the optimizer's step that is the stage's step 0. Defaults to 0.

    Raises:
        ValueError: a rate or scale that is negative or not finite.

    Example:

    >>> rate = StageRate(1.0, warmup_steps=4, first_step=10)
    >>> [float(rate(step)) for step in (10, 11, 13, 20)]
    [0.25, 0.5, 1.0, 1.0]

    Reference:
        https://keras.io/api/optimizers/learning_rate_schedules/
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        scale: float = 1.0,
        warmup_steps: int = 0,
        first_step: int = 0,
    ) -> None:
        for name, value in (("learning_rate", learning_rate), ("scale", scale)):
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(
                    f"Expected {name} to be finite and at least 0. Received: {name}={value!r}."
                )
        self.learning_rate = learning_rate
        self.scale = scale
        self.warmup_steps = warmup_steps
        self.first_step = first_step

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every step."""
        return isinstance(self.learning_rate, int | float) and not self.warmup_steps

    def beginning_at(self, first_step: int) -> "StageRate":
        """The same, counted from another step of the optimizer."""
        return StageRate(self.learning_rate, self.scale, self.warmup_steps, first_step)

    def __call__(self, step: Any) -> Any:
        """The rate at the optimizer's step `step`."""
        rate = self.warmed_up(step)
        if not self.warmup_steps:
            return rate
        step = keras.ops.maximum(step - self.first_step, 0)
        warm = (keras.ops.cast(step, "float32") + 1) / self.warmup_steps
        return rate * keras.ops.minimum(warm, 1.0)

    def warmed_up(self, step: Any) -> Any:
        """The rate at the optimizer's step `step` as if the warm-up were over."""
        if isinstance(self.learning_rate, int | float):
            return self.learning_rate * self.scale
        rate = self.learning_rate(keras.ops.maximum(step - self.first_step, 0))
        return keras.ops.cast(rate * self.scale, "float32")

    def is_same(self, other: "StageRate | None") -> bool:
        """Whether `other` is the same at every step."""
        if other is None:
            return False
        mine, theirs = self.learning_rate, other.learning_rate
        numbers = (self.scale, self.warmup_steps, self.first_step)
        return numbers == (other.scale, other.warmup_steps, other.first_step) and (
            mine is theirs
            or (isinstance(mine, int | float) and mine == theirs)
            or (type(mine) is type(theirs) and self.get_config() == other.get_config())
        )

    def get_config(self) -> dict[str, Any]:
        """The configuration."""
        rate = self.learning_rate
        if not isinstance(rate, int | float):
            rate = keras.saving.serialize_keras_object(rate)
        return {
            "learning_rate": rate,
            "scale": self.scale,
            "warmup_steps": self.warmup_steps,
            "first_step": self.first_step,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StageRate":
        """A rate from `get_config`."""
        rate = config["learning_rate"]
        if isinstance(rate, dict):
            rate = keras.saving.deserialize_keras_object(rate)
        return cls(**{**config, "learning_rate": rate})


# The rate of each group of variables; the first group is what `learning_rate` reads.
Rates = Sequence[tuple[Sequence[Any], StageRate]]


@keras.saving.register_keras_serializable(package="keras_xfer")
class GroupedOptimizer(keras.optimizers.Optimizer):
    """Several optimizers, each for its group of variables, that look like one.

    What `retarget` gives a model once variables have joined that began later, or train at a rate
    of their own. `learning_rate` and `iterations` read the first group, and setting
    `learning_rate` scales all groups in proportion, so that ReduceLROnPlateau and
    LearningRateScheduler work beside a schedule. keras.optimizers.MultiOptimizer has neither:
    https://github.com/keras-team/keras/pull/22897

    Args:
        optimizers: list of Keras optimizers, one a group.
        groups: list of int, the group of each trainable variable of the model, in order.
        rates: list of `StageRate`, the rate of each group; None, or None for a group, leaves it
            the rate that its optimizer has.
        global_clipnorm: float or None, over the gradients of all groups together.
        loss_scale_factor: float or None, that of the optimizers.
        name: str or None.

    Raises:
        ValueError: it is built for another number of variables than `groups` has, or its
            `learning_rate` is set while that of the schedule is 0.

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
        rates: Sequence[StageRate | None] | None = None,
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
        # What somebody who sets `learning_rate` has made of the rates.
        self._factor = self.add_variable((), "ones", name="factor")
        self._groups = [int(group) for group in groups]
        self._members = list(optimizers)
        self._rates = [
            self._rate_of(member) if rate is None else rate
            for member, rate in zip(
                self._members, rates or [None] * len(self._members), strict=True
            )
        ]

    @staticmethod
    def _rate_of(member: keras.optimizers.Optimizer) -> StageRate | None:
        """The rate that `member` has; None where it is a schedule of its own."""
        if isinstance(member._learning_rate, keras.Variable):
            return StageRate(number(member._learning_rate))
        return None

    def build(self, variables: Sequence[Any]) -> None:
        """Build each optimizer for its group of `variables`."""
        if self.built:
            return
        if len(variables) != len(self._groups):
            # Of a file whose model makes its own layers, and freezes them: it loads all the same.
            warnings.warn(
                f"Expected the {len(self._groups)} variables that this optimizer trained when it "
                f"was saved. Received: {len(variables)} variables. It begins anew and trains them "
                "at one rate, that of its first group: compile the model again before you train.",
                stacklevel=2,
            )
            self._members, self._rates = self._members[:1], self._rates[:1]
            self._groups = [0] * len(variables)
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
        for member, rate in zip(self._members, self._rates, strict=True):
            if rate is not None and not rate.is_constant:
                member._learning_rate.assign(self._factor * rate(self._iterations))
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
        """The global norm is that of all groups, not of each.

        Where gradients are accumulated it is the norm of their means so far, and they are clipped
        when their group is updated: the group adds what it has accumulated to what it gets here,
        so what it gets is the clipped sum less what it has.
        """
        if not self.global_clipnorm:
            return grads
        ops = keras.ops
        scale = self.loss_scale_factor or 1.0
        grads = [grad if grad is None else ops.convert_to_tensor(grad) for grad in grads]
        steps = self._members[0].gradient_accumulation_steps
        if not steps:
            factor = self._clip_factor([grad / scale for grad in grads if grad is not None])
            return [grad if grad is None else grad * factor for grad in grads]
        pairs = list(zip(self._groups, self._trainable_variables, strict=True))
        counts = [member._iterations % steps + 1 for member in self._members]
        counts = [counts[group] for group, _ in pairs]
        held = [
            member._accumulated_gradients[member._get_variable_index(variable)]
            for member, variable in ((self._members[group], variable) for group, variable in pairs)
        ]
        sums = [None if g is None else g / scale + a for g, a in zip(grads, held, strict=True)]
        factor = self._clip_factor(
            [s / ops.cast(n, s.dtype) for s, n in zip(sums, counts, strict=True) if s is not None]
        )
        return [
            grad
            if grad is None
            else ops.where(
                ops.logical_and(ops.equal(count, steps), factor < 1),
                (total * factor - slot) * scale,
                grad,
            )
            for grad, slot, total, count in zip(grads, held, sums, counts, strict=True)
        ]

    def _clip_factor(self, grads: list[Any]) -> Any:
        squares = [keras.ops.sum(keras.ops.square(grad)) for grad in grads]
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.stack(squares)))
        return self.global_clipnorm / keras.ops.maximum(norm, self.global_clipnorm)

    @property
    def variables(self) -> list[Any]:
        """The variables of all groups."""
        return [*self._variables, *(v for member in self._members for v in member.variables)]

    @property
    def learning_rate(self) -> Any:
        """The rate of the first group, of its last step where it changes from step to step; during
        a warm-up that which it rises to. Setting it scales the others in proportion; it is no
        variable, whose `assign` would leave them out."""
        rate = self._rates[0]
        if rate is None or not rate.warmup_steps:
            return keras.ops.copy(self._members[0].learning_rate)
        # What somebody sets by it must not be the smaller for the warm-up, or would be so for good.
        return self._factor * rate.warmed_up(keras.ops.maximum(self._iterations - 1, 0))

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if self._rates[0] is None:
            self._members[0].learning_rate = value  # raises, as Keras does for a schedule
            return
        now = number(self._rates[0].warmed_up(self._last_step()))
        if not now and float(value):
            raise ValueError(
                "Expected a learning rate other than 0 to scale the groups by. Received: "
                f"learning_rate={float(value)} while the schedule of the stage is at 0."
            )
        self._scale_rates(float(value) / now if now else 1.0)

    def _scale_rates(self, factor: float) -> None:
        """Let each group have `factor` times its rate of the last step, or of the first to come."""
        self._factor.assign(factor)
        for member, rate in zip(self._members, self._rates, strict=True):
            if rate is not None:
                member._learning_rate.assign(factor * number(rate(self._last_step())))

    def _last_step(self) -> int:
        return max(int(self._iterations.numpy()) - 1, 0)

    @property
    def iterations(self) -> Any:
        """The steps of the first group."""
        return self._members[0].iterations

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages in the order of the variables, as SwapEMAWeights looks for them."""
        if not self._members[0].use_ema:
            raise AttributeError("use_ema is not set")
        averages = [iter(member._model_variables_moving_average) for member in self._members]
        return [next(averages[group]) for group in self._groups]

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:  # noqa: ARG002  # all of it
        """Let each optimizer end its group: moving averages become the weights."""
        for member in self._members:
            member.finalize_variable_values(member._trainable_variables)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all of `variables`, in order."""
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def get_config(self) -> dict[str, Any]:
        """The configuration, with that of each optimizer."""
        return {
            "name": self.name,
            "optimizers": [keras.saving.serialize_keras_object(m) for m in self._members],
            "groups": list(self._groups),
            "rates": [keras.saving.serialize_keras_object(rate) for rate in self._rates],
            "global_clipnorm": self.global_clipnorm,
            "loss_scale_factor": self.loss_scale_factor,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """An optimizer from `get_config`."""

        def made(each: Any) -> Any:
            return keras.saving.deserialize_keras_object(each, custom_objects=custom_objects)

        return cls(
            **{
                **config,
                "optimizers": [made(each) for each in config["optimizers"]],
                "rates": [made(each) for each in config["rates"]],
            }
        )


def number(value: Any) -> float:
    """One number of Python or a backend, a mirrored variable among them, as a float."""
    return float(keras.ops.convert_to_numpy(value))
