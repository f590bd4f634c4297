import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xfer import Stage

pytestmark = pytest.mark.core

CosineDecay = keras.optimizers.schedules.CosineDecay


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"unfreeze": False}, TypeError, "unfreeze=False"),
        ({"unfreeze": ["all"]}, TypeError, "unfreeze"),
        ({"epochs": 0}, ValueError, "at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs"),
        ({"epochs": True}, TypeError, "epochs"),
        ({"patience": 0}, ValueError, "patience of a stage to be at least 1"),
        ({"patience": 2.0}, TypeError, "patience"),
        ({"learning_rate": 0.0}, ValueError, "positive"),
        ({"learning_rate": -1e-3}, ValueError, "positive"),
        ({"learning_rate": float("nan")}, ValueError, "finite"),
        ({"learning_rate": math.inf}, ValueError, "finite"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate"),
        ({"learning_rate": True}, TypeError, "learning_rate"),
        ({"learning_rate": {}}, ValueError, "without 'head'"),
        ({"learning_rate": {"head": 1e-3}}, ValueError, "without 'backbone'"),
        ({"learning_rate": {"head": 1, "bakcbone": 1}}, ValueError, "nearest .* is 'backbone'"),
        ({"learning_rate": {"head": 1, "backbone": 0}}, ValueError, r"learning_rate\['backbone'\]"),
        ({"learning_rate": {"head": None, "backbone": 1}}, TypeError, r"learning_rate\['head'\]"),
        ({"learning_rate": 1, "layer_decay": 0}, ValueError, "layer_decay"),
        ({"learning_rate": 1, "layer_decay": 1.1}, ValueError, "layer_decay"),
        ({"learning_rate": 1, "layer_decay": math.nan}, ValueError, "layer_decay"),
        ({"learning_rate": 1, "layer_decay": "0.5"}, TypeError, "layer_decay"),
        ({"layer_decay": 0.5}, ValueError, "learning_rate=None, layer_decay=0.5"),
        ({"learning_rate": 1, "warmup_epochs": -1}, ValueError, "warmup_epochs"),
        ({"learning_rate": 1, "warmup_epochs": math.inf}, ValueError, "warmup_epochs"),
        ({"learning_rate": 1, "warmup_epochs": math.nan}, ValueError, "warmup_epochs"),
        ({"learning_rate": 1, "warmup_epochs": None}, TypeError, "warmup_epochs"),
        ({"learning_rate": 1, "warmup_epochs": 2.5, "epochs": 2}, ValueError, "no longer than"),
        ({"warmup_epochs": 1}, ValueError, "learning_rate=None, warmup_epochs=1"),
        ({"name": 3}, TypeError, "name"),
    ],
)
def test_a_stage_checks_itself(arguments, error, match):
    with pytest.raises(error, match=match):
        Stage(**arguments)


def test_the_rates_of_a_stage_are_its_own():
    rates = {"head": 1e-3, "backbone": 1e-4}
    stage = Stage("all", learning_rate=rates)
    rates["head"] = 1.0
    assert stage.learning_rate == {"head": 1e-3, "backbone": 1e-4}


def test_numbers_of_numpy_are_numbers():
    """As from np.logspace: what JSON and YAML could not write."""
    stage = Stage(
        np.int64(-3),
        epochs=np.int32(2),
        learning_rate={"head": np.float32(0.5), "backbone": np.float64(0.25)},
        layer_decay=np.float64(0.5),
        warmup_epochs=np.float32(0.5),
    )
    assert json.loads(json.dumps(stage.get_config())) == {
        "unfreeze": -3,
        "epochs": 2,
        "learning_rate": {"head": 0.5, "backbone": 0.25},
        "layer_decay": 0.5,
        "warmup_epochs": 0.5,
    }


numbers = st.floats(1e-8, 10.0)
schedules = st.one_of(
    st.builds(CosineDecay, numbers, st.integers(1, 99), alpha=st.floats(0, 1)),
    st.builds(
        lambda low, high: keras.optimizers.schedules.PiecewiseConstantDecay((3,), (high, low)),
        numbers,
        numbers,
    ),
)
rates = st.one_of(numbers, schedules)


@settings(deadline=None, max_examples=50)  # a backend's first call takes its time
@given(
    st.fixed_dictionaries(
        {
            "unfreeze": st.one_of(
                st.none(),
                st.text(max_size=5),
                st.integers(-99, 99),
                st.floats(allow_nan=False, allow_infinity=False),
            ),
            "learning_rate": st.one_of(
                rates, st.fixed_dictionaries({"head": rates, "backbone": rates})
            ),
        },
        optional={
            "epochs": st.integers(3, 99),
            "layer_decay": st.floats(0.01, 1.0),
            "warmup_epochs": st.one_of(st.integers(0, 3), st.floats(0, 3)),
            "patience": st.integers(1, 9),
            "name": st.text(max_size=5),
        },
    )
)
def test_a_stage_is_made_again_from_its_config_as_json(arguments):
    stage = Stage(**arguments)
    config = json.loads(json.dumps(stage.get_config()))
    again = Stage.from_config(config)
    assert again.get_config() == config

    def rates_at(rate, step):
        if isinstance(rate, dict):
            return {part: rates_at(each, step) for part, each in rate.items()}
        return float(rate) if isinstance(rate, float) else float(rate(step))

    for name, value in arguments.items():
        if name == "learning_rate":
            for step in (0, 1, 7):
                assert rates_at(again.learning_rate, step) == rates_at(value, step)
        else:
            assert getattr(again, name) == value


def test_the_config_holds_what_differs_from_the_defaults():
    assert Stage().get_config() == {"unfreeze": None}
    assert Stage("all", learning_rate=CosineDecay(0.5, 9)).get_config()["learning_rate"] == {
        "class_name": "CosineDecay",
        "config": CosineDecay(0.5, 9).get_config(),
    }


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"epoch": 3}, "'epoch'; nearest is 'epochs'"),
        ({"layerdecay": 3}, "nearest is 'layer_decay'"),
        ({3: 3}, "Received: 3; nearest"),
        ({"learning_rate": {"class_name": "CosinDecay"}}, "nearest is 'CosineDecay'"),
        ({"learning_rate": {"class_name": ["a"]}}, "class_name"),
        ({"learning_rate": {"class_name": "LearningRateSchedule"}}, "class_name"),
        ({"learning_rate": {"class_name": "CosineDecay"}}, "arguments of CosineDecay"),
        (
            {"learning_rate": {"class_name": "CosineDecay", "config": {"decay": 1}}},
            "arguments of CosineDecay.*'decay'",
        ),
        ({"learning_rate": {"class_name": "CosineDecay", "config": 3}}, "arguments of CosineDecay"),
        # Registered with Keras, and no schedule.
        ({"learning_rate": {"class_name": "keras_xfer>GroupedOptimizer"}}, "class_name"),
    ],
)
def test_a_config_that_is_wrong_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        Stage.from_config(config)


@keras.saving.register_keras_serializable(package="tests_of_stages")
class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, first):
        self.first = first

    def __call__(self, step):
        return self.first / 2**step

    def get_config(self):
        return {"first": self.first}


def test_a_schedule_that_the_user_has_registered():
    config = Stage("all", learning_rate={"head": 1, "backbone": Halving(8.0)}).get_config()
    again = Stage.from_config(json.loads(json.dumps(config)))
    assert again.learning_rate["backbone"](3) == 1.0
