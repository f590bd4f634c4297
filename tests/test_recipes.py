"""The recipes run, on small data here, and do what their hand-written forms get wrong."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from benchmarks.recipes import materials
from benchmarks.recipes.__main__ import INSTEAD, code_lines, epoch_seconds
from benchmarks.recipes.by_hand import measured
from keras_xfer import Backbone

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Keras's own, of shuffle=True and tf.data
    pytest.mark.filterwarnings("ignore:.*pkg_resources.*"),  # of tensorflow_hub
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FOLDER = Path(materials.__file__).parent
# What a thawed backbone shows at the end: those with a checkpoint may go back to the frozen one, and
# the gradients of cats_dogs vanish in a MobileNetV2 of random weights.
THAWED = ("custom_loop", "fashion_mnist", "flowers_hub", "fruits", "text_embedding")
# They take up to a minute each: CI runs them beside the kills.
LONG = ("custom_loop", "fashion_mnist", "flowers_hub", "flowers_speed", "food101", "fruits")
LEAVES = {
    "cats_dogs": {"history.png"},
    "custom_loop": {"best.keras"},
    "fashion_mnist": {"history.png"},
    "flowers_hub": {"predictions.csv", "history.png", "confusion.png"},
    "flowers_speed": {"best.keras", "timing.png", "logs"},
    "food101": {"best.keras", "scores.png", "most_wrong.png"},
    "fruits": {"fruits.keras", "fruits.json", "fruits.weights.h5"},
    "text_embedding": {"history.png", "reviews.keras"},
}
STAGES = {"fashion_mnist": 3, "fruits": 1}


@pytest.fixture
def made(monkeypatch):
    """The backbones that a recipe makes, each with the values that it came with."""
    found = []
    init = Backbone.__init__

    def remembering(self, model, **kwargs):
        init(self, model, **kwargs)
        found.append((self, measured.values(model.variables)))

    monkeypatch.setattr(Backbone, "__init__", remembering)
    return found


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    yield
    keras.utils.enable_interactive_logging()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.slow) if each in LONG else each for each in INSTEAD],
)
def test_it_runs_and_no_statistic_moves(name, made, tmp_path, capsys):
    recipe = importlib.import_module(f"benchmarks.recipes.{name}")
    timing = materials.run(recipe.main, ["--smoke", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} >= LEAVES[name]
    rows = json.loads((tmp_path / "timing.json").read_text("utf-8"))["results"]
    assert len(rows) == len(timing.rows) == 2 * STAGES.get(name, 2)
    assert len(epoch_seconds(rows)) == STAGES.get(name, 2)
    assert min(row["epoch_seconds"] for row in rows) > 0

    # A loaded model's Backbone comes with what the saved one had learned.
    backbone, before = max(made, key=lambda each: each[0].trainable) if name in THAWED else made[-1]
    now = dict(zip(map(id, backbone.model.variables), before, strict=True))
    if name != "text_embedding":
        norms = measured.statistics(backbone.model)
        assert measured.moved(norms, [now[id(each)] for each in norms]) == 0
    if name in THAWED:
        assert measured.moved(backbone.model.variables, before) > 0
    if name == "cats_dogs":
        above = [
            layer
            for layer in backbone.model.layers[100:]
            if not isinstance(layer, keras.layers.BatchNormalization)
        ]
        expected = [weight.path for layer in above for weight in layer.trainable_weights]
        assert [weight.path for weight in backbone.model.trainable_weights] == expected != []
    if name == "text_embedding":  # its SavedModel is gone with the other small data
        with pytest.raises(ValueError, match="safe_mode"):  # so it has been read until there
            keras.saving.load_model(tmp_path / "reviews.keras")
    if name == "fruits":
        assert capsys.readouterr().out.count("answers alike: True") == 2


def test_flowers_hub_feeds_each_backbone_what_it_was_trained_on(made, tmp_path):
    recipe = importlib.import_module("benchmarks.recipes.flowers_hub")
    images = np.array([0, 255], "float32").reshape(1, 1, 2, 1).repeat(3, -1)
    hub = Backbone.from_hub(materials.Smoke(tmp_path).image_module(), image_size=(1, 2))
    model = recipe.classifier(
        Backbone.from_application("ResNet101V2", input_shape=(75, 75, 3), weights=None), 75, 5
    )
    assert hub.preprocessing()(images)[0, 0, :, 0].numpy().tolist() == [0, 1]
    assert model.layers[0](images)[0, 0, :, 0].numpy().tolist() == [-1, 1]


@pytest.mark.parametrize("name", INSTEAD)
def test_it_is_short(name):
    path = FOLDER / f"{name}.py"
    assert len(path.read_text("utf-8").splitlines()) < 60
    assert code_lines(path) < 60


# --- By hand: should one of these fail, Keras has changed for the better ------------------------

WRONG = {
    "cats_dogs": "36 BatchNormalization statistics move",
    "custom_loop": "0 of the backbone's 376 weights train",
    "fashion_mnist": "0 of the backbone's 26 weights train",
    "text_embedding": "trains 0 of its 1 variables; the model does not save and load",
    "flowers_hub": "refuses hub.KerasLayer; ResNet101V2, trained on [-1, 1], is fed [0, 1]; 4 Batch",
    "flowers_speed": "188 BatchNormalization statistics move",
    "food101": "is overwritten by the second's",
    "fruits": "is fed [0, 1] in RGB",
}
SOON = ("fashion_mnist", "text_embedding")


@pytest.mark.parametrize(
    "name", [each if each in SOON else pytest.param(each, marks=pytest.mark.slow) for each in WRONG]
)
def test_what_is_wrong_by_hand(name, tmp_path):
    keras.utils.disable_interactive_logging()
    recipe = importlib.import_module(f"benchmarks.recipes.by_hand.{name}")
    (tmp_path / "output").mkdir()
    told = recipe.main(materials.Smoke(tmp_path), tmp_path / "output")
    assert WRONG[name] in told


def test_lines_of_code_are_counted_by_hand(tmp_path):
    (tmp_path / "one.py").write_text(
        '"""Text."""\n\nimport os  # why\n\n# no\n\n\ndef main():\n    """More\n    text."""\n'
        "    before = measured.values(1)\n    print(\n        os.sep,\n        1,\n    )\n"
        '    moved = 2\n    return f"{moved}"\n'
    )
    assert code_lines(tmp_path / "one.py") == 2 + 4  # import, def; print over four lines


def test_seconds_of_an_epoch_are_those_after_the_first():
    rows = [{"stage": stage, "epoch_seconds": s} for stage, s in [(0, 9), (0, 1), (0, 3), (1, 8)]]
    assert epoch_seconds(rows) == [2, 8]


# --- With a network ------------------------------------------------------------------------------


def test_without_a_network_one_line_says_so(tmp_path):
    closed = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "benchmarks.recipes.cats_dogs", "--output", str(tmp_path)]
    environment = {**os.environ, **closed, "KERAS_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cats_dogs: its data or weights cannot be had: URL fetch failure on ")
    assert last.endswith("(--smoke needs no network)")
    assert "Traceback" not in done.stderr


ARCHIVES = {  # what is in them, to what a recipe is given
    "flowers": ("flower_photos/roses/1.jpg", "flower_photos"),
    "cats_dogs": ("cats_and_dogs_filtered/train/cats/1.jpg", "cats_and_dogs_filtered"),
    "fruits": ("fruits-360-100x100-main/Training/Apple 1/1.jpg", "fruits-360-100x100-main"),
    "reviews": ("aclImdb/train/unsup/1.txt", "aclImdb"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_fetched_and_unpacked(name, tmp_path, monkeypatch):
    content, folder = ARCHIVES[name]
    path = tmp_path / "content" / content
    path.parent.mkdir(parents=True)
    path.write_text("1")
    archive = shutil.make_archive(str(tmp_path / "archive"), "gztar", tmp_path / "content")
    get_file = keras.utils.get_file
    monkeypatch.setattr(
        keras.utils,
        "get_file",
        lambda fname, origin, **kwargs: get_file(
            fname, origin=Path(archive).as_uri(), cache_dir=tmp_path / "home", **kwargs
        ),
    )
    given = getattr(materials.Materials(), name)()
    assert given.name == folder
    assert (given / Path(content).relative_to(folder)).exists() == (name != "reviews")
