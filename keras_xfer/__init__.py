"""keras_xfer: transfer learning for Keras 3, each step a component of `model.fit`.

The core (layers, callbacks, stages, retarget) is imported with the package, so that saved models
find their layers; what needs further libraries is imported when it is first used.
"""

from keras_xfer import callbacks, layers, retarget, stages
from keras_xfer._version import __version__
from keras_xfer.callbacks import StagedUnfreezing
from keras_xfer.layers import Backbone, BackbonePreprocessing
from keras_xfer.stages import Stage

__all__ = [
    "Backbone",
    "BackbonePreprocessing",
    "Stage",
    "StagedUnfreezing",
    "__version__",
    "callbacks",
    "layers",
    "retarget",
    "stages",
]
