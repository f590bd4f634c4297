"""Stages as a YAML file that people edit."""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_xfer.files import write_text
from keras_xfer.stages.planning import check
from keras_xfer.stages.stage import Stage

_HEADER = """\
# A schedule of keras_xfer: stages in the order in which they run. Of each:
#   unfreeze       null (head alone), all, an index, a fraction, a layer, a block, an expression
#   epochs         how long at most; leave it out on the last stage to train to the end of fit
#   learning_rate  a number, or {head: ..., backbone: ...}, or {class_name: CosineDecay, config: {...}}
#   layer_decay    the factor from each block of the backbone to the one below it
#   warmup_epochs  how long the rate rises linearly
#   patience       epochs without improvement that end the stage
#   name           for printing
"""

_TEXTS = ("unfreeze", "name")  # what looks like a number there is a name


def stages_to_yaml(stages: Sequence[Stage], path: str | os.PathLike[str]) -> None:
    """Write a schedule as a YAML file, to be edited and read again by `stages_from_yaml`.

    Args:
        stages: list of `keras_xfer.Stage`.
        path: str or path, the file to write; it is replaced at once or not at all.

    Raises:
        TypeError: `stages` is not a list of stages.
        ValueError: the schedule contradicts itself, or names a layer as Keras has numbered it in
            this process, which another process may number otherwise.
        OSError: the file cannot be written.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "stages.yaml"
    >>> stages_to_yaml([Stage(epochs=5, learning_rate=1e-3), Stage(-20, learning_rate=1e-4)], path)
    >>> stages_from_yaml(path)[1]
    Stage(unfreeze=-20, epochs=None, learning_rate=0.0001, layer_decay=1.0, warmup_epochs=0, \
patience=None, name=None)

    Reference:
        https://yaml.org/spec/1.2.2/
    """
    check(stages)
    for index, stage in enumerate(stages):
        _check_lasting(stage.unfreeze, index)
    body = _yaml().safe_dump([stage.get_config() for stage in stages], sort_keys=False)
    write_text(path, f"{_HEADER}stages:\n{body}")


def stages_from_yaml(path: str | os.PathLike[str]) -> list[Stage]:
    """Read a schedule from a YAML file.

    Args:
        path: str or path, the file to read: a list of stages, or a mapping with `stages`.

    Returns:
        list of `keras_xfer.Stage`. What they select is looked up when they meet a model.

    Raises:
        ValueError: the file is no YAML or no schedule; the stage and the nearest valid choice are
            named.
        OSError: the file cannot be read.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "stages.yaml"
    >>> _ = path.write_text("stages: [{unfreeze: null, epochs: 3}, {unfreeze: all, epoch: 2}]")
    >>> stages_from_yaml(path)
    Traceback (most recent call last):
        ...
    ValueError: Stage 2 in stages.yaml: Expected the arguments of keras_xfer.Stage. Received: \
'epoch'; nearest is 'epochs', all are unfreeze, epochs, learning_rate, layer_decay, \
warmup_epochs, patience, name.

    Reference:
        https://yaml.org/spec/1.2.2/
    """
    path = Path(path)
    yaml = _yaml()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected YAML in {path}. Received: {' '.join(str(error).split())}"
        ) from None
    if isinstance(content, Mapping):
        for key in content:
            if key != "stages":
                raise ValueError(
                    f"Expected `stages` at the top of {path.name}. Received: {key!r}; nearest is "
                    "'stages'."
                )
        content = content.get("stages")
    if not isinstance(content, list):
        raise ValueError(
            f"Expected a list of stages in {path.name}. Received: {type(content).__name__}."
        )
    stages = [_stage(each, index, path.name) for index, each in enumerate(content)]
    try:
        check(stages)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return stages


def _stage(content: Any, index: int, file: str) -> Stage:
    where = f"Stage {index + 1} in {file}"
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{where}: expected a mapping such as {{epochs: 5}}. Received: {content!r}."
        )
    try:
        return Stage.from_config(
            {key: value if key in _TEXTS else _number(value) for key, value in content.items()}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any) -> Any:
    """YAML 1.1, which PyYAML reads, takes 1e-4 for text: it wants 1.0e-4."""
    if isinstance(value, Mapping):
        return {key: _number(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_number(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _check_lasting(unfreeze: Any, index: int) -> None:
    """Refuse names that Keras counts up in each process."""
    if not isinstance(unfreeze, str):
        return
    match = re.fullmatch(r"([a-z0-9_]+?)_\d+(_block)?", unfreeze)
    if match and match[1] in _automatic_names():
        raise ValueError(
            f"Expected a selection that holds in another process. Received: unfreeze={unfreeze!r} "
            f"in stage {index + 1}, a name that Keras counts up in each process. Use an index, a "
            "fraction, or the name of a layer that somebody has named."
        )


def _automatic_names() -> set[str]:
    """The names that Keras gives to layers without one, before it numbers them."""
    classes = {name for name, each in vars(keras.layers).items() if inspect.isclass(each)}
    classes |= {"Sequential", "Functional"}
    classes -= {"Layer"}  # nobody's own; `layer_1` is what people call theirs
    return {
        re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()
        for name in classes
    }


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Stages in YAML need PyYAML: pip install pyyaml") from error
    return yaml
