"""The search space: every hyperparameter of transfer learning, which of them are searched, and when."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Which numbers a hyperparameter may be.

    Args:
        low: number, the least of them.
        high: number, the greatest.
        without: the ends that are themselves none of them.
        whole: bool, whether they are whole numbers.

    Example:

    >>> 1.0 in Numbers(0, 1, without=(0,)), str(Numbers(0, 1, without=(0,)))
    (True, 'a number in (0, 1]')
    """

    low: float
    high: float = math.inf
    _: dataclasses.KW_ONLY
    without: Sequence[float] = (math.inf,)
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, numbers.Real) or value in self.without:
            return False
        number = float(value)
        return self.low <= number <= self.high and not (self.whole and number % 1)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} {'above' if self.low in self.without else 'of at least'} {self.low}"
        begin = "(" if self.low in self.without else "["
        end = ")" if self.high in self.without else "]"
        return f"{kind} in {begin}{self.low}, {self.high}{end}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A hyperparameter, and the values that are searched where nothing else is said.

    Args:
        name: str.
        default: its value where it is not searched.
        low: number, the least value; None for a choice.
        high: number, the greatest value; None for a choice.
        step: number or None, the distance of values.
        log: bool, whether values are drawn by their logarithm.
        choices: the values of a choice, in order.
        of: `"stages"` where it acts once the backbone thaws, `"head_layers"` where the head has
            hidden layers, `"maps"` where the backbone gives feature maps, None always.
        legal: `Numbers`, what `space` may give it; None: whatever.
    """

    name: str
    default: Any = None
    _: dataclasses.KW_ONLY
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: Sequence[Any] = ()
    of: str | None = None
    legal: Numbers | None = None


_SHARE = Numbers(0.0, 1.0)
_POSITIVE = Numbers(0.0, without=(0.0, math.inf))
_COUNT = Numbers(1, whole=True)
_COUNT_OR_NONE = Numbers(0, whole=True)
_BELOW_ONE = Numbers(0.0, 1.0, without=(1.0,))
_ABOVE_ZERO = Numbers(0.0, 1.0, without=(0.0,))

PARAMETERS = (
    Parameter("backbone"),
    Parameter("image_size", legal=_COUNT),
    Parameter("augment", 0.0, low=0.0, high=1.0, step=0.25, legal=_SHARE),
    Parameter("pooling", "avg", choices=("avg", "max"), of="maps"),
    Parameter("head_layers", 0, low=0, high=2, step=1, legal=_COUNT_OR_NONE),
    Parameter("head_units", 256, low=64, high=512, step=64, of="head_layers", legal=_COUNT),
    Parameter("dropout", 0.2, low=0.0, high=0.5, step=0.1, legal=_BELOW_ONE),
    Parameter("label_smoothing", 0.0, low=0.0, high=0.2, step=0.05, legal=_BELOW_ONE),
    Parameter("optimizer", "adam", choices=("adam", "adamw", "rmsprop", "sgd")),
    Parameter("learning_rate", 1e-3, low=1e-4, high=1e-2, log=True, legal=_POSITIVE),
    Parameter("weight_decay", None, low=1e-6, high=1e-2, log=True, legal=Numbers(0.0)),
    Parameter("batch_size", None, choices=(16, 32, 64), legal=_COUNT),
    Parameter("warmup_epochs", 0, low=0, high=2, step=1, legal=_COUNT_OR_NONE),
    Parameter("stages", None, low=1, step=1, legal=_COUNT),
    Parameter("head_epochs", None, low=2, high=10, step=1, of="stages", legal=_COUNT),
    Parameter("unfreeze", 0.25, choices=(0.1, 0.25, 0.5, 1.0), of="stages", legal=_ABOVE_ZERO),
    Parameter(
        "backbone_learning_rate", None, low=1e-5, high=1e-3, log=True, of="stages", legal=_POSITIVE
    ),
    Parameter("layer_decay", 1.0, low=0.7, high=1.0, step=0.05, of="stages", legal=_ABOVE_ZERO),
    Parameter("batch_norm", "frozen", choices=("frozen", "affine", "train"), of="stages"),
)
NAMES = tuple(parameter.name for parameter in PARAMETERS)
# What a head that trains alone does not depend on.
THAWED = frozenset(parameter.name for parameter in PARAMETERS if parameter.of == "stages")
TUNED = (
    "backbone",
    "pooling",
    "head_layers",
    "head_units",
    "dropout",
    "optimizer",
    "learning_rate",
    "unfreeze",
    "backbone_learning_rate",
    "batch_norm",
)


class SearchSpace:
    """Which hyperparameters are searched, over what, and what the others are.

    Args:
        backbones: names of the backbones to choose from.
        max_stages: int >= 1, the most stages.
        tune: names of the hyperparameters that are searched.
        space: mapping of names to what is to hold in place of their usual values: a single value
            fixes one, a list chooses among these, a tuple `(low, high)` narrows a range.

    Raises:
        TypeError: a value of `space` is of another kind.
        ValueError: there is no such hyperparameter (the nearest is named), a range is empty, or a
            value is none that the hyperparameter may have.
    """

    def __init__(
        self,
        backbones: Sequence[str],
        max_stages: int,
        tune: Iterable[str],
        space: Mapping[str, Any] | None,
    ) -> None:
        tune, told = tuple(tune), dict(space or {})
        for name in (*tune, *told):
            _check_name(name)
        self._maps: list[str] = list(backbones)
        own: dict[str, dict[str, Any]] = {
            "backbone": {"choices": tuple(backbones), "default": backbones[0]},
            "stages": {"high": max_stages, "default": max_stages},
        }
        self.parameters: dict[str, Parameter] = {}
        self.searched: set[str] = set()
        for each in PARAMETERS:
            parameter = dataclasses.replace(each, **own.get(each.name, {}))
            is_searched = each.name in tune
            if each.name in told:
                parameter, is_searched = _told(parameter, told[each.name])
                _check_legal(parameter, told[each.name])
            elif is_searched and not parameter.choices and parameter.low is None:
                raise ValueError(
                    f"Expected what {each.name} may be, which has no usual values. Received: "
                    f"tune with {each.name!r}: give space={{{each.name!r}: [...]}} too."
                )
            self.parameters[each.name] = parameter
            if is_searched and not _is_constant(parameter):
                self.searched.add(each.name)
        if "head_units" in self.searched and "head_layers" not in (self.searched | told.keys()):
            layers = self.parameters["head_layers"]  # one, or there would be no units
            self.parameters["head_layers"] = dataclasses.replace(layers, default=1)
        stages = self.parameters["stages"]
        most = max([*stages.choices, stages.default, stages.high or 1])
        if most > max_stages:
            raise ValueError(
                f"Expected at most max_stages={max_stages} stages. Received: "
                f"space={{'stages': {told['stages']!r}}}."
            )
        _check_backbone(self.possible("backbone"), backbones)

    def without_maps(self, backbones: Iterable[str]) -> None:
        """Say which backbones give no feature maps, so that there is nothing to pool."""
        self._maps = [name for name in self._maps if name not in set(backbones)]

    def possible(self, name: str) -> tuple[Any, ...]:
        """The values that a hyperparameter with choices, or that is not searched, may have."""
        parameter = self.parameters[name]
        return tuple(parameter.choices) if name in self.searched else (parameter.default,)

    def values(self, hp: Any) -> dict[str, Any]:
        """Declare what is searched and return the value of every hyperparameter.

        Args:
            hp: `keras_tuner.HyperParameters`.

        Returns:
            dict of name to value; of one that does not act, its default.
        """
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            values[name] = self._value(hp, parameter, values)
        if values["backbone_learning_rate"] is None:
            values["backbone_learning_rate"] = values["learning_rate"] / 10
        return values

    def _value(self, hp: Any, parameter: Parameter, values: Mapping[str, Any]) -> Any:
        name = parameter.name
        condition = self._condition(hp, parameter, values)
        # The user's own, given to a tuner as `hyperparameters=`, come first.
        named = [each for each in hp.space if each.name == name]
        ours = [condition] if isinstance(condition, tuple) else []
        theirs = [each for each in named if _conditions(each) != ours]
        is_ours = name in self.searched and condition is not False
        if theirs or not is_ours:
            return hp.get(name) if named and name in hp else parameter.default
        if condition is None:
            return _declare(hp, parameter)
        parent, active = condition
        with hp.conditional_scope(parent, list(active)):
            value = _declare(hp, parameter)
        return parameter.default if value is None else value

    def _condition(self, hp: Any, parameter: Parameter, values: Mapping[str, Any]) -> Any:
        """None: it always acts; False: never; else what it depends on, and where it acts."""
        if parameter.of is None:
            return None
        parent = "backbone" if parameter.of == "maps" else parameter.of
        least = {"head_layers": 1, "stages": 2}

        def acts(value: Any) -> bool:
            return bool(value in self._maps if parent == "backbone" else value >= least[parent])

        searched = next((each for each in hp.space if each.name == parent), None)
        if searched is None:
            return None if acts(values[parent]) else False
        active = tuple(value for value in _possible(searched) if acts(value))
        return (parent, active) if active else False


def _conditions(declared: Any) -> list[tuple[str, tuple[Any, ...]]]:
    return [(condition.name, tuple(condition.values)) for condition in declared.conditions]


def _possible(declared: Any) -> Iterable[Any]:
    """The values that a declared hyperparameter may have, of those that others depend on."""
    if hasattr(declared, "values"):
        return tuple(declared.values)
    if hasattr(declared, "value"):  # `hp.Fixed`
        return (declared.value,)
    return range(declared.min_value, declared.max_value + 1, declared.step or 1)


def _declare(hp: Any, parameter: Parameter) -> Any:
    name, default = parameter.name, parameter.default
    if parameter.choices:
        default = default if default in parameter.choices else parameter.choices[0]
        return hp.Choice(name, list(parameter.choices), default=default)
    low: Any = parameter.low
    high: Any = parameter.high
    if default is None or not low <= default <= high:
        default = math.sqrt(low * high) if parameter.log else low
    if isinstance(low, int):
        return hp.Int(name, low, high, step=parameter.step or 1, default=default)
    if parameter.log:
        return hp.Float(name, low, high, sampling="log", default=default)
    if parameter.step is None:
        return hp.Float(name, low, high, default=default)
    # By name: KerasTuner 1.4.8 counts the steps of a Float as (high - low) // step, which is 4 of
    # 0.5 and 0.1, so that the end is never tried; and the third is 0.30000000000000004.
    values = _in_steps(low, high, parameter.step)
    default = min(values, key=lambda value: abs(value - default))
    return hp.Choice(name, values, default=default)


def _in_steps(low: float, high: float, step: float) -> list[float]:
    """The values of a range, a step apart; the last may be less, so that its end is one of them.

    >>> _in_steps(0.0, 0.5, 0.1)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    count = math.ceil((high - low) / step - 1e-9)  # without the last; rounding is no step
    return [round(low + index * step, 12) for index in range(count)] + [high]


def _told(parameter: Parameter, value: Any) -> tuple[Parameter, bool]:
    """The parameter with what the user says of it, and whether that leaves something to search."""
    name = parameter.name
    if isinstance(value, list):
        if not value:
            raise ValueError(f"Expected values to choose from. Received: space={{{name!r}: []}}.")
        kinds = {_kind(each) for each in value}
        if kinds == {int, float}:
            kinds = {float}
        if len(kinds) > 1 or None in kinds:
            raise TypeError(
                "Expected values of one type to choose from: str, bool, int or float. Received: "
                f"space={{{name!r}: {value!r}}}."
            )
        if kinds == {float}:
            value = [float(each) for each in value]
        default = parameter.default if parameter.default in value else value[0]
        changes = {"choices": tuple(value), "low": None, "high": None, "default": default}
        return dataclasses.replace(parameter, **changes), True
    if isinstance(value, tuple):
        if parameter.choices or name in ("backbone", "image_size"):
            raise TypeError(
                f"Expected a single value or a list of choices for {name!r}. "
                f"Received: space={{{name!r}: {value!r}}}."
            )
        if len(value) != 2 or not value[0] <= value[1]:
            raise ValueError(
                f"Expected (low, high) for {name!r}. Received: space={{{name!r}: {value!r}}}."
            )
        kind = int if isinstance(parameter.low, int) else float
        low, high = (kind(each) for each in value)
        if parameter.log and low <= 0:
            raise ValueError(
                f"Expected a range above 0 for {name!r}, which is drawn by its logarithm. Received: "
                f"space={{{name!r}: {value!r}}}. For none at all give space={{{name!r}: None}}."
            )
        if low == high:
            return dataclasses.replace(parameter, default=low), False
        default = parameter.default
        if default is not None:
            default = min(max(default, low), high)
        step = parameter.step
        if step is not None and high - low < step:
            step = None
        return dataclasses.replace(parameter, low=low, high=high, step=step, default=default), True
    if value is not None and _kind(value) is None:
        raise TypeError(
            f"Expected a value (str, bool or number), a list of choices or a tuple (low, high) for {name!r}. "
            f"Received: space={{{name!r}: {value!r}}}."
        )
    return dataclasses.replace(parameter, default=value), False


def _check_legal(parameter: Parameter, value: Any) -> None:
    legal, name = parameter.legal, parameter.name
    for each in value if isinstance(value, list | tuple) else (value,):
        # Names of layers and indices are for the backbone to judge.
        is_other = name == "unfreeze" and not isinstance(each, float)
        if legal is not None and each is not None and not is_other and each not in legal:
            raise ValueError(
                f"Expected {name} to be {legal}. Received: space={{{name!r}: {value!r}}}."
            )


def _kind(value: Any) -> type | None:
    """What KerasTuner takes a choice for; None where it takes none."""
    kinds = {bool: bool, numbers.Integral: int, numbers.Real: float, str: str}
    return next((kinds[kind] for kind in kinds if isinstance(value, kind)), None)


def _is_constant(parameter: Parameter) -> bool:
    if parameter.choices:
        return len(parameter.choices) == 1
    return parameter.low is None or parameter.low == parameter.high


def _check_name(name: str) -> None:
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0)[0]
        raise ValueError(
            f"Expected names of hyperparameters. Received: {name!r}; nearest is {near!r}, all are "
            f"{', '.join(NAMES)}."
        )


def _check_backbone(chosen: Iterable[str], backbones: Sequence[str]) -> None:
    for name in chosen:
        if name not in backbones:
            raise ValueError(
                f"Expected one of the backbones {', '.join(map(repr, backbones))}. "
                f"Received: space={{'backbone': {name!r}}}."
            )
