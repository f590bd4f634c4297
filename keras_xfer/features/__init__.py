"""Never compute a frozen layer twice: `FeatureCache`, `split_model` and `fit_staged`.

A model in two:
- `split`: `split_model`; `masks`: what could not cross a cut; `live`, `own_training`: what in a prefix
  acts otherwise while training.

A schedule on cached features:
- `fit_staged`; `boundaries`: where each stage is cut; `training_data`: what it is fed;
  `stage_callbacks`: one training to callbacks, several `fit` to Keras.

The cache:
- `cache`: `FeatureCache`; `dataset`, `tf_dataset`, `order`: `CachedFeatures`, its batches and their
  order.
- What an entry is known by: `identity` (layers), `own_code` (those of users), `code` and `bytecode`
  (functions), `source` (data), `digests`.
- How it is computed: `extraction`, `reading`, `progress`, `nesting`.
- How it lies on disk: `store` (the folder, locks, eviction), `entry` (shards), `manifest`.
"""

from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.dataset import CachedFeatures
from keras_xfer.features.fit_staged import fit_staged
from keras_xfer.features.split import split_model

__all__ = ["CachedFeatures", "FeatureCache", "fit_staged", "split_model"]
