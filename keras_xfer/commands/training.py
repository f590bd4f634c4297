"""A folder of images becomes a fine-tuned classifier: one training, and what it leaves."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_xfer import applications
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.commands import hub_backbone
from keras_xfer.commands.caching import FeatureSeconds, RunCache
from keras_xfer.commands.recipe import AUGMENTS, TOP_THIRD, Recipe, UsageError
from keras_xfer.features import fit_staged
from keras_xfer.images import (
    ImageDataset,
    ImageFolder,
    augmentation_ranges,
    class_weights,
    make_augmentation,
)
from keras_xfer.layers import Backbone
from keras_xfer.stages import Stage, planning, stages_from_yaml

# How images get from their own size to the model's, in training and in the saved model alike.
RESIZE = "crop"

Row = dict[str, float]


class Classifier(NamedTuple):
    """One set of layers as two models.

    Attributes:
        trained: uint8 images of `image_size` in, logits out; augments while training.
        served: uint8 images of any size in, probabilities out.
        backbone: The `Backbone` in both.
        image_size: Int, height and width in pixels.
    """

    trained: keras.Model
    served: keras.Model
    backbone: Backbone
    image_size: int


@dataclasses.dataclass
class Fitted:
    """What `fit` did.

    Attributes:
        rows: One dict an epoch: `epoch` (from 0) and every log.
        best_epoch: Int from 0, the epoch whose weights the model has.
        stopped_by_nan: Bool, whether the loss became NaN after that epoch.
        cached: None, or for each stage what of it was cached and why.
        feature_seconds: Float, the time that computing features took, beside that of the epochs.
    """

    rows: list[Row]
    best_epoch: int
    stopped_by_nan: bool
    cached: list[str] | None = None
    feature_seconds: float = 0.0

    def best_accuracy(self, stage: int | None = None) -> float | None:
        """Return the best validation accuracy, of one stage or of all; None without epochs."""
        values = [row["val_accuracy"] for row in self.rows if stage in (None, row["stage"])]
        return max(values, default=None)


def build(recipe: Recipe, num_classes: int) -> Classifier:
    """Build the classifier of a recipe.

    Args:
        recipe: A `Recipe`.
        num_classes: Int.

    Returns:
        A `Classifier`.

    Raises:
        UsageError: There is no such backbone, it takes no images of that size or no such argument,
            or the weights are not its own; or the SavedModel will not do.
        keras_xfer.applications.WeightsUnavailableError: The ImageNet weights cannot be downloaded.

    Example:
    >>> recipe = Recipe(weights=None, image_size=32, backbone_args={"alpha": 0.35})
    >>> build(recipe, 3).served.output_shape
    (None, 3)
    """
    backbone, size = make_backbone(recipe) if recipe.hub is None else hub_backbone.build(recipe)
    dropout = keras.layers.Dropout(recipe.dropout, seed=recipe.seed)
    # float32 whatever the policy: float16 logits round the loss.
    dense = keras.layers.Dense(num_classes, dtype="float32", name="logits")

    inputs = keras.Input((size, size, 3), dtype="uint8")
    augmentation = _augmentation(recipe)
    x = inputs if augmentation is None else augmentation(inputs)
    x = backbone.preprocessing(image_size=None)(x)
    trained = keras.Model(inputs, dense(dropout(backbone(x))), name="training")

    inputs = keras.Input((None, None, 3), dtype="uint8", name="images")
    # As `load_image` resizes, so that the model sees a photograph as it saw those it learned from.
    x = backbone.preprocessing(image_size=size, resize=RESIZE, antialias=True)(inputs)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")
    served = keras.Model(
        inputs, probabilities(dense(dropout(backbone(x)))), name="image_classifier"
    )
    return Classifier(trained, served, backbone, size)


def make_backbone(recipe: Recipe, *, pooling: str | None = "avg") -> tuple[Backbone, int]:
    """Make the backbone of a recipe, a model of keras.applications.

    Args:
        recipe: A `Recipe`.
        pooling: `"avg"`, `"max"`, or `None`: it ends in feature maps.

    Returns:
        The `Backbone`, and the height and width of its images.

    Raises:
        UsageError: See `build`.
        keras_xfer.applications.WeightsUnavailableError: The ImageNet weights cannot be downloaded.
    """
    try:
        spec = applications.spec_for(recipe.backbone)
    except ValueError as error:
        hint = str(error).partition(f"{recipe.backbone!r}. ")[2]
        raise UsageError(
            f"--backbone: keras.applications has no model {recipe.backbone!r}. {hint}"
        ) from error
    size = recipe.image_size or spec.default_image_size
    from_file = recipe.weights not in (None, "imagenet")
    if from_file and not Path(str(recipe.weights)).is_file():
        raise UsageError(
            f"--weights: no such file: {recipe.weights!r}. Give the path of a weights file, "
            "'imagenet' or 'none'"
        )
    if size < spec.min_image_size:
        raise UsageError(
            f"--image-size: {recipe.backbone} takes images of at least {spec.min_image_size} "
            f"pixels. Received: {size}"
        )
    arguments: dict[str, Any] = {"input_shape": (size, size, 3), **recipe.backbone_args}
    if recipe.weights is None:
        arguments.update(batch_norm="train", trainable=True)
    try:
        backbone = Backbone.from_application(
            recipe.backbone,
            weights="imagenet" if recipe.weights == "imagenet" else None,
            pooling=pooling,
            name="backbone",
            **arguments,
        )
    except applications.WeightsUnavailableError as error:
        raise applications.WeightsUnavailableError(
            f"The ImageNet weights of {recipe.backbone} could not be downloaded. Connect to the "
            "network and try again, or give --weights PATH (a weights file) or --weights none "
            f"(train from scratch). Received: {one_line(error.__cause__ or error)}"
        ) from error
    except (TypeError, ValueError) as error:
        if not recipe.backbone_args:
            raise
        raise UsageError(f"--backbone-arg: {one_line(error)}") from error
    if from_file:
        _load_weights(backbone.model, recipe, size)
    return backbone, backbone.model.input_shape[1]


def read_stages(recipe: Recipe) -> Recipe:
    """Put the stages of the recipe's file in its place: it may be moved or edited meanwhile.

    Args:
        recipe: A `Recipe`.

    Returns:
        A `Recipe`.

    Raises:
        UsageError: There is no such file, or it holds no schedule.

    Example:
    >>> read_stages(Recipe()) == Recipe()
    True
    """
    if not isinstance(recipe.stages, str):
        return recipe
    try:
        return dataclasses.replace(recipe, stages=tuple(stages_from_yaml(recipe.stages)))
    except FileNotFoundError:
        raise UsageError(f"--stages: no such file: {recipe.stages!r}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"--stages: {one_line(error)}") from error


def schedule(recipe: Recipe, backbone: Backbone) -> list[Stage]:
    """Write the recipe as stages of this backbone.

    Args:
        recipe: A `Recipe`.
        backbone: The `Backbone` that they thaw.

    Returns:
        List of `Stage`.

    Raises:
        UsageError: The stages contradict themselves, the backbone or `recipe.epochs`.

    Example:
    >>> recipe = Recipe(image_size=32, weights="some.h5", backbone_args={"alpha": 0.35})
    >>> backbone = Backbone.from_application("MobileNetV2", weights=None, alpha=0.35)
    >>> [(stage.unfreeze, stage.epochs) for stage in schedule(recipe, backbone)]
    [(None, 5), ('block_11', 10)]
    """
    recipe = read_stages(recipe)
    if recipe.hub is not None and (reason := hub_backbone.why_frozen(backbone)):
        recipe = _of_the_head(recipe, reason)
    if isinstance(recipe.stages, tuple):
        stages, option = _told_stages(recipe.stages, recipe), "--stages"
    else:
        stages, option = _stages(recipe, backbone), "--unfreeze"
    try:
        planning.resolve(stages, backbone)
    except ValueError as error:
        raise UsageError(f"{option}: {one_line(error)}") from error
    epochs_of(recipe, stages)
    return stages


def epochs_of(recipe: Recipe, stages: list[Stage]) -> int:
    """Return how many epochs a schedule lasts at most.

    That is the sum where every stage has its epochs. Where one has none (it lasts to the end, or as
    long as it improves) it is `recipe.epochs`, in which the others must find their own and each
    such stage at least one.

    Args:
        recipe: A `Recipe`.
        stages: Its stages.

    Returns:
        Int.

    Raises:
        UsageError: `recipe.epochs` is too low for the stages.

    Example:
    >>> epochs_of(Recipe(epochs=9), [Stage(epochs=2), Stage(learning_rate=1e-4)])
    9
    """
    counted = sum(stage.epochs or 0 for stage in stages)
    without = [f"stage {index}" for index, stage in enumerate(stages, 1) if stage.epochs is None]
    if not without:
        return counted
    least = counted + len(without)
    if recipe.epochs < least:
        raise UsageError(
            f"--epochs: expected at least {least}: the {counted} that the stages say, and one for "
            f"each that says none ({', '.join(without)}). Received: {recipe.epochs}. Raise it, or "
            "say the epochs of every stage"
        )
    return recipe.epochs


def _stages(recipe: Recipe, backbone: Backbone) -> list[Stage]:
    head_epochs, more_epochs = recipe.stage_epochs
    if recipe.weights is None:
        rate = recipe.learning_rate
        return [Stage("all", epochs=more_epochs, learning_rate=rate, name="from scratch")]
    stages = []
    if head_epochs:
        stages.append(Stage(epochs=head_epochs, learning_rate=recipe.learning_rate, name="head"))
    if more_epochs:
        start = recipe.unfreeze
        if start == TOP_THIRD:
            start = backbone.blocks[-max(1, round(len(backbone.blocks) / 3))].name
        rate = recipe.fine_tune_rate or recipe.learning_rate / 10
        stages.append(Stage(start, epochs=more_epochs, learning_rate=rate, name="fine-tuning"))
    return stages


def _of_the_head(recipe: Recipe, reason: str) -> Recipe:
    """The recipe for a backbone that cannot be trained."""
    thawing = []
    if isinstance(recipe.stages, tuple):
        if any(stage.unfreeze is not None for stage in recipe.stages):
            thawing.append("--stages")
    elif recipe.unfreeze is not None:
        if recipe.unfreeze != TOP_THIRD:
            thawing.append("--unfreeze")
        if recipe.fine_tune_rate is not None:
            thawing.append("--fine-tune-rate")
        if recipe.head_epochs not in (None, recipe.epochs):
            thawing.append("--head-epochs")
    if thawing:
        raise UsageError(
            f"{' and '.join(thawing)}: {recipe.hub!r} cannot be trained, for {reason}. Leave out "
            "what thaws it: the head alone trains then"
        )
    return recipe if recipe.stages is not None else dataclasses.replace(recipe, unfreeze=None)


def _told_stages(told: Sequence[Stage], recipe: Recipe) -> list[Stage]:
    stages = list(told)
    if stages[0].learning_rate is None:
        stages[0] = dataclasses.replace(stages[0], learning_rate=recipe.learning_rate)
    # A name of its own for each, by which tables and reports tell them apart.
    names = [stage.name or f"stage {index + 1}" for index, stage in enumerate(stages)]
    return [
        dataclasses.replace(stage, name=name if names.count(name) == 1 else f"{name} ({index + 1})")
        for index, (stage, name) in enumerate(zip(stages, names, strict=True))
    ]


def fit(
    classifier: Classifier,
    folder: ImageFolder,
    recipe: Recipe,
    checkpoint: BestCheckpoint,
    *,
    on_epoch: Callable[[list[Row]], None] | None = None,
    callbacks: list[keras.callbacks.Callback] | None = None,
    cache: RunCache | None = None,
) -> Fitted:
    """Train the classifier on a folder's images by the recipe's schedule.

    Args:
        classifier: A `Classifier`, whose layers get the weights of the best epoch.
        folder: An `ImageFolder` with a validation split.
        recipe: A `Recipe`.
        checkpoint: A `BestCheckpoint` that restores the best weights.
        on_epoch: `None`, or a function that is called after each epoch with the rows so far.
        callbacks: Further callbacks.
        cache: `None`, or where to keep what the frozen layers of each stage give for an image: the
            epochs then train what is above them alone, to the same end.

    Returns:
        A `Fitted`.

    Raises:
        UsageError: The loss is NaN before any epoch was good.
    """
    model = classifier.trained
    train = folder.dataset(
        "train",
        classifier.image_size,
        batch_size=recipe.batch_size,
        shuffle=True,
        seed=recipe.seed,
        resize=RESIZE,
    )
    labels = [sample.label for sample in folder.train]
    weights = class_weights(labels) if recipe.class_weights else None
    planned = schedule(recipe, classifier.backbone)
    if recipe.weights is None:
        _shorten_batch_norm_memory(classifier.backbone.model, steps_per_epoch=len(train))
    rows = _Rows(on_epoch)
    compile_for_training(model, recipe.learning_rate)
    staged = StagedUnfreezing(planned, backbone=classifier.backbone)
    # The order of an epoch depends on its number alone, also after a run was cut off.
    in_order = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(train, "epoch", epoch)  # noqa: ARG005
    )
    common: dict[str, Any] = {
        "validation_data": dataset(classifier, folder, "validation", recipe.batch_size),
        "epochs": epochs_of(recipe, planned),
        "class_weight": weights,
        "verbose": 0,
    }
    others = [in_order, keras.callbacks.TerminateOnNaN(), checkpoint, rows, *(callbacks or [])]
    told = None
    if cache is None:
        # Keras would shuffle the batches once more, otherwise than those of features.
        common["shuffle"] = False
        model.fit(train, callbacks=[EpochTiming(), staged, *others], **common)
    else:
        history = fit_staged(
            model,
            train,
            stages=staged,
            cache=cache,
            views=recipe.views or 1,
            seed=recipe.seed,
            callbacks=[EpochTiming(), *others, FeatureSeconds(cache)],
            **common,
        )
        told = [boundary.text for boundary in history.boundaries]
    best = checkpoint.best_epoch
    # The accuracy, by which the best is chosen, is a number even where the loss is none.
    if best is None or not all(math.isfinite(rows.rows[best][k]) for k in ("loss", "val_loss")):
        raise UsageError(
            f"The loss became NaN in epoch {len(rows.rows)}. Lower --learning-rate, which was "
            f"{recipe.learning_rate:g}"
        )
    return Fitted(
        rows.rows,
        best,
        stopped_by_nan=not math.isfinite(rows.rows[-1]["loss"]),
        cached=told,
        feature_seconds=0.0 if cache is None else cache.seconds,
    )


def dataset(
    classifier: Classifier, folder: ImageFolder, split: str, batch_size: int
) -> ImageDataset:
    """Return a split's images in their order, as the classifier takes them.

    Args:
        classifier: A `Classifier`.
        folder: An `ImageFolder`.
        split: `"train"`, `"validation"` or `"test"`.
        batch_size: Int, images a batch.

    Returns:
        An `ImageDataset`.
    """
    return folder.dataset(split, classifier.image_size, batch_size=batch_size, resize=RESIZE)


def compile_for_training(model: keras.Model, learning_rate: float) -> None:
    """Compile a model that answers logits.

    Args:
        model: A `keras.Model`.
        learning_rate: Float, of Adam.
    """
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # By its class: "accuracy" would be resolved by shapes, and counted apart for two classes.
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        # XLA on CPU was 8 to 20 times slower under TensorFlow; JAX is nothing without it.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )


@contextlib.contextmanager
def reproducible(recipe: Recipe) -> Iterator[None]:
    """Seed everything, and set the dtype policy of the recipe for as long as the block runs.

    Args:
        recipe: A `Recipe`.

    Example:
    >>> with reproducible(Recipe(mixed_precision=True)):
    ...     keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    True
    >>> keras.config.dtype_policy().compute_dtype
    'float32'
    """
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(recipe.seed)
    try:
        if recipe.mixed_precision:
            # float16 is slower than float32 on a CPU; bfloat16 is faster where the CPU knows it.
            keras.config.set_dtype_policy("mixed_float16" if _has_gpu() else "mixed_bfloat16")
        yield
    finally:
        keras.config.set_dtype_policy(before)


def one_line(error: BaseException) -> str:
    r"""Return the message of an exception on one line.

    Args:
        error: The exception.

    Returns:
        Str.

    Example:
    >>> one_line(ValueError("first\n  second"))
    'first second'
    """
    return " ".join(str(error).split()) or type(error).__name__


# How the model is made.


def _load_weights(model: keras.Model, recipe: Recipe, size: int) -> None:
    try:
        model.load_weights(recipe.weights)
    except Exception as error:  # h5py and Keras raise what they like over a wrong file
        raise UsageError(
            f"--weights: {recipe.weights!r} does not fit {recipe.backbone} at {size} pixels "
            f"without its classifier: {one_line(error)[:200]}. Give a file that this backbone's "
            "save_weights wrote"
        ) from error


def _augmentation(recipe: Recipe) -> keras.Sequential | None:
    if recipe.augment == "none":
        return None
    ranges = augmentation_ranges(AUGMENTS[recipe.augment])
    return make_augmentation(**ranges, flip=recipe.flip, seed=recipe.seed)


def _shorten_batch_norm_memory(model: keras.Model, steps_per_epoch: int) -> None:
    """Let BatchNormalization that trains from scratch remember about an epoch.

    MobileNetV2's remembers a thousand steps. A run of a few hundred would be judged, and used, by
    statistics that still are those of the random start.
    """
    momentum = 1 - 1 / max(10, steps_per_epoch)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, momentum)


def _has_gpu() -> bool:
    if keras.backend.backend() == "torch":
        import torch

        return bool(torch.cuda.is_available())
    return bool(keras.distribution.list_devices("gpu"))


class _Rows(keras.callbacks.Callback):
    """Collects the logs of each epoch as floats."""

    def __init__(self, on_epoch: Callable[[list[Row]], None] | None) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._on_epoch = on_epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add a row."""
        self.rows.append({"epoch": epoch, **{k: _number(v) for k, v in (logs or {}).items()}})
        if self._on_epoch is not None:
            self._on_epoch(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after these rows."""
        self.rows[:] = state["rows"]


def _number(value: Any) -> float:
    return value if isinstance(value, int) else float(np.asarray(value))
