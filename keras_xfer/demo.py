"""`keras-xfer demo`: the whole job without a network, on images and a backbone made here.

The images are scikit-learn's handwritten digits. A small network learns the digits 0 to 4 and is
transferred to 5 to 9, of which 20 images a class are labelled; the same network trained from
scratch on those 100 images stands beside it.
"""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keras_xfer import files
from keras_xfer.callbacks.best_checkpoint import BestCheckpoint
from keras_xfer.commands import job, training
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.commands.runs import CHECKPOINT, RunFolder
from keras_xfer.commands.screen import EpochLines, Screen, counted
from keras_xfer.commands.training import Classifier, Fitted
from keras_xfer.images import ImageFolder, Sample

LABELLED = 20  # images a class that the transfer learns from
VALIDATED = 10  # images a class that choose the epoch
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SOURCE, _TARGET = range(5), range(5, 10)

# The network sees the digits at 64 pixels: below, its last third would work on a single pixel.
_COMMON: dict[str, Any] = {
    "backbone": "MobileNetV2",
    "backbone_args": {"alpha": 0.35},
    "image_size": 64,
    "batch_size": 16,
    "flip": False,  # a mirrored digit is none
}
_QUICK: dict[str, Any] = {
    "backbone": "MobileNet",
    "backbone_args": {"alpha": 0.25},
    "image_size": 32,
    "batch_size": 50,
    "flip": False,
}


def demo(
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    quick: bool = False,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Pretrain, transfer, compare, and write the run's folder of the transferred model.

    Args:
        output: Path of the run's folder, see `RunFolder`. It gets the images too (`images/`), and
            the pretrained backbone (`pretraining/`), which is used again by the next demo there
            that would make the same.
        seed: Int >= 0, of the split, the weights, the order and the augmentation. Defaults to 0.
        quick: Bool, a few steps of a smaller network: everything runs, nothing is learned.
        screen: A `Screen`. `None` writes to `sys.stdout`.

    Returns:
        A dict, what `metrics.json` holds; its `comparison` has the three ways side by side.

    Raises:
        UsageError: The folder cannot be used.
    """
    screen = screen or Screen()
    run = RunFolder(output)
    source = write_digits(run / "pretraining" / "images", _SOURCE)
    target = write_digits(run / "images", _TARGET)
    settings = {**(_QUICK if quick else _COMMON), "seed": seed}
    weights = pretrain(run / "pretraining", source, settings, quick, screen)
    folder = split(target, _TARGET, seed, train=LABELLED, validation=VALIDATED)
    recipes = _recipes(str(weights), settings, quick)

    comparison: dict[str, dict[str, Any]] = {}
    with run.writing({"command": "demo", "quick": quick, **recipes["staged"].to_dict()}):
        for name, recipe in recipes.items():
            screen.line()
            screen.line(
                f"{name.capitalize()}: {counted(len(folder.train), 'image')} of the digits 5 to 9"
            )
            with training.reproducible(recipe):
                classifier = training.build(recipe, len(folder.class_names))
                if name == "staged":
                    fitted = job.fit(classifier, folder, recipe, run, screen)
                else:
                    fitted = _fit(classifier, folder, recipe, run / CHECKPOINT, screen)
                comparison[name] = _row(classifier, fitted, folder, recipe)
                if name == "staged":
                    metrics = job.finish(
                        classifier, fitted, folder, recipe, run, screen, comparison=comparison
                    )
    _show(comparison, metrics, run, weights, settings, screen)
    return metrics


def pretrain(
    place: Path, images: Path, settings: dict[str, Any], quick: bool, screen: Screen
) -> Path:
    """Train the backbone on the digits 0 to 4, unless it is there already.

    Args:
        place: Folder for the weights file, whose name tells the settings that it was made with.
        images: Folder of `write_digits`.
        settings: Of the `Recipe`.
        quick: Bool, a single epoch.
        screen: A `Screen`.

    Returns:
        Path of the weights file.
    """
    recipe = Recipe(weights=None, epochs=1 if quick else 10, learning_rate=2e-3, **settings)
    key = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    # Not .weights.h5: HDF5 kills the process when the disk is full.
    weights = place / f"backbone-{key}.keras"
    if weights.is_file():
        screen.line(f"The backbone that an earlier demo pretrained is used again: {weights}")
        return weights
    folder = split(images, _SOURCE, recipe.seed, train=140, validation=30)
    screen.line(
        f"Pretraining {recipe.backbone} on {counted(len(folder.train), 'image')} of the digits 0 "
        "to 4"
    )
    with training.reproducible(recipe):
        classifier = training.build(recipe, len(folder.class_names))
        checkpoint = place / CHECKPOINT
        try:
            _fit(classifier, folder, recipe, checkpoint, screen)
        finally:
            for path in (checkpoint, Path(f"{checkpoint}.json")):
                path.unlink(missing_ok=True)
        with files.replacing(weights) as temporary:
            classifier.backbone.model.save(temporary)
    return weights


def write_digits(folder: Path, digits: range) -> Path:
    """Write scikit-learn's handwritten digits as image files of several sizes and kinds.

    Args:
        folder: Where; one folder a class. All of it appears at once, or is there already.
        digits: Which digits.

    Returns:
        `folder`.

    Raises:
        UsageError: `folder` holds something else.

    Example:
    >>> folder = write_digits(Path(tempfile.mkdtemp()) / "images", range(1))
    >>> len(list((folder / "zero").iterdir()))
    178

    Reference:
        https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = [
        (pixels, Path(_NAMES[digit]) / f"{number:04}")
        for number, (pixels, digit) in enumerate(zip(bunch.images, bunch.target, strict=True))
        if digit in digits
    ]
    if folder.exists():
        if all((folder / f"{name}{_kind(name)[0]}").is_file() for _, name in chosen):
            return folder
        raise UsageError(
            f"--output: {str(folder)!r} is there and does not hold the demo's images. Choose "
            "another folder, or move it elsewhere"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for pixels, name in chosen:
            (temporary / name.parent).mkdir(exist_ok=True)
            _write_digit(temporary / name, pixels)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def split(folder: Path, digits: range, seed: int, *, train: int, validation: int) -> ImageFolder:
    """Draw a number of images a class to train and to validate on; the rest is for the test.

    Args:
        folder: Folder of `write_digits`.
        digits: Its digits.
        seed: Int >= 0.
        train: Int, images a class.
        validation: Int, images a class.

    Returns:
        An `ImageFolder`.
    """
    class_names = sorted(_NAMES[digit] for digit in digits)
    drawn: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(class_names):
        paths = sorted((folder / name).iterdir())
        order = np.random.default_rng([seed, label]).permutation(len(paths))
        indices = np.split(order, [train, train + validation])
        for part, own in zip(drawn.values(), indices, strict=True):
            part += [Sample(paths[i], label) for i in sorted(own)]
    return ImageFolder(
        folder=folder,
        class_names=tuple(class_names),
        train=tuple(drawn["train"]),
        validation=tuple(drawn["validation"]),
        test=tuple(drawn["test"]),
        skipped=(),
    )


# How a digit becomes a file.

# Extension, mode, and what Pillow's `save` takes besides.
_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (".png", "L", {}),
    (".jpg", "RGB", {"quality": 90}),
    (".gif", "P", {}),
    (".png", "RGBA", {}),
    (".bmp", "RGB", {}),
    (".webp", "RGB", {"quality": 90}),
    (".jpg", "CMYK", {"quality": 90}),
    (".png", "P", {}),
    (".jpeg", "L", {"quality": 90}),
)
_SIDES = (32, 48, 64, 80, 120)
_MARGINS = ((0, 0), (8, 0), (0, 12), (20, 4))  # of paper, left and right, above and below


def _kind(name: Path) -> tuple[str, str, dict[str, Any]]:
    return _KINDS[int(name.name) % len(_KINDS)]


def _write_digit(path: Path, pixels: np.ndarray) -> None:
    suffix, mode, options = _kind(path)
    number = int(path.name)
    side = _SIDES[number // 7 % len(_SIDES)]
    paper = Image.fromarray((255 - pixels * 255 / 16).round().astype("uint8"))
    paper = paper.resize((side, side), Image.Resampling.BICUBIC)
    margin_x, margin_y = _MARGINS[number // 3 % len(_MARGINS)]
    image = Image.new("L", (side + 2 * margin_x, side + 2 * margin_y), 255)
    image.paste(paper, (margin_x, margin_y))
    if mode == "RGBA":  # ink on a sheet of glass
        ink = Image.new("RGBA", image.size, "black")
        ink.putalpha(image.point(lambda value: 255 - value))
        image = ink
    elif mode == "CMYK":
        image = image.convert("RGB").convert("CMYK")
    else:
        image = image.convert(mode)
    image.save(path.with_suffix(suffix), **options)


# The three ways.


def _recipes(weights: str, settings: dict[str, Any], quick: bool) -> dict[str, Recipe]:
    common = {**settings, "epochs": 2 if quick else 24}
    return {
        "from scratch": Recipe(weights=None, learning_rate=2e-3, **common),
        "frozen": Recipe(weights=weights, learning_rate=3e-3, unfreeze=None, **common),
        # Five digits make a narrow backbone: all of it has to move, and faster than usual.
        "staged": Recipe(
            weights=weights,
            learning_rate=3e-3,
            head_epochs=1 if quick else 4,
            unfreeze="all",
            fine_tune_rate=1e-3,
            **common,
        ),
    }


def _fit(
    classifier: Classifier, folder: ImageFolder, recipe: Recipe, checkpoint: Path, screen: Screen
) -> Fitted:
    stages = training.schedule(recipe, classifier.backbone)
    return training.fit(
        classifier,
        folder,
        recipe,
        BestCheckpoint(checkpoint, restore_best_weights=True, resume=False),
        callbacks=[EpochLines(screen, [str(stage.name) for stage in stages])],
    )


def _row(
    classifier: Classifier, fitted: Fitted, folder: ImageFolder, recipe: Recipe
) -> dict[str, Any]:
    data = training.dataset(classifier, folder, "test", recipe.batch_size)
    scores = classifier.trained.evaluate(data, verbose=0, return_dict=True)
    last = [row for row in fitted.rows if row["stage"] == fitted.rows[-1]["stage"]]
    return {
        "accuracy": float(scores["accuracy"]),
        # The first epoch of a stage compiles.
        "epoch_seconds": float(np.median([row["epoch_seconds"] for row in last])),
        "epochs": len(fitted.rows),
        "trainable_params": int(last[-1]["trainable_params"]),
    }


def _show(
    comparison: dict[str, dict[str, Any]],
    metrics: dict[str, Any],
    run: RunFolder,
    weights: Path,
    settings: dict[str, Any],
    screen: Screen,
) -> None:
    screen.line()
    screen.line(f"{'':12}  accuracy  seconds an epoch  parameters trained")
    for name, row in comparison.items():
        screen.line(
            f"{name:12}  {row['accuracy']:8.1%}  {row['epoch_seconds']:16.2f}  "
            f"{row['trainable_params']:18,}"
        )
    screen.line(
        f"on {metrics['test_images']:,} test images of the digits 5 to 9, after {LABELLED} a class "
        f"to learn from and {VALIDATED} to choose the epoch"
    )
    screen.line()
    job.show_result(metrics, run, screen)
    arguments = " ".join(
        f"--backbone-arg {name}={value}" for name, value in settings["backbone_args"].items()
    )
    screen.line("Try next:")
    screen.line(f"  keras-xfer predict {_quoted(run.path)} {_quoted(run / 'images' / 'seven')}")
    screen.line(
        f"  keras-xfer train {_quoted(run / 'images')} --output {_quoted(f'{run.path}-own')} "
        f"--weights {_quoted(weights)} --backbone {settings['backbone']} {arguments} "
        f"--image-size {settings['image_size']} --no-flip"
    )


def _quoted(path: str | os.PathLike[str]) -> str:
    return shlex.quote(os.fspath(path))
