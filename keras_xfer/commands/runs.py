"""The folder of a run: which files in it are ours, written whole or not at all, and read again."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_xfer import files
from keras_xfer._version import __version__
from keras_xfer.commands.recipe import UsageError

OUTPUTS = (
    "model.keras",
    "labels.json",
    "history.csv",
    "predictions.csv",
    "metrics.json",
    "skipped.csv",
    "report.html",
    "trials.csv",
    "trial_epochs.csv",
)
_GIVE = "Give the --output of keras-xfer train, tune or demo"
RECORD = "run.json"  # says that a folder is a run's, and what was asked for
UNFINISHED = "unfinished"  # the folder of what a run needs to go on, there until it has ended
CHECKPOINT = f"{UNFINISHED}/best.keras"
FEATURES = f"{UNFINISHED}/features"  # a folder of its own, a keras_xfer.FeatureCache
SEARCH = "search"  # the folder of a search, KerasTuner's project, there until it has ended
SEARCH_STATE = f"{SEARCH}/oracle.json"  # as KerasTuner names it
# What says that there is something to go on with goes first: the rest is of no use without it.
_UNFINISHED_FILES = ("training_state.zip", "best.keras", "best.keras.json")
# What the split is drawn by, of which the fingerprint of the images tells too.
_DRAWN_BY = {"images", "validation_split", "test_split", "seed"}
# What only a run with --hub says, or only one without.
_OF_ONE_KIND = {"backbone", "backbone_args", "weights", "hub_range", "hub_sha256"}


class RunFolder:
    """The folder that `keras-xfer train`, `tune` and `demo` write.

    A new folder, an empty one, one of an earlier run (whose files are replaced), or one with other
    files (which stay) will do. A folder that holds a file of one of our names without being a
    run's is refused. Every file is written beside its place and moved there when it is complete.

    Args:
        path: Path of the folder. Nothing is made before `writing`.
        images: `None`, or the folder of images, which must not hold this one.

    Raises:
        UsageError: The folder cannot be used.

    Example:
    >>> import tempfile
    >>> run = RunFolder(Path(tempfile.mkdtemp()) / "run")
    >>> with run.writing({"seed": 0}):
    ...     run.write_json("metrics.json", {"accuracy": 0.5})
    >>> sorted(path.name for path in run.path.iterdir())
    ['metrics.json', 'run.json']
    """

    def __init__(
        self, path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path)
        if images is not None and self.path.resolve().is_relative_to(Path(images).resolve()):
            raise UsageError(
                f"--output: {str(self.path)!r} lies in the folder of images, where it would be "
                "taken for a class. Choose a folder outside"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output: {str(self.path)!r} is a file. Give a folder")
        if not (self / RECORD).is_file():
            ours = (*OUTPUTS, *self._unfinished(), FEATURES, SEARCH)
            foreign = [name for name in ours if (self / name).exists()]
            if foreign:
                raise UsageError(
                    f"--output: {str(self.path)!r} holds {', '.join(foreign)}, and is not the "
                    "folder of an earlier run. Choose another folder, or move them elsewhere"
                )
        self._check_writable()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def writing(self, record: dict[str, Any], *, resume: bool = False) -> Iterator[None]:
        """Begin a run here: what an earlier one left goes. What fails before an epoch leaves nothing.

        Args:
            record: What was asked for, for `run.json`.
            resume: Bool, whether to keep what an unfinished run left, to go on from it.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (*OUTPUTS, RECORD, *self._unfinished()):
                files.remove_leftovers(self / name)
            if not resume:
                # First of all: of a search that was interrupted it tells of the best so far, and
                # without that search it would pass for one that has ended.
                self.remove("metrics.json")
                self._remove_folders()
            elif not self.is_searching():
                self._remove_folder(SEARCH)  # half removed, or hardly begun
            if not (resume and self.is_unfinished()):
                # What an earlier run could be taken for ended or unfinished by goes first, its record
                # last: killed in between, nothing of it is ever taken for the new run's. (Features
                # are: they are known by what they were computed of.)
                self.remove("metrics.json", *self._unfinished(), *OUTPUTS)
                self.write_json(RECORD, {"keras_xfer": __version__, **record})
            yield
        except BaseException:
            kept = any((self / name).exists() for name in ("history.csv", "trials.csv"))
            if not (self.is_unfinished() or kept):
                self.remove(*OUTPUTS, *self._unfinished(), RECORD)
                self._remove_folders()
                made.insert(0, self / UNFINISHED)
                _remove_empty(made)
            raise
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Remove what is kept to go on with a run: it has ended."""
        self.remove(*self._unfinished())
        self._remove_folders()
        _remove_empty([self / UNFINISHED])

    def is_unfinished(self) -> bool:
        """Return whether a run here was cut off after its first epoch, or a search begun."""
        return (self / UNFINISHED / "training_state.zip").exists() or self.is_searching()

    def is_searching(self) -> bool:
        """Return whether there is a search here that has not ended."""
        return (self / SEARCH_STATE).exists()

    def finished(self) -> dict[str, Any] | None:
        """Return the metrics of the run here, if it has come to its end."""
        if self.is_unfinished() or not (self / "metrics.json").is_file():
            return None
        metrics: dict[str, Any] = json.loads((self / "metrics.json").read_text(encoding="utf-8"))
        return metrics

    def time_finished(self) -> int | None:
        """Return when the run here came to its end, on the clock of its disk in nanoseconds."""
        with contextlib.suppress(OSError):  # of a run that is being replaced
            if not self.is_unfinished():
                return (self / "metrics.json").stat().st_mtime_ns
        return None

    def check_resumable(self, record: dict[str, Any]) -> None:
        """Refuse to go on with a run that was asked for otherwise.

        Args:
            record: What is asked for now.

        Raises:
            UsageError: `run.json` holds something else; the differences are named.
        """
        if not ((self / RECORD).is_file() and self.written()):
            return
        different = self.differences(record)
        if different:
            raise UsageError(
                f"--resume: {str(self.path)!r} holds a run that was asked for otherwise: "
                f"{'; '.join(different)}. Give the options of that run, choose another --output, "
                "or leave out --resume to begin anew in its place"
            )

    def differences(self, record: dict[str, Any]) -> list[str]:
        """Say in words how what is asked for differs from what `run.json` holds.

        Args:
            record: What is asked for now.

        Returns:
            List of str.
        """
        then = json.loads((self / RECORD).read_text(encoding="utf-8"))
        return _differences(then, json.loads(files.to_json(record)))

    def _remove_folders(self) -> None:
        if self.is_searching():
            self.remove(SEARCH_STATE)  # half removed, the rest is taken for nothing
        for name in (FEATURES, SEARCH):
            self._remove_folder(name)

    def _remove_folder(self, name: str) -> None:
        if (self / name).exists():
            shutil.rmtree(self / name)

    @staticmethod
    def _unfinished() -> list[str]:
        return [f"{UNFINISHED}/{name}" for name in _UNFINISHED_FILES]

    def remove(self, *names: str) -> None:
        """Remove files of ours.

        Args:
            *names: Their names.
        """
        for name in names:
            (self / name).unlink(missing_ok=True)

    def written(self) -> list[str]:
        """Return the names of the outputs that are there."""
        return [name for name in OUTPUTS if (self / name).is_file()]

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file.

        Args:
            name: Its name.
            value: See `keras_xfer.files.to_json`.
        """
        files.write_json(self / name, value)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write one CSV file.

        Args:
            name: Its name.
            columns: Its header.
            rows: A sequence of values each.
        """
        write_csv(self / name, columns, rows)

    def _check_writable(self) -> None:
        parent = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(
                f"--output: cannot write in {str(parent)!r}. Make it writable, or choose another "
                "folder"
            )


def check_cache(
    path: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Refuse a place for a cache where it would be taken for something else.

    Args:
        path: Path of its folder, which need not exist.
        images: Path of the folder of images.
        output: Path of the run's folder.

    Raises:
        UsageError: It is a file, or lies in the folder of images, or would hold the run's folder.

    Example:
    >>> check_cache("runs/photos", images="photos", output="runs/photos")
    Traceback (most recent call last):
        ...
    keras_xfer.commands.recipe.UsageError: --cache: 'runs/photos' holds --output, which `keras-xfer \
cache clear` would remove. Choose a folder of its own
    """
    folder = Path(path).resolve()
    if folder.is_relative_to(Path(images).resolve()):
        raise UsageError(
            f"--cache: {str(path)!r} lies in the folder of images, where it would be taken for a "
            "class. Choose a folder outside"
        )
    if Path(output).resolve().is_relative_to(folder):
        raise UsageError(
            f"--cache: {str(path)!r} holds --output, which `keras-xfer cache clear` would remove. "
            "Choose a folder of its own"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--cache: {str(path)!r} is a file. Give a folder")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say in words how two records differ."""
    names = [name for name, value in now.items() if then.get(name) != value]
    found = []
    for name in names:
        before, after = then.get(name), now[name]
        if name == "images_fingerprint":
            if not _DRAWN_BY.intersection(names):
                found.append("the images have changed since (their names, sizes or dates)")
        elif name in _OF_ONE_KIND and name not in then:
            continue  # `hub`, which differs too, says it
        elif name == "stages":
            found += _stage_differences(before, after)
        else:
            found.append(f"{name} was {before!r} and is {after!r}")
    return found


def _stage_differences(
    before: list[dict[str, Any]] | None, after: list[dict[str, Any]] | None
) -> list[str]:
    """Say in words how two schedules differ, which are those of files or None."""
    if before is None or after is None:
        return [f"--stages was {'not ' if before is None else ''}given"]
    if len(before) != len(after):
        return [f"--stages had {len(before)} stages and has {len(after)}"]
    found = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        label = f"stage {index + 1}" + (f" ({new['name']})" if new.get("name") else "")
        found += [
            f"{key} of {label} was {_told(old, key)} and is {_told(new, key)}"
            for key in dict.fromkeys([*old, *new])
            if _told(old, key) != _told(new, key)
        ]
    return found


def _told(stage: dict[str, Any], key: str) -> str:
    return repr(stage[key]) if key in stage else "left out"


def _remove_empty(folders: Iterable[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # not there, or not empty: somebody else's
            path.rmdir()


def write_csv(
    path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    r"""Write a CSV file in UTF-8, atomically.

    Args:
        path: The file.
        columns: Its header.
        rows: A sequence of values each.

    Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.csv"
    >>> write_csv(path, ["a", "b"], [[1, "x, y"]])
    >>> path.read_text()
    'a,b\n1,"x, y"\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Read the class names of a run, in the order of the model's outputs.

    Args:
        path: Path of the run's folder.

    Returns:
        List of str.

    Raises:
        UsageError: The folder is not that of a run, or its labels are damaged.

    Example:
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "model.keras").touch(), (folder / "labels.json").write_text('["cat", "dog"]')
    >>> read_labels(folder)
    ['cat', 'dog']
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"No such folder: {str(folder)!r}. {_GIVE}")
    for name in ("model.keras", "labels.json"):
        if not (folder / name).is_file():
            raise UsageError(f"No {name} in {str(folder)!r}. {_GIVE}")
    try:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    except ValueError as error:
        labels = error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(
            f"{str(folder / 'labels.json')!r} is no list of class names. Train again, or restore it"
        )
    return labels
