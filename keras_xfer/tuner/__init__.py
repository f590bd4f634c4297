"""Hyperparameter search for transfer learning, on KerasTuner."""

from keras_xfer.tuner.hyper_transfer import HyperTransfer

__all__ = ["HyperTransfer"]
