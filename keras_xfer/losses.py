"""Losses that Keras does not have."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_xfer")
class SmoothedSparseCategoricalCrossentropy(keras.losses.Loss):
    """`keras.losses.SparseCategoricalCrossentropy` with label smoothing.

    Keras smooths one-hot labels alone. Here the labels are integers, as
    `keras.utils.image_dataset_from_directory` gives them; the values are those of
    `keras.losses.CategoricalCrossentropy(label_smoothing=...)` on the same labels one-hot.

    Args:
        label_smoothing: float in [0, 1), how much of a label's weight goes to all classes alike.
            Defaults to 0.1.
        from_logits: bool, whether predictions are logits rather than probabilities. Defaults to
            `False`.
        reduction: as of `keras.losses.Loss`.
        name: str, the loss's name.
        dtype: the dtype of the computation.

    Input shape:
        `y_true`: integers `(B,)` or `(B, 1)`; `y_pred`: floats `(B, num_classes)`.

    Raises:
        ValueError: `label_smoothing` is out of its range.

    Example:

    >>> loss = SmoothedSparseCategoricalCrossentropy(0.2)
    >>> round(float(loss([1], [[0.5, 0.5]])), 4)
    0.6931

    Reference:
        https://arxiv.org/abs/1512.00567 (label smoothing)
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        from_logits: bool = False,
        reduction: str = "sum_over_batch_size",
        name: str = "smoothed_sparse_categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                "Expected label_smoothing of at least 0 and less than 1. "
                f"Received: label_smoothing={label_smoothing!r}."
            )
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.label_smoothing = float(label_smoothing)
        self.from_logits = bool(from_logits)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each row, `(B,)`."""
        y_pred = keras.ops.convert_to_tensor(y_pred)
        labels = keras.ops.reshape(keras.ops.cast(y_true, "int32"), (-1,))
        one_hot = keras.ops.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
        return keras.losses.categorical_crossentropy(
            one_hot, y_pred, from_logits=self.from_logits, label_smoothing=self.label_smoothing
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "from_logits": self.from_logits,
        }
