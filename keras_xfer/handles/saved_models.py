"""Where in a folder the SavedModel is."""

from pathlib import Path

from keras_xfer.handles.failures import HandleError

# tfhub_module.pb marks TensorFlow 1's format: https://www.tensorflow.org/hub/tf1_hub_module
FILES = ("saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb")

_MOST_NAMES = 8


def saved_model_in(folder: Path) -> Path:
    """Return `folder`, or the only folder in it, whichever holds a SavedModel.

    Args:
        folder: `pathlib.Path` of a folder.

    Returns:
        The `pathlib.Path` of the folder that holds `saved_model.pb`.

    Raises:
        HandleError: there is none, or there are several.

    Example:
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "1").mkdir()
    >>> _ = (folder / "1" / "saved_model.pb").write_bytes(b"")
    >>> saved_model_in(folder).name
    '1'

    Reference:
        https://www.tensorflow.org/guide/saved_model#the_savedmodel_format_on_disk
    """
    if holds_saved_model(folder):
        return folder
    entries = sorted(folder.iterdir())
    inner = [entry for entry in entries if entry.is_dir() and holds_saved_model(entry)]
    if len(inner) == 1:
        return inner[0]
    if inner:
        raise HandleError(
            f"Expected one SavedModel, but there are {len(inner)} in this folder: {_named(inner)}.",
            "Give the path of the one that is meant.",
        )
    raise HandleError(
        f"Expected a SavedModel, a folder that holds {FILES[0]} or {FILES[1]}, but there "
        f"{'is nothing' if not entries else f'are only: {_named(entries)}'}.",
        "Give the folder that tf.saved_model.save or model.export has written.",
    )


def holds_saved_model(folder: Path) -> bool:
    """Tell whether `folder` itself, not one inside it, holds a SavedModel."""
    return any((folder / name).is_file() for name in FILES)


def _named(entries: list[Path]) -> str:
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
