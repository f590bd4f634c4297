"""What each model function of keras.applications expects of its input, and how to build it.

Offers `spec_for` (the expectation by name), `build` (the feature extractor, with the traps of the
single functions taken care of) and `identify` (the expectation of a model that somebody else
built). `APPLICATIONS`, at the end of the file, holds the whole table.
"""

from __future__ import annotations

import dataclasses
import difflib
import http.client
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class ApplicationSpec:
    """What one model of keras.applications expects of its input.

    The preprocessing that has to happen outside the model is, for an RGB image `x` with values in
    `input_range`, `channel_order(x * scale + offset)`: scale and offset are applied first and are
    therefore given in RGB order, also where `channel_order` then reverses the channels.

    Args:
        name: String, the function's name in keras.applications, such as `"ResNet50"`.
        module: String, its module in keras.applications, where its `preprocess_input` is.
        default_image_size: Integer, height and width in pixels that the weights were trained at.
        min_image_size: Integer, smallest height and width in pixels that the model accepts.
        mode: String. `"builtin"`: the model's own first layers preprocess, give it `[0, 255]`.
            `"caffe"`, `"tf"`, `"torch"`: the modes of `imagenet_utils.preprocess_input`.
            `"tf128"`: `x / 128 - 1` (EfficientNetV2 S, M and L without their own preprocessing).
        scale: Three floats in RGB order.
        offset: Three floats in RGB order.
        channel_order: String, the order of the channels that the model takes: `"rgb"` or `"bgr"`.
        url: String, the page that documents the model.
        input_range: Two floats, the range of values that scale and offset are defined on.
        channels: Integer, the number of channels of the model's input. Other than 3 only in specs
            that `identify` returns.

    Example:
    >>> spec = spec_for("VGG16")
    >>> spec.mode, spec.channel_order, spec.default_image_size
    ('caffe', 'bgr', 224)
    >>> spec.offset
    (-123.68, -116.779, -103.939)

    Reference: https://keras.io/api/applications/
    """

    name: str
    module: str
    default_image_size: int
    min_image_size: int
    mode: str
    scale: Triple
    offset: Triple
    channel_order: Literal["rgb", "bgr"]
    url: str
    input_range: tuple[float, float] = (0.0, 255.0)
    channels: int = 3


class WeightsUnavailableError(OSError):
    """The pretrained weights of a model could not be downloaded.

    Why and when: `build(..., weights="imagenet")` downloads a file the first time; this is the one
    error for every way in which the download can fail (no network, refused, not found, damaged).
    It derives from `OSError`, like the errors of the network itself.

    Example:
    >>> issubclass(WeightsUnavailableError, OSError)
    True

    Reference: https://keras.io/api/applications/
    """


def spec_for(application: str) -> ApplicationSpec:
    """Look up what the model function of that name in keras.applications expects of its input.

    Why and when: to preprocess for a backbone that is chosen by name, before it is built. For a
    model that exists already, and may have been built with other arguments, use `identify`.

    Args:
        application: String, the function's name, such as `"MobileNetV2"`.

    Returns:
        An `ApplicationSpec`.

    Raises:
        ValueError: If keras.applications has no function of that name; names the nearest ones.

    Example:
    >>> spec_for("EfficientNetB3").default_image_size
    300

    Reference: https://keras.io/api/applications/
    """
    if application in APPLICATIONS:
        return APPLICATIONS[application]
    wanted = re.sub(r"[^a-z0-9]", "", str(application).lower())
    by_lower = {name.lower(): name for name in APPLICATIONS}
    near = [by_lower[match] for match in difflib.get_close_matches(wanted, by_lower, n=3)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(APPLICATIONS)}."
    raise ValueError(
        "`application` must be the name of a model function in keras.applications. "
        f"Received: application={application!r}. {hint}"
    )


def build(
    application: str,
    /,
    *,
    input_shape: tuple[int | None, ...] | None = None,
    weights: str | Path | None = "imagenet",
    pooling: str | None = "avg",
    name: str | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Build a model of keras.applications without its classifier.

    Why and when: the functions of keras.applications agree on most arguments and fail differently
    on the rest: a custom `name` breaks EfficientNetV2 and the download of ConvNeXt, an unknown
    `pooling` is ignored, a failed download is a bare `Exception`. Here they all behave alike.

    Args:
        application: String, the function's name, such as `"MobileNetV2"`.
        input_shape: Tuple of three integers, `(height, width, channels)`, or channels first where
            that is Keras's image data format. A side of `None` takes images of any size (not
            NASNet). Defaults to `None`: three channels, any size; for NASNet its default size.
        weights: `"imagenet"`, which downloads them the first time, `None` for random ones, or the
            path of a weights file. EfficientNetB0 to B7 hold one more `Rescaling` layer with
            `"imagenet"` than with a path, so that features differ: save such a model whole, as
            `.keras`, rather than its weights. Defaults to `"imagenet"`.
        pooling: `"avg"`, `"max"`, or `None` for the feature map. Defaults to `"avg"`.
        name: String, the model's name. Defaults to `None`, the name that keras.applications gives.
        **kwargs: Further arguments of that function, such as `alpha` or `include_preprocessing`.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: If the name is unknown, the image is smaller than the model accepts, or an
            argument belongs to the classifier, which is not built.
        TypeError: If the function takes no such argument.
        FileNotFoundError: If `weights` is a path and there is no such file.
        WeightsUnavailableError: If the weights cannot be downloaded.

    Example:
    >>> model = build("MobileNet", input_shape=(32, 32, 3), weights=None, alpha=0.25)
    >>> model.output_shape
    (None, 256)

    Reference: https://keras.io/api/applications/
    """
    spec = spec_for(application)
    function = getattr(keras.applications, application)
    _check_arguments(spec, function, pooling, kwargs)
    if weights is not None and weights != "imagenet":
        weights = _existing_path(weights)
    if input_shape is None and spec.module == "nasnet":
        # NASNet joins feature maps whose sizes it compares while it is built: they must be known.
        input_shape = _with_channels((spec.default_image_size, spec.default_image_size), 3)
    if input_shape is not None:
        input_shape = _checked_shape(spec, input_shape, weights)
    arguments = {"include_top": False, "input_shape": input_shape, "pooling": pooling, **kwargs}
    try:
        model = function(weights=weights, **arguments)
    except Exception as error:
        if weights == "imagenet" and _is_download_failure(error):
            raise WeightsUnavailableError(
                f"The ImageNet weights of {application} could not be downloaded: {error} "
                "Connect to the network and try again, or pass `weights=None` (random weights) or "
                "`weights=PATH` of a `.weights.h5` file. Received: weights='imagenet'"
            ) from error
        raise
    if name is not None:
        # Set afterwards: EfficientNetV2 looks its architecture up by `name`, and ConvNeXt and
        # EfficientNetV2 make the address of their weights from it.
        model.name = name
    return model


def identify(model: Any) -> ApplicationSpec | None:
    """Tell what a model expects of its input, if a function of keras.applications built it.

    Why and when: to preprocess for a model that the user built, with or without its classifier, of
    any size, renamed, reloaded, with layers of their own on top, with `include_preprocessing=False`
    or with other than three channels (where some models leave their preprocessing out). The answer
    is read off the layers between the input and the first convolution and off the names of the
    blocks; the model's own name does not matter.

    Args:
        model: Any object; usually a `keras.Model`.

    Returns:
        The `ApplicationSpec` with the `mode`, `scale`, `offset` and `channels` of this very model,
        or `None` if the model is not known, is only a part of a known one, or has other layers in
        front of it.

    Example:
    >>> model = keras.applications.MobileNetV3Small(
    ...     include_preprocessing=False, weights=None, input_shape=(32, 32, 3), include_top=False)
    >>> spec = identify(model)
    >>> spec.name, spec.mode
    ('MobileNetV3Small', 'tf')
    >>> identify(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])) is None
    True

    Reference: https://keras.io/api/applications/
    """
    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        return None  # not a graph of layers
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4:
        return None
    prefix, stem = _prefix_and_stem(model.operations)
    if stem is None:
        return None
    for name, (family_name, _, counts, width) in _TABLE.items():
        family = _FAMILIES[family_name]
        if not re.fullmatch(family.stem, stem.name) or prefix not in family.prefixes:
            continue
        if _block_counts(family, model.operations) != counts:
            continue
        if width is not None and _width(family, model.operations) != width:
            continue
        channel_axis = 1 if keras.config.image_data_format() == "channels_first" else -1
        return dataclasses.replace(
            APPLICATIONS[name],
            **_fields_of(family.prefixes[prefix]),
            channels=model.inputs[0].shape[channel_axis],
        )
    return None


# --- how `build` checks ---------------------------------------------------------------------------


def _check_arguments(
    spec: ApplicationSpec, function: Any, pooling: str | None, kwargs: dict[str, Any]
) -> None:
    if pooling not in (None, "avg", "max"):
        # keras.applications would ignore it and return the feature map.
        raise ValueError(f"`pooling` must be 'avg', 'max' or None. Received: pooling={pooling!r}")
    of_classifier = {"include_top", "classes", "classifier_activation"} & set(kwargs)
    if of_classifier:
        argument = min(of_classifier)
        raise ValueError(
            f"`{argument}` configures the ImageNet classifier, which a feature extractor is built "
            f"without. Received: {argument}={kwargs[argument]!r}. Leave it out and put a layer of "
            f"your own on top, or call `keras.applications.{spec.name}` for the classifier."
        )
    accepted = set(inspect.signature(function).parameters) - {"include_top", "classes"}
    accepted -= {"classifier_activation", "input_shape", "weights", "pooling", "name"}
    unknown = set(kwargs) - accepted
    if unknown:
        argument = min(unknown)
        raise TypeError(
            f"`keras.applications.{spec.name}` takes no argument `{argument}`. "
            f"Received: {argument}={kwargs[argument]!r}. "
            f"It takes: {', '.join(sorted(accepted))}."
        )


def _existing_path(weights: str | Path) -> str:
    path = str(weights)
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(
            "`weights` must be 'imagenet', None or the path of a weights file that exists. "
            f"Received: weights={path!r}"
        )
    return path


def _with_channels(size: tuple[int, int], channels: int) -> tuple[int, ...]:
    if keras.config.image_data_format() == "channels_first":
        return (channels, *size)
    return (*size, channels)


def _checked_shape(
    spec: ApplicationSpec, input_shape: tuple[int | None, ...], weights: str | None
) -> tuple[int | None, ...]:
    """Return the shape as a tuple; raise where the model would fail, or fail less clearly."""
    shape = tuple(input_shape)
    received = f"Received: input_shape={shape}"
    channels_first = keras.config.image_data_format() == "channels_first"
    layout = "(channels, height, width)" if channels_first else "(height, width, channels)"
    if len(shape) != 3:
        raise ValueError(f"`input_shape` must be {layout}, without the batch. {received}")
    channels, sides = (shape[0], shape[1:]) if channels_first else (shape[2], shape[:2])
    if channels is None or (weights == "imagenet" and channels != 3):
        raise ValueError(
            f"`input_shape` must be {layout} with 3 channels where weights='imagenet', and with a "
            f"known number of channels in any case. {received}. For images of one channel put "
            "`BackbonePreprocessing` before the model: it repeats the channel."
        )
    if any(side is not None and side < spec.min_image_size for side in sides):
        raise ValueError(
            f"{spec.name} takes images of at least {spec.min_image_size}x{spec.min_image_size} "
            f"pixels. {received}. Resize the images to a larger size, or take another model."
        )
    if None in sides and spec.module == "nasnet":
        raise ValueError(
            f"{spec.name} needs a fixed image size, for instance "
            f"{_with_channels((spec.default_image_size, spec.default_image_size), 3)}. {received}"
        )
    return shape


def _is_download_failure(error: Exception) -> bool:
    """Whether keras.utils.get_file failed to fetch a file.

    It raises a bare `Exception` for what urllib reports and a `ValueError` for a file whose
    checksum is wrong, so that these two are known by their texts alone.
    """
    if isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException):
        return True
    known = ("URL fetch failure on ", "Incomplete or corrupted file detected.")
    return type(error) in (Exception, ValueError) and str(error).startswith(known)


# --- how `identify` reads a model -----------------------------------------------------------------

Prefix = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Family:
    """What the models of one architecture have in common.

    `stem`, `blocks` and `width` are regular expressions over layer names: of the first convolution,
    of one layer in each block (its first group names the stage), and of the convolution whose
    number of filters tells sizes apart that have the same blocks. `prefixes` maps what the model
    may do to its input before the stem to the mode that the input must then be in.
    """

    module: str
    page: str
    min_image_size: int
    mode: str
    stem: str
    blocks: str
    width: str
    prefixes: dict[Prefix, str]


def _prefix_and_stem(operations: list[Any]) -> tuple[Prefix, Any]:
    """Return what the model does to its input before its first other layer, and that layer."""
    prefix: list[str] = []
    for operation in operations:
        if isinstance(operation, keras.layers.InputLayer | keras.layers.ZeroPadding2D):
            continue
        step = _normalisation_step(operation)
        if step is None:
            return tuple(prefix), operation
        prefix.append(step)
    return tuple(prefix), None


def _normalisation_step(operation: Any) -> str | None:
    """Describe a Rescaling or Normalization layer so that its values are told apart."""
    if isinstance(operation, keras.layers.Rescaling):
        if np.ndim(operation.scale) or np.ndim(operation.offset):
            return "scale channels"
        return _rescaling(operation.scale, operation.offset)
    if isinstance(operation, keras.layers.Normalization):
        mean = operation.get_config()["mean"]
        return "normalise" if mean is None else f"normalise, mean {np.ravel(mean)[0]:g}"
    return None


def _rescaling(scale: float, offset: float) -> str:
    return f"x * {scale:.6g} {offset:+g}"


def _block_counts(family: _Family, operations: list[Any]) -> tuple[int, ...]:
    """Count the blocks in each stage, in the order of the stages."""
    matches = (re.fullmatch(family.blocks, operation.name) for operation in operations)
    return tuple(Counter(match[1] for match in matches if match).values())


def _width(family: _Family, operations: list[Any]) -> int | None:
    for operation in operations:
        if re.fullmatch(family.width, operation.name):
            return getattr(operation, "filters", None)
    return None


# --- the table ------------------------------------------------------------------------------------

# Means and standard deviations of ImageNet in RGB order, as in keras.applications.imagenet_utils.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_CAFFE_MEAN = (123.68, 116.779, 103.939)


def _fields_of(mode: str) -> dict[str, Any]:
    """Return the fields of `ApplicationSpec` that follow from the mode."""
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    if mode == "caffe":
        offset = tuple(-mean for mean in _CAFFE_MEAN)
    elif mode == "tf":
        scale, offset = (1 / 127.5,) * 3, (-1.0,) * 3
    elif mode == "tf128":
        scale, offset = (1 / 128,) * 3, (-1.0,) * 3
    elif mode == "torch":
        scale = tuple(1 / (255 * std) for std in _STD)
        offset = tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True))
    order = "bgr" if mode == "caffe" else "rgb"
    return {"mode": mode, "scale": scale, "offset": offset, "channel_order": order}


_TORCH_IN_UNIT = "normalise, mean 0.485"  # means of [0, 1]
_TORCH_IN_255 = "normalise, mean 123.675"  # means of [0, 255]

_RESNET_STEM = "conv1_conv"
_EFFICIENTNET_BLOCKS = r"block(\d+)[a-z]_project_conv"

# fmt: off
_FAMILIES = {
    "ConvNeXt": _Family(
        "convnext", "convnext", 32, "builtin",
        r".+_stem", r".+_stage_(\d)_block_\d+_depthwise_conv", r".+_stage_0_block_0_depthwise_conv",
        {(_TORCH_IN_255,): "builtin", (): "torch"}),
    "DenseNet": _Family(
        "densenet", "densenet", 32, "torch",
        _RESNET_STEM, r"conv(\d)_block\d+_concat", _RESNET_STEM, {(): "torch"}),
    "EfficientNet": _Family(
        "efficientnet", "efficientnet", 32, "builtin",
        "stem_conv", _EFFICIENTNET_BLOCKS, "top_conv",
        {(_rescaling(1 / 255, 0), "normalise"): "builtin",
         # With weights="imagenet" the model divides by the root of the deviations once more:
         # https://github.com/tensorflow/tensorflow/issues/49930
         (_rescaling(1 / 255, 0), "normalise", "scale channels"): "builtin"}),
    "EfficientNetV2B": _Family(
        "efficientnet_v2", "efficientnet_v2", 32, "builtin",
        "stem_conv", _EFFICIENTNET_BLOCKS, "top_conv",
        # x / 128 - 1 is what it does itself with other than three channels.
        {(_rescaling(1 / 255, 0), _TORCH_IN_UNIT): "builtin",
         (_rescaling(1 / 128, -1),): "builtin",
         (): "torch"}),
    "EfficientNetV2": _Family(
        "efficientnet_v2", "efficientnet_v2", 32, "builtin",
        "stem_conv", _EFFICIENTNET_BLOCKS, "top_conv",
        {(_rescaling(1 / 128, -1),): "builtin", (): "tf128"}),
    "InceptionResNetV2": _Family(
        "inception_resnet_v2", "inceptionresnetv2", 75, "tf",
        r"conv2d(_\d+)?", r"block(35|17|8)_\d+_conv", r"conv2d(_\d+)?", {(): "tf"}),
    "InceptionV3": _Family(
        "inception_v3", "inceptionv3", 75, "tf",
        r"conv2d(_\d+)?", r"(mixed)\d+", r"conv2d(_\d+)?", {(): "tf"}),
    "MobileNet": _Family(
        "mobilenet", "mobilenet", 32, "tf", "conv1", r"(conv_pw)_\d+", "conv1", {(): "tf"}),
    "MobileNetV2": _Family(
        "mobilenet_v2", "mobilenet", 32, "tf", "Conv1", r"(block)_\d+_project", "Conv1",
        {(): "tf"}),
    "MobileNetV3": _Family(
        "mobilenet_v3", "mobilenet", 32, "builtin",
        "conv", r"(expanded_conv)(?:_\d+)?_project", "conv",
        {(_rescaling(1 / 127.5, -1),): "builtin", (): "tf"}),
    "NASNet": _Family(
        "nasnet", "nasnet", 32, "tf",
        "stem_conv1", r"(normal)_concat_\d+", "stem_conv1", {(): "tf"}),
    "ResNet": _Family(
        "resnet", "resnet", 32, "caffe",
        _RESNET_STEM, r"conv(\d)_block\d+_3_bn", _RESNET_STEM, {(): "caffe"}),
    "ResNetV2": _Family(
        "resnet_v2", "resnet", 32, "tf",
        _RESNET_STEM, r"conv(\d)_block\d+_preact_bn", _RESNET_STEM, {(): "tf"}),
    "VGG": _Family(
        "vgg", "vgg", 32, "caffe",
        "block1_conv1", r"block(\d)_conv\d", "block1_conv1", {(): "caffe"}),
    "Xception": _Family(
        "xception", "xception", 71, "tf",
        "block1_conv1", r"block(\d+)_sepconv\d", "block1_conv1", {(): "tf"}),
}

# name: (family, default image size, blocks in each stage, filters of the family's `width` layer).
# MobileNets are built in any width (`alpha`), so that theirs tells nothing.
_TABLE: dict[str, tuple[str, int, tuple[int, ...], int | None]] = {
    "ConvNeXtBase": ("ConvNeXt", 224, (3, 3, 27, 3), 128),
    "ConvNeXtLarge": ("ConvNeXt", 224, (3, 3, 27, 3), 192),
    "ConvNeXtSmall": ("ConvNeXt", 224, (3, 3, 27, 3), 96),
    "ConvNeXtTiny": ("ConvNeXt", 224, (3, 3, 9, 3), 96),
    "ConvNeXtXLarge": ("ConvNeXt", 224, (3, 3, 27, 3), 256),
    "DenseNet121": ("DenseNet", 224, (6, 12, 24, 16), 64),
    "DenseNet169": ("DenseNet", 224, (6, 12, 32, 32), 64),
    "DenseNet201": ("DenseNet", 224, (6, 12, 48, 32), 64),
    "EfficientNetB0": ("EfficientNet", 224, (1, 2, 2, 3, 3, 4, 1), 1280),
    "EfficientNetB1": ("EfficientNet", 240, (2, 3, 3, 4, 4, 5, 2), 1280),
    "EfficientNetB2": ("EfficientNet", 260, (2, 3, 3, 4, 4, 5, 2), 1408),
    "EfficientNetB3": ("EfficientNet", 300, (2, 3, 3, 5, 5, 6, 2), 1536),
    "EfficientNetB4": ("EfficientNet", 380, (2, 4, 4, 6, 6, 8, 2), 1792),
    "EfficientNetB5": ("EfficientNet", 456, (3, 5, 5, 7, 7, 9, 3), 2048),
    "EfficientNetB6": ("EfficientNet", 528, (3, 6, 6, 8, 8, 11, 3), 2304),
    "EfficientNetB7": ("EfficientNet", 600, (4, 7, 7, 10, 10, 13, 4), 2560),
    "EfficientNetV2B0": ("EfficientNetV2B", 224, (1, 2, 2, 3, 5, 8), 1280),
    "EfficientNetV2B1": ("EfficientNetV2B", 240, (2, 3, 3, 4, 6, 9), 1280),
    "EfficientNetV2B2": ("EfficientNetV2B", 260, (2, 3, 3, 4, 6, 10), 1408),
    "EfficientNetV2B3": ("EfficientNetV2B", 300, (2, 3, 3, 5, 7, 12), 1536),
    "EfficientNetV2L": ("EfficientNetV2", 480, (4, 7, 7, 10, 19, 25, 7), 1280),
    "EfficientNetV2M": ("EfficientNetV2", 480, (3, 5, 5, 7, 14, 18, 5), 1280),
    "EfficientNetV2S": ("EfficientNetV2", 384, (2, 4, 4, 6, 9, 15), 1280),
    "InceptionResNetV2": ("InceptionResNetV2", 299, (10, 20, 10), 32),
    "InceptionV3": ("InceptionV3", 299, (11,), 32),
    "MobileNet": ("MobileNet", 224, (13,), None),
    "MobileNetV2": ("MobileNetV2", 224, (16,), None),
    "MobileNetV3Large": ("MobileNetV3", 224, (15,), None),
    "MobileNetV3Small": ("MobileNetV3", 224, (11,), None),
    "NASNetLarge": ("NASNet", 331, (18,), 96),
    "NASNetMobile": ("NASNet", 224, (12,), 32),
    "ResNet101": ("ResNet", 224, (3, 4, 23, 3), 64),
    "ResNet101V2": ("ResNetV2", 224, (3, 4, 23, 3), 64),
    "ResNet152": ("ResNet", 224, (3, 8, 36, 3), 64),
    "ResNet152V2": ("ResNetV2", 224, (3, 8, 36, 3), 64),
    "ResNet50": ("ResNet", 224, (3, 4, 6, 3), 64),
    "ResNet50V2": ("ResNetV2", 224, (3, 4, 6, 3), 64),
    "VGG16": ("VGG", 224, (2, 2, 3, 3, 3), 64),
    "VGG19": ("VGG", 224, (2, 2, 4, 4, 4), 64),
    "Xception": ("Xception", 299, (2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2), 32),
}
# fmt: on


def _spec(name: str) -> ApplicationSpec:
    family_name, default_image_size, _, _ = _TABLE[name]
    family = _FAMILIES[family_name]
    return ApplicationSpec(
        name=name,
        # VGG16 and VGG19 are one architecture in two modules.
        module=name.lower() if family.module == "vgg" else family.module,
        default_image_size=default_image_size,
        min_image_size=family.min_image_size,
        url=f"https://keras.io/api/applications/{family.page}/",
        **_fields_of(family.mode),
    )


APPLICATIONS: dict[str, ApplicationSpec] = {name: _spec(name) for name in _TABLE}
