"""The job of `keras-xfer train`, which `demo` does too: a folder of images in, a run's folder out."""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_xfer import files
from keras_xfer.callbacks.backup_and_restore import BackupAndRestore, BackupError
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.callbacks.staged_unfreezing import StagedUnfreezing
from keras_xfer.commands import caching, hub_backbone, training
from keras_xfer.commands.caching import RunCache
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.commands.runs import CHECKPOINT, UNFINISHED, RunFolder, check_cache
from keras_xfer.commands.screen import EpochLines, Screen, counted, seconds
from keras_xfer.commands.training import Classifier, Fitted, Row
from keras_xfer.images import ImageFolder, scan
from keras_xfer.reports import predict_probabilities, write_report
from keras_xfer.reports.predictions import prediction_columns


def train(
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Recipe,
    screen: Screen,
    *,
    resume: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Train a classifier on a folder of images and write the run's folder.

    Args:
        images: Path of the folder of images.
        output: Path of the run's folder, see `RunFolder`.
        recipe: A `Recipe`.
        screen: A `Screen` for what was found, each epoch, and the result.
        resume: Bool, whether to go on with the run of the same recipe that was cut off there. If
            it had ended nothing is done; if there is none it begins.
        cache: Path of the folder where a recipe that caches keeps features. `None`: one in the
            run's folder, until the run has ended.

    Returns:
        A dict, what `metrics.json` holds.

    Raises:
        UsageError: The recipe or the folders do not do, or what the run left is damaged.
        keras_xfer.images.ImageFolderError: The images do not do.
        keras_xfer.applications.WeightsUnavailableError: The weights cannot be downloaded.
        KeyboardInterrupt: With a message that says what is kept.
    """
    run = RunFolder(output, images=images)
    features = None
    if cache is not None:
        check_cache(cache, images=images, output=output)
        features = caching.given(cache, screen)
    recipe = training.read_stages(recipe)
    folder = look_at(images, recipe, screen)
    record = {
        "command": "train",
        "images": str(Path(images).resolve()),
        "images_fingerprint": folder.fingerprint(),
        **recipe.to_dict(),
    }
    if resume:
        run.check_resumable(record)
        if (metrics := run.finished()) is not None:
            run.remove_unfinished()
            screen.line("The run had ended; nothing is left to do")
            show_result(metrics, run, screen)
            return metrics
    with training.reproducible(recipe):
        classifier = training.build(recipe, len(folder.class_names))
        show_model(classifier, recipe, screen)
        if run.is_unfinished() and not resume:
            screen.line("Discarded the unfinished run that was there; --resume goes on with one")
        with run.writing(record, resume=resume):
            if recipe.caches and features is None:
                features = caching.own(run, screen)
            fitted = fit(classifier, folder, recipe, run, screen, resumable=True, cache=features)
            metrics = finish(classifier, fitted, folder, recipe, run, screen)
    show_result(metrics, run, screen)
    return metrics


def look_at(images: str | os.PathLike[str], recipe: Recipe, screen: Screen) -> ImageFolder:
    """Scan a folder of images and say what is in it.

    Args:
        images: Path of the folder of images.
        recipe: A `Recipe`.
        screen: A `Screen`.

    Returns:
        An `ImageFolder`.
    """
    folder = scan(
        images,
        validation_split=recipe.validation_split,
        test_split=recipe.test_split,
        seed=recipe.seed,
        progress=screen.progress("looking at the images"),
    )
    counts = folder.counts()
    by_class = np.sum(list(counts.values()), axis=0)
    splits = ", ".join(f"{sum(count):,} {split}" for split, count in counts.items() if sum(count))
    screen.line(
        f"Images   {counted(int(by_class.sum()), 'image')} in {len(by_class)} classes: {splits}"
    )
    shown = [f"{name} {count:,}" for name, count in zip(folder.class_names, by_class, strict=True)]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    screen.line(f"Classes  {', '.join(shown[:10])}{more}")
    if folder.skipped:
        first = folder.skipped[0]
        screen.line(
            f"Skipped  {counted(len(folder.skipped), 'unreadable file')}, listed in skipped.csv; "
            f"the first: {first.file} ({first.reason})"
        )
    return folder


def show_model(classifier: Classifier, recipe: Recipe, screen: Screen) -> None:
    """Say what is to be trained.

    Args:
        classifier: A `Classifier`.
        recipe: A `Recipe`.
        screen: A `Screen`.
    """
    weights = "random weights" if recipe.weights is None else f"weights {recipe.weights}"
    screen.line(
        f"Model    {recipe.model_name} at {classifier.image_size} pixels, "
        f"{'' if recipe.hub else weights + ', '}"
        f"{classifier.served.count_params():,} parameters"
    )
    if recipe.hub and (reason := hub_backbone.why_frozen(classifier.backbone)):
        screen.line(f"         the head alone trains, for {reason}")
    stages = training.schedule(recipe, classifier.backbone)
    plan = StagedUnfreezing(stages, backbone=classifier.backbone).plan(classifier.trained)
    for _, epochs, _, blocks, _, _, trainable, _, rate in plan.rows:
        stage = stages.pop(0)
        screen.line(
            f"         epochs {epochs}: {stage.name}, {blocks} blocks thawed, {trainable:,} "
            f"parameters at learning rate {rate}"
        )


def fit(
    classifier: Classifier,
    folder: ImageFolder,
    recipe: Recipe,
    run: RunFolder,
    screen: Screen,
    *,
    resumable: bool = False,
    cache: RunCache | None = None,
) -> Fitted:
    """Train, keeping `history.csv` up to date, and the best model where it is interrupted.

    Args:
        classifier: A `Classifier`.
        folder: An `ImageFolder`.
        recipe: A `Recipe`.
        run: A `RunFolder` that is being written.
        screen: A `Screen`.
        resumable: Bool, whether to keep what `keras-xfer train --resume` needs, and to go on from
            it where it is there.
        cache: `None`, or where to keep features.

    Returns:
        A `Fitted`.

    Raises:
        UsageError: What is there to go on from is damaged, or that of another training.
        KeyboardInterrupt: With a message that says what is kept.
    """
    run.write_csv("skipped.csv", ("file", "reason"), folder.skipped)
    checkpoint = BestCheckpoint(run / CHECKPOINT, restore_best_weights=True, resume=False)
    names = [str(stage.name) for stage in training.schedule(recipe, classifier.backbone)]

    def on_epoch(rows: list[Row]) -> None:
        columns = list(dict.fromkeys(["epoch", "stage", *rows[-1]]))
        run.write_csv("history.csv", columns, [[row[name] for name in columns] for row in rows])

    callbacks: list[Any] = [EpochLines(screen, names)]
    # Kept until the outputs are written too.
    backup = BackupAndRestore(run / UNFINISHED, delete_checkpoint=False)
    try:
        if resumable:
            if backup.next_epoch:
                screen.line(f"Resumed  after epoch {backup.next_epoch}")
            callbacks.append(backup)
        return training.fit(
            classifier,
            folder,
            recipe,
            checkpoint,
            on_epoch=on_epoch,
            callbacks=callbacks,
            cache=cache,
        )
    except BackupError as error:
        # What follows speaks of the callback's arguments.
        what = re.split(r"\.? (?:Choose another|Put back)", training.one_line(error))[0]
        raise UsageError(
            f"--resume: {str(backup.filepath)!r} will not do: {what}; leave out --resume to begin "
            "anew"
        ) from error
    except KeyboardInterrupt:
        goes_on = "; --resume goes on from there" if run.is_unfinished() else ""
        if checkpoint.best is None or not (run / "history.csv").exists():
            raise KeyboardInterrupt(
                f"Interrupted. What {str(run.path)!r} held is as it was{goes_on}"
                if goes_on
                else "Interrupted before the first epoch was over"
            ) from None
        checkpoint.on_train_end()  # restores the best weights
        save(classifier, folder, run)
        raise KeyboardInterrupt(
            f"Interrupted. {str(run.path)!r} keeps the model of epoch "
            f"{(checkpoint.best_epoch or 0) + 1}, the best so far: model.keras, labels.json, "
            f"history.csv, skipped.csv{goes_on}"
        ) from None


def save(classifier: Classifier, folder: ImageFolder, run: RunFolder) -> None:
    """Write `labels.json` and `model.keras`.

    Args:
        classifier: A `Classifier`.
        folder: The `ImageFolder` that it was trained on.
        run: A `RunFolder` that is being written.
    """
    run.write_json("labels.json", list(folder.class_names))
    with files.replacing(run / "model.keras") as temporary:
        classifier.served.save(temporary)


def finish(
    classifier: Classifier,
    fitted: Fitted,
    folder: ImageFolder,
    recipe: Recipe,
    run: RunFolder,
    screen: Screen,
    **extra: Any,
) -> dict[str, Any]:
    """Write what a run leaves when its training is over.

    Args:
        classifier: A `Classifier`, trained.
        fitted: What `fit` returned.
        folder: The `ImageFolder` that it was trained on.
        recipe: A `Recipe`.
        run: A `RunFolder` that is being written.
        screen: A `Screen`.
        **extra: Further entries of `metrics.json`.

    Returns:
        A dict, what `metrics.json` holds.
    """
    if fitted.stopped_by_nan:
        screen.line(
            f"The loss became NaN in epoch {len(fitted.rows)}, which ended the training; the "
            f"weights of epoch {fitted.best_epoch + 1} are kept. A lower --learning-rate may do"
        )
    save(classifier, folder, run)
    split = "test" if folder.test else "validation"
    screen.passing(f"predicting the {split} images")
    data = training.dataset(classifier, folder, split, recipe.batch_size)
    names, labels, probabilities = predict_probabilities(classifier.served, data)
    if labels is None or not np.isfinite(probabilities).all():
        raise FloatingPointError(
            f"The trained model answers NaN for images of the {split} split. "
            "Lower --learning-rate, or leave out --mixed-precision."
        )
    columns = prediction_columns(names, labels, probabilities, folder.class_names)
    accuracy = float(columns["correct"].mean())
    columns["probability"] = [f"{probability:.7g}" for probability in columns["probability"]]
    run.write_csv("predictions.csv", list(columns), zip(*columns.values(), strict=True))
    own = probabilities[np.arange(len(labels)), labels]
    metrics = {
        "accuracy": accuracy,
        "loss": float(-np.log(np.maximum(own, 1e-30)).mean()),
        "split": split,
        **summary(fitted, folder, recipe, classifier),
        **extra,
    }
    run.write_json("metrics.json", metrics)
    report(run, folder, screen)
    return metrics


def report(run: RunFolder, folder: ImageFolder, screen: Screen) -> None:
    """Write `report.html`, or say what is missing for it.

    Args:
        run: A `RunFolder` that is being written.
        folder: An `ImageFolder`.
        screen: A `Screen`.
    """
    try:
        with _quiet_matplotlib():
            write_report(run.path, images=folder.folder, title=run.path.resolve().name)
    except ImportError as error:
        screen.line(f"No report.html: {training.one_line(error)}")


def summary(
    fitted: Fitted, folder: ImageFolder, recipe: Recipe, classifier: Classifier
) -> dict[str, Any]:
    """Sum up a training for `metrics.json`.

    Args:
        fitted: What `fit` returned.
        folder: The `ImageFolder` that it was trained on.
        recipe: A `Recipe`.
        classifier: A `Classifier`.

    Returns:
        A dict.
    """
    planned = training.schedule(recipe, classifier.backbone)
    by_stage = {}
    for index, stage in enumerate(planned):
        rows = [row for row in fitted.rows if row["stage"] == index]
        if rows:
            by_stage[str(stage.name)] = {
                "epochs": len(rows),
                "val_accuracy": fitted.best_accuracy(index),
                "trainable_params": int(rows[0]["trainable_params"]),
                "learning_rate": rows[0]["learning_rate"],
                "epoch_seconds": _median(rows, "epoch_seconds"),
                "samples_per_second": _median(rows, "samples_per_second"),
                **({} if fitted.cached is None else {"cached": fitted.cached[index]}),
            }
    return {
        "val_accuracy": fitted.best_accuracy(),
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.rows),
        "training_seconds": sum(row["epoch_seconds"] for row in fitted.rows)
        + fitted.feature_seconds,
        **({} if fitted.cached is None else {"feature_seconds": fitted.feature_seconds}),
        "classes": len(folder.class_names),
        **{f"{split}_images": sum(count) for split, count in folder.counts().items()},
        "skipped_images": len(folder.skipped),
        "backbone": recipe.model_name,
        "image_size": classifier.image_size,
        "stages": by_stage,
    }


def show_result(metrics: dict[str, Any], run: RunFolder, screen: Screen) -> None:
    """Say how good the model is and where it lies.

    Args:
        metrics: What `finish` returned.
        run: The `RunFolder`.
        screen: A `Screen`.
    """
    head, tuned = (metrics["stages"].get(name) for name in ("head", "fine-tuning"))
    if head is not None and tuned is not None:
        screen.line(
            f"Before fine-tuning {head['val_accuracy']:.1%} of the validation images were right, "
            f"with it {tuned['val_accuracy']:.1%}"
        )
    screen.line(
        f"Accuracy {metrics['accuracy']:.1%} on the {metrics[metrics['split'] + '_images']:,} "
        f"{metrics['split']} images, with the weights of epoch {metrics['best_epoch'] + 1}; "
        f"trained in {seconds(metrics['training_seconds'])}"
    )
    screen.line(f"Wrote    {run.path}{os.sep}: {', '.join(run.written())}")


def _median(rows: list[Row], name: str) -> float:
    known = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return float(np.median(known)) if known else math.nan


@contextlib.contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Let matplotlib find its fonts and caches without a word on stderr."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
