"""What every test shares: a quiet backend, one seed, and SavedModels that are made once."""

import functools
import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
from filelock import FileLock

from tests import saved_models


def pytest_collection_finish():
    """What is imported by now stays, and is spared by every collection of garbage to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function that gives the folder of a SavedModel of `tests.saved_models`, by its name; each
    is made once, whichever of pytest-xdist's processes wants it first. Not to be changed."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    @functools.cache
    def folder(name):
        made = root / "saved_models" / name
        made.parent.mkdir(exist_ok=True)
        with FileLock(f"{made}.lock"):
            if not made.exists():
                unfinished = root / "saved_models" / f"{name}.unfinished"
                getattr(saved_models, name)(unfinished).rename(made)
        return made

    return folder
