"""Never compute a frozen layer twice: `FeatureCache`, `split_model` and `fit_staged`."""

from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.dataset import CachedFeatures
from keras_xfer.features.fit_staged import fit_staged
from keras_xfer.features.split import split_model

__all__ = ["CachedFeatures", "FeatureCache", "fit_staged", "split_model"]
