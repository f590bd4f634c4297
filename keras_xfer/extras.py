"""What only the extra `report` installs, imported where it is used."""

import importlib
from typing import Any


def require(module: str) -> Any:
    """Import a module, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This needs {module.partition('.')[0]}. Install it with: "
            'pip install "keras-xfer[report]"'
        ) from error
