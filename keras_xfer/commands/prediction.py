"""What a run's model says of image files, each of its own size."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_xfer.commands import hub_handles
from keras_xfer.commands.recipe import UsageError
from keras_xfer.commands.runs import read_labels
from keras_xfer.commands.screen import Screen
from keras_xfer.commands.training import one_line
from keras_xfer.handles.failures import shown
from keras_xfer.images import ImageReadError, Skipped, list_images, load_image
from keras_xfer.images.pixels import shown as shown_path
from keras_xfer.layers import BackbonePreprocessing, HubModule
from keras_xfer.reports import predict_probabilities

_BATCH_SIZE = 32


class Prediction(NamedTuple):
    """What the model says of one file.

    Attributes:
        file: Str, the path as it was given, or found in a folder that was given.
        ranking: List of (class name, probability), the most probable first.
    """

    file: str
    ranking: list[tuple[str, float]]


def predict(
    run: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    top: int = 3,
    screen: Screen | None = None,
    trust: bool = False,
    hub: str | None = None,
) -> tuple[list[Prediction], list[Skipped]]:
    """Let the model of a run classify image files.

    Args:
        run: Path of the folder that `train`, `tune` or `demo` wrote.
        paths: Image files, and folders of them.
        top: Int, the most classes to name for each image. Defaults to 3.
        screen: `None`, or a `Screen` that shows the progress.
        trust: Bool, whether to run the code of the SavedModels that the model holds.
        hub: `None`, or the handle of a SavedModel to load in their place.

    Returns:
        A list of `Prediction` and a list of `Skipped`, the files that are no readable images.

    Raises:
        UsageError: `run` is not the folder of a run, its model is damaged, or it holds a SavedModel
            that is not trusted or not there.
        keras_xfer.images.ImageFolderError: A path is missing, or a folder holds no images.
    """
    class_names = read_labels(run)
    files = list_images(paths)
    model = load_model(run, class_names, trust=trust, hub=hub)
    progress = None if screen is None else screen.progress("predicting")
    predictions: list[Prediction] = []
    skipped: list[Skipped] = []
    done = 0
    for batch in _batches(files, model):
        for file, image in batch:
            if isinstance(image, ImageReadError):
                skipped.append(Skipped(shown_path(file, None), image.reason))
        readable = [(file, image) for file, image in batch if isinstance(image, np.ndarray)]
        if readable:
            images = np.stack([image for _, image in readable])
            _, _, answers = predict_probabilities(model, (images,))
            for (file, _), row in zip(readable, answers, strict=True):
                order = np.argsort(-row, kind="stable")[:top]
                ranking = [(class_names[i], float(row[i])) for i in order]
                predictions.append(Prediction(shown_path(file, None), ranking))
        done += len(batch)
        if progress is not None:
            progress(done, len(files))
    return predictions, skipped


def load_model(
    run: str | os.PathLike[str],
    class_names: Sequence[str],
    *,
    trust: bool = False,
    hub: str | None = None,
) -> keras.Model:
    """Load the model of a run.

    Args:
        run: Path of the run's folder.
        class_names: The names of its classes.
        trust: Bool, whether to run the code of the SavedModels that the model holds.
        hub: `None`, or the handle of a SavedModel to load in their place.

    Returns:
        A `keras.Model`.

    Raises:
        UsageError: It does not load, answers another number of classes, or holds a SavedModel that
            is not trusted or not there.
    """
    path = Path(run) / "model.keras"
    held = hub_handles.trusted(path, trust=trust, hub=hub)
    places = hub_handles.places(held, hub)
    try:
        with HubModule.relocated(places):
            model = keras.saving.load_model(path, compile=False, safe_mode=not held)
    except Exception as error:  # a damaged file can raise anything: zip, JSON, HDF5, Keras
        reason = shown(one_line(error))[:200]
        raise UsageError(
            f"{str(path)!r} cannot be loaded: {reason}. Restore it, or train again"
        ) from error
    if model.output_shape[-1] != len(class_names):
        raise UsageError(
            f"{str(path)!r} answers {model.output_shape[-1]} classes, and labels.json beside it "
            f"names {len(class_names)}. Put back the one that belongs to the other"
        )
    return model


def _batches(
    files: list[Path], model: keras.Model
) -> Iterator[list[tuple[Path, np.ndarray | ImageReadError]]]:
    """Read the files on all cores, in batches where the model brings images to one size.

    They are read as they were for training, so that the answers are those of predictions.csv.
    """
    size, resize = _geometry(model)

    def read(file: Path) -> tuple[Path, Any]:
        try:
            return file, load_image(file, size, resize=resize)
        except ImageReadError as error:
            return file, error

    waiting = iter(files)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while chunk := list(itertools.islice(waiting, _BATCH_SIZE)):
            read_chunk = list(pool.map(read, chunk))
            if size is None:
                yield from ([each] for each in read_chunk)
            else:
                yield read_chunk


def _geometry(model: keras.Model) -> tuple[tuple[int, int] | None, str]:
    for layer in model.layers:
        if isinstance(layer, BackbonePreprocessing) and layer.image_size is not None:
            return layer.image_size, layer.resize
    return None, "crop"
