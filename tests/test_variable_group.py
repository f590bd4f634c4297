"""VariableGroup: names of scopes and variables, and what Keras sees of them."""

import keras
import pytest

from keras_xfer import freezing
from keras_xfer.live_config import LiveConfig
from keras_xfer.variable_group import VariableGroup, join, sanitised, split

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("bert/layer_3/kernel", ("bert/layer_3", "kernel")),
        ("dense/kernel", ("dense", "kernel")),
        ("embeddings", ("embeddings", "embeddings")),
    ],
)
def test_a_name_is_a_scope_and_a_name_within_it(name, parts):
    assert split(name) == parts
    assert join(*parts) == name


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("bert/layer_3", (), "bert_layer_3"),
        ("a b:c/d", (), "a_b_c_d"),
        ("/Conv1/", (), "Conv1"),
        ("Conv_1-x.y", (), "Conv_1-x.y"),
        ("///", (), "variable"),
        ("a/b", ("a_b",), "a_b_2"),
        ("a/b", ("a_b", "a_b_2"), "a_b_3"),
    ],
)
def test_names_become_what_keras_allows(name, taken, expected):
    assert sanitised(name, taken) == expected


def group(**trainable):
    variables = {
        name: keras.Variable(1.0, trainable=each, name=name) for name, each in trainable.items()
    }
    return VariableGroup("tower/norm", variables, name="tower_norm")


def test_its_variables_are_frozen_and_thawed_as_one():
    made = group(gamma=True, beta=True, moving_mean=False, moving_variance=False)
    assert made.built
    assert [each.name for each in made.trainable_weights] == ["gamma", "beta"]
    assert [each.name for each in made.weights[2:]] == ["moving_mean", "moving_variance"]
    made.trainable = False
    assert made.trainable_weights == []
    made.trainable = True
    assert [each.name for each in made.trainable_weights] == ["gamma", "beta"]


def test_statistics_make_it_a_batch_normalization():
    normalisation = group(gamma=True, moving_mean=False, moving_variance=False)
    assert freezing.is_batch_norm(normalisation)
    assert freezing.batch_norm_state([normalisation], "affine") == "affine"
    assert not freezing.is_batch_norm(group(kernel=True, moving_mean=False))


def test_a_copy_of_a_configuration_is_not_live():
    live = LiveConfig(handle="…")
    assert live == {"handle": "…"}
    assert not isinstance(dict(live), LiveConfig)
    assert not isinstance(live.copy(), LiveConfig)
    assert not isinstance({**live}, LiveConfig)
