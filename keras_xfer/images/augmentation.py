"""Random changes of training images, by Keras's own layers."""

from typing import Any

import keras

from keras_xfer.layers.random_shear import RandomShear


def make_augmentation(
    *,
    shift: float,
    zoom: float,
    rotation: float = 0.0,
    shear: float = 0.0,
    flip: bool = True,
    seed: int | None = None,
    name: str = "augmentation",
) -> keras.Sequential:
    """Make layers that change images at random while training, and do nothing otherwise.

    They compute in float32 whatever the policy: float16 has steps of 0.125 near white. What comes
    in from beyond the edge repeats it.

    Args:
        shift: Float in [0, 1], the most an image moves, as a share of its height and width.
        zoom: Float in [0, 1), the most it grows or shrinks.
        rotation: Float in [0, 1], the most it turns, as a share of a full turn.
        shear: Float in [0, 1], the most it is sheared.
        flip: Bool, whether it may be mirrored left to right.
        seed: Int or None, of the first layer; those after it count up.
        name: Str, the model's name.

    Returns:
        A `keras.Sequential`, images `(B, H, W, C)` of range [0, 255] in and out.

    Example:
    >>> model = make_augmentation(shift=0.1, zoom=0.1, rotation=0.05, seed=1)
    >>> [type(layer).__name__ for layer in model.layers]
    ['RandomFlip', 'RandomTranslation', 'RandomZoom', 'RandomRotation']

    Reference:
        https://keras.io/api/layers/preprocessing_layers/image_augmentation/
    """
    layers = keras.layers
    wanted: list[tuple[Any, Any, dict[str, Any]]] = [
        (flip, layers.RandomFlip, {"mode": "horizontal"}),
        (shift, layers.RandomTranslation, {"height_factor": shift, "width_factor": shift}),
        (zoom, layers.RandomZoom, {"height_factor": zoom}),
        (rotation, layers.RandomRotation, {"factor": rotation}),
        (shear, RandomShear, {"x_factor": shear, "y_factor": shear}),
    ]
    made: list[keras.layers.Layer] = []
    for is_wanted, layer, arguments in wanted:
        if is_wanted:
            edges = {} if layer is layers.RandomFlip else {"fill_mode": "nearest"}
            own_seed = None if seed is None else seed + len(made)
            made.append(layer(**arguments, **edges, seed=own_seed, dtype="float32"))
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # of the model around them too, which would cast first
    try:
        return keras.Sequential(made, name=name)
    finally:
        keras.config.set_dtype_policy(before)


def augmentation_ranges(strength: float) -> dict[str, Any]:
    """How far `make_augmentation` goes at a strength: up to a half it shifts and zooms, above it turns
    and shears too.

    Args:
        strength: Float in [0, 1].

    Returns:
        A dict of its arguments `shift`, `zoom`, `rotation` and `shear`.

    Example:
    >>> augmentation_ranges(0.5)
    {'shift': 0.075, 'zoom': 0.1, 'rotation': 0.0, 'shear': 0.0}
    >>> augmentation_ranges(1.0)
    {'shift': 0.15, 'zoom': 0.2, 'rotation': 0.05, 'shear': 0.1}
    """
    above = max(0.0, strength - 0.5)
    return {
        "shift": 0.15 * strength,
        "zoom": 0.2 * strength,
        "rotation": 0.1 * above,
        "shear": 0.2 * above,
    }
