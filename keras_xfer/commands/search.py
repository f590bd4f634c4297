"""The job of `keras-xfer tune`: a folder of images in, a run's folder of the best model out."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_xfer import applications, files, freezing, lifeline
from keras_xfer.commands import caching, job, training
from keras_xfer.commands.recipe import AUGMENTS, UsageError
from keras_xfer.commands.runs import SEARCH, SEARCH_STATE, RunFolder
from keras_xfer.commands.screen import Screen, counted
from keras_xfer.commands.search_recipe import FINALISTS, SearchRecipe, process_of
from keras_xfer.commands.training import RESIZE, Classifier, Fitted
from keras_xfer.features import FeatureCache
from keras_xfer.images import ImageFolder, Sample, Skipped
from keras_xfer.layers import BackbonePreprocessing
from keras_xfer.reports.trials import reason
from keras_xfer.tuner import DurableTuner, FunnelOracle, HyperTransfer, durable, records
from keras_xfer.tuner.progress import SearchProgress
from keras_xfer.tuner.search_result import best_trial, write_tables
from keras_xfer.tuner.workers import WorkerDiedError, free_port, is_loopback, run_workers

_IMAGES = f"{SEARCH}/images.json"  # the splits, for the workers, who need not look at every image
_LOGS = f"{SEARCH}/logs"
_FEATURES = f"{SEARCH}/features"
_CHIEF_SECONDS = 3600.0  # that a worker waits for its chief, as KerasTuner's own do
_POLL_SECONDS = 0.5
# Of the record: what may differ from machine to machine, or is known to the chief alone.
_OF_A_MACHINE = ("images", "images_fingerprint")


class Team(NamedTuple):
    """A chief and workers on this machine.

    Attributes:
        command: List of str, what each of them runs.
        workers: Int, how many.
        address: Str, where the chief listens.
        port: Int, and at which port; `None`: one that is free.
    """

    command: list[str]
    workers: int
    address: str
    port: int | None


class Search:
    """A search on a folder of images.

    Args:
        images: Path of the folder of images.
        output: Path of the run's folder, see `RunFolder`.
        recipe: A `SearchRecipe`.
        screen: A `Screen`.
        cache: Path of the folder that keeps features. `None`: one in the run's folder, until the
            search is over.

    Raises:
        UsageError: The folders do not do.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        output: str | os.PathLike[str],
        recipe: SearchRecipe,
        screen: Screen,
        *,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._images = Path(images)
        self._run = RunFolder(output, images=images)
        self._recipe = recipe
        self._screen = screen
        self._cache = cache
        self._oracle = _oracle(recipe)

    def run(self, *, resume: bool = False, team: Team | None = None) -> dict[str, Any]:
        """Search, and write the folder of the best model.

        Args:
            resume: Bool, whether to go on with the search of the same recipe that was cut off
                there.
            team: `None`, or who runs the trials.

        Returns:
            A dict, what `metrics.json` holds.

        Raises:
            UsageError: The recipe or the folders do not do, or no trial came to an end.
            keras_xfer.images.ImageFolderError: The images do not do.
            keras_xfer.applications.WeightsUnavailableError: The weights cannot be downloaded.
            KeyboardInterrupt: With a message that says what is kept.
        """
        run, screen, recipe = self._run, self._screen, self._recipe
        team = _with_port(team)
        folder = job.look_at(self._images, self._training_recipe(), screen)
        record = self._record(folder.fingerprint())
        if resume:
            run.check_resumable(record)
            if (metrics := run.finished()) is not None:
                run.remove_unfinished()
                screen.line("The search had ended; nothing is left to do")
                job.show_result(metrics, run, screen)
                return metrics
        with training.reproducible(self._training_recipe()):
            for name in recipe.backbones:  # what does not fit is told now; weights are downloaded
                training.make_backbone(self._training_recipe(name))
            if run.is_unfinished() and not resume:
                screen.line(
                    "Discarded the unfinished run that was there; --resume goes on with one"
                )
            with run.writing(record, resume=resume):
                run.write_json("labels.json", list(folder.class_names))
                run.write_csv("skipped.csv", ("file", "reason"), folder.skipped)
                (run / SEARCH).mkdir(exist_ok=True)
                files.write_json(run / _IMAGES, _splits(folder))
                self._show(resume=resume, team=team)
                interrupted = False
                try:
                    if team is None:
                        tuner = self._search(folder)
                    else:
                        self._supervise(team)
                except KeyboardInterrupt:
                    interrupted = True
                if team is not None or interrupted:
                    tuner = self._tuner(len(folder.class_names))
                try:
                    metrics = self._write(tuner, folder, interrupted=interrupted)
                except KeyboardInterrupt as interrupt:
                    if interrupt.args:  # it says what is kept
                        raise
                    raise KeyboardInterrupt(
                        "Interrupted while the result was written; --resume writes it"
                    ) from None
        job.show_result(metrics, run, screen)
        return metrics

    def take_part(self) -> None:
        """Be the chief or a worker of a search whose folder another process writes.

        Raises:
            UsageError: The chief was asked for another search, never came, or is gone for good.
        """
        is_worker = process_of(os.environ) == "worker"
        if is_worker and not self._wait_for_chief():
            return
        if not (self._run / _IMAGES).is_file():
            raise UsageError(
                f"--output: {str(self._run.path)!r} holds no search. Give the folder that the chief "
                "writes, on a disk that all machines share"
            )
        if different := self._run.differences(self._record(None)):
            raise UsageError(
                f"{str(self._run.path)!r} holds a search that was asked for otherwise: "
                f"{'; '.join(different)}. Give a worker the options of its chief"
            )
        told = json.loads((self._run / _IMAGES).read_text(encoding="utf-8"))
        from keras_tuner.errors import FatalError

        try:
            with training.reproducible(self._training_recipe()):
                self._search(_image_folder(self._images, told), says=is_worker)
        except FatalError as error:
            raise UsageError(training.one_line(error)) from error

    # --- Searching ---------------------------------------------------------------------------

    def _search(self, folder: ImageFolder, *, says: bool = True) -> DurableTuner:
        """Run the trials; as a chief, let the workers run them."""
        recipe = self._recipe
        tuner = self._tuner(len(folder.class_names))
        progress = self._progress(1)
        tuner.after_each_trial = progress.update if says else _nothing
        sizes: dict[str, Any] = {
            "image_size": self._image_size,
            "resize": RESIZE,
            "batch_size": recipe.batch_size,
        }
        train = folder.dataset("train", shuffle=True, seed=recipe.seed, **sizes)
        # The order of an epoch depends on its number alone, whichever process has the trial.
        in_order = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: setattr(train, "epoch", epoch)  # noqa: ARG005
        )
        is_lonely_chief = process_of(os.environ) == "chief" and not lifeline.is_watched()
        with _repeated(progress.update) if is_lonely_chief else contextlib.nullcontext():
            tuner.search(
                train,
                validation_data=folder.dataset("validation", **sizes),
                epochs=recipe.epochs,
                callbacks=[in_order, keras.callbacks.TerminateOnNaN()],
                verbose=0,
            )
        return tuner

    def _supervise(self, team: Team) -> None:
        progress = self._progress(team.workers)

        def poll() -> int:
            progress.update()
            return progress.num_ended

        try:
            run_workers(
                team.command,
                team.workers,
                logs=self._run / _LOGS,
                address=team.address,
                port=team.port,
                poll=poll,
                state=self._run / SEARCH_STATE,
            )
        except WorkerDiedError as error:
            raise UsageError(
                f"The search was given up: {training.one_line(error)}. --resume goes on with it"
            ) from error

    def _tuner(self, num_classes: int) -> DurableTuner:
        recipe = self._recipe
        size = self._image_size
        hypermodel = HyperTransfer(
            num_classes,
            backbones={
                name: functools.partial(_backbone, self._training_recipe(name))
                for name in recipe.backbones
            },
            input_shape=(size, size, 3),
            cache=self._features(),
            space={"augment": AUGMENTS[recipe.augment]},
            flip=recipe.flip,
        )
        with contextlib.redirect_stdout(None):  # KerasTuner says which file it reads
            return DurableTuner(
                self._oracle,
                hypermodel,
                directory=self._run.path,
                project_name=SEARCH,
                seed=recipe.seed % 2**31,  # the number of the trial is added
            )

    def _features(self) -> FeatureCache:
        if self._cache is not None:
            return caching.given(self._cache, self._screen)
        return caching.RunCache(self._run / _FEATURES, self._screen)

    def _progress(self, workers: int) -> SearchProgress:
        planned = [self._recipe.max_trials]
        if isinstance(self._oracle, FunnelOracle):
            planned = [count for count, _ in self._oracle.rounds]
        return SearchProgress(
            self._run / SEARCH,
            self._oracle.objective,
            planned,
            workers=workers,
            say=self._screen.line,
        )

    @functools.cached_property
    def _image_size(self) -> int:
        if self._recipe.image_size is not None:
            return self._recipe.image_size
        try:
            return applications.spec_for(self._recipe.backbones[0]).default_image_size
        except ValueError:  # there is no such model, which making it says
            return 224

    def _training_recipe(self, backbone: str | None = None) -> Any:
        name = self._recipe.backbones[0] if backbone is None else backbone
        return dataclasses.replace(self._recipe.recipe(name), image_size=self._image_size)

    def _record(self, fingerprint: str | None) -> dict[str, Any]:
        record = {
            "command": "tune",
            "images": str(self._images.resolve()),
            "images_fingerprint": fingerprint,
            **self._recipe.to_dict(),
        }
        if fingerprint is None:
            record = {name: each for name, each in record.items() if name not in _OF_A_MACHINE}
        return record

    def _wait_for_chief(self) -> bool:
        """Wait until the chief listens; tell whether there is something to do."""
        address, port = os.environ["KERASTUNER_ORACLE_IP"], os.environ["KERASTUNER_ORACLE_PORT"]
        where = (address.strip("[]"), int(port))
        before = self._run.time_finished()  # an earlier run: its chief is not the one to come
        until, has_said = time.monotonic() + _CHIEF_SECONDS, False
        while True:
            with contextlib.suppress(OSError), socket.create_connection(where, timeout=5):
                return True
            if self._run.time_finished() not in (None, before):
                self._screen.line("The search has ended; nothing is left to do")
                return False
            if not has_said:
                self._screen.line(f"Waiting  for the chief at {address}:{port}")
                has_said = True
            if time.monotonic() > until:
                raise UsageError(
                    f"No chief at {address}:{port}. Start it, with KERASTUNER_TUNER_ID=chief, "
                    "or mend KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT"
                )
            time.sleep(_POLL_SECONDS)

    # --- What is said and written ------------------------------------------------------------

    def _show(self, *, resume: bool, team: Team | None) -> None:
        recipe, screen = self._recipe, self._screen
        weights = "random weights" if recipe.weights is None else f"weights {recipe.weights}"
        screen.line(
            f"Models   {', '.join(recipe.backbones)} at {self._image_size} pixels, {weights}"
        )
        text = f"{counted(recipe.max_trials, 'trial')} of {recipe.epochs} epochs, {recipe.tuner}"
        if isinstance(self._oracle, FunnelOracle):
            *heads, (finalists, epochs) = self._oracle.rounds
            rounds = ", ".join(f"{count} to epoch {each}" for count, each in heads)
            text = f"heads: {rounds}; fine-tuning: {finalists} to epoch {epochs}"
        screen.line(f"Search   {text}")
        if team is not None:
            screen.line(f"Workers  {team.workers}, whose logs are in {self._run / _LOGS}{os.sep}")
            if not is_loopback(team.address):
                screen.line(
                    "         others join by this command without --workers, and the address of this "
                    f"machine as KERASTUNER_ORACLE_IP, KERASTUNER_ORACLE_PORT={team.port} and a "
                    f"KERASTUNER_TUNER_ID of their own, from tuner{team.workers} on; whoever reaches "
                    "the port can change the search"
                )
        if resume and (ended := self._progress(1).num_ended):
            screen.line(f"Resumed  after {counted(ended, 'trial')}")

    def _write(
        self, tuner: DurableTuner, folder: ImageFolder, *, interrupted: bool
    ) -> dict[str, Any]:
        run, screen = self._run, self._screen
        trials, _ = write_tables(tuner, run.path)
        best = best_trial(tuner)
        if best is None:
            self._nothing_found(trials, folder, interrupted=interrupted)
        model = tuner.load_model(best)
        outcome = records.read(run / SEARCH, best.trial_id)
        rows = records.history(run / SEARCH, tuner.oracle.trials, best.trial_id)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        run.write_csv(
            "history.csv", columns, [[row.get(name, "") for name in columns] for row in rows]
        )
        classifier = _classifier(model, self._image_size)
        stages = tuple(
            tuner.hypermodel.stages(best.hyperparameters, model, epochs=self._recipe.epochs)
        )
        values = {
            name.removeprefix(records.HYPERPARAMETER): value
            for name, value in records.hyperparameters(best).items()
        }
        backbone = values.get("backbone", self._recipe.backbones[0])
        shown = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        candidate = records.lineage(tuner.oracle.trials)[best.trial_id][0]  # as the tables name it
        screen.line(f"Best     trial {candidate}: {shown}")
        metrics = job.finish(
            classifier,
            Fitted(rows, int(outcome["best_epoch"]), stopped_by_nan=False),
            folder,
            dataclasses.replace(self._training_recipe(backbone), stages=stages),
            run,
            screen,
            search={
                "tuner": self._recipe.tuner,
                "best_trial": candidate,
                "trials": len(trials),
                **{
                    f"{status}_trials": int((trials["status"] == status).sum())
                    for status in ("completed", "failed", "interrupted")
                },
                "seconds": float(trials["seconds"].sum()),
            },
            hyperparameters=values,
        )
        if interrupted:
            ended = int((trials["status"] != "interrupted").sum())
            raise KeyboardInterrupt(
                f"Interrupted. {str(run.path)!r} keeps the best model so far, of "
                f"{counted(ended, 'candidate')}; --resume goes on from there"
            )
        return metrics

    def _nothing_found(self, trials: Any, folder: ImageFolder, *, interrupted: bool) -> None:
        run = self._run
        if interrupted:
            run.remove("trials.csv", "trial_epochs.csv")
            raise KeyboardInterrupt(
                "Interrupted before the first trial was over; --resume goes on from there"
                if run.is_searching()
                else "Interrupted before the search began"
            )
        failed = trials[trials["status"] == "failed"]
        error = reason(failed["error"].iloc[0]) if len(failed) else "none began"
        job.report(run, folder, self._screen)
        run.remove_unfinished()
        raise UsageError(
            f"No trial came to an end, {counted(len(failed), 'trial')} failed, the first: {error} "
            f"({run / 'trials.csv'} holds all errors)"
        )


def _oracle(recipe: SearchRecipe) -> Any:
    import keras_tuner

    common: dict[str, Any] = {
        "objective": keras_tuner.Objective("val_accuracy", "max"),
        "seed": recipe.seed,
    }
    oracles = keras_tuner.oracles
    if recipe.tuner == "funnel":
        return FunnelOracle(
            **common,
            max_trials=recipe.max_trials,
            finalists=FINALISTS if recipe.finalists is None else recipe.finalists,
            head_epochs=recipe.head_epochs,
            fine_tune_epochs=recipe.epochs - recipe.head_epochs,
        )
    if recipe.tuner == "hyperband":
        oracle = durable(oracles.HyperbandOracle)(
            **common, max_epochs=recipe.epochs, hyperband_iterations=recipe.max_trials
        )
        oracle.max_trials = recipe.max_trials  # which ends it, not the number of its iterations
        return oracle
    kind = {"random": oracles.RandomSearchOracle, "bayesian": oracles.BayesianOptimizationOracle}
    return durable(kind[recipe.tuner])(**common, max_trials=recipe.max_trials)


def _backbone(recipe: Any) -> keras.Model:
    return training.make_backbone(recipe, pooling=None)[0]  # how to pool is searched


def _classifier(model: keras.Model, size: int) -> Classifier:
    """The model of a trial, as it is and for images of any size."""
    inputs = keras.Input((None, None, 3), dtype="uint8", name="images")
    x: Any = inputs
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer) or layer.name == "augmentation":
            continue
        if isinstance(layer, BackbonePreprocessing):
            # As `load_image` resizes: the model sees a photograph as it saw those it learned from.
            resizing = {"image_size": size, "resize": RESIZE, "antialias": True}
            layer = BackbonePreprocessing.from_config({**layer.get_config(), **resizing})
        x = layer(x)
    served = keras.Model(inputs, x, name="image_classifier")
    backbone: Any = freezing.find_backbone(model, "backbone")
    return Classifier(model, served, backbone, size)


def _splits(folder: ImageFolder) -> dict[str, Any]:
    return {
        "class_names": folder.class_names,
        **{
            split: [
                (sample.path.relative_to(folder.folder).as_posix(), sample.label)
                for sample in getattr(folder, split)
            ]
            for split in folder.counts()
        },
        "skipped": folder.skipped,
    }


def _image_folder(root: Path, told: dict[str, Any]) -> ImageFolder:
    splits = {
        split: tuple(Sample(root / name, label) for name, label in told[split])
        for split in ("train", "validation", "test")
    }
    skipped = tuple(Skipped(*each) for each in told["skipped"])
    return ImageFolder(root, tuple(told["class_names"]), **splits, skipped=skipped)


def _with_port(team: Team | None) -> Team | None:
    """Find the chief a port, and refuse one that is taken: two chiefs would share it unnoticed."""
    if team is not None:
        option, address, port = "--listen", team.address, team.port
    elif process_of(os.environ) == "chief":
        option = "KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT"
        address = os.environ["KERASTUNER_ORACLE_IP"]
        port = int(os.environ["KERASTUNER_ORACLE_PORT"])
    else:
        return None
    try:
        found = free_port(address, port)
    except OSError as error:
        at = address if port is None else f"{address}:{port}"
        raise UsageError(
            f"{option}: the chief cannot listen at {at} ({error.strerror}). Give an address of this "
            "machine and a free port"
        ) from error
    return None if team is None else Team(team.command, team.workers, address, found)


@contextlib.contextmanager
def _repeated(function: Any) -> Iterator[None]:
    """Call a function again and again in a thread, for as long as the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(_POLL_SECONDS):
            function()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        function()


def _nothing() -> None:
    """What a chief does after each trial whose progress another process shows."""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
