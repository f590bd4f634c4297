"""Make a running `fit` train another set of variables, and take a training's state as a whole.

Keras builds its optimizer and its compiled train step for the variables that are trainable when
`fit` begins; changing `trainable` later is ignored (TensorFlow), refused (torch) or destroys the
model (JAX). `retarget` changes all of it together, between two steps of one `fit`. This package is
the one place that touches the internals of trainers and optimizers. Tried on Keras 3.15.1.

- `trainer`: `retarget` itself.
- `grouped_optimizer`: several optimizers that look like one, and their rates.
- `carrying`: an optimizer for other variables, with the state of the old one.
- `training_state`: weights, flags and optimizer as plain data, and back.
"""

from keras_xfer.retarget.grouped_optimizer import GroupedOptimizer, StageRate
from keras_xfer.retarget.trainer import retarget
from keras_xfer.retarget.training_state import capture, restore

__all__ = ["GroupedOptimizer", "StageRate", "capture", "restore", "retarget"]
