"""Layers: `Backbone` and `BackbonePreprocessing`."""

from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.preprocessing import BackbonePreprocessing

__all__ = ["Backbone", "BackbonePreprocessing"]
