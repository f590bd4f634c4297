"""Layers: `Backbone` and `BackbonePreprocessing`."""
