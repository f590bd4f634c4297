"""`Recipe`: what `keras-xfer train` trains and how, checked before any framework is loaded."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

AUGMENTS = {"none": 0.0, "light": 0.5, "strong": 1.0}  # strengths
TOP_THIRD = "the top third of the blocks"
HUB_OR_BACKBONE = (
    "--hub names the whole model: leave out --backbone, --backbone-arg and --weights, or leave out "
    "--hub"
)
_OF_APPLICATION = ("backbone", "backbone_args", "weights")
_OF_HUB = ("hub_range", "hub_sha256")


class UsageError(ValueError):
    """What the user of a command can mend: one line that says what, where and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run depends on, beside the images.

    With pretrained weights the head trains first, then the layers from `unfreeze` on at
    `fine_tune_rate`, BatchNormalization frozen throughout. With `weights=None` there is nothing to
    keep: everything trains from the first epoch, BatchNormalization too.

    Args:
        backbone: Str, a model function of keras.applications.
        backbone_args: Mapping of further arguments of that function, such as `alpha`.
        hub: None, or the handle of a SavedModel that takes the place of `backbone`,
            `backbone_args` and `weights`, see `keras_xfer.HubModule`.
        hub_range: Tuple of two floats, the lowest and highest value of the images it takes.
        hub_sha256: None, or str, the SHA-256 that its archive must have.
        weights: `"imagenet"`, `None` (random), or the path of a weights file.
        image_size: Int, height and width in pixels. `None`: what the backbone was trained on, as
            far as a SavedModel says it.
        batch_size: Int, images a batch.
        epochs: Int, epochs in all.
        head_epochs: Int, how many of them train the head alone. `None`: a third.
        learning_rate: Float, the head's.
        fine_tune_rate: Float, the rate of everything once the backbone thaws. `None`: a tenth of
            `learning_rate`.
        unfreeze: `TOP_THIRD`, `None` (never thaw), or any `start` of `Backbone.unfreeze`.
        stages: `None`, or the whole schedule: the path of a YAML file, or a tuple of
            `keras_xfer.Stage`. `epochs` then counts only where a stage has none of its own,
            as the most epochs in all.
        dropout: Float in [0, 1), in front of the classifier.
        augment: `"none"`, `"light"` (flip, shift, zoom) or `"strong"` (rotate and shear too).
        flip: Bool, whether augmentation may mirror images.
        mixed_precision: Bool, compute in 16 bits.
        cached: Bool, whether what the frozen layers give for an image is computed once and kept.
            `None`: where they give the same in every epoch, with pretrained weights and nothing
            augmented.
        views: None, or int, how many augmented passes of each image are kept.
        class_weights: Bool, whether every class counts alike.
        validation_split: Float in (0, 1), where there is no validation folder.
        test_split: Float in [0, 1), where there is no test folder.
        seed: Int >= 0, of the split, the weights, the order and the augmentation.

    Raises:
        UsageError: A value is out of range, in terms of the command's options.

    Example:
    >>> Recipe(epochs=9).stage_epochs
    (3, 6)
    >>> Recipe(epochs=0)
    Traceback (most recent call last):
        ...
    keras_xfer.commands.recipe.UsageError: --epochs: expected a whole number of at least 1. Received: 0
    """

    backbone: str = "MobileNetV2"
    backbone_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = "imagenet"
    hub: str | None = None
    hub_range: tuple[float, float] = (0.0, 1.0)
    hub_sha256: str | None = None
    image_size: int | None = None
    batch_size: int = 32
    epochs: int = 15
    head_epochs: int | None = None
    learning_rate: float = 1e-3
    fine_tune_rate: float | None = None
    unfreeze: str | int | float | None = TOP_THIRD
    stages: str | tuple[Any, ...] | None = None
    dropout: float = 0.2
    augment: str = "light"
    flip: bool = True
    cached: bool | None = None
    views: int | None = None
    mixed_precision: bool = False
    class_weights: bool = False
    validation_split: float = 0.2
    test_split: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("image_size", 1), ("seed", 0)):
            self._check_whole(name, least)
        self._check_whole("head_epochs", 0)
        self._check_whole("views", 2)
        for name in ("learning_rate", "fine_tune_rate"):
            rate = getattr(self, name)
            if rate is not None and not (rate > 0 and math.isfinite(rate)):
                raise self._error(name, "a positive number")
        if not 0 < self.validation_split < 1:
            raise self._error("validation_split", "a fraction between 0 and 1")
        for name in ("test_split", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise self._error(name, "a fraction of at least 0 and less than 1")
        if self.validation_split + self.test_split >= 1:
            raise UsageError(
                "--validation-split and --test-split: expected to leave images to train on. "
                f"Received: {self.validation_split:g} and {self.test_split:g}"
            )
        if self.augment not in AUGMENTS:
            raise self._error("augment", f"one of {', '.join(AUGMENTS)}")
        if self.head_epochs is not None and self.head_epochs > self.epochs:
            raise self._error("head_epochs", f"at most the {self.epochs} of --epochs")
        self._check_hub()
        self._check_cached()
        is_told = self.unfreeze != TOP_THIRD or self.fine_tune_rate is not None or self.head_epochs
        if self.stages is not None and is_told:
            raise UsageError(
                "--unfreeze, --fine-tune-rate and --head-epochs: --stages says all of it. Leave "
                "them out, or leave out --stages"
            )
        if self.weights is None and is_told:
            raise UsageError(
                "--unfreeze, --fine-tune-rate and --head-epochs need pretrained weights: with "
                "--weights none everything trains from the first epoch. Leave them out, or give "
                "--weights PATH"
            )
        if self.stages is None:
            self._check_thawing()

    @property
    def model_name(self) -> str:
        """What the backbone is called: a model of keras.applications, or a handle."""
        return self.backbone if self.hub is None else self.hub

    @property
    def stage_epochs(self) -> tuple[int, int]:
        """How many epochs train the head alone, and how many more."""
        if self.weights is None:
            return 0, self.epochs
        if self.unfreeze is None:
            return self.epochs, 0
        head = -(-self.epochs // 3) if self.head_epochs is None else self.head_epochs
        return head, self.epochs - head

    @property
    def caches(self) -> bool:
        """Whether what the frozen layers give for an image is computed once and kept."""
        if self.cached is None:
            return self.augment == "none" and self.weights is not None
        return self.cached

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe in types that JSON has."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["cached"] = self.caches
        if self.stages is not None and not isinstance(self.stages, str):
            values["stages"] = [stage.get_config() for stage in self.stages]
        values["backbone_args"] = dict(self.backbone_args)
        unused = _OF_HUB if self.hub is None else _OF_APPLICATION
        return {name: value for name, value in values.items() if name not in unused}

    def _check_hub(self) -> None:
        low, high = self.hub_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(
                "--hub-range: expected the lowest and the highest value of an image, such as 0 1 "
                f"or -1 1. Received: {low:g} {high:g}"
            )
        if self.hub is None:
            if self.hub_range != Recipe.hub_range or self.hub_sha256 is not None:
                raise UsageError("--hub-range and --hub-sha256 belong to --hub. Leave them out")
            return
        if (self.backbone, self.weights) != (Recipe.backbone, Recipe.weights) or self.backbone_args:
            raise UsageError(HUB_OR_BACKBONE)
        if self.hub_sha256 is not None and not re.fullmatch("[0-9A-Fa-f]{64}", self.hub_sha256):
            raise self._error("hub_sha256", "64 hexadecimal digits, as sha256sum prints them")

    def _check_thawing(self) -> None:
        head, rest = self.stage_epochs
        if self.unfreeze is None:
            if self.fine_tune_rate is not None or self.head_epochs not in (None, self.epochs):
                raise UsageError(
                    "--fine-tune-rate and --head-epochs: with --unfreeze none the head alone trains, "
                    "in all epochs. Leave them out, or leave out --unfreeze"
                )
        elif not rest and (self.unfreeze != TOP_THIRD or self.fine_tune_rate is not None):
            raise UsageError(
                "--unfreeze and --fine-tune-rate: expected epochs after those of the head, which "
                f"has {head} of {self.epochs}. Give more --epochs or fewer --head-epochs, or leave "
                "them out"
            )

    def _check_cached(self) -> None:
        if self.weights is None and (self.cached or self.views is not None):
            raise UsageError(
                "--cache and --views: with --weights none everything trains from the first epoch, "
                "and nothing stays as it is. Leave them out, or give --weights PATH"
            )
        if self.augment == "none":
            if self.views is not None:
                raise UsageError(
                    "--views: with --augment none all passes of an image are alike. Leave it out, "
                    "or give --augment light"
                )
        elif self.cached and self.views is None:
            raise UsageError(
                f"--cache: with --augment {self.augment} every epoch trains on other images. Give "
                "--views N, to keep N augmented passes of each image, or --augment none"
            )
        elif self.views is not None and not self.cached:
            raise UsageError(
                "--views: augmented passes are kept in a cache alone. Give --cache DIR, or leave "
                "out --views"
            )

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise self._error(name, f"a whole number of at least {least}")

    def _error(self, name: str, expected: str) -> UsageError:
        option = name.replace("_", "-")
        return UsageError(f"--{option}: expected {expected}. Received: {getattr(self, name)}")
