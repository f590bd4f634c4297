"""The arguments of the command `keras-xfer`. Nothing here loads a framework."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from keras_xfer._version import __version__
from keras_xfer.commands import options
from keras_xfer.commands.recipe import TOP_THIRD
from keras_xfer.commands.search_recipe import TUNERS


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command `keras-xfer`.

    Returns:
        An `argparse.ArgumentParser`, whose result has the command's name as `command`.
    """
    root = _Parser(
        prog="keras-xfer",
        description="Transfer learning for Keras 3: a folder of images becomes a classifier.",
        epilog="Exit status: 0 done, 2 bad usage or bad input, 130 interrupted, 1 anything else.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"keras-xfer {__version__}")
    commands = root.add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser, dest="command"
    )
    _add_demo(commands)
    _add_train(commands)
    _add_tune(commands)
    _add_predict(commands)
    _add_cache(commands)
    return root


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


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
    demo.add_argument("--output", metavar="DIR", type=Path, required=True, help=options.OUTPUT_HELP)
    demo.add_argument("--seed", metavar="N", type=options.seed, default=0, help="seed (default: 0)")
    demo.add_argument(
        "--quick",
        action="store_true",
        help="the smallest form, to see that everything runs: few epochs, meaningless accuracies",
    )


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
    options.add_folders(
        train,
        resume="go on with the run of the same options that was cut off in DIR, at the epoch it "
        "had come to; without one, begin. The result is that of a run that was not cut off",
    )

    model = train.add_argument_group("model")
    options.add_backbone(model)
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
        default=options.DEFAULT.hub_range,
        help="lowest and highest value of the images that the SavedModel was trained on (default: "
        "0 1, as modules of TensorFlow Hub)",
    )
    model.add_argument(
        "--hub-sha256",
        metavar="HEX",
        help="SHA-256 that the archive of the SavedModel must have",
    )
    options.add_image_size(
        model, default="the model's own; a SavedModel that takes any size needs it"
    )
    model.add_argument(
        "--dropout",
        metavar="FRACTION",
        type=float,
        default=options.DEFAULT.dropout,
        help="dropout in front of the classifier (default: %(default)s)",
    )

    schedule = train.add_argument_group("schedule")
    schedule.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        default=options.DEFAULT.epochs,
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
        default=options.DEFAULT.learning_rate,
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
        type=options.start,
        default=options.DEFAULT.unfreeze,
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
    options.add_steps(schedule)

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
    options.add_augmentation(data, default=options.DEFAULT.augment)
    data.add_argument(
        "--class-weights",
        action="store_true",
        help="let every class count alike, however many images it has",
    )
    options.add_split(data)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="search the hyperparameters of a pretrained model on a folder of images",
        description=(
            "Search backbone, head, learning rates and how much of the backbone thaws. The funnel "
            "trains all heads on features that are computed once, and fine-tunes the best of them. "
            "A line for each trial says how good it was, the best so far and the time left."
        ),
        epilog=(
            "DIR then holds what train writes, of the best model, and trials.csv, trial_epochs.csv "
            "and the figures of the search in report.html. Ctrl-C keeps the best model so far, and "
            "--resume goes on. On several machines: the same command on each of them with "
            "KERASTUNER_ORACLE_IP, KERASTUNER_ORACLE_PORT and KERASTUNER_TUNER_ID (chief, tuner0, "
            "tuner1, ...) in the environment and DIR on a disk that all share. The chief's port "
            "asks nobody who they are: leave it to a network that you trust."
        ),
        allow_abbrev=False,
    )
    options.add_folders(
        tune,
        resume="go on with the search of the same options that was cut off in DIR: trials that "
        "were over stay, those that were not over are run again; without one, begin",
    )

    search = tune.add_argument_group("search")
    search.add_argument(
        "--max-trials",
        metavar="N",
        type=int,
        required=True,
        help="how many candidates to try; of hyperband, how many trainings",
    )
    search.add_argument(
        "--tuner",
        choices=TUNERS,
        default="funnel",
        help="funnel: the heads of all, halved by successive rounds, then the best fine-tuned; the "
        "others are KerasTuner's (default: %(default)s)",
    )
    search.add_argument(
        "--finalists",
        metavar="N",
        type=int,
        help="how many candidates the funnel fine-tunes (default: 3)",
    )
    search.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        default=options.DEFAULT.epochs,
        help="epochs of a candidate that comes to the end; of the funnel three fifths for the "
        "head (default: %(default)s)",
    )
    search.add_argument(
        "--workers",
        metavar="N",
        type=options.positive,
        help="run so many trials at the same time, in processes of their own on this machine; one "
        "that dies is started again (default: one trial after the other)",
    )
    search.add_argument(
        "--listen",
        metavar="ADDRESS:PORT",
        type=options.address,
        help="with --workers: where their chief listens. On another address than loopback, workers "
        "of other machines may join; it asks nobody who they are (default: 127.0.0.1, a free port)",
    )
    search.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="keep the features of frozen backbones in this folder, for other runs on the same "
        "images too (default: in --output until the search is over)",
    )

    model = tune.add_argument_group("model")
    options.add_backbone(model, repeatable=True)
    options.add_image_size(model, default="that of the first backbone")
    options.add_steps(model)

    data = tune.add_argument_group("images")
    options.add_augmentation(
        data, default="none", why=". What is augmented is not cached, and takes its time"
    )
    options.add_split(data, seeded="the candidates, ")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="classify images with a trained model",
        description="Classify image files with the model that train, tune or demo wrote.",
        epilog=(
            "Files that are no readable images are named on stderr and left out; the exit status "
            "is 0 if at least one image was classified, and 2 if none was."
        ),
        allow_abbrev=False,
    )
    predict.add_argument(
        "run_dir", metavar="DIR", type=Path, help="the --output of keras-xfer train, tune or demo"
    )
    predict.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", type=Path, help="image files, and folders"
    )
    predict.add_argument(
        "--top",
        metavar="N",
        type=options.positive,
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


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="show or remove what train --cache and tune --cache keep",
        description="Show or remove what keras-xfer train --cache DIR and tune --cache DIR keep.",
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
            "directory",
            metavar="DIR",
            type=options.folder,
            help="the --cache of keras-xfer train or tune",
        )
