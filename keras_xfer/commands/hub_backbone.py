"""The backbone of `keras-xfer train --hub`: a SavedModel that takes square colour images."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_xfer import freezing, handles
from keras_xfer.commands.hub_handles import said
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.handles.failures import without_secret
from keras_xfer.layers import Backbone, HubModule

_IN_PYTHON = "or call it as it needs in Python: keras_xfer.Backbone.from_hub"


def build(recipe: Recipe) -> tuple[Backbone, int]:
    """Load the SavedModel of a recipe as a backbone that gives one vector an image.

    A dict is taken at `"default"`, as the common signatures of TensorFlow Hub have it, or at its
    only entry; a feature map is pooled; what cannot be called is called by its signature.

    Args:
        recipe: A `Recipe` with a `hub`.

    Returns:
        The `Backbone`, and the height and width of its images.

    Raises:
        UsageError: It cannot be had or loaded, takes other inputs, or gives something else.
    """
    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            "--hub: a SavedModel runs on the TensorFlow backend alone. Received: KERAS_BACKEND="
            f"{keras.backend.backend()}. Set KERAS_BACKEND=tensorflow, or give --backbone"
        )
    call: dict[str, Any] = {}
    try:
        try:
            backbone = _load(recipe)
        except ValueError:
            call = _signature(recipe)
            if not call:
                raise
            backbone = _load(recipe, **call)
        size, output = _probe(backbone, recipe)
        more = _reading(output, recipe)
        # Only now is it known how it is to be called: a second time, then.
        return (_load(recipe, **call, **more) if more else backbone), size
    except UsageError:
        raise
    except Exception as error:  # the files of others, and TensorFlow, can raise anything
        text = said(error)
        handle = without_secret(str(recipe.hub))
        named = "" if repr(handle) in text else f"{handle!r} cannot be loaded: "
        raise UsageError(f"--hub: {named}{text}") from error


def why_frozen(backbone: Backbone) -> str | None:
    """Return what stands against training a SavedModel.

    Args:
        backbone: A `Backbone`.

    Returns:
        Str, or None where it can be trained, as whatever is no SavedModel can.
    """
    module = backbone.model
    if not isinstance(module, HubModule):
        return None
    if module.why_not_trainable:
        return module.why_not_trainable.rstrip(".")
    try:
        freezing.select(module, "all", batch_norm=backbone.batch_norm)
    except ValueError:
        return "it has nothing to train"
    return None


def _load(recipe: Recipe, **call: Any) -> Backbone:
    return Backbone.from_hub(
        recipe.hub,
        image_size=recipe.image_size,
        input_range=recipe.hub_range,
        name="backbone",
        sha256=recipe.hub_sha256,
        **call,
    )


def _signature(recipe: Recipe) -> dict[str, Any]:
    """How to call a SavedModel that has nothing but signatures; nothing where it has more."""
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(handles.resolve(str(recipe.hub), sha256=recipe.hub_sha256))
    except Exception:  # what HubModule has said of it says more
        return {}
    if callable(loaded) or callable(getattr(loaded, "serve", None)):
        return {}
    signatures = getattr(loaded, "signatures", None) or {}
    names = [name for name in ("serving_default", "default") if name in signatures]
    name = names[0] if names else next(iter(signatures)) if len(signatures) == 1 else None
    if name is None:
        return {}
    return {"signature": name, "output_key": _key(signatures[name].structured_outputs, recipe)}


def _probe(backbone: Backbone, recipe: Recipe) -> tuple[int, Any]:
    """The size of images that the module is to be given, and what it then gives."""
    says, asked = backbone.model.image_size, recipe.image_size
    if _takes_channels_first(backbone):
        raise UsageError(
            f"--hub: {recipe.hub!r} wants the channels of an image first, and this command gives "
            f"them last. Give a module that takes (batch, height, width, 3), {_IN_PYTHON}"
        )
    if asked is None and says is not None and says[0] != says[1]:
        raise UsageError(
            f"--hub: {recipe.hub!r} takes images of {says[0]} x {says[1]} pixels (height x width), "
            f"and this command trains on square ones. Give a module that takes these, {_IN_PYTHON}"
        )
    size = asked if says is None or asked is not None else says[0]
    try:
        output = backbone.compute_output_spec(keras.KerasTensor((None, size, size, 3)))
    except Exception as error:  # of whatever the SavedModel does with it
        if says is not None and asked is not None and (asked, asked) != says:
            raise UsageError(
                f"--image-size: {recipe.hub!r} takes images of {says[0]} x {says[1]} pixels. "
                f"Received: {asked}. Leave it out"
            ) from error
        reason = said(error).partition(" Received:")[0].rstrip(".")
        raise UsageError(
            f"--hub: {recipe.hub!r} does not take colour images as this command gives them: "
            f"{reason}. Give a module that does, such as a feature vector of images, {_IN_PYTHON}"
        ) from error
    if size is None:
        raise UsageError(
            f"--image-size: {recipe.hub!r} takes images of any size. Say which: --image-size N, "
            "that which it was trained on, such as 224"
        )
    if not _takes(backbone, (2, size, size, 3)):
        raise _of_one_batch(recipe)
    return size, output


def _takes_channels_first(backbone: Backbone) -> bool:
    """Whether the module takes images with the channels first, and none with the channels last."""
    sides = (None, 224)  # a side of any length fits one that is said, 224 one that is not
    return any(
        _takes(backbone, (None, 3, side, side)) and not _takes(backbone, (None, side, side, 3))
        for side in sides
    )


def _takes(backbone: Backbone, shape: tuple[int | None, ...]) -> bool:
    try:
        backbone.model.compute_output_spec(keras.KerasTensor(shape))
    except Exception:  # of whatever the SavedModel does with it
        return False
    return True


def _of_one_batch(recipe: Recipe) -> UsageError:
    return UsageError(
        f"--hub: {recipe.hub!r} takes batches of one size alone, and this command gives as many "
        "images as there are. Give a module that was saved for any batch: "
        "tf.TensorSpec([None, height, width, 3])"
    )


def _reading(output: Any, recipe: Recipe) -> dict[str, Any]:
    """How to make one vector an image of what the module gives."""
    call: dict[str, Any] = {}
    if isinstance(output, Mapping):
        call["output_key"] = _key(output, recipe)
        output = output[call["output_key"]]
    shape = getattr(output, "shape", None)
    if not (
        isinstance(output, keras.KerasTensor)
        and keras.backend.is_float_dtype(output.dtype)
        and shape is not None
        and len(shape) in (2, 4)
        and shape[-1] is not None
    ):
        given = f"{output.dtype}{shape}" if shape is not None else f"a {type(output).__name__}"
        raise UsageError(
            f"--hub: expected a module that gives one floating tensor of shape (batch, features) "
            f"or (batch, height, width, channels). Received: {given} from {recipe.hub!r}. Give a "
            f"feature vector of images, {_IN_PYTHON}"
        )
    if shape[0] is not None:  # whatever it says of its input
        raise _of_one_batch(recipe)
    return {**call, "pooling": "avg"} if len(shape) == 4 else call


def _key(outputs: Mapping[str, Any], recipe: Recipe) -> str:
    if "default" in outputs:
        return "default"
    if len(outputs) == 1:
        return str(next(iter(outputs)))
    raise UsageError(
        f"--hub: expected one output, or one called 'default'. Received: {sorted(outputs)} from "
        f"{recipe.hub!r}. Give a feature vector of images, {_IN_PYTHON}(…, output_key=…)"
    )
