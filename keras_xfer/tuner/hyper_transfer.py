"""`HyperTransfer`: transfer learning as a KerasTuner hypermodel."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import keras_tuner
import numpy as np

from keras_xfer import freezing
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.features import FeatureCache, fit_staged
from keras_xfer.features.source import DataChangedError
from keras_xfer.images import augmentation_ranges, make_augmentation
from keras_xfer.layers import Backbone, BackbonePreprocessing
from keras_xfer.losses import SmoothedSparseCategoricalCrossentropy
from keras_xfer.stages import Stage
from keras_xfer.tuner import asked
from keras_xfer.tuner.backbones import Backbones, Shape, Taken, channels_of, image_shape, size_of
from keras_xfer.tuner.checks import (
    check_arrays,
    check_batch_size,
    check_image_size,
    check_validation_freq,
)
from keras_xfer.tuner.space import TUNED, SearchSpace
from keras_xfer.tuner.trial_files import STATE, BestEpoch, Rounds, is_checkpoint, local_oracle

# How many trials, at the least, use a cache.
_RUNS = 10

# What KerasTuner's Hyperband, and the funnel, say of a trial.
_PARENT, _EPOCHS, _BEGINS = "tuner/trial_id", "tuner/epochs", "tuner/initial_epoch"
_HEAD_EPOCHS = "tuner/head_epochs"

_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": lambda **kwargs: keras.optimizers.SGD(momentum=0.9, **kwargs),
}
_FIT_ARGUMENTS = (
    "x",
    "y",
    "batch_size",
    "epochs",
    "verbose",
)  # by position, as `Model.fit` takes them


class SearchDataChangedError(keras_tuner.errors.FatalValueError, DataChangedError):
    """Data whose features cannot be kept, of which every trial would fail: it ends a search."""


class HyperTransfer(keras_tuner.HyperModel):
    """Transfer learning as a hypermodel: images in, a fine-tuned model out.

    KerasTuner's own hypermodels train from scratch. This one takes pretrained backbones, brings
    images into the range that each was trained on, freezes it, trains a head, and thaws the top at
    a rate of its own with BatchNormalization held to a policy, in one `fit` a trial. With a `cache`
    the frozen layers are computed once for all trials and all workers that share its folder.

    It works with each of KerasTuner's tuners and with your own. Every trial begins with the
    backbone's own weights, bit for bit, and its checkpoint is the whole model. A trial that goes on
    from another (Hyperband) goes on with the optimizer's state, the stage and the seeds too.

    Args:
        num_classes: int, units of the output. 1 is binary classification with labels 0 and 1 by a
            sigmoid; more, by a softmax, take integers (or one-hot labels, see `label_mode`). With
            `task="regression"`, the number of values to predict.
        backbones: what to choose from: names of keras.applications, built models or
            `keras_xfer.Backbone`s, handles or paths of SavedModels, functions that return one of
            these (with an argument `input_shape`, if they have it, and `hp`); a list, or a dict by
            name. Of models, given or returned, trials train copies. Defaults to `("MobileNetV2",)`.
        input_shape: tuple `(height, width, channels)` of the images, of values in [0, 255]; None:
            any size; they are resized in the model to what the backbone was trained on.
        weights: of keras.applications: `"imagenet"`, None (random) or a path.
        cache: `keras_xfer.FeatureCache`, the path of its folder, or None: the frozen layers are
            computed in every epoch. Defaults to `None`.
        max_stages: int, the most stages: 1 trains the head alone, with more the backbone thaws in
            this number of steps less one. Defaults to 2.
        tune: names of the hyperparameters that are searched: `backbone`, `image_size` (needs
            `space`), `augment` (strength, 0 to 1), `pooling`, `head_layers`, `head_units`,
            `dropout`, `label_smoothing`, `optimizer`, `learning_rate` (of the head),
            `weight_decay`, `batch_size` (of arrays), `warmup_epochs`, `stages`, `head_epochs` (of
            the first stage), `unfreeze` (the share of the backbone's blocks), `layer_decay`,
            `backbone_learning_rate`, `batch_norm`. The others keep their usual values.
        name: str or None, of the hypermodel.
        space: mapping of these names to a value, which fixes it; a list, which is chosen from; or a
            tuple `(low, high)`. What has a list or a range is searched, whatever `tune` says.
            `unfreeze` takes any `start` of `Backbone.unfreeze` too.
        task: `"classification"` or `"regression"`.
        label_mode: `"int"` or `"categorical"` (one-hot), of the labels of more than two classes,
            as `keras.utils.image_dataset_from_directory` calls them. Defaults to `"int"`.
        head: function of `hp` and the features `(B, C)` that returns the output, in place of the
            head with `head_layers`, `head_units` and `dropout`.
        loss: in place of the usual loss, as of `Model.compile`.
        metrics: list, in place of the usual metrics, as of `Model.compile`.
        flip: bool, whether augmentation may mirror images. Defaults to `True`.
        views: int, with `cache` and augmentation: how many augmented passes of each image are kept,
            see `keras_xfer.fit_staged`. More than 1 needs a `cache` (`funnel_search` has its own).
            Defaults to 1: what is augmented is not cached.
        dtype_policy: str, such as `"mixed_float16"`; None: the one in force now. (KerasTuner resets
            it before each trial.)

    Raises:
        TypeError: a backbone, or a value of `space`, is of another kind.
        ValueError: an argument is out of its range, or there is no such hyperparameter or
            application; the nearest is named.

    Example:

    >>> import tempfile
    >>> def tiny(input_shape):
    ...     convolution = keras.layers.Conv2D(4, 3, strides=2, name="conv")
    ...     return keras.Sequential([keras.Input(input_shape), convolution])
    >>> hypermodel = HyperTransfer(3, backbones=[tiny], input_shape=(8, 8, 3))
    >>> tuner = keras_tuner.RandomSearch(
    ...     hypermodel, "val_accuracy", max_trials=2, directory=tempfile.mkdtemp()
    ... )
    >>> images, labels = 255 * np.random.rand(12, 8, 8, 3), np.arange(12) % 3
    >>> tuner.search(images, labels, validation_data=(images, labels), epochs=2, verbose=0)
    >>> tuner.get_best_models()[0].output_shape
    (None, 3)

    Reference:
        https://keras.io/keras_tuner/api/hypermodels/
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbones: Any = ("MobileNetV2",),
        input_shape: Shape | None = None,
        weights: str | os.PathLike[str] | None = "imagenet",
        cache: FeatureCache | str | os.PathLike[str] | None = None,
        max_stages: int = 2,
        tune: Sequence[str] = TUNED,
        name: str | None = None,
        space: Mapping[str, Any] | None = None,
        task: Literal["classification", "regression"] = "classification",
        label_mode: Literal["int", "categorical"] = "int",
        head: Callable[[Any, Any], Any] | None = None,
        loss: Any = None,
        metrics: Any = None,
        flip: bool = True,
        views: int = 1,
        dtype_policy: str | None = None,
    ) -> None:
        super().__init__(name=name)
        _check_count("num_classes", num_classes)
        _check_count("max_stages", max_stages)
        _check_count("views", views)
        _check_choice("task", task, ("classification", "regression"))
        _check_choice("label_mode", label_mode, ("int", "categorical"))
        self.num_classes = num_classes
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if self.input_shape is not None and len(self.input_shape) != 3:
            raise ValueError(
                "Expected input_shape to be (height, width, channels). "
                f"Received: input_shape={input_shape!r}."
            )
        self.max_stages = max_stages
        self.task = task
        self.label_mode = label_mode
        self.head = head
        self.loss = loss
        self.metrics = metrics
        self.flip = flip
        self.views = views
        self.dtype_policy = dtype_policy or keras.config.dtype_policy().name
        self.cache = FeatureCache(cache) if isinstance(cache, str | os.PathLike) else cache
        if self.cache is not None and not isinstance(self.cache, FeatureCache):
            raise TypeError(
                "Expected cache to be a keras_xfer.FeatureCache, the path of a folder, or None. "
                f"Received: cache={cache!r}."
            )
        self.weights = weights
        self._backbones = Backbones(backbones, weights)
        tune = _without_idle(tune, head=head, loss=loss, task=task)
        self._space = SearchSpace(self._backbones.names, max_stages, tune, space)
        self._space.without_maps(self._backbones.without_maps())
        sizes = self._backbones.sizes()
        for backbone in self._space.possible("backbone"):
            for image_size in self._space.possible("image_size"):
                if backbone in sizes and image_size is not None:
                    check_image_size(backbone, sizes[backbone], image_size)

    # --- KerasTuner's three methods ----------------------------------------------------------

    def declare_hyperparameters(self, hp: Any) -> None:
        """Declare everything that is searched.

        Args:
            hp: `keras_tuner.HyperParameters`.
        """
        self._space.values(hp)

    def build(self, hp: Any) -> keras.Model:
        """Build and compile the model of a trial.

        Args:
            hp: `keras_tuner.HyperParameters`.

        Returns:
            keras.Model, images `(B, height, width, channels)` of range [0, 255] in, probabilities
            `(B, num_classes)` (or the values of a regression) out; the backbone, named
            `"backbone"`, frozen.
        """
        values = self._space.values(hp)
        with _dtype_policy(self.dtype_policy):
            model = self._model(hp, values)
            self._compile(model, values)
        return model

    def fit(self, hp: Any, model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        """Train the model of a trial by its schedule.

        Args:
            hp: `keras_tuner.HyperParameters`.
            model: what `build` returned.
            *args: as of `Model.fit`: `x`, `y`.
            **kwargs: as of `Model.fit`.

        Returns:
            keras.callbacks.History of all stages.

        Raises:
            ValueError: `batch_size` is searched and the data come in batches, the labels are not
                what the model was told, or there are `views` without a `cache`.
        """
        if len(args) > len(_FIT_ARGUMENTS):
            raise TypeError(
                f"Expected {', '.join(_FIT_ARGUMENTS)} by position, and the others by name. "
                f"Received: {len(args)} arguments by position."
            )
        named = dict(zip(_FIT_ARGUMENTS, args, strict=False))
        kwargs = {"epochs": 1, **named, **kwargs}
        values = self._space.values(hp)
        check_arrays(self, kwargs.get("y"), kwargs.get("validation_data"))
        check_batch_size(values["batch_size"] is not None, kwargs.get("x"))
        if self.views > 1 and self.cache is None:
            raise ValueError(
                "Expected a cache, which keeps the views. Received: cache=None, "
                f"views={self.views}. Give HyperTransfer cache=, or leave out views."
            )
        if values["batch_size"] is not None:
            kwargs["batch_size"] = values["batch_size"]
        if kwargs.get("class_weight"):
            # Keras counts a class that is left out as 1, but where data come by tf.data.
            every = dict.fromkeys(range(max(2, self.num_classes)), 1.0)
            kwargs["class_weight"] = {**every, **kwargs["class_weight"]}
        callbacks = list(keras.tree.flatten(kwargs.pop("callbacks", None) or []))
        trial = _trial(callbacks)
        if trial is not None:
            check_validation_freq(kwargs.get("validation_freq"))
        schedule = StagedUnfreezing(
            self.stages(hp, model, epochs=_all_epochs(hp, trial, kwargs)), backbone="backbone"
        )
        timing = EpochTiming()
        callbacks = self._kept(hp, model, trial, callbacks)
        # Without a cache too: the rows then come in the same order, and go on in it from round to
        # round.
        try:
            history = fit_staged(
                model,
                **kwargs,
                stages=schedule,
                cache=self.cache,
                boundary="never" if self.cache is None else "auto",
                views=self.views if self.cache is not None and values["augment"] else 1,
                runs=_RUNS,
                callbacks=[timing, *callbacks],
            )
        except DataChangedError as error:
            # So would all trials, after two passes over the data each.
            raise SearchDataChangedError(
                "Expected data that are the same in every pass, since the features of a cache are "
                "kept for all trials. Received: data that differ from pass to pass: random "
                "augmentation in the pipeline, rows that are shuffled anew, files that were written "
                "meanwhile? Augment inside the model (space={'augment': …}, with views= to keep "
                "augmented passes), shuffle by fit (shuffle=True), or, but for funnel_search, leave "
                "out cache."
            ) from error
        return _without_unknown_times(history, timing)

    def describe(self) -> dict[str, Any]:
        """What is searched, as plain data, by which two searches are told apart.

        Returns:
            dict.
        """
        hp = keras_tuner.HyperParameters()
        values = self._space.values(hp)
        told = {
            "num_classes": self.num_classes,
            "task": self.task,
            "input_shape": self.input_shape,
            "backbones": self._backbones.names,
            "max_stages": self.max_stages,
            "weights": self.weights,
            "label_mode": self.label_mode,
            "dtype_policy": self.dtype_policy,
            "flip": self.flip,
            "views": self.views,
            **{
                name: asked.of_callable(getattr(self, name)) for name in ("head", "loss", "metrics")
            },
            "searched": hp.get_config()["space"],
            "fixed": {name: value for name, value in values.items() if name not in hp.values},
        }
        plain: dict[str, Any] = json.loads(json.dumps(told, default=repr))
        return plain

    def takes_batch_size(self) -> bool:
        """Whether `batch_size` is searched, or fixed by `space`."""
        return self._space.values(keras_tuner.HyperParameters())["batch_size"] is not None

    def takes_head_epochs(self, epochs: int) -> bool:
        """Whether `head_epochs` is neither searched nor fixed at another number than `epochs`."""
        default = self._space.parameters["head_epochs"].default
        return default in (None, epochs) and "head_epochs" not in self._space.searched

    # --- The schedule ------------------------------------------------------------------------

    def stages(self, hp: Any, model: keras.Model, *, epochs: int) -> list[Stage]:
        """The schedule of a trial.

        The head trains for `head_epochs`, or a third of the epochs where nothing is said of them;
        each further stage thaws more of the backbone, for the same number of the remaining epochs.
        In a funnel the head trains for as long as that says; where it leaves fewer epochs than
        there would be further stages, there is one for each epoch.
        By the epochs of the whole search, so it is the same in every round of Hyperband.

        Args:
            hp: `keras_tuner.HyperParameters`.
            model: what `build` returned.
            epochs: int, of the trial, in all of its rounds.

        Returns:
            list of `keras_xfer.Stage`.

        Example:

        >>> base = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
        >>> hypermodel = HyperTransfer(3, backbones={"base": base}, input_shape=(8, 8, 3))
        >>> hp = keras_tuner.HyperParameters()
        >>> [each.epochs for each in hypermodel.stages(hp, hypermodel.build(hp), epochs=9)]
        [3, None]
        """
        values = self._space.values(hp)
        rate, backbone_rate = values["learning_rate"], values["backbone_learning_rate"]
        backbone: Any = freezing.find_backbone(model, "backbone")
        count = min(values["stages"], epochs) if _can_thaw(backbone) else 1
        of_funnel = hp.values.get(_HEAD_EPOCHS)
        if of_funnel and epochs > of_funnel:
            # Its rounds before the last train heads: there are the stages that it leaves epochs for.
            count = min(count, 1 + epochs - of_funnel)
        if count == 1:
            return [_stage(None, None, values, rate, "head")]
        head_epochs = of_funnel or values["head_epochs"]
        head_epochs = min(head_epochs or math.ceil(epochs / 3), max(1, epochs - (count - 1)))
        stages = [_stage(None, head_epochs, values, rate, "head")]
        more = count - 1
        each_epochs = max(1, (epochs - head_epochs) // more)
        for index in range(1, count):
            start = _start(backbone, values["unfreeze"], index / more)
            stages.append(
                _stage(
                    start,
                    each_epochs if index < more else None,
                    values,
                    {"head": rate, "backbone": backbone_rate},
                    "fine-tuning" if more == 1 else f"fine-tuning {index}",
                    layer_decay=values["layer_decay"],
                )
            )
        return stages

    # --- Building ----------------------------------------------------------------------------

    def _model(self, hp: Any, values: Mapping[str, Any]) -> keras.Model:
        size = values["image_size"]
        shape: Shape = self.input_shape or image_shape(3, None)
        wanted: Shape | None = shape if None not in shape else None
        if size is not None:
            wanted = image_shape(channels_of(shape), size)
        taken = self._backbones.take(
            values["backbone"],
            wanted,
            batch_norm=values["batch_norm"],
            pooling=values["pooling"],
            hp=hp,
        )
        if size is not None:
            check_image_size(values["backbone"], size_of(taken.input_shape), size)
        inputs = keras.Input(shape, name="images")
        x = inputs
        if values["augment"]:
            x = make_augmentation(**augmentation_ranges(values["augment"]), flip=self.flip)(x)
        for layer in _preprocessing(taken, shape, size):
            x = layer(x)
        features = taken.backbone(x)
        outputs = self._head(hp, values, features) if self.head is None else self.head(hp, features)
        return keras.Model(inputs, outputs, name=self.name or "hyper_transfer")

    def _head(self, hp: Any, values: Mapping[str, Any], features: Any) -> Any:  # noqa: ARG002
        if len(features.shape) != 2:
            raise ValueError(
                "Expected a backbone that gives a vector (B, C) or a feature map (B, H, W, C) for "
                f"an image. Received: backbone {values['backbone']!r}, which gives "
                f"{features.shape}. Give head=, a function of hp and these features."
            )
        x = features
        for index in range(values["head_layers"]):
            x = keras.layers.Dense(
                values["head_units"], activation="relu", name=f"head_{index + 1}"
            )(x)
        x = keras.layers.Dropout(values["dropout"], name="head_dropout")(x)
        activation = None
        if self.task == "classification":
            activation = "sigmoid" if self.num_classes == 1 else "softmax"
        # float32 whatever the policy: float16 rounds the loss.
        return keras.layers.Dense(
            self.num_classes, activation=activation, dtype="float32", name="predictions"
        )(x)

    def _compile(self, model: keras.Model, values: Mapping[str, Any]) -> None:
        loss, metrics = self._loss_and_metrics(values["label_smoothing"])
        make = _OPTIMIZERS.get(values["optimizer"])
        if make is None:
            make = type(keras.optimizers.get(values["optimizer"]))
        decay = values["weight_decay"]
        model.compile(
            optimizer=make(
                learning_rate=values["learning_rate"],
                **({} if decay is None else {"weight_decay": decay}),
            ),
            loss=loss if self.loss is None else self.loss,
            metrics=metrics if self.metrics is None else self.metrics,
            # XLA on CPU was 8 to 20 times slower under TensorFlow; JAX is nothing without it.
            jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
        )
        # Keras builds it when it loads the model, and then looks for its state in the file.
        model.optimizer.build(model.trainable_variables)

    def _loss_and_metrics(self, smoothing: float) -> tuple[Any, list[Any]]:
        losses, metrics = keras.losses, keras.metrics
        if self.task == "regression":
            return losses.MeanSquaredError(), [metrics.MeanAbsoluteError(name="mae")]
        if self.num_classes == 1:
            return (
                losses.BinaryCrossentropy(label_smoothing=smoothing),
                [metrics.BinaryAccuracy(name="accuracy")],
            )
        if self.label_mode == "categorical":
            return (
                losses.CategoricalCrossentropy(label_smoothing=smoothing),
                [metrics.CategoricalAccuracy(name="accuracy")],
            )
        loss = losses.SparseCategoricalCrossentropy()
        if smoothing:
            loss = SmoothedSparseCategoricalCrossentropy(smoothing)
        # By its class: "accuracy" would be resolved by shapes, and counted apart for two classes.
        return loss, [metrics.SparseCategoricalAccuracy(name="accuracy")]

    # --- Fitting -----------------------------------------------------------------------------

    def _kept(self, hp: Any, model: keras.Model, trial: Any, callbacks: Sequence[Any]) -> list[Any]:
        """The callbacks of a trial, with those that keep what it leaves."""
        backbone: Any = freezing.find_backbone(model, "backbone")
        goes_on = _PARENT in hp.values
        pristine = self._backbones.pristine_of(backbone)
        light = None
        if trial is not None and getattr(trial.tuner, "builds_what_is_pristine", False):
            light = Path(trial.tuner.get_trial_dir(trial.trial.trial_id))
        kept = [
            BestEpoch(each, model, backbone, pristine, light, goes_on=goes_on)
            if is_checkpoint(each)
            else each
            for each in callbacks
        ]
        if trial is not None and (_EPOCHS in hp.values or goes_on):
            folder = Path(trial.tuner.get_trial_dir(trial.trial.trial_id))
            parent = None
            if goes_on:
                parent = Path(trial.tuner.get_trial_dir(hp.values[_PARENT])) / STATE
                if light is None and not parent.exists():
                    parent = None  # KerasTuner has loaded the weights, which is all there is
            kept.append(
                Rounds(
                    backbone,
                    pristine if light is not None else None,
                    begin_with=parent,
                    leave=folder / STATE,
                )
            )
        return kept


def _without_idle(tune: Sequence[str], *, head: Any, loss: Any, task: str) -> list[str]:
    """`tune` without what would change nothing; what `space` says is searched all the same, since
    the user's own functions may read it."""
    idle = set()
    if head is not None:
        idle |= {"head_layers", "head_units", "dropout"}
    if loss is not None or task == "regression":
        idle |= {"label_smoothing"}
    return [name for name in tune if name not in idle]


def _without_unknown_times(history: Any, timing: EpochTiming) -> Any:
    """Without what could not be measured (epochs of one step), which KerasTuner would warn of."""
    for name in {name for row in timing.rows for name, value in row.items() if value != value}:
        history.history.pop(name, None)
    return history


def _stage(
    start: Any, epochs: int | None, values: Mapping[str, Any], rate: Any, name: str, **more: Any
) -> Stage:
    warmup = values["warmup_epochs"]
    return Stage(
        start,
        epochs=epochs,
        learning_rate=rate,
        warmup_epochs=warmup if epochs is None else min(warmup, epochs),
        name=name,
        **more,
    )


def _start(backbone: Backbone, unfreeze: Any, share: float) -> Any:
    """Where thawing begins in a stage that thaws a `share` of what the last one does."""
    if not isinstance(unfreeze, float) and (share == 1 or not isinstance(unfreeze, str)):
        return unfreeze
    blocks = backbone.blocks
    if isinstance(unfreeze, str):
        names = [block.name for block in blocks]
        if unfreeze != "all" and unfreeze not in names:
            return unfreeze
        thawed = len(names) - (0 if unfreeze == "all" else names.index(unfreeze))
    else:
        thawed = math.ceil(unfreeze * len(blocks))
    thawed = max(1, math.ceil(thawed * share))
    return "all" if thawed >= len(blocks) else blocks[-thawed].name


def _can_thaw(backbone: Backbone) -> bool:
    try:
        freezing.select(backbone.model, "all", batch_norm=backbone.batch_norm)
    except ValueError:  # a SavedModel that cannot be trained, or nothing to train
        return False
    return not getattr(backbone.model, "why_not_trainable", None)


def _preprocessing(taken: Taken, shape: Shape, image_size: int | None) -> list[keras.layers.Layer]:
    """What brings images of `shape` to what the backbone takes."""
    size = size_of(taken.input_shape)
    if image_size is not None:  # the backbone's own, or it takes any
        size = (image_size, image_size)
    is_right = size == size_of(shape) or None in size
    resize: dict[str, Any] = {} if is_right else {"image_size": size}
    if taken.preprocessing is not None:
        return [taken.preprocessing(**resize)]
    if not resize and channels_of(shape) == channels_of(taken.input_shape):
        return []
    return [BackbonePreprocessing(1.0, 0.0, **resize)]


def _trial(callbacks: Sequence[Any]) -> Any:
    """KerasTuner's callback that knows the tuner and the trial; None outside of a tuner."""
    return next((c for c in callbacks if hasattr(c, "tuner") and hasattr(c, "trial")), None)


def _all_epochs(hp: Any, trial: Any, kwargs: Mapping[str, Any]) -> int:
    """How long a trial may become, over all of its rounds."""
    if _EPOCHS in hp.values and trial is not None:
        max_epochs = getattr(local_oracle(trial.tuner), "max_epochs", None)
        if max_epochs is not None:
            return int(max_epochs)
    return int(kwargs.get("epochs", 1))


@contextlib.contextmanager
def _dtype_policy(policy: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"Expected {name} of at least 1. Received: {name}={value!r}.")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Expected {name} to be one of {choices}. Received: {name}={value!r}.")
