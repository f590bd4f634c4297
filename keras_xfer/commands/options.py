"""Options that several commands share, and what the words of a command line are read as."""

import argparse
import ast
import contextlib
from pathlib import Path
from typing import Any

from keras_xfer.commands.recipe import AUGMENTS, Recipe

DEFAULT = Recipe()
OUTPUT_HELP = (
    "folder for the results, made if there is none. An earlier run's files in it are replaced, "
    "other files stay; a folder with files of the same names from elsewhere is refused"
)


def add_folders(parser: Any, *, resume: str) -> None:
    """Add IMAGES, --output and --resume.

    Args:
        parser: An `argparse.ArgumentParser`.
        resume: Str, the help of --resume.
    """
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=folder,
        help="folder with one folder a class, or with train/, validation/ and test/ that have them",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=OUTPUT_HELP)
    parser.add_argument("--resume", action="store_true", help=resume)


def add_backbone(group: Any, *, repeatable: bool = False) -> None:
    """Add --backbone, --backbone-arg and --weights.

    Args:
        group: A group of arguments.
        repeatable: Bool, whether there may be several backbones.
    """
    if repeatable:
        group.add_argument(
            "--backbone",
            metavar="NAME",
            action="append",
            help="a model of keras.applications; repeated, one of several to choose from (default: "
            f"{DEFAULT.backbone})",
        )
    else:
        group.add_argument(
            "--backbone",
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=f"a model of keras.applications (default: {DEFAULT.backbone})",
        )
    from_scratch = "train trains everything from scratch"
    if repeatable:
        from_scratch = "heads learn on the frozen features of a network that has learned nothing"
    group.add_argument(
        "--backbone-arg",
        metavar="NAME=VALUE",
        type=named_value,
        action="append",
        default=[],
        help="a further argument of that model's function, such as alpha=0.35; may be repeated",
    )
    group.add_argument(
        "--weights",
        metavar="imagenet|none|PATH",
        type=lambda text: None if text == "none" else text,
        default=argparse.SUPPRESS,
        help=f"imagenet is downloaded once; with none they are random, and {from_scratch}; PATH is "
        "a weights file of the model without its classifier (default: imagenet)",
    )


def add_image_size(group: Any, *, default: str) -> None:
    """Add --image-size.

    Args:
        group: A group of arguments.
        default: Str, what it says of the default.
    """
    group.add_argument(
        "--image-size",
        metavar="N",
        type=int,
        help=f"height and width in pixels that images are resized to (default: {default})",
    )


def add_steps(group: Any) -> None:
    """Add --batch-size and --mixed-precision.

    Args:
        group: A group of arguments.
    """
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=DEFAULT.batch_size,
        help="images a training step (default: %(default)s)",
    )
    group.add_argument(
        "--mixed-precision",
        action="store_true",
        help="compute in 16 bits (float16 on a GPU, bfloat16 elsewhere): faster where the "
        "hardware knows it",
    )


def add_augmentation(group: Any, *, default: str, why: str = "") -> None:
    """Add --augment and --no-flip.

    Args:
        group: A group of arguments.
        default: Str, the default of --augment.
        why: Str, what its help says further.
    """
    group.add_argument(
        "--augment",
        choices=AUGMENTS,
        default=default,
        help="random changes of training images: light is flip, shift and zoom; strong is more of "
        f"these, rotation and shear{why} (default: %(default)s)",
    )
    group.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="never mirror images: for letters, digits, road signs",
    )


def add_split(group: Any, *, seeded: str = "") -> None:
    """Add --validation-split, --test-split and --seed.

    Args:
        group: A group of arguments.
        seeded: Str, what else follows from the seed.
    """
    group.add_argument(
        "--validation-split",
        metavar="FRACTION",
        type=float,
        default=DEFAULT.validation_split,
        help="fraction of each class to validate on, where IMAGES has no validation/ "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--test-split",
        metavar="FRACTION",
        type=float,
        default=DEFAULT.test_split,
        help="fraction of each class to test on at the end, where IMAGES has no test/ "
        "(default: none)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=seed,
        default=DEFAULT.seed,
        help=f"seed of {seeded}the split, the weights, the order and the augmentation (default: 0)",
    )


# What the words are read as.


def folder(text: str) -> Path:
    """Read a path that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such folder: {text!r}; check the path")
    return path


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32-1, not {text!r}")
    return int(text)


def start(text: str) -> str | int | float | None:
    """Read where thawing begins."""
    if text == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def named_value(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as alpha=0.35, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def address(text: str) -> tuple[str, int | None]:
    """Read ADDRESS:PORT, whose port may be left out. An IPv6 address has brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_host = host.strip("[]") and (is_bracketed or not set("[]:") & set(host))
    if not is_host or (port and not (port.isdecimal() and 0 < int(port) < 2**16)):
        raise argparse.ArgumentTypeError(
            f"expected ADDRESS:PORT, such as 0.0.0.0:8000 or [::1]:8000, not {text!r}"
        )
    return host, int(port) if port else None
