"""`SearchRecipe`: what `keras-xfer tune` searches and how, checked before any framework is loaded."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from keras_xfer.commands.recipe import Recipe, UsageError

TUNERS = ("funnel", "random", "bayesian", "hyperband")
FINALISTS = 3
_VARIABLES = ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID")


def process_of(environment: Mapping[str, str]) -> str | None:
    """Return which process of a search on several machines this is.

    Args:
        environment: Mapping, as of `os.environ`.

    Returns:
        `"chief"` or `"worker"`, as KerasTuner tells them apart; `None` if it is alone.

    Raises:
        UsageError: One of KerasTuner's environment variables is missing.

    Example:
    >>> process_of({}) is None
    True
    >>> process_of({"KERASTUNER_ORACLE_IP": "10.0.0.1", "KERASTUNER_TUNER_ID": "tuner0"})
    Traceback (most recent call last):
        ...
    keras_xfer.commands.recipe.UsageError: KERASTUNER_ORACLE_IP is set and KERASTUNER_ORACLE_PORT \
is not. Set all of KERASTUNER_ORACLE_IP, KERASTUNER_ORACLE_PORT, KERASTUNER_TUNER_ID, or none
    """
    if _VARIABLES[0] not in environment:
        return None
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise UsageError(
            f"{_VARIABLES[0]} is set and {' and '.join(missing)} is not. Set all of "
            f"{', '.join(_VARIABLES)}, or none"
        )
    port = environment[_VARIABLES[1]]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"{_VARIABLES[1]}: expected a port, such as 8000. Received: {port!r}")
    return "chief" if "chief" in environment["KERASTUNER_TUNER_ID"] else "worker"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """Everything that a search depends on, beside the images.

    Args:
        max_trials: Int, how many candidates; of `"hyperband"`, how many trainings.
        tuner: One of `TUNERS`.
        finalists: Int, how many candidates the funnel fine-tunes. `None`: three.
        epochs: Int, epochs of a candidate that comes to the end.
        backbones: Tuple of str, model functions of keras.applications.
        backbone_args: Mapping of further arguments of these functions.
        weights: `"imagenet"`, `None` (random), or the path of a weights file.
        image_size: Int, height and width in pixels. `None`: that of the first backbone.
        batch_size: Int, images a batch.
        augment: `"none"`, `"light"` or `"strong"`.
        flip: Bool, whether augmentation may mirror images.
        mixed_precision: Bool, compute in 16 bits.
        validation_split: Float in (0, 1), where there is no validation folder.
        test_split: Float in [0, 1), where there is no test folder.
        seed: Int >= 0, of the split, the candidates, the weights, the order and the augmentation.

    Raises:
        UsageError: A value is out of range, in terms of the command's options.

    Example:
    >>> SearchRecipe(max_trials=20).head_epochs
    9
    >>> SearchRecipe(max_trials=0)
    Traceback (most recent call last):
        ...
    keras_xfer.commands.recipe.UsageError: --max-trials: expected a whole number of at least 1. \
Received: 0
    """

    max_trials: int
    tuner: str = "funnel"
    finalists: int | None = None
    epochs: int = Recipe.epochs
    backbones: tuple[str, ...] = (Recipe.backbone,)
    backbone_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = Recipe.weights
    image_size: int | None = None
    batch_size: int = Recipe.batch_size
    augment: str = "none"
    flip: bool = True
    mixed_precision: bool = False
    validation_split: float = Recipe.validation_split
    test_split: float = Recipe.test_split
    seed: int = Recipe.seed

    def __post_init__(self) -> None:
        self.recipe(self.backbones[0])  # which checks what the two have in common
        for name in ("max_trials", "finalists"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option}: expected a whole number of at least 1. Received: {value}"
                )
        if self.finalists is not None and self.tuner != "funnel":
            raise UsageError(
                f"--finalists: --tuner {self.tuner} has none. Leave it out, or give --tuner funnel"
            )
        if self.tuner == "funnel" and self.epochs < 2:
            raise UsageError(
                "--epochs: expected at least 2 for --tuner funnel: one for the head, one for "
                f"fine-tuning. Received: {self.epochs}"
            )
        if len(set(self.backbones)) < len(self.backbones):
            raise UsageError(f"--backbone: each one once. Received: {', '.join(self.backbones)}")

    @property
    def head_epochs(self) -> int:
        """How many epochs the funnel trains a head alone: three fifths, and not all."""
        return min(math.ceil(0.6 * self.epochs), self.epochs - 1)

    def recipe(self, backbone: str) -> Recipe:
        """Return the recipe of a training with one of the backbones.

        Args:
            backbone: Str, its name.

        Returns:
            A `Recipe`.
        """
        common = {field.name for field in dataclasses.fields(Recipe)}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Recipe(
            backbone=backbone, **{name: each for name, each in values.items() if name in common}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it in types that JSON has."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        finalists = FINALISTS if self.finalists is None else self.finalists
        values["finalists"] = finalists if self.tuner == "funnel" else None
        values["backbones"] = list(self.backbones)
        values["backbone_args"] = dict(self.backbone_args)
        return values
