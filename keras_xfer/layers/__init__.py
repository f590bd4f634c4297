"""Layers: `Backbone`, `BackbonePreprocessing` and `HubModule`."""

from keras_xfer.layers.backbone import Backbone
from keras_xfer.layers.hub_module import HubModule
from keras_xfer.layers.preprocessing import BackbonePreprocessing

__all__ = ["Backbone", "BackbonePreprocessing", "HubModule"]
