"""The version of keras_xfer, alone so that the build reads it without importing Keras."""

__version__ = "0.1.0"
