"""keras_xfer: transfer learning for Keras 3, each step a component of `model.fit`.

The core (layers, callbacks, stages, retarget) is imported with the package, so that saved models
find their layers; what needs further libraries is imported when it is first used.
"""

import sys
from pathlib import Path

from keras_xfer._version import __version__


def _is_command() -> bool:
    """Tell whether this process is the command `keras-xfer`, by either of its names.

    It answers `--help` and wrong arguments before a framework is loaded, which takes seconds, and
    then imports by itself the modules that it works with.
    """
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "keras-xfer" or (
        program == "-m" and "keras_xfer.cli" in sys.orig_argv
    )


if not _is_command():
    from keras_xfer import callbacks, layers, retarget, stages
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
