"""`fit_staged`: a fine-tuning schedule, each stage on features cached at its own freeze boundary."""

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.callbacks.epoch_timing import EpochTiming
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.features.boundaries import MODES, Boundary, BoundaryMode, choose
from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.stage_callbacks import StageCallbacks
from keras_xfer.features.training_data import TrainingData
from keras_xfer.retarget.stand_in import StandIn, standing_in, why_no_stand_in
from keras_xfer.retarget.trainer import begins_at, distribution_scope
from keras_xfer.running_fit import fitting
from keras_xfer.stages import Stage, planning

# Arguments of `Model.fit` that say how much of the data an epoch has: what is cached is all of it.
_PARTIAL = ("steps_per_epoch", "validation_steps")


def fit_staged(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    stages: Sequence[Stage] | StagedUnfreezing,
    validation_data: Any = None,
    cache: FeatureCache | str | os.PathLike[str] | None = None,
    boundary: BoundaryMode = "auto",
    epochs: int | None = None,
    callbacks: Any = None,
    views: int = 1,
    runs: int = 1,
    seed: int | None = None,
    key: str | None = None,
    verbose: Any = "auto",
    **fit_kwargs: Any,
) -> keras.callbacks.History:
    """Run a schedule of stages, each on features cached at its own freeze boundary.

    The same training as `model.fit(..., callbacks=[StagedUnfreezing(stages)])`, and much faster:
    what is frozen in a stage is computed once for each image and kept on disk, and the epochs of
    the stage train what is above it on that. The result is that of the schedule without a cache, to
    rounding: the same variables and optimizer train, dropout draws the same numbers.

    Callbacks see one `fit` of the whole model: `self.model` is `model` at all times, one that saves
    it saves all of it. One merged History has the logs of every epoch; its `boundaries` say where
    each stage was cut, and why. Add `keras_xfer.BackupAndRestore` to make the whole schedule
    resumable, and `keras_xfer.EpochTiming` to see what each stage takes (computing features comes
    before a stage's first epoch and is not in it).

    Args:
        model: a built and compiled `keras.Model` with a `Backbone` inside, functional or Sequential.
        x: as of `Model.fit`: arrays, a `keras.utils.PyDataset`, a `tf.data.Dataset`, a torch
            `DataLoader`, which end.
        y: labels, where `x` is arrays. Defaults to `None`.
        stages: list of `keras_xfer.Stage`; or a `StagedUnfreezing`, for its further arguments
            (`monitor`, `restore_best`, which backbone).
        validation_data: as of `Model.fit`. Defaults to `None`.
        cache: a `FeatureCache`, or the path of its folder, which later runs and other processes
            share; None: a temporary folder, for this run alone.
        boundary: `"auto"`: a stage is cut where an epoch costs least, by the FLOPs below the cut
            and the bytes that cross it, the same place on every run; it is not where a stage has
            one epoch, where less than a tenth of the forward pass is frozen, or where the features
            would take more than `max_bytes` of the cache or half of the free disk. `"always"`:
            wherever anything is frozen; what cannot be cut is an error. `"never"`: nowhere.
        epochs: int, epochs in all; None: those of the stages, which must then all say theirs.
        callbacks: list of callbacks, as of `Model.fit`.
        views: int, how many augmented passes of each image to keep where random layers come before
            the backbone; epoch e trains on pass `e % views`. Defaults to 1: an augmenting model
            trains its images anew in every epoch, uncached.
        runs: int, how many trainings share the features of this cache, as in a search: what a single
            epoch of each uses is worth keeping then. Defaults to 1.
        seed: int, of the order of the rows in each epoch; None: that of the data if they have one
            (`keras_xfer.images.ImageDataset`), else drawn from Python's generator, which
            `keras.utils.set_random_seed` sets.
        key: str, names the data of `x` where its content cannot or need not be read to know it
            again, see `FeatureCache.features`. Defaults to `None`.
        verbose: as of `Model.fit`; where it is not 0, each stage's boundary is printed.
        **fit_kwargs: further arguments of `Model.fit`: `batch_size`, `class_weight`,
            `sample_weight`, `shuffle`, `initial_epoch`, `validation_batch_size`,
            `validation_freq`, `validation_split`. With `steps_per_epoch` or `validation_steps`
            nothing is cached. Where a stage is cached, `shuffle` holds for datasets too, of which
            `fit` would leave the order to them: by default the rows that were kept come in a new
            order in every epoch; with `shuffle=False` always in that of the one pass that was kept,
            which is right for data in order and not for data that shuffle themselves.

    Returns:
        keras.callbacks.History.

    Raises:
        TypeError: `stages` or `cache` is of another type, or there is no such argument of `fit`.
        ValueError: the schedule contradicts itself or the model; `boundary="always"` and a stage
            cannot be cut; the data do not end, or change from pass to pass.
        OSError: the cache cannot be written.

    Example:

    >>> import numpy as np
    >>> from keras_xfer import Backbone
    >>> dense = [keras.layers.Dense(3, name=name) for name in ("low", "high")]
    >>> base = keras.Sequential([keras.Input((4,)), *dense])
    >>> model = keras.Sequential([keras.Input((4,)), Backbone(base), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    >>> schedule = [Stage(epochs=2, learning_rate=1e-3), Stage(-1, epochs=2, learning_rate=1e-4)]
    >>> history = fit_staged(model, x, y, stages=schedule, verbose=0)
    >>> history.history["stage"], [each.at for each in history.boundaries]
    ([0, 0, 1, 1], ['head', 'before high'])

    Reference:
        https://keras.io/guides/transfer_learning/
    """
    if boundary not in MODES:
        raise ValueError(
            f"Expected boundary to be one of {MODES}. Received: boundary={boundary!r}."
        )
    if getattr(model, "optimizer", None) is None or not model.built:
        raise ValueError(
            "Expected a built and compiled model. Received: model="
            f"{getattr(model, 'name', model)!r}: begin it with keras.Input and call compile first."
        )
    schedule = stages if isinstance(stages, StagedUnfreezing) else StagedUnfreezing(stages)
    listed = keras.tree.flatten(callbacks) if callbacks is not None else []
    if any(isinstance(each, StagedUnfreezing) for each in listed):
        raise ValueError(
            "Expected callbacks without StagedUnfreezing, which fit_staged runs itself: pass that "
            "one as stages=. Received: two schedules."
        )
    backbone: Any = freezing.find_backbone(model, schedule.backbone)
    planned = planning.resolve(schedule.stages_for(model), backbone)
    epochs = _all_epochs(planned, epochs)
    data = TrainingData(
        x, y, validation_data, fit_kwargs, views=views, seed=seed, key=key, verbose=verbose
    )
    reason = _why_uncached(model, fit_kwargs)
    if reason is not None and boundary == "always":
        raise ValueError(f"Expected a training that can be cached. Received: {reason}.")
    run = _Run(model, schedule, data, epochs, verbose)
    if reason is not None or boundary == "never":
        reason = reason or "boundary='never'"
        return run.uncached([Boundary(p.index, None, None, None, reason) for p in planned], listed)
    with _cache(cache) as features, freezing.calls_forgotten(model):
        boundaries = choose(
            model,
            backbone,
            planned,
            epochs=epochs,
            images=data.images(),
            budget_bytes=_budget_bytes(features),
            mode=boundary,
            augments=views > 1,
            runs=runs,
        )
        if all(each.at is None for each in boundaries):
            return run.uncached(boundaries, listed)
        return run.cached(boundaries, features, listed)


class _Run:
    """One call of `fit_staged`."""

    def __init__(
        self,
        model: keras.Model,
        schedule: StagedUnfreezing,
        data: TrainingData,
        epochs: int,
        verbose: Any,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.data = data
        self.epochs = epochs
        self.verbose = verbose

    def uncached(self, boundaries: Sequence[Boundary], callbacks: Sequence[Any]) -> Any:
        """All of the schedule in one plain `fit`."""
        for each in boundaries:
            self._say(each)
        fed = self.data.plain()
        together = keras.callbacks.CallbackList(
            [self.data.clock, *_with(self.schedule, callbacks)],
            add_history=True,
            add_progbar=self.verbose != 0,
            model=self.model,
            verbose=self.verbose,
            epochs=self.epochs,
            steps=self.data.steps(),
            boundaries=_told(boundaries),
        )
        history = self.model.fit(
            **fed, epochs=self.epochs, callbacks=together, verbose=self.verbose
        )
        history.boundaries = _told(boundaries)
        return history

    def cached(
        self, boundaries: Sequence[Boundary], cache: FeatureCache, callbacks: Sequence[Any]
    ) -> Any:
        """One `fit` after the other, of stand-ins for the model, which callbacks take for one."""
        model = self.model
        together = StageCallbacks(
            [self.data.clock, *_with(self.schedule, callbacks)],
            model,
            self.schedule,
            epochs=self.epochs,
            verbose=self.verbose,
            steps=self.data.steps(),
            boundaries=_told(boundaries),
        )
        with fitting(model, validation_data=self.data.validation):
            together.begin()
            epoch = begins_at(model, self.data.initial_epoch)
            while epoch < self.epochs:
                place = self.schedule.stage_at(epoch)
                self._say(boundaries[place.index])
                epoch = self._stage(boundaries[place.index], cache, together, epoch)
                if not together.stage_is_over:
                    break
            if self.epochs > 0:
                model.optimizer.finalize_variable_values(model.trainable_variables)
            together.end()
        model.history.boundaries = _told(boundaries)
        return model.history

    def _stage(
        self, boundary: Boundary, cache: FeatureCache, together: StageCallbacks, epoch: int
    ) -> int:
        """Train the stage from `epoch` on; return the epoch after its last."""
        if boundary.at is None:
            fed, forward = self.data.plain(), self.model
        else:
            prefix, forward = boundary.halves
            # The step of a head is soon done, and its features are small.
            fed = self.data.cached(cache, prefix, prefetch=boundary.at != "head")
        with distribution_scope(self.model):
            stand_in = StandIn(self.model, forward)
        together.stage(stand_in, boundary.stage, self.data.steps())
        with standing_in(self.model, stand_in):
            stand_in.fit(
                **{**fed, "initial_epoch": epoch},
                epochs=self.epochs,
                callbacks=together,
                verbose=self.verbose,
            )
        return together.next_epoch

    def _say(self, boundary: Boundary) -> None:
        if self.verbose:
            print(f"fit_staged, {boundary}")  # noqa: T201  # what verbose asks for, as Keras does


def _told(boundaries: Sequence[Boundary]) -> list[Boundary]:
    """For others: without the models that a stage is made of."""
    return [dataclasses.replace(each, halves=None) for each in boundaries]


def _with(schedule: StagedUnfreezing, callbacks: Sequence[Any]) -> list[Any]:
    """The schedule before all others but those that time what it does."""
    first = 0
    while first < len(callbacks) and isinstance(callbacks[first], EpochTiming):
        first += 1
    return [*callbacks[:first], schedule, *callbacks[first:]]


def _budget_bytes(cache: FeatureCache) -> float:
    """What the features of a stage may take: what the cache may, and half of what the disk has
    left, with what the cache has of it by now, so that a second run finds the same."""
    folder = Path(cache.directory).absolute()
    while not folder.exists():  # it is made when it is first needed
        folder = folder.parent
    free = shutil.disk_usage(folder).free + cache.info().total_bytes
    return min(free / 2, math.inf if cache.max_bytes is None else cache.max_bytes)


def _all_epochs(planned: Sequence[planning.PlannedStage], epochs: int | None) -> int:
    if epochs is not None:
        return epochs
    without = [place.label for place in planned if place.stage.epochs is None]
    if without:
        raise ValueError(
            f"Expected epochs, where not every stage says its own. Received: epochs=None with none "
            f"in {', '.join(without)}."
        )
    return sum(place.stage.epochs or 0 for place in planned)


def _why_uncached(model: keras.Model, fit_kwargs: dict[str, Any]) -> str | None:
    """Why nothing of this training can be cached; None where it can."""
    for name in _PARTIAL:
        if fit_kwargs.get(name) is not None:
            return f"{name}={fit_kwargs[name]} takes a part of the data in each epoch"
    return why_no_stand_in(model)


@contextlib.contextmanager
def _cache(cache: Any) -> Iterator[FeatureCache]:
    if isinstance(cache, FeatureCache):
        yield cache
    elif isinstance(cache, str | os.PathLike):
        yield FeatureCache(cache)
    elif cache is None:
        with tempfile.TemporaryDirectory(
            prefix="keras_xfer_features_", ignore_cleanup_errors=True
        ) as folder:
            yield FeatureCache(Path(folder) / "cache")
    else:
        raise TypeError(
            "Expected cache to be a keras_xfer.FeatureCache, the path of a folder, or None. "
            f"Received: cache={cache!r}."
        )
