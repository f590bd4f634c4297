"""`Stage`: a period of training, as users write it."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np

from keras_xfer.freezing import Start

SCHEDULE: Any = keras.optimizers.schedules.LearningRateSchedule
# The parts of a model that may have rates of their own, in the order that messages name them.
PARTS = ("head", "backbone")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A period of training with one set of trainable layers and their learning rates.

    A schedule is a list of stages: the head first, then more and more of the backbone at a
    fraction of the rate. `keras_xfer.callbacks.StagedUnfreezing` runs it inside one `fit`.

    Args:
        unfreeze: None (the backbone is frozen), `"all"`, or any `start` that
            `keras_xfer.layers.Backbone.unfreeze` takes. Defaults to `None`.
        epochs: int, how many epochs the stage lasts at most; None, on the last stage, means to the
            end of `fit`, and on another one, which must have a `patience`, as long as it improves.
            Defaults to `None`.
        learning_rate: the rate of everything that trains in this stage: a float; a
            `keras.optimizers.schedules.LearningRateSchedule`, counted from the stage's first step;
            or `{"head": …, "backbone": …}`, each one of these. None keeps what is in force, and is
            refused where the stage thaws something new. Defaults to `None`.
        layer_decay: float in (0, 1], each block of the backbone trains at this factor of the rate
            of the one above it, the topmost at this factor of the head's, or at the backbone's rate
            where that is given. Needs a `learning_rate`. Defaults to 1.
        warmup_epochs: int or float, in epochs, how long the rate rises linearly to what it is.
            Needs a `learning_rate`. Defaults to 0.
        patience: int, how many epochs without improvement of the callback's `monitor` end the
            stage; None, it lasts its `epochs`. Defaults to `None`.
        name: str or None, a name for printing.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of its range; the nearest valid choice is named.

    Example:

    >>> [Stage(epochs=5, learning_rate=1e-3), Stage(-20, learning_rate=1e-4)][1].unfreeze
    -20
    >>> Stage("all", learning_rate={"head": 1e-3, "backbone": 1e-4}, layer_decay=0.8).layer_decay
    0.8

    Reference:
        https://keras.io/guides/transfer_learning/
    """

    unfreeze: Start | None = None
    _: dataclasses.KW_ONLY
    epochs: int | None = None
    # Keras has no types: a schedule is Any.
    learning_rate: float | Mapping[str, Any] | Any | None = None
    layer_decay: float = 1.0
    warmup_epochs: float = 0
    patience: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if isinstance(self.unfreeze, bool) or not isinstance(
            self.unfreeze, str | int | float | None
        ):
            raise TypeError(
                "Expected unfreeze of a stage to be None, 'all', an index, a fraction, or the name "
                f"of a layer or a block. Received: unfreeze={self.unfreeze!r}."
            )
        for name in ("epochs", "patience"):
            self._check_count(name)
        self._check_rates()
        self._check_number("layer_decay")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                "Expected layer_decay of a stage in (0, 1]; 1 trains all blocks at one rate. "
                f"Received: layer_decay={self.layer_decay!r}."
            )
        self._check_number("warmup_epochs")
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(
                "Expected warmup_epochs of a stage to be at least 0. "
                f"Received: warmup_epochs={self.warmup_epochs!r}."
            )
        if self.epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(
                f"Expected a warm-up no longer than its stage of {self.epochs} epochs. "
                f"Received: warmup_epochs={self.warmup_epochs!r}."
            )
        if self.learning_rate is None and (self.warmup_epochs or self.layer_decay != 1):
            needs = "warmup_epochs" if self.warmup_epochs else "layer_decay"
            raise ValueError(
                f"Expected a learning_rate on a stage with {needs}. Received: learning_rate=None, "
                f"{needs}={getattr(self, needs)!r}."
            )
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(
                f"Expected name of a stage to be a str or None. Received: name={self.name!r}."
            )

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"Expected {name} of a stage to be an int or None. Received: {name}={value!r}."
            )
        if value < 1:
            raise ValueError(
                f"Expected {name} of a stage to be at least 1. Received: {name}={value}."
            )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"Expected {name} of a stage to be a number. Received: {name}={value!r}."
            )

    def _check_rates(self) -> None:
        rates = self.learning_rate
        if rates is None:
            return
        if not isinstance(rates, Mapping):
            _check_rate(rates, "learning_rate")
            return
        for part in rates:
            if part not in PARTS:
                near = difflib.get_close_matches(str(part), PARTS, n=1, cutoff=0)[0]
                raise ValueError(
                    "Expected the learning rates of 'head' and 'backbone'. Received: "
                    f"learning_rate={dict(rates)!r}; nearest to {part!r} is {near!r}."
                )
        if missing := [part for part in PARTS if part not in rates]:
            raise ValueError(
                "Expected the learning rates of both 'head' and 'backbone'. Received: "
                f"learning_rate={dict(rates)!r}, without {missing[0]!r}."
            )
        for part, rate in rates.items():
            _check_rate(rate, f"learning_rate[{part!r}]")

    def get_config(self) -> dict[str, Any]:
        """The stage as plain data: what differs from the defaults, schedules as Keras writes them.

        Example:

        >>> Stage("all", epochs=3, learning_rate=1e-4).get_config()
        {'unfreeze': 'all', 'epochs': 3, 'learning_rate': 0.0001}
        """
        config = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "learning_rate":
                value = _plain_rate(value)
            elif isinstance(value, str):
                value = str(value)  # one of `Backbone.cuts()` is more than that
            if value != field.default or field.name == "unfreeze":
                config[field.name] = value
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A stage from `get_config`, or as somebody has written it.

        Args:
            config: a mapping of argument names to values.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: an unknown name or an argument out of its range; the nearest valid choice
                is named.

        Example:

        >>> Stage.from_config({"unfreeze": "all", "learning_rate": 1e-4}).learning_rate
        0.0001
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in config:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1, cutoff=0)[0]
                raise ValueError(
                    f"Expected the arguments of keras_xfer.Stage. Received: {key!r}; nearest is "
                    f"{near!r}, all are {', '.join(names)}."
                )
        rate = config.get("learning_rate")
        return cls(**{**config, "learning_rate": _rate_from_plain(rate)})


def _check_rate(rate: Any, name: str) -> None:
    if isinstance(rate, SCHEDULE):
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(
            f"Expected {name} of a stage to be a float, a LearningRateSchedule, a dict of "
            f"'head' and 'backbone', or None. Received: {name}={rate!r}."
        )
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(
            f"Expected {name} of a stage to be positive and finite. Received: {name}={rate!r}."
        )


def _plain(value: Any) -> Any:
    """`value` as JSON and YAML can write it: NumPy's numbers as Python's, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}  # nobody changes it from outside
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _plain_rate(rate: Any) -> Any:
    if isinstance(rate, Mapping):
        return {part: _plain_rate(of_part) for part, of_part in rate.items()}
    if isinstance(rate, SCHEDULE):
        shipped = _shipped_schedules().get(type(rate).__name__) is type(rate)
        name = type(rate).__name__ if shipped else keras.saving.get_registered_name(type(rate))
        return {"class_name": name, "config": _plain(rate.get_config())}
    return rate


def _shipped_schedules() -> dict[str, Any]:
    return {
        name: each
        for name, each in vars(keras.optimizers.schedules).items()
        if isinstance(each, type) and issubclass(each, SCHEDULE) and each is not SCHEDULE
    }


def _rate_from_plain(rate: Any) -> Any:
    if not isinstance(rate, Mapping):
        return rate
    if "class_name" not in rate:
        return {part: _rate_from_plain(of_part) for part, of_part in rate.items()}
    # Keras's own by name, or one that the user has registered; nothing else is looked up.
    shipped = _shipped_schedules()
    name = str(rate["class_name"])
    found: Any = shipped.get(name) or keras.saving.get_registered_object(name)
    if not (inspect.isclass(found) and issubclass(found, SCHEDULE)):
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0)[0]
        raise ValueError(
            "Expected a schedule of keras.optimizers.schedules, or one registered with "
            f"keras.saving.register_keras_serializable. Received: class_name={name!r}; nearest is "
            f"{near!r}."
        )
    schedule: Any = found
    try:
        return schedule.from_config(dict(rate.get("config") or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the arguments of {name}. Received: config={rate.get('config')!r}: {error}."
        ) from None
