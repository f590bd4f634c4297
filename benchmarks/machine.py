"""What a benchmark ran on, and where its numbers go."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from keras_xfer import files


def description() -> dict[str, Any]:
    """The machine and the versions, without anything that names it."""
    import keras

    packages = ("keras", "tensorflow", "jax", "torch", "numpy", "keras-xfer")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "backend": keras.backend.backend(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def write(output: str | None, results: Any) -> None:
    """Write `results` with what they ran on as JSON, where `output` says so."""
    if output is None:
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"machine": description(), "results": results})
