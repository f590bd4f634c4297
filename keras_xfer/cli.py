"""The command `keras-xfer`: arguments, errors and exit statuses.

Frameworks take seconds to load and talk while they do. So the arguments are read first, and the
modules that do the work are imported in the functions that need them.
"""

import argparse
import ast
import contextlib
import errno
import importlib
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from keras_xfer._version import __version__
from keras_xfer.commands import hub_handles
from keras_xfer.commands.recipe import AUGMENTS, HUB_OR_BACKBONE, TOP_THIRD, Recipe, UsageError

_DEFAULT = Recipe()
_OUTPUT_HELP = (
    "folder for the results, made if there is none. An earlier run's files in it are replaced, "
    "other files stay; a folder with files of the same names from elsewhere is refused"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments. `None`: those of the process.

    Returns:
        The exit status: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted, 1
        anything else.

    Example:
    >>> main(["train", "missing", "--output", "run"])
    2
    """
    _never_fail_on_letters()
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
    except SystemExit as stop:  # of argparse, which has said why
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "Interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `keras-xfer predict … | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _mendable(error)
        if message is None:
            traceback.print_exc()
            return 1
        _say(message)
        return 2
    return status


# What each command does.


def _train(arguments: argparse.Namespace) -> int:
    from keras_xfer.commands.runs import RunFolder, check_cache

    recipe = _recipe(arguments)
    RunFolder(arguments.output, images=arguments.images)  # refuses before anything is loaded
    if arguments.cache is not None:
        check_cache(arguments.cache, images=arguments.images, output=arguments.output)
    if recipe.hub is not None:
        hub_handles.look(recipe.hub, recipe.hub_sha256)
    with _quiet_start():
        from keras_xfer.commands import job
        from keras_xfer.commands.screen import Screen
    job.train(
        arguments.images,
        arguments.output,
        recipe,
        Screen(),
        resume=arguments.resume,
        cache=arguments.cache,
    )
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from keras_xfer.commands.runs import read_labels, write_csv
    from keras_xfer.files import check_writable

    read_labels(arguments.run_dir)
    hub_handles.trusted(arguments.run_dir / "model.keras", trust=arguments.trust, hub=arguments.hub)
    for path in map(Path, arguments.images):
        if not (path.exists() or path.is_symlink()):
            raise UsageError(f"No such file or folder: {str(path)!r}. Check the path")
    if arguments.csv is not None:
        check_writable(arguments.csv)
    with _quiet_start():
        from keras_xfer.commands.prediction import predict
        from keras_xfer.commands.screen import Screen, counted
    screen = Screen()
    predictions, skipped = predict(
        arguments.run_dir,
        arguments.images,
        top=arguments.top,
        screen=screen,
        trust=arguments.trust,
        hub=arguments.hub,
    )
    if arguments.csv is not None:
        write_csv(
            arguments.csv,
            ("file", "rank", "prediction", "probability"),
            [
                (file, rank, name, f"{probability:.7g}")
                for file, ranking in predictions
                for rank, (name, probability) in enumerate(ranking, 1)
            ],
        )
    width = max((len(prediction.file) for prediction in predictions), default=0)
    for file, ranking in predictions:
        answers = "  ".join(f"{name} {probability:.1%}" for name, probability in ranking)
        screen.line(f"{file:{width}}  {answers}")
    if not predictions:
        file, reason = skipped[0]
        raise UsageError(
            f"None of {counted(len(skipped), 'file')} is a readable image; the first: {file!r} "
            f"({reason}). Give JPEG, PNG, BMP, GIF or WebP images"
        )
    for file, reason in skipped:
        _say(f"Skipped {file}: {reason}")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    with _quiet_start():
        from keras_xfer.commands import caching
        from keras_xfer.commands.screen import Screen
    {"info": caching.info, "clear": caching.clear}[arguments.action](arguments.directory, Screen())
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from keras_xfer.commands.runs import RunFolder

    RunFolder(arguments.output)
    with _quiet_start():
        from keras_xfer.commands.screen import Screen
        from keras_xfer.demo import demo
    demo(arguments.output, seed=arguments.seed, quick=arguments.quick, screen=Screen())
    return 0


# The arguments.


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="keras-xfer",
        description="Transfer learning for Keras 3: a folder of images becomes a classifier.",
        epilog="Exit status: 0 done, 2 bad usage or bad input, 130 interrupted, 1 anything else.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"keras-xfer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_demo(commands)
    _add_train(commands)
    _add_predict(commands)
    _add_cache(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole job without a network, on images and a backbone that it makes itself",
        description=(
            "Write scikit-learn's handwritten digits as image files, pretrain a small MobileNetV2 "
            "on the digits 0 to 4, transfer it to 5 to 9 with 20 labelled images a class, and "
            "compare with the same network trained from scratch. Minutes on two cores; no network."
        ),
        epilog=(
            "The folder then holds what train writes, of the transferred model, the images "
            "(images/), and the pretrained backbone (pretraining/), which the next demo in this "
            "folder with the same settings uses again."
        ),
        allow_abbrev=False,
    )
    demo.add_argument("--output", metavar="DIR", type=Path, required=True, help=_OUTPUT_HELP)
    demo.add_argument("--seed", metavar="N", type=_seed, default=0, help="seed (default: 0)")
    demo.add_argument(
        "--quick",
        action="store_true",
        help="the smallest form, to see that everything runs: few epochs, meaningless accuracies",
    )
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a pretrained model on a folder of images",
        description=(
            "Fine-tune a model of keras.applications or of TensorFlow Hub on a folder of images "
            "(JPEG, PNG, BMP, GIF, WebP of any size): first a new head, then the top blocks at a tenth of the rate, "
            "BatchNormalization frozen. Unreadable images are skipped and listed."
        ),
        epilog=(
            "DIR then holds model.keras (uint8 images of any size in, probabilities out), "
            "labels.json, history.csv, predictions.csv (of the test images if there are any, else "
            "of the validation images), metrics.json, skipped.csv, report.html and run.json (what "
            "was asked for). Ctrl-C keeps the best model so far. What is cut off after its first "
            "epoch, by whatever, goes on with --resume."
        ),
        allow_abbrev=False,
    )
    train.add_argument(
        "images",
        metavar="IMAGES",
        type=_folder,
        help="folder with one folder a class, or with train/, validation/ and test/ that have them",
    )
    train.add_argument("--output", metavar="DIR", type=Path, required=True, help=_OUTPUT_HELP)
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of the same options that was cut off in DIR, at the epoch it had "
        "come to; without one, begin. The result is that of a run that was not cut off",
    )

    model = train.add_argument_group("model")
    model.add_argument(
        "--backbone",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"a model of keras.applications (default: {_DEFAULT.backbone})",
    )
    model.add_argument(
        "--backbone-arg",
        metavar="NAME=VALUE",
        type=_named_value,
        action="append",
        default=[],
        help="a further argument of that model's function, such as alpha=0.35; may be repeated",
    )
    model.add_argument(
        "--weights",
        metavar="imagenet|none|PATH",
        type=lambda text: None if text == "none" else text,
        default=argparse.SUPPRESS,
        help="imagenet is downloaded once; none trains everything from scratch; PATH is a weights "
        "file of the model without its classifier (default: imagenet)",
    )
    model.add_argument(
        "--hub",
        metavar="HANDLE",
        help="in place of --backbone and --weights, a SavedModel of TensorFlow Hub or of your own: a "
        "folder, a .tar.gz, file://, https:// or kaggle://owner/model/framework/variation/version. "
        "Its code runs with your rights; predict then needs --trust",
    )
    model.add_argument(
        "--hub-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=_DEFAULT.hub_range,
        help="lowest and highest value of the images that the SavedModel was trained on (default: "
        "0 1, as modules of TensorFlow Hub)",
    )
    model.add_argument(
        "--hub-sha256",
        metavar="HEX",
        help="SHA-256 that the archive of the SavedModel must have",
    )
    model.add_argument(
        "--image-size",
        metavar="N",
        type=int,
        help="height and width in pixels that images are resized to (default: the model's own; a "
        "SavedModel that takes any size needs it)",
    )
    model.add_argument(
        "--dropout",
        metavar="FRACTION",
        type=float,
        default=_DEFAULT.dropout,
        help="dropout in front of the classifier (default: %(default)s)",
    )

    schedule = train.add_argument_group("schedule")
    schedule.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        default=_DEFAULT.epochs,
        help="epochs in all, or with --stages see there (default: %(default)s)",
    )
    schedule.add_argument(
        "--head-epochs",
        metavar="N",
        type=int,
        help="how many of them train the head alone (default: a third)",
    )
    schedule.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=float,
        default=_DEFAULT.learning_rate,
        help="learning rate of the head (default: %(default)s)",
    )
    schedule.add_argument(
        "--fine-tune-rate",
        metavar="RATE",
        type=float,
        help="learning rate once the backbone trains too (default: a tenth of --learning-rate)",
    )
    schedule.add_argument(
        "--unfreeze",
        metavar="START",
        type=_start,
        default=_DEFAULT.unfreeze,
        help="where training of the backbone begins: none, all, a block or layer name, an index "
        f"(-20: the last 20 layers) or a fraction such as 0.3 (default: {TOP_THIRD})",
    )
    schedule.add_argument(
        "--stages",
        metavar="FILE.yaml",
        help="the whole schedule as keras_xfer.stages.stages_to_yaml writes it, in place of "
        "--head-epochs, --unfreeze and --fine-tune-rate; --epochs then counts only where a stage has "
        "none of its own: as the most in all, at least one for each such stage beside those of "
        "the others",
    )
    schedule.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=_DEFAULT.batch_size,
        help="images a training step (default: %(default)s)",
    )
    schedule.add_argument(
        "--mixed-precision",
        action="store_true",
        help="compute in 16 bits (float16 on a GPU, bfloat16 elsewhere): faster where the "
        "hardware knows it",
    )

    cache = train.add_argument_group(
        "cache",
        "What is frozen gives the same for an image in every epoch. Kept, it is computed once, and "
        "the epochs train what is above it alone, to the same end.",
    )
    where = cache.add_mutually_exclusive_group()
    where.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="keep it in this folder, for other runs on the same images too (default: with "
        "--augment none in --output until the run has ended, else not at all)",
    )
    where.add_argument(
        "--no-cache", action="store_true", help="compute it in every epoch, whatever is augmented"
    )
    cache.add_argument(
        "--views",
        metavar="N",
        type=int,
        help="with --cache and augmentation: how many augmented passes of each image to keep, of "
        "which each epoch takes the next",
    )

    data = train.add_argument_group("images")
    data.add_argument(
        "--augment",
        choices=AUGMENTS,
        default=_DEFAULT.augment,
        help="random changes of training images: light is flip, shift and zoom; strong is more of "
        "these, rotation and shear (default: %(default)s)",
    )
    data.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="never mirror images: for letters, digits, road signs",
    )
    data.add_argument(
        "--class-weights",
        action="store_true",
        help="let every class count alike, however many images it has",
    )
    data.add_argument(
        "--validation-split",
        metavar="FRACTION",
        type=float,
        default=_DEFAULT.validation_split,
        help="fraction of each class to validate on, where IMAGES has no validation/ "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--test-split",
        metavar="FRACTION",
        type=float,
        default=_DEFAULT.test_split,
        help="fraction of each class to test on at the end, where IMAGES has no test/ "
        "(default: none)",
    )
    data.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=_DEFAULT.seed,
        help="seed of the split, the weights, the order and the augmentation (default: 0)",
    )
    train.set_defaults(run=_train)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="classify images with a trained model",
        description="Classify image files with the model that train or demo wrote.",
        epilog=(
            "Files that are no readable images are named on stderr and left out; the exit status "
            "is 0 if at least one image was classified, and 2 if none was."
        ),
        allow_abbrev=False,
    )
    predict.add_argument(
        "run_dir", metavar="DIR", type=Path, help="the --output of keras-xfer train or demo"
    )
    predict.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", type=Path, help="image files, and folders"
    )
    predict.add_argument(
        "--top",
        metavar="N",
        type=_positive,
        default=3,
        help="how many classes to name for each image (default: %(default)s)",
    )
    predict.add_argument(
        "--csv",
        metavar="FILE",
        type=Path,
        help="write file, rank, prediction, probability there too",
    )
    predict.add_argument(
        "--trust",
        action="store_true",
        help="run the code of the SavedModel that a model of train --hub holds",
    )
    predict.add_argument(
        "--hub",
        metavar="HANDLE",
        help="where that SavedModel is now, if it has moved since",
    )
    predict.set_defaults(run=_predict)


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="show or remove what train --cache keeps",
        description="Show or remove what keras-xfer train --cache DIR keeps.",
        allow_abbrev=False,
    )
    actions = cache.add_subparsers(
        metavar="ACTION", required=True, parser_class=_Parser, dest="action", help="what to do"
    )
    for name, text in (
        ("info", "list what is kept, the last used first, with its bytes"),
        ("clear", "remove everything that no process has open"),
    ):
        action = actions.add_parser(
            name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False
        )
        action.add_argument(
            "directory", metavar="DIR", type=_folder, help="the --cache of keras-xfer train"
        )
    cache.set_defaults(run=_cache)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = vars(arguments)
    recipe = {name: given[name] for name in vars(_DEFAULT) if name in given}
    if arguments.hub is not None:
        if {"backbone", "weights"} & given.keys():  # the defaults, too, where they are given
            raise UsageError(HUB_OR_BACKBONE)
        recipe["hub"] = hub_handles.located(arguments.hub)
    recipe["hub_range"] = tuple(arguments.hub_range)
    recipe["cached"] = False if arguments.no_cache else arguments.cache is not None or None
    return Recipe(**recipe, backbone_args=dict(arguments.backbone_arg))


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such folder: {text!r}; check the path")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32-1, not {text!r}")
    return int(text)


def _start(text: str) -> str | int | float | None:
    if text == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _named_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as alpha=0.35, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# Errors.


def _mendable(error: Exception) -> str | None:
    """Return what to tell the user; None if it is nothing that they could mend."""
    if isinstance(error, UsageError):
        return f"{error}"
    # By name, so that no framework is loaded to ask.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {
        "DataChangedError",
        "ImageFolderError",
        "ImageReadError",
        "WeightsUnavailableError",
    }:
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return _of_the_system(error)
    return None


def _of_the_system(error: OSError) -> str | None:
    text = " ".join(str(error).split())
    # h5py says the number in its text alone.
    found = re.search(r"errno = (\d+)|\[Errno (\d+)\]", text)
    number = error.errno or (found and int(found[1] or found[2]))
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"The disk is full ({os.strerror(number)}): free some space, or choose an --output "
            "elsewhere. What was not complete has been removed"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
        return f"{text}. Choose another path, or change its permissions"
    if number == errno.ENOENT and (error.filename is not None or "Cannot write" in text):
        return f"{text}. Check the path"
    return None


def _say(message: str) -> None:
    print(f"keras-xfer: {' '.join(message.split()).rstrip('.')}.", file=sys.stderr)


# The terminal.


def _never_fail_on_letters() -> None:
    """Let a terminal without UTF-8 show a class name's code points instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Hold back TensorFlow's talk about itself while it is loaded, and no other messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of each new stage's tracing
    try:
        stderr = os.dup(2)
    except OSError:  # started without one
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            # On other backends Keras loads it, if it is there, with the first preprocessing layer.
            with contextlib.suppress(ImportError):
                importlib.import_module("tensorflow")
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held.read().decode("utf-8", "replace").splitlines():
                if not _START_UP.match(line):
                    print(line, file=sys.stderr)


_START_UP = re.compile(
    r"[IW]\d{4} \d|E\d{4} \d.*(cuda|cuInit|cuDNN|cuBLAS|cuFFT)|WARNING: All log messages before absl::InitializeLog|"
    r"To enable the following instructions|\d{4}-\d\d-\d\d [\d:.]+: [IW] |\s*$"
)


if __name__ == "__main__":
    sys.exit(main())
