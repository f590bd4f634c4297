"""Every Python block of the README runs, in order, as one reader would run them."""

import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_xfer import applications, handles, tuner
from tests import saved_models

README = Path(__file__).parents[1] / "README.md"
BUILD = applications.build
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def upper_part(name, *, input_shape, **kwargs):
    """The application from its block 13 up, on one convolution in place of all that is below: each
    `fit` traces every layer again, and none of the README's blocks looks at the others."""
    whole = BUILD(name, input_shape=input_shape, **{**kwargs, "weights": None, "alpha": 0.35})
    names = [layer.name for layer in whole.layers]
    first = names.index("block_13_expand")
    channels = whole.layers[first - 1].output.shape[-1]
    inputs = keras.Input(input_shape)
    made = {names[first - 1]: keras.layers.Conv2D(channels, 16, 16, name="Conv1")(inputs)}
    for layer in whole.layers[first:]:
        given = layer.input if isinstance(layer.input, list) else [layer.input]
        given = [made[each._keras_history.operation.name] for each in given]
        made[layer.name] = layer(given if len(given) > 1 else given[0])
    return keras.Model(inputs, made[names[-1]])


def test_the_blocks_run(tmp_path, monkeypatch):
    assert BLOCKS
    monkeypatch.setattr(applications, "build", upper_part)  # no network and no time
    known = applications.spec_for("MobileNetV2")
    monkeypatch.setattr(applications, "identify", lambda model: known)  # which counts the blocks
    short = {"max_trials": 1, "finalists": 1, "head_epochs": 1, "fine_tune_epochs": 1}
    search = tuner.funnel_search
    monkeypatch.setattr(
        tuner,
        "funnel_search",
        functools.wraps(search)(lambda *args, **kwargs: search(*args, **{**kwargs, **short})),
    )
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 30)).save(tmp_path / "photos" / name / f"{i}.png")
    text = saved_models.text(tmp_path / "text")
    monkeypatch.setattr(handles, "resolve", lambda handle, **_: str(text))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 160, 160, 3), "uint8")
    labels = rng.integers(0, 5, 8)
    namespace = {"images": images, "labels": labels, "validation": (images, labels)}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)  # noqa: S102  # our own README
    assert (tmp_path / "best.keras").exists()
    assert [len(namespace[each].files) for each in ("training", "held_out")] == [8, 2]
    assert namespace["history"].history["stage"] == [0, 0, 1, 1]
    assert namespace["model"].history.history["stage"] == [0] * 5 + [1] * 10


@pytest.mark.parametrize("line", ["pip install -e", "keras-xfer demo", "pytest"])
def test_the_two_lines_stand_at_the_top(line):
    assert line in "\n".join(README.read_text("utf-8").splitlines()[:25])
