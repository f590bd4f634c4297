"""What can be told before the first trial: that a hypermodel and what it is given do not fit."""

from keras_xfer.tuner.backbones import Shape


def check_image_size(backbone: str, takes: Shape, image_size: int) -> None:
    """Raise if a backbone cannot be given images of the size that the search says.

    Args:
        backbone: str, its name.
        takes: height and width of the images that it takes, None for any.
        image_size: int, the hyperparameter.

    Raises:
        ValueError: it takes another size.
    """
    if any(side not in (None, image_size) for side in takes):
        raise ValueError(
            f"Expected a backbone that takes images of any size, or of image_size={image_size}. "
            f"Received: backbone {backbone!r}, which takes images of {takes[0]} x {takes[1]} pixels "
            "alone. Leave image_size out of space, and they are resized to that; or give a function "
            "of input_shape that builds the backbone for it."
        )
