import keras
import pytest

from keras_xfer import Backbone, Stage
from keras_xfer.stages.planning import current_stage, resolve, set_current_stage, stage_at

pytestmark = pytest.mark.core


@pytest.fixture
def backbone():
    layers = [keras.layers.Dense(2, name=name) for name in ("a", "b", "c")]
    return Backbone(keras.Sequential([keras.Input((2,)), *layers]))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs"),
        ({"epochs": True}, TypeError, "epochs"),
        ({"learning_rate": 0.0}, ValueError, "positive"),
        ({"learning_rate": float("nan")}, ValueError, "finite"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate"),
    ],
)
def test_a_stage_checks_itself(arguments, error, match):
    with pytest.raises(error, match=match):
        Stage(**arguments)


@pytest.mark.parametrize(
    ("stages", "error", "match"),
    [
        ([], ValueError, "at least one stage"),
        (Stage(), TypeError, "list of keras_xfer.Stage"),
        ([None], TypeError, "list of keras_xfer.Stage"),
        ([Stage(), Stage("all", learning_rate=1)], ValueError, "in stage 1 of 2"),
        ([Stage(epochs=1), Stage("all")], ValueError, r"learning_rate=None.*stage 2"),
        ([Stage("all")], ValueError, "learning_rate=None"),
        (
            [Stage("b", epochs=1, learning_rate=1), Stage("c", learning_rate=1)],
            ValueError,
            "freezes again",
        ),
        (
            [Stage("b", epochs=1, learning_rate=1), Stage(None, learning_rate=1)],
            ValueError,
            "freezes again",
        ),
        ([Stage(epochs=1), Stage("bb", learning_rate=1)], ValueError, r"Stage 2: .*'b'"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(backbone, stages, error, match):
    with pytest.raises(error, match=match):
        resolve(stages, backbone)


def test_stages_are_placed_in_epochs_and_layers(backbone):
    planned = resolve(
        [
            Stage(epochs=2, name="head"),
            Stage("c", epochs=3, learning_rate=1e-3),
            Stage("c", epochs=1),
            Stage("all", learning_rate=1e-4),
        ],
        backbone,
    )
    assert [(p.first_epoch, p.end_epoch, p.position) for p in planned] == [
        (0, 2, None),
        (2, 5, 2),
        (5, 6, 2),
        (6, None, 0),
    ]
    assert [stage_at(planned, epoch).index for epoch in range(8)] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert planned[0].label == "stage 1 (head)"


def test_resolving_changes_nothing(backbone):
    resolve([Stage(epochs=1), Stage("all", learning_rate=1e-4)], backbone)
    assert not backbone.trainable_variables


def test_the_current_stage_is_told_for_a_model():
    model = keras.Sequential()
    assert current_stage(model) is None
    set_current_stage(model, 0)
    assert current_stage(model) == 0
    set_current_stage(model, None)
    assert current_stage(model) is None
