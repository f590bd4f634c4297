"""The command `keras-xfer`: arguments, errors and exit statuses.

Frameworks take seconds to load and talk while they do. So the arguments are read first, and the
modules that do the work are imported in the functions that need them.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from keras_xfer import lifeline
from keras_xfer.commands import hub_handles
from keras_xfer.commands.arguments import parser as _parser
from keras_xfer.commands.recipe import HUB_OR_BACKBONE, Recipe, UsageError
from keras_xfer.commands.search_recipe import SearchRecipe, process_of


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
        words = sys.argv[1:] if argv is None else list(argv)
        arguments = _parser().parse_args(words, argparse.Namespace(words=words))
        status = _COMMANDS[arguments.command](arguments)
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


def _tune(arguments: argparse.Namespace) -> int:
    lifeline.watch()
    from keras_xfer.commands.runs import RunFolder, check_cache

    if importlib.util.find_spec("pandas") is None:
        raise UsageError(
            'tune needs pandas, for trials.csv. Install it with: pip install "keras-xfer[report]"'
        )
    recipe = _search_recipe(arguments)
    place = process_of(os.environ)
    if arguments.listen is not None and arguments.workers is None:
        raise UsageError("--listen: it is for the chief of --workers. Give --workers N too")
    if place is not None and arguments.workers is not None and not lifeline.is_watched():
        raise UsageError(
            "--workers: with KERASTUNER_ORACLE_IP this process is a chief or a worker itself. Leave "
            "it out, or unset the variable"
        )
    RunFolder(arguments.output, images=arguments.images)
    if arguments.cache is not None:
        check_cache(arguments.cache, images=arguments.images, output=arguments.output)
    if arguments.workers is not None or place == "chief":
        # This process makes each backbone once, to see that it can, and leaves the GPU to workers.
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _quiet_start():
        from keras_xfer.commands import search
        from keras_xfer.commands.screen import Screen
    job = search.Search(arguments.images, arguments.output, recipe, Screen(), cache=arguments.cache)
    if place is not None and (place == "worker" or lifeline.is_watched()):
        job.take_part()
        return 0
    team = None
    if arguments.workers is not None and place is None:
        command = [sys.executable, "-m", "keras_xfer.cli", *arguments.words]
        team = search.Team(command, arguments.workers, *(arguments.listen or ("127.0.0.1", None)))
    job.run(resume=arguments.resume, team=team)
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
    if not predictions:
        file, reason = skipped[0]
        raise UsageError(
            f"None of {counted(len(skipped), 'file')} is a readable image; the first: {file!r} "
            f"({reason}). Give JPEG, PNG, BMP, GIF or WebP images"
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
    width = max(len(prediction.file) for prediction in predictions)
    for file, ranking in predictions:
        answers = "  ".join(f"{name} {probability:.1%}" for name, probability in ranking)
        screen.line(f"{file:{width}}  {answers}")
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


_COMMANDS = {
    "cache": _cache,
    "demo": _demo,
    "predict": _predict,
    "train": _train,
    "tune": _tune,
}


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = vars(arguments)
    recipe = {name: given[name] for name in vars(Recipe()) if name in given}
    if arguments.hub is not None:
        if {"backbone", "weights"} & given.keys():  # the defaults, too, where they are given
            raise UsageError(HUB_OR_BACKBONE)
        recipe["hub"] = hub_handles.located(arguments.hub)
    recipe["hub_range"] = tuple(arguments.hub_range)
    recipe["cached"] = False if arguments.no_cache else arguments.cache is not None or None
    return Recipe(**recipe, backbone_args=dict(arguments.backbone_arg))


def _search_recipe(arguments: argparse.Namespace) -> SearchRecipe:
    given = vars(arguments)
    fields = {field.name for field in dataclasses.fields(SearchRecipe)}
    return SearchRecipe(
        **{name: value for name, value in given.items() if name in fields},
        backbones=tuple(arguments.backbone or SearchRecipe.backbones),
        backbone_args=dict(arguments.backbone_arg),
    )


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
