"""The funnel: all heads on cached features first, then the best of them fine-tuned."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np

from keras_xfer.extras import require
from keras_xfer.features import FeatureCache
from keras_xfer.tuner import asked, checks
from keras_xfer.tuner.durable import DurableOracle, DurableTuner, is_worker
from keras_xfer.tuner.hyper_transfer import HyperTransfer
from keras_xfer.tuner.progress import SearchProgress
from keras_xfer.tuner.search_result import SearchResult, search_result
from keras_xfer.tuner.space import THAWED

_FEATURES = "features"


def funnel_search(
    hypermodel: HyperTransfer,
    x: Any,
    y: Any = None,
    *,
    validation_data: Any,
    directory: str | os.PathLike[str],
    max_trials: int,
    finalists: int = 3,
    seed: int | None = None,
    head_epochs: int = 9,
    fine_tune_epochs: int = 6,
    factor: int = 3,
    objective: Any = None,
    overwrite: bool = False,
    callbacks: Any = None,
    verbose: int = 1,
    **fit_kwargs: Any,
) -> SearchResult | None:
    """Search heads on cached features, then fine-tune the best of them.

    What the frozen backbone gives for an image is computed once. On that, `max_trials` candidates
    train their heads, by successive halving: all for a few epochs, the best `1/factor` of them for
    `factor` times as many, until `head_epochs`. The `finalists` alone are fine-tuned, each from its
    head as it was left. What acts in fine-tuning alone, such as `unfreeze` and
    `backbone_learning_rate`, is spread evenly over them: a head's score says nothing of it.

    A search that was killed goes on when it is called again with the same arguments. A trial that
    fails is recorded with its traceback, and the search goes on; one in which all failed begins anew
    when it is called again. Ctrl-C ends it with what there is.
    With KerasTuner's environment variables several processes, on one machine or many, share it.

    Args:
        hypermodel: a `HyperTransfer`. Without a `cache`, features are kept in `directory` until
            the search is over.
        x: as of `Model.fit`: arrays, a `keras.utils.PyDataset`, a `tf.data.Dataset`.
        y: labels, where `x` is arrays. Defaults to `None`.
        validation_data: as of `Model.fit`; the objective is measured on it.
        directory: str or path of the search's folder.
        max_trials: int, how many candidates.
        finalists: int, how many of them are fine-tuned. Defaults to 3.
        seed: int, of the candidates, and with its number of each trial; None: another one each
            time. Defaults to `None`.
        head_epochs: int, epochs of the heads that come furthest. Defaults to 9.
        fine_tune_epochs: int, further epochs of the finalists. Defaults to 6.
        factor: int of at least 2, see above. Defaults to 3.
        objective: str or `keras_tuner.Objective`; None: `"val_accuracy"`, of a regression
            `"val_loss"`.
        overwrite: bool, whether to begin anew where there is a search. Defaults to `False`.
        callbacks: list of callbacks of each trial, as of `Model.fit`; they are copied.
        verbose: 0 or 1, whether to print a line for each trial. Defaults to 1.
        **fit_kwargs: further arguments of `Model.fit`, such as `batch_size` or `class_weight`.

    Returns:
        SearchResult; None in a worker, whose chief has it.

    Raises:
        ImportError: pandas is not installed, which the result's tables need.
        TypeError: `hypermodel` is no `HyperTransfer`, or `epochs` is among the arguments.
        ValueError: an argument is out of its range, the labels or the objective are not those of
            the hypermodel, `head_epochs` is a hyperparameter of it, or the folder holds a search
            that was asked something else.
        RuntimeError: no trial came to an end; the first error is named.
        KeyboardInterrupt: before any trial was over.

    Example:

    >>> import tempfile, numpy as np
    >>> base = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    >>> hypermodel = HyperTransfer(2, backbones={"base": base}, input_shape=(8, 8, 3))
    >>> images, labels = 255 * np.random.rand(8, 8, 8, 3), np.arange(8) % 2
    >>> result = funnel_search(
    ...     hypermodel, images, labels, validation_data=(images, labels), max_trials=2, finalists=1,
    ...     head_epochs=1, fine_tune_epochs=1, directory=tempfile.mkdtemp(), verbose=0,
    ... )
    >>> sorted(result.trials["stage"])
    ['fine-tuning', 'head']

    Reference:
        https://arxiv.org/abs/1502.07943 (successive halving)
    """
    require("pandas")  # which the result is written with, hours from now
    if not isinstance(hypermodel, HyperTransfer):
        raise TypeError(
            "Expected a keras_xfer.HyperTransfer. Received: hypermodel of type "
            f"{type(hypermodel).__name__}."
        )
    for name in ("epochs", "initial_epoch"):
        if name in fit_kwargs:
            raise TypeError(
                f"Expected head_epochs and fine_tune_epochs. Received: {name}={fit_kwargs[name]!r}."
            )
    if not hypermodel.takes_head_epochs(head_epochs):
        raise ValueError(
            "Expected head_epochs as an argument of funnel_search alone, whose rounds follow from it. "
            f"Received: head_epochs={head_epochs}, and a hypermodel with a hyperparameter head_epochs "
            "that says otherwise. Leave it out of tune and space."
        )
    default = "val_loss" if hypermodel.task == "regression" else "val_accuracy"
    oracle = FunnelOracle(
        default if objective is None else objective,
        max_trials,
        finalists=finalists,
        head_epochs=head_epochs,
        fine_tune_epochs=fine_tune_epochs,
        factor=factor,
        seed=seed,
    )
    callbacks = list(keras.tree.flatten(callbacks or []))
    objectives = [each.name for each in _objectives(oracle)]
    checks.check_search(hypermodel, objectives, x, y, validation_data, callbacks, fit_kwargs)
    folder = Path(directory)
    own_features = folder / _FEATURES if hypermodel.cache is None else None
    with _cached(hypermodel, own_features):
        data = {"x": x, "y": y, "validation_data": validation_data}
        told = _asked(oracle, hypermodel, seed, data, fit_kwargs)
        asked.check_same(folder, told, overwrite=overwrite)
        tuner = DurableTuner(
            oracle,
            hypermodel,
            directory=folder,
            project_name=asked.PROJECT,
            overwrite=overwrite,
            seed=seed,
        )
        progress = SearchProgress(
            Path(tuner.project_dir), oracle.objective, [count for count, _ in oracle.rounds]
        )
        if verbose:
            tuner.after_each_trial = progress.update
        interrupted = False
        try:
            tuner.search(
                x,
                y,
                validation_data=validation_data,
                callbacks=callbacks,
                verbose=0,
                **fit_kwargs,
            )
        except KeyboardInterrupt:
            interrupted = True
        if is_worker():
            if interrupted:
                raise KeyboardInterrupt
            return None
        try:
            return search_result(tuner, folder, interrupted=interrupted)
        except KeyboardInterrupt as interrupt:
            if interrupt.args:  # there is nothing to write
                raise
            # Once more, since it takes seconds; what is written replaces what was, whole.
            return search_result(tuner, folder, interrupted=True)
        finally:
            if own_features is not None and not interrupted:
                _remove(own_features)


class FunnelOracle(DurableOracle, keras_tuner.Oracle):
    """Which trials a funnel runs: candidates at random, halved in rounds, then the finalists, over
    which the values of what acts once the backbone thaws are spread anew.

    Args:
        objective: str or `keras_tuner.Objective`.
        max_trials: int, how many candidates.
        finalists: int, how many of them are fine-tuned.
        head_epochs: int, epochs of the heads of the last round.
        fine_tune_epochs: int, further epochs of the finalists.
        factor: int of at least 2: each round keeps one of so many, for so many times the epochs.
        seed: int or None, of the candidates.
        **kwargs: as of `keras_tuner.Oracle`.

    Attributes:
        max_epochs: int, epochs of a finalist, all rounds together.
        rounds: list of `(number of trials, epochs at their end)`, the finalists last.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> FunnelOracle("val_accuracy", 20, head_epochs=9, fine_tune_epochs=6).rounds
    [(20, 3), (7, 9), (3, 15)]

    Reference:
        https://arxiv.org/abs/1502.07943 (successive halving)
    """

    def __init__(
        self,
        objective: Any,
        max_trials: int,
        *,
        finalists: int = 3,
        head_epochs: int = 9,
        fine_tune_epochs: int = 6,
        factor: int = 3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        least = {"max_trials": 1, "finalists": 1, "head_epochs": 1, "fine_tune_epochs": 1}
        told = {"max_trials": max_trials, "finalists": finalists, "head_epochs": head_epochs}
        told |= {"fine_tune_epochs": fine_tune_epochs, "factor": factor}
        for name, value in told.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 2):
                raise ValueError(
                    f"Expected {name} to be an int of at least {least.get(name, 2)}. "
                    f"Received: {name}={value!r}."
                )
        # Trials in the sense of KerasTuner are more: one a round.
        super().__init__(objective=objective, max_trials=None, seed=seed, **kwargs)
        self.head_epochs = head_epochs
        self.max_epochs = head_epochs + fine_tune_epochs
        self.rounds = _rounds(max_trials, finalists, head_epochs, self.max_epochs, factor)
        self._begun: list[list[dict[str, str]]] = [[] for _ in self.rounds]
        self._exhausted = False  # whether the space has no further candidates

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Return the values of the next trial, or that there is none (yet).

        Args:
            trial_id: str, of that trial.

        Returns:
            dict, see `keras_tuner.Oracle`.
        """
        if len(self._begun[0]) < self.rounds[0][0] and not self._exhausted:
            values = self._random_values()
            if values is not None:
                return self._begin(trial_id, 0, values, None)
            self._exhausted = True
        for number in range(1, len(self.rounds)):
            past = [each["id"] for each in self._begun[number - 1]]
            if any(each not in self.end_order for each in past):
                return {"status": "IDLE"}
            taken = {each["past_id"] for each in self._begun[number]}
            done = [self.trials[each] for each in past]
            done = [trial for trial in done if trial.status == "COMPLETED"]
            if len(taken) < min(self.rounds[number][0], len(done)):
                sign = -1 if self.objective.direction == "max" else 1
                best = min(
                    (trial for trial in done if trial.trial_id not in taken),
                    key=lambda trial: (sign * trial.score, trial.trial_id),
                )
                values = dict(best.hyperparameters.values)
                if number + 1 == len(self.rounds):
                    count = min(self.rounds[number][0], len(done))
                    values |= self._spread(values, len(taken), count)
                return self._begin(trial_id, number, values, best.trial_id)
        return {"status": "IDLE" if self.ongoing_trials else "STOPPED"}

    def _spread(self, values: dict[str, Any], place: int, count: int) -> dict[str, Any]:
        """What acts once the backbone thaws, for one of `count` finalists: a Latin hypercube, since
        the scores of heads say nothing of it, and a few values at random may all lie in one end."""
        rng = np.random.default_rng(self.seed)
        spread = {}
        for each in self.hyperparameters.space:
            if each.name in THAWED:
                strata = (rng.permutation(count) + rng.random(count)) / count
                if each.name in values:
                    spread[each.name] = each.prob_to_value(float(strata[place]))
        return spread

    def _begin(
        self, trial_id: str, number: int, values: dict[str, Any], past_id: str | None
    ) -> dict[str, Any]:
        values["tuner/round"] = number
        values["tuner/epochs"] = self.rounds[number][1]
        values["tuner/initial_epoch"] = self.rounds[number - 1][1] if number else 0
        values["tuner/head_epochs"] = self.head_epochs
        if past_id is not None:
            values["tuner/trial_id"] = past_id
        self._begun[number].append({"past_id": past_id or "", "id": trial_id})
        return {"status": "RUNNING", "values": values}

    def _compute_values_hash(self, values: dict[str, Any]) -> str:
        own = {name: each for name, each in values.items() if not name.startswith("tuner/")}
        text: str = super()._compute_values_hash(own)
        return text

    def get_state(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {**super().get_state(), "begun": self._begun, "exhausted": self._exhausted}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        super().set_state(state)
        self._begun = state["begun"]
        self._exhausted = state["exhausted"]


def _rounds(
    max_trials: int, finalists: int, head_epochs: int, max_epochs: int, factor: int
) -> list[tuple[int, int]]:
    sizes = [max_trials]
    while math.ceil(sizes[-1] / factor) > finalists:
        sizes.append(math.ceil(sizes[-1] / factor))
    epochs = [math.ceil(head_epochs / factor**k) for k in reversed(range(len(sizes)))]
    # Few epochs leave no more to some rounds than to those before: these are left out.
    heads = [
        (size, each)
        for i, (size, each) in enumerate(zip(sizes, epochs, strict=True))
        if i == 0 or each > epochs[i - 1]
    ]
    return [*heads, (min(finalists, max_trials), max_epochs)]


@contextlib.contextmanager
def _cached(hypermodel: HyperTransfer, folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    if not is_worker():
        shutil.rmtree(_leaving(folder), ignore_errors=True)  # of a process that was killed
    hypermodel.cache = FeatureCache(folder)
    try:
        yield
    finally:
        hypermodel.cache = None


def _objectives(oracle: FunnelOracle) -> list[Any]:
    """Each of what trials are compared by, where a list was given; else the one."""
    return getattr(oracle.objective, "objectives", [oracle.objective])


def _remove(folder: Path) -> None:
    """Remove the funnel's own features, all or none: half of them are no cache."""
    with contextlib.suppress(OSError):  # there are none, or Windows, where a file of them is open
        folder.rename(_leaving(folder))
    shutil.rmtree(_leaving(folder), ignore_errors=True)


def _leaving(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-removed")


def _asked(
    oracle: FunnelOracle,
    hypermodel: HyperTransfer,
    seed: int | None,
    data: Mapping[str, Any],
    fit_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """What tells a search from others."""
    return {
        "objective": [[each.name, each.direction] for each in _objectives(oracle)],
        "rounds": [list(each) for each in oracle.rounds],
        "seed": seed,
        "space": hypermodel.describe(),
        **{name: asked.of_data(each) for name, each in data.items()},
        "fit": asked.of_fit_arguments(fit_kwargs),
    }
