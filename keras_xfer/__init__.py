"""keras_xfer: transfer learning for Keras 3, each step a component of `model.fit`.

The core (layers, callbacks, stages, retarget) is imported with the package, so that saved models
find their layers; what needs further libraries is imported when it is first used.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

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
    from keras_xfer import callbacks, layers, losses, retarget, stages
    from keras_xfer.callbacks import (
        BackupAndRestore,
        BestCheckpoint,
        EpochTiming,
        LearningRateCurve,
        StagedUnfreezing,
        find_learning_rate,
    )
    from keras_xfer.layers import Backbone, BackbonePreprocessing, HubModule
    from keras_xfer.stages import Stage

_LAZY = ("applications", "features", "images", "reports", "tuner")
_LAZY_NAMES = {
    "CachedFeatures": "features",
    "FeatureCache": "features",
    "HyperTransfer": "tuner",
    "SearchResult": "tuner",
    "fit_staged": "features",
    "funnel_search": "tuner",
    "split_model": "features",
}

__all__ = [
    "Backbone",
    "BackbonePreprocessing",
    "BackupAndRestore",
    "BestCheckpoint",
    "CachedFeatures",
    "EpochTiming",
    "FeatureCache",
    "HubModule",
    "HyperTransfer",
    "LearningRateCurve",
    "SearchResult",
    "Stage",
    "StagedUnfreezing",
    "__version__",
    "applications",
    "callbacks",
    "features",
    "find_learning_rate",
    "fit_staged",
    "funnel_search",
    "images",
    "layers",
    "losses",
    "reports",
    "retarget",
    "split_model",
    "stages",
    "tuner",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"keras_xfer.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f"keras_xfer.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module 'keras_xfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
