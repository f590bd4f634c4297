"""BackbonePreprocessing: images of any size and number type to what a pretrained model expects."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import keras
import numpy as np

from keras_xfer.applications import ApplicationSpec, spec_for

_RESIZE_MODES = ("stretch", "crop", "pad")
_INTERPOLATIONS = ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")


@keras.saving.register_keras_serializable(package="keras_xfer")
class BackbonePreprocessing(keras.layers.Rescaling):
    """Turn images into the numbers that a pretrained backbone was trained on.

    Why and when: each family of keras.applications wants its own preprocessing, and the wrong one
    costs accuracy without an error. As a layer it is saved with the model, or runs in
    `tf.data.Dataset.map` on every backend, and its `preprocess_input` counterparts' traps are
    closed: it never changes its input, casts `uint8` before it computes, and takes gray images.

    In this order, the layer

    1. casts to float32 (float64 where that is the layer's dtype), whatever the dtype policy;
    2. drops the alpha channel, if `alpha="drop"`;
    3. resizes to `image_size`, if given;
    4. repeats a single channel to three;
    5. maps `input_range` to `[0, 255]` and computes `x * scale + offset`;
    6. reverses the channels, if `channel_order="bgr"`;
    7. casts to the compute dtype of the layer's dtype policy.

    A NaN in the input stays a NaN in the output, at that pixel or, resized, around it.

    Args:
        scale: Float, or three floats in RGB order, for values in `[0, 255]`.
        offset: Float, or three floats in RGB order. They are added before the channels are
            reversed, therefore in RGB order also where `channel_order="bgr"`.
        channel_order: `"rgb"` or `"bgr"`, the order of the output's channels. Defaults to `"rgb"`.
        image_size: Integer, or two integers `(height, width)`, in pixels. Defaults to `None`, which
            leaves the size alone.
        resize: `"stretch"` changes the aspect ratio, `"crop"` keeps it and cuts the middle out,
            `"pad"` keeps it and puts black (the lower end of `input_range`) around. Defaults to
            `"stretch"`.
        interpolation: `"bilinear"`, `"nearest"`, `"bicubic"`, `"lanczos3"` or `"lanczos5"` (no
            lanczos on torch). Defaults to `"bilinear"`.
        antialias: Boolean, whether to smooth when making images smaller. Defaults to `False`.
        input_range: Two numbers, the values of black and white in the input. Defaults to
            `(0, 255)`. The scale and offset stay those for `[0, 255]`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `None`, Keras's image
            data format.
        alpha: `"error"` or `"drop"`, what to do with a fourth channel. Defaults to `"error"`.
        name: String, the layer's name.
        dtype: The layer's dtype or dtype policy. The output is in its compute dtype.

    Input shape:
        `(height, width, channels)` or `(batch, height, width, channels)`, or channels first;
        channels is 1 or 3 (4 with `alpha="drop"`) and must be known. Any integer or float dtype,
        RGB, values in `input_range`. An eager call on values outside it, or on floats that all lie
        in `[0, 1]` where `input_range` goes to 255 or beyond, warns, once per layer. Images of
        different sizes have no common shape: map the layer over them one by one.

    Output shape:
        The same with three channels, and `image_size` if given. Float, of the range that the
        backbone expects.

    Returns:
        A tensor; the input is never changed in place.

    Raises:
        ValueError: If an argument is not one of those above, or the input is no image or batch of
            images with 1 or 3 channels.

    Example:
    >>> import numpy as np
    >>> images = np.full((2, 48, 64, 3), 255, "uint8")
    >>> layer = BackbonePreprocessing.for_application("MobileNetV2", image_size=32)
    >>> outputs = layer(images)
    >>> tuple(outputs.shape), float(keras.ops.max(outputs))
    ((2, 32, 32, 3), 1.0)

    Reference: https://keras.io/api/layers/preprocessing_layers/
    """

    def __init__(
        self,
        scale: float | Sequence[float],
        offset: float | Sequence[float],
        *,
        channel_order: Literal["rgb", "bgr"] = "rgb",
        image_size: int | Sequence[int] | None = None,
        resize: Literal["stretch", "crop", "pad"] = "stretch",
        interpolation: str = "bilinear",
        antialias: bool = False,
        input_range: Sequence[float] = (0, 255),
        data_format: str | None = None,
        alpha: Literal["error", "drop"] = "error",
        name: str | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # Without autocast the layer sees the input as it is: casting floats to float16 first would
        # lose up to 0.06 of 255, and casts of its own belong to `call`.
        super().__init__(
            _one_or_three("scale", scale),
            _one_or_three("offset", offset),
            name=name,
            dtype=dtype,
            autocast=False,
            **kwargs,
        )
        self.channel_order = _one_of("channel_order", channel_order, ("rgb", "bgr"))
        self.image_size = _size(image_size)
        self.resize = _one_of("resize", resize, _RESIZE_MODES)
        self.interpolation = _one_of("interpolation", interpolation, _INTERPOLATIONS)
        self.antialias = bool(antialias)
        self.input_range = _range(input_range)
        self.data_format = _one_of(
            "data_format",
            data_format or keras.config.image_data_format(),
            ("channels_last", "channels_first"),
        )
        self.alpha = _one_of("alpha", alpha, ("error", "drop"))
        if self.image_size is None and self.resize != "stretch":
            raise ValueError(
                f"`resize={resize!r}` needs an `image_size` to resize to. "
                f"Received: image_size={image_size}, resize={resize!r}"
            )
        self.resizing = None
        if self.image_size is not None:
            self.resizing = _Resizing(
                *self.image_size,
                interpolation=self.interpolation,
                antialias=self.antialias,
                crop_to_aspect_ratio=self.resize == "crop",
                pad_to_aspect_ratio=self.resize == "pad",
                fill_value=self.input_range[0],
                data_format=self.data_format,
                dtype=self.compute_dtype,
            )
            if self.antialias and keras.backend.backend() == "tensorflow":
                # XLA has no kernel for TensorFlow's antialiased resizing, and Keras compiles with
                # XLA by default where there is a GPU.
                self.supports_jit = False
        self._has_warned = False

    @classmethod
    def for_application(cls, application: str, /, **kwargs: Any) -> Self:
        """Make the layer that equals the `preprocess_input` of a model of keras.applications.

        Why and when: the backbone is chosen by name and built with its default arguments. For a
        model that exists, `Backbone.preprocessing()` looks at what it was built with.

        Args:
            application: String, the function's name in keras.applications, such as `"ResNet50"`.
            **kwargs: Further arguments of `BackbonePreprocessing`, such as `image_size`.

        Returns:
            A `BackbonePreprocessing`; an identity where the model preprocesses by itself.

        Raises:
            ValueError: If keras.applications has no function of that name.

        Example:
        >>> BackbonePreprocessing.for_application("VGG16").channel_order
        'bgr'

        Reference: https://keras.io/api/applications/
        """
        return cls.from_spec(spec_for(application), **kwargs)

    @classmethod
    def from_spec(cls, spec: ApplicationSpec, **kwargs: Any) -> Self:
        """Make the layer from what is known of a model's expected input.

        Why and when: `keras_xfer.applications.identify` found out what a model expects.

        Args:
            spec: An `ApplicationSpec`.
            **kwargs: Further arguments of `BackbonePreprocessing`, such as `image_size`.

        Returns:
            A `BackbonePreprocessing`.

        Raises:
            ValueError: If the model takes other than three channels.

        Example:
        >>> from keras_xfer.applications import spec_for
        >>> BackbonePreprocessing.from_spec(spec_for("EfficientNetB0")).scale
        (1.0, 1.0, 1.0)

        Reference: https://keras.io/api/applications/
        """
        if spec.channels != 3:
            raise ValueError(
                "BackbonePreprocessing makes images of three channels, and this model takes "
                f"another number. Received: spec.name={spec.name!r}, "
                f"spec.channels={spec.channels}. Build the model with three channels, or scale its "
                "input with `keras.layers.Rescaling`."
            )
        return cls(spec.scale, spec.offset, channel_order=spec.channel_order, **kwargs)

    @property
    def compute_dtype(self) -> str:
        """The dtype of the arithmetic: float32 even where the policy's compute dtype is shorter.

        float16 has 0.125 between its numbers near 255, and the backbone sees the difference.
        """
        return "float64" if self.dtype_policy.compute_dtype == "float64" else "float32"

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Apply the layer to a tensor, an array, or a list of images of one size."""
        if isinstance(inputs, list | tuple):
            inputs = _stack(inputs)
        if hasattr(inputs, "row_splits") or getattr(inputs, "ragged", False):
            # Keras would fill it with zeros to the largest size, and resize that.
            raise ValueError(
                f"{self.name} expects images of one size. Received: a ragged tensor, "
                f"inputs.shape={tuple(inputs.shape)}. Map the layer over single images, or, if "
                "they are all of one size, pass `inputs.to_tensor()`."
            )
        if hasattr(inputs, "shape"):
            self._checked_channels(inputs.shape)
        return super().__call__(inputs, **kwargs)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Build the layer that resizes: it holds no weights, but reloading asks for it."""
        if self.resizing is not None:
            self.resizing.build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Preprocess a tensor of images (the steps of the class docstring)."""
        ops = self.backend
        channels = self._checked_channels(inputs.shape)
        x = ops.cast(inputs, self.compute_dtype)
        self._warn_about_values(inputs, x)
        if channels == 4:
            x = x[..., :3, :, :] if self.data_format == "channels_first" else x[..., :3]
        if self.resizing is not None:
            x = self.resizing(x)
        if channels == 1:
            # Not `repeat`: on torch it fails on the meta device, where Keras infers shapes.
            x = ops.numpy.concatenate([x, x, x], axis=self._channel_axis)
        scale, offset = self._for_input_range()
        x = x * ops.cast(scale, self.compute_dtype) + ops.cast(offset, self.compute_dtype)
        if self.channel_order == "bgr":
            x = ops.numpy.flip(x, axis=self._channel_axis)
        return ops.cast(x, self.dtype_policy.compute_dtype)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the input's shape with three channels and `image_size`."""
        shape = list(input_shape)
        self._checked_channels(shape)
        shape[self._channel_axis] = 3
        if self.resizing is not None:
            shape = list(self.resizing.compute_output_shape(shape))
        return tuple(shape)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        """Return a symbolic output: its dtype is the policy's, not that of the arithmetic."""
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.dtype_policy.compute_dtype
        )

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, in types that JSON keeps."""
        config = super().get_config()
        del config["scale"], config["offset"]  # again below, as plain numbers
        return {
            **config,
            "scale": list(self.scale) if isinstance(self.scale, tuple) else self.scale,
            "offset": list(self.offset) if isinstance(self.offset, tuple) else self.offset,
            "channel_order": self.channel_order,
            "image_size": None if self.image_size is None else list(self.image_size),
            "resize": self.resize,
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "input_range": list(self.input_range),
            "data_format": self.data_format,
            "alpha": self.alpha,
        }

    @property
    def _channel_axis(self) -> int:
        return -3 if self.data_format == "channels_first" else -1

    def _checked_channels(self, shape: Sequence[int | None]) -> int:
        """Return the number of channels; raise where the input cannot be images of RGB or gray."""
        if getattr(shape, "rank", 0) is None:  # a tf.TensorShape of unknown rank
            raise ValueError(
                f"{self.name} expects images of known rank. Received: inputs.shape=<unknown>. "
                "Decode with `tf.io.decode_image(..., channels=3, expand_animations=False)`."
            )
        shape = tuple(shape)
        if len(shape) not in (3, 4):
            last = self.data_format == "channels_last"
            layout = "height, width, channels" if last else "channels, height, width"
            raise ValueError(
                f"{self.name} expects one image ({layout}) or a batch of images (batch, {layout}). "
                f"Received: inputs.shape={shape}. Add or remove dimensions, for instance with "
                "`image[..., None]` for a gray image without channels."
            )
        channels = shape[self._channel_axis]
        allowed = (1, 3, 4) if self.alpha == "drop" else (1, 3)
        if channels is not None and channels in allowed:
            return channels
        if channels == 4:
            mend = "Drop the alpha channel with `alpha='drop'`, or load the images as RGB."
        elif channels is None:
            mend = "Give the number: `channels=3` when decoding, or `keras.Input((None, None, 3))`."
        else:
            mend = f"Is the layout of the images the layer's data_format={self.data_format!r}?"
        raise ValueError(
            f"{self.name} expects images of {' or '.join(map(str, allowed))} channels. "
            f"Received: inputs.shape={shape}, of which channels={channels}. {mend}"
        )

    def _for_input_range(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return scale and offset for values in `input_range`, in a shape that broadcasts."""
        low, high = self.input_range
        to_255 = 255.0 / (high - low)
        shape = (3, 1, 1) if self.data_format == "channels_first" else (3,)
        scale = np.broadcast_to(np.asarray(self.scale, "float64"), (3,)).reshape(shape)
        offset = np.broadcast_to(np.asarray(self.offset, "float64"), (3,)).reshape(shape)
        scale, offset = scale * to_255, offset - scale * low * to_255
        if self.resize == "pad":
            # Padding in tf.data forgets the number of channels; vectors of three restore it.
            return scale, offset
        return _scalar_if_uniform(scale), _scalar_if_uniform(offset)

    def _warn_about_values(self, inputs: Any, x: Any) -> None:
        """Warn, once, if concrete values cannot be meant for this `input_range`.

        `inputs` tells the dtype that the user gave, `x` holds the same values as floats.
        """
        if self._has_warned or 0 in tuple(x.shape) or not self._is_concrete(x):
            return
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        is_float = "float" in dtype
        low, high = self.input_range
        if dtype == "bool":
            return
        if not is_float and low <= np.iinfo(dtype).min and np.iinfo(dtype).max <= high:
            return  # no value of this dtype lies outside, which spares the common uint8 a pass
        least, most = float(keras.ops.min(x)), float(keras.ops.max(x))
        if least == most == 1:
            return  # on torch, Keras may infer shapes by calling a model on ones
        tolerance = 1e-4 * (high - low)  # rounding, as of a resized image
        if least < low - tolerance or most > high + tolerance:
            problem = f"holds values outside input_range={self.input_range}"
            mend = "Pass the `input_range` that the images have."
        elif is_float and high >= 255 and least >= 0 and 0 < most <= 1:
            # A maximum of 0 is a black image, and right in any range.
            problem = f"lies in [0, 1], and input_range={self.input_range} is expected"
            mend = "Pass `input_range=(0, 1)`, or images that are not yet rescaled."
        else:
            return
        self._has_warned = True
        warnings.warn(
            f"The input of {self.name} {problem}: the backbone would see other values than it was "
            f"trained on. Received: values from {least:g} to {most:g}. {mend}",
            stacklevel=2,
        )

    def _is_concrete(self, x: Any) -> bool:
        """Whether `x` has values now, rather than being traced, compiled or symbolic."""
        backend = keras.backend.backend()
        if self.backend.name != backend:
            return False  # in tf.data, on another backend
        if backend == "torch":
            import torch

            return not torch.compiler.is_compiling() and x.device.type != "meta"
        if backend == "jax":
            import jax

            return not isinstance(x, jax.core.Tracer)
        return hasattr(x, "numpy")  # TensorFlow: of eager tensors alone


class _Resizing(keras.layers.Resizing):
    """Keras's, without `training=True` as the default of its call.

    Keras hands such a default on to the layers that come after: in `model(x)`, where nobody said
    `training`, BatchNormalization then normalised by the batch and moved its statistics. Seen on
    Keras 3.15.1.
    """

    def call(self, data: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        return super().call(data, training=False)


def _one_of(argument: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, allowed))}. "
            f"Received: {argument}={value!r}"
        )
    return value


def _one_or_three(argument: str, value: Any) -> float | tuple[float, ...]:
    values = np.asarray(value)
    is_known = values.dtype.kind in "iuf" and values.shape in ((), (1,), (3,))
    if is_known and np.all(np.isfinite(values)):
        as_floats = tuple(float(each) for each in np.ravel(values))
        return as_floats if len(as_floats) == 3 else as_floats[0]
    raise ValueError(
        f"`{argument}` must be a finite number or three of them, in RGB order. "
        f"Received: {argument}={value!r}"
    )


def _scalar_if_uniform(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return one number where all are equal: scalars broadcast two to three times as fast."""
    return values.flat[0] if np.all(values == values.flat[0]) else values


def _size(image_size: Any) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, numbers.Integral) else image_size
    if isinstance(pair, Sequence) and len(pair) == 2:
        is_whole = all(isinstance(side, numbers.Integral) for side in pair)
        if is_whole and min(int(side) for side in pair) > 0:
            return int(pair[0]), int(pair[1])
    raise ValueError(
        "`image_size` must be a positive integer, two of them as (height, width), or None. "
        f"Received: image_size={image_size!r}"
    )


def _range(input_range: Any) -> tuple[float, float]:
    values = tuple(input_range) if isinstance(input_range, Sequence) else ()
    if len(values) == 2 and all(isinstance(value, numbers.Real) for value in values):
        low, high = float(values[0]), float(values[1])
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    raise ValueError(
        "`input_range` must be two finite numbers, the lower one first, such as (0, 255). "
        f"Received: input_range={input_range!r}"
    )


def _stack(images: Sequence[Any]) -> Any:
    """Make one batch of a list of images."""
    shapes = [tuple(np.shape(image)) for image in images]
    if len(set(shapes)) > 1:
        raise ValueError(
            "A list of images must hold images of one shape. "
            f"Received: shapes={sorted(set(shapes))[:5]}. Images of different sizes go one by one: "
            "`[layer(image) for image in images]`, with `image_size` for a common size."
        )
    return np.stack([np.asarray(image) for image in images]) if shapes else np.asarray(images)
