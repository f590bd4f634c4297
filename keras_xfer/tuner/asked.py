"""What a search was asked, as plain data: by it a search that goes on is told from another."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_xfer import files
from keras_xfer.features import digests
from keras_xfer.features.nesting import describe, flatten
from keras_xfer.features.source import as_tuple, is_arrays, is_tf_dataset, to_numpy
from keras_xfer.tuner.durable import is_worker
from keras_xfer.tuner.search_result import BEST_MODEL, TRIAL_EPOCHS, TRIALS

PROJECT = "search"  # KerasTuner's name for what it keeps of a search, here its folder
_ASKED = "search.json"
_FINGERPRINT = "fingerprint"
_NAMES = {"rounds": "number of trials or epochs (rounds)"}  # where the key alone would not say it


def of_data(data: Any) -> Any:
    """What tells data of `Model.fit` from others, as far as it is cheap.

    Arrays are known by their content; a dataset that has a `fingerprint()` by that; others by their
    type, their length and what one batch is like, since to read them all may take as long as an
    epoch.

    Args:
        data: arrays, a nest of arrays, a dataset, an iterable, or None.

    Returns:
        JSON.

    Example:

    >>> of_data(np.zeros((4, 2))) == of_data(np.ones((4, 2)))
    False
    """
    if data is None:
        return None
    if is_arrays(data):
        arrays = [to_numpy(leaf) for leaf in flatten(data)]
        return {"structure": describe(data), "arrays": digests.of_arrays(arrays)}
    told: dict[str, Any] = {"type": type(data).__name__}
    if is_tf_dataset(data):  # whose fingerprint() never recurs where it calls Python
        return {**told, "batches": int(data.cardinality()), "batch": repr(data.element_spec)}
    fingerprint = getattr(data, _FINGERPRINT, None)
    if callable(fingerprint):
        return {**told, "batches": _length(data), _FINGERPRINT: str(fingerprint())}
    if isinstance(data, keras.utils.PyDataset):
        batch = as_tuple(data[0])
        specs = [_spec(to_numpy(leaf)) for leaf in flatten(batch)]
        return {**told, "batches": _length(data), "batch": [describe(batch), specs]}
    return {**told, "batches": _length(data)}


def of_fit_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What tells further arguments of `Model.fit` from others; None is as if it were not given.

    Args:
        arguments: mapping of names to values.

    Returns:
        dict, JSON.
    """
    return {name: _argument(value) for name, value in arguments.items() if value is not None}


def of_callable(value: Any) -> Any:
    """What tells a function, a loss or metrics from others, the same in every process.

    Args:
        value: a function, a loss or a metric of Keras, a name, a list or mapping of these, or None.

    Returns:
        JSON.

    Example:

    >>> of_callable(keras.losses.Huber(delta=1.0)) == of_callable(keras.losses.Huber(delta=2.0))
    False
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [of_callable(each) for each in value]
    if isinstance(value, Mapping):
        if value.get("class_name") == "__lambda__":  # whose code is not the same everywhere
            return "<lambda>"
        config = {str(name): of_callable(each) for name, each in value.items()}
        if isinstance(config.get("name"), str):  # auc_1 is the second that this process makes
            config["name"] = re.sub(r"_\d+$", "", config["name"])
        return config
    if isinstance(value, keras.losses.Loss | keras.metrics.Metric):
        told: list[Any] = [type(value).__name__, of_callable(value.get_config())]
        if isinstance(value, keras.losses.Loss):
            # What a function is called with: the delta of Huber is in no config (keras 3.15.1).
            told.append(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)))
        return told
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    return getattr(value, "__name__", type(value).__name__)


def check_same(folder: Path, asked: dict[str, Any], *, overwrite: bool) -> None:
    """Raise if the folder holds a search that was asked something else; else write what is asked.

    A search that is over, and of which every trial failed, is removed: what made them fail may be
    mended.

    Args:
        folder: path of the search's folder.
        asked: dict, JSON.
        overwrite: bool, whether to begin anew whatever is there.

    Raises:
        ValueError: it holds another search.
    """
    path = folder / _ASKED
    for name in (path.name, TRIALS, TRIAL_EPOCHS, BEST_MODEL):
        files.remove_leftovers(folder / name)
    if not overwrite and (folder / PROJECT / "oracle.json").exists():
        then = json.loads(path.read_text("utf-8")) if path.exists() else {}
        different = list(_differences(then, json.loads(json.dumps(asked))))
        if different:
            raise ValueError(
                f"Expected the search that {str(folder)!r} holds. Received: another "
                f"{' and another '.join(different)}. Call it with the same arguments to go on, "
                "pass overwrite=True to begin anew, or choose another directory."
            )
        if is_worker() or not _has_failed(folder / PROJECT, asked):
            return
    if not is_worker():
        folder.mkdir(parents=True, exist_ok=True)
        # The first thing to go, so that no search is ever taken for another.
        (folder / PROJECT / "oracle.json").unlink(missing_ok=True)
        shutil.rmtree(folder / PROJECT, ignore_errors=True)
        files.write_json(path, asked)


def _has_failed(project: Path, asked: Mapping[str, Any]) -> bool:
    """Whether each candidate of a search was tried, and failed."""
    state = json.loads((project / "oracle.json").read_text("utf-8"))
    begun = [each["id"] for each in state.get("begun", [[]])[0]]
    if not begun or not (state["exhausted"] or len(begun) == asked["rounds"][0][0]):
        return False
    trials = [project / f"trial_{each}" / "trial.json" for each in begun]
    return all(
        path.exists() and json.loads(path.read_text("utf-8"))["status"] == "FAILED"
        for path in trials
    )


def _differences(then: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name, value in asked.items():
        before = then.get(name)
        if name == "fit":
            before = before or {}
            yield from (
                each for each in sorted({*before, *value}) if before.get(each) != value.get(each)
            )
        elif _comparable(before) != _comparable(value):
            yield _NAMES.get(name, name)


def _comparable(told: Any) -> Any:
    """Without what a worker cannot compare: a fingerprint is of paths and times of files, too,
    which differ from machine to machine."""
    if isinstance(told, list):
        return [_comparable(each) for each in told]
    if isinstance(told, dict) and is_worker():
        return {name: each for name, each in told.items() if name != _FINGERPRINT}
    return told


def _argument(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):  # class_weight
        return {str(name): _argument(each) for name, each in value.items()}
    return of_data(value)


def _spec(array: np.ndarray) -> list[Any]:
    return [list(array.shape), digests.kind_of(array)]


def _length(data: Any) -> int | None:
    if isinstance(data, keras.utils.PyDataset):
        try:
            count = data.num_batches
        except NotImplementedError:
            return None
        return None if count is None else int(count)
    try:
        return len(data)
    except TypeError:  # a generator
        return None
