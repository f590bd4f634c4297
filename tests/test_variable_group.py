"""VariableGroup: names of scopes and variables, and what Keras sees of them."""

import keras
import pytest

from keras_xfer import freezing
from keras_xfer.live_config import LiveConfig
from keras_xfer.variable_group import VariableGroup, grouped

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="SavedModels are TensorFlow's"
)


def variables(*names, still=()):
    """What a SavedModel of variables with these names hands over."""
    import tensorflow as tf

    return [(name, tf.Variable([float(i)]), name not in still) for i, name in enumerate(names)]


@on_tensorflow
def test_variables_are_grouped_by_scope_in_the_order_they_come():
    found = variables(
        "net/top/kernel", "net/low/kernel", "scale", "net/top/bias", "net/low/count",
        still=["net/low/count"],
    )  # fmt: skip
    groups = grouped(found, "module")
    assert [each.aliases for each in groups] == [
        ("net/top", "net/top/kernel", "net/top/bias"),
        ("net/low", "net/low/kernel", "net/low/count"),
        ("scale",),
    ]
    assert [[each.path for each in group.weights] for group in groups] == [
        ["module/net_top/kernel", "module/net_top/bias"],
        ["module/net_low/kernel", "module/net_low/count"],
        ["module/scale/scale"],
    ]
    assert [len(each.trainable_weights) for each in groups] == [2, 1, 1]
    values = [keras.ops.convert_to_numpy(each)[0] for group in groups for each in group.weights]
    assert values == [0, 3, 1, 4, 2]


@on_tensorflow
@pytest.mark.parametrize(
    ("scopes", "names"),
    [
        (["bert/layer_3"], ["bert_layer_3"]),
        (["a b:c/d"], ["a_b_c_d"]),
        (["/Conv1/"], ["Conv1"]),
        (["Conv_1-x.y"], ["Conv_1-x.y"]),
        (["///"], ["variable"]),
        (["a/b", "a_b", "a b", "c"], ["a_b", "a_b_2", "a_b_3", "c"]),
    ],
)
def test_scopes_become_names_that_keras_allows(scopes, names):
    found = variables(*(f"{scope}/kernel" for scope in scopes))
    assert [each.name for each in grouped(found, "module")] == names


@on_tensorflow
def test_variables_of_one_name_are_all_kept():
    found = variables("dense/kernel", "dense/kernel", "dense/kernel")
    (group,) = grouped(found, "module")
    assert [keras.ops.convert_to_numpy(each)[0] for each in group.weights] == [0, 1, 2]
    assert len(set(group.aliases)) == 4


def group(**trainable):
    variables = {
        name: keras.Variable(1.0, trainable=each, name=name) for name, each in trainable.items()
    }
    return VariableGroup("tower/norm", variables, name="tower_norm")


@pytest.mark.core
def test_its_variables_are_frozen_and_thawed_as_one():
    made = group(gamma=True, beta=True, moving_mean=False, moving_variance=False)
    assert made.built
    assert [each.name for each in made.trainable_weights] == ["gamma", "beta"]
    assert [each.name for each in made.weights[2:]] == ["moving_mean", "moving_variance"]
    made.trainable = False
    assert made.trainable_weights == []
    made.trainable = True
    assert [each.name for each in made.trainable_weights] == ["gamma", "beta"]


@pytest.mark.core
def test_statistics_make_it_a_batch_normalization():
    normalisation = group(gamma=True, moving_mean=False, moving_variance=False)
    assert freezing.is_batch_norm(normalisation)
    assert freezing.batch_norm_state([normalisation], "affine") == "affine"
    assert not freezing.is_batch_norm(group(kernel=True, moving_mean=False))


@pytest.mark.core
def test_a_copy_of_a_configuration_is_not_live():
    live = LiveConfig(handle="…")
    assert live == {"handle": "…"}
    assert not isinstance(dict(live), LiveConfig)
    assert not isinstance(live.copy(), LiveConfig)
    assert not isinstance({**live}, LiveConfig)
