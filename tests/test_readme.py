"""Every Python block of the README runs, in order, as one reader would run them."""

import re
from pathlib import Path

import numpy as np
import pytest

from keras_xfer import applications, handles
from tests import saved_models

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_the_blocks_run(tmp_path, monkeypatch):
    assert BLOCKS
    build = applications.build
    monkeypatch.setattr(  # no network: random weights, and no time: a small model
        applications,
        "build",
        lambda name, **kwargs: build(name, **{**kwargs, "weights": None, "alpha": 0.35}),
    )
    monkeypatch.chdir(tmp_path)
    text = saved_models.text(tmp_path / "text")
    monkeypatch.setattr(handles, "resolve", lambda handle, **_: str(text))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 160, 160, 3), "uint8")
    labels = rng.integers(0, 5, 8)
    namespace = {"images": images, "labels": labels, "validation": (images, labels)}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)  # noqa: S102  # our own README
    assert (tmp_path / "best.keras").exists()
    assert namespace["history"].history["stage"] == [0, 0, 1, 1]
    assert namespace["model"].history.history["stage"] == [0] * 5 + [1] * 10


@pytest.mark.parametrize("line", ["pip install -e", "keras-xfer demo", "pytest"])
def test_the_two_lines_stand_at_the_top(line):
    assert line in "\n".join(README.read_text("utf-8").splitlines()[:25])
