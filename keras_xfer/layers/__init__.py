"""Layers: `Backbone`, `BackbonePreprocessing` and `HubModule`."""

from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.hub_module import HubModule
from keras_xfer.layers.preprocessing import BackbonePreprocessing
from keras_xfer.layers.random_shear import RandomShear as _RandomShear  # noqa: F401  # registered here

__all__ = ["Backbone", "BackbonePreprocessing", "HubModule"]
