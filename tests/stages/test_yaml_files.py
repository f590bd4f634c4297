import re
import sys

import keras
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from keras_xfer.stages import stages_from_yaml, stages_to_yaml
from keras_xfer.stages.yaml_files import _automatic_names
from tests import schedules


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stages.yaml"


def configs(stages):
    return [stage.get_config() for stage in stages]


def test_a_schedule_comes_back_as_it_was_written(path):
    decay = keras.optimizers.schedules.CosineDecay(1e-5, 100)
    piecewise = keras.optimizers.schedules.PiecewiseConstantDecay([3], [1e-5, 1e-6])
    stages = [
        Stage(epochs=5, learning_rate=1e-5, name="1e-4"),  # a name that looks like a number
        Stage(-20, epochs=3, patience=2, learning_rate=decay, warmup_epochs=0.5),
        Stage(0.25, epochs=1, learning_rate={"head": 1e-5, "backbone": piecewise}),
        Stage("block_12", epochs=1),
        Stage("all", learning_rate={"head": 1e-5, "backbone": decay}, layer_decay=0.9),
    ]
    stages_to_yaml(stages, path)
    again = stages_from_yaml(path)
    assert configs(again) == configs(stages)
    assert float(again[1].learning_rate(100)) == 0.0
    assert float(again[2].learning_rate["backbone"](4)) == pytest.approx(1e-6)


def test_what_people_edit_is_read(path):
    stages_to_yaml([Stage(epochs=5, learning_rate=1e-3), Stage("all", learning_rate=1e-5)], path)
    written = path.read_text()
    assert written.startswith("# A schedule of keras_xfer")
    written = written.replace("epochs: 5", "epochs: 2\n  patience: 1")
    written = written.replace("1.0e-05", "{head: 1e-4, backbone: .5E-5}")
    path.write_text(written)
    assert configs(stages_from_yaml(path)) == configs(
        [
            Stage(epochs=2, patience=1, learning_rate=1e-3),
            Stage("all", learning_rate={"head": 1e-4, "backbone": 5e-6}),
        ]
    )


def test_a_number_as_people_write_it_is_one_wherever_a_rate_stands(path):
    """YAML 1.1 takes 1e-4 for text."""
    path.write_text(
        "- {epochs: 1, learning_rate: 1e-4}\n"
        "- unfreeze: all\n"
        "  learning_rate: {class_name: PiecewiseConstantDecay,\n"
        "    config: {boundaries: [1], values: [1e-3, 1e-4]}}\n"
    )
    first, last = stages_from_yaml(path)
    assert first.learning_rate == 1e-4
    assert float(last.learning_rate(5)) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("stages: [{unfreeze: null, epochs: 1", "Expected YAML in .*stages.yaml"),
        ("", "list of stages in stages.yaml. Received: NoneType"),
        ("{}", "list of stages in stages.yaml"),
        ("3", "list of stages in stages.yaml. Received: int"),
        ("stages: {epochs: 1}", "list of stages in stages.yaml. Received: dict"),
        ("stages: []", "stages.yaml: Expected at least one stage"),
        ("stage: [{epochs: 1}]", "'stage'; nearest is 'stages'"),
        ("[all]", "Stage 1 in stages.yaml: expected a mapping"),
        ("[{epochs: 1}, {epohcs: 2}]", "Stage 2 in stages.yaml: .*'epohcs'; nearest is 'epochs'"),
        ("[{epochs: 0}]", "Stage 1 in stages.yaml: .*at least 1.*epochs=0"),
        ("[{epochs: three}]", "Stage 1 in stages.yaml: .*epochs='three'"),
        ("[{unfreeze: no}]", "Stage 1 in stages.yaml: .*unfreeze=False"),
        ("[{learning_rate: {haed: 1, backbone: 1}}]", "nearest to 'haed' is 'head'"),
        ("[{learning_rate: {class_name: CosinDecay}}]", "nearest is 'CosineDecay'"),
        ("[{epochs: 1}, {}, {}]", "stages.yaml: .*can never begin.*in stage 2 of 3"),
        ("[!!python/object/apply:os.system ['exit 1']]", "Expected YAML"),
        ("[{learning_rate: !!python/name:os.system }]", "Expected YAML"),
        ("[{learning_rate: {class_name: os.system}}]", "keras.optimizers.schedules"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(path, text, match):
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        stages_from_yaml(path)


def test_a_file_that_is_no_text_is_refused(path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="Expected YAML"):
        stages_from_yaml(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[{epochs: 1}, {unfreeze: hihg, learning_rate: 1}]", "Stage 2: .*'high'"),
        (
            "[{unfreeze: low, epochs: 1, learning_rate: 1}, {unfreeze: high, learning_rate: 1}]",
            "freezes again what unfreeze='low' trained",
        ),
    ],
)
def test_what_contradicts_the_model_is_told_when_they_meet(path, text, match):
    path.write_text(text)
    schedule = StagedUnfreezing(stages_from_yaml(path))
    with pytest.raises(ValueError, match=match):
        schedule.plan(schedules.model())


@pytest.mark.parametrize(
    "name",
    ["conv2d_12", "activation_188_block", "multi_head_attention_3", "sequential_1", "functional_7"],
)
def test_names_that_keras_counts_up_are_refused(path, name):
    with pytest.raises(ValueError, match=rf"unfreeze='{name}' in stage 2.*Use an index"):
        stages_to_yaml([Stage(epochs=1), Stage(name, learning_rate=1.0)], path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["block_12", "conv2d", "layer_1", "my_dense_1", "dense_1x", "all"])
def test_names_that_last_are_written(path, name):
    stages_to_yaml([Stage(name, learning_rate=1.0)], path)
    assert stages_from_yaml(path)[0].unfreeze == name


def test_the_name_of_a_cut_is_written(path):
    (*_, cut) = Backbone(
        keras.Sequential([keras.Input((4,)), keras.layers.ReLU(name="top")])
    ).cuts()
    stages_to_yaml([Stage(cut, learning_rate=1.0)], path)
    assert stages_from_yaml(path)[0].unfreeze == "top"


def test_the_names_that_are_refused_are_those_that_keras_gives():
    """Oracle: layers made without a name."""
    layers = [
        keras.layers.Conv2D(1, 1),
        keras.layers.BatchNormalization(),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.LSTM(1),
        keras.layers.ReLU(),
        keras.Sequential(),
        keras.Model(inputs := keras.Input((1,)), inputs),
    ]
    given = {re.sub(r"_\d+$", "", layer.name) for layer in layers}
    assert len(given) == len(layers)
    assert given <= _automatic_names()


def test_what_is_no_schedule_is_not_written(path):
    with pytest.raises(TypeError, match="list of keras_xfer.Stage"):
        stages_to_yaml(["all"], path)
    with pytest.raises(ValueError, match="can never begin"):
        stages_to_yaml([Stage(), Stage()], path)
    assert not path.exists()


def test_without_pyyaml_the_package_to_install_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        stages_to_yaml([Stage()], path)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        stages_from_yaml(path)
