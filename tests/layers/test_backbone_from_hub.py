"""A SavedModel of TensorFlow Hub as a Backbone: its policies, schedules, images and files."""

import itertools
import json
import re

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf  # not where the backend is another

from keras_xfer import Backbone, HubModule, Stage, StagedUnfreezing
from tests.layers.hub import assert_same, inputs_of, kerashub, moved, numbers, weights

TOWER = ["block1_conv", "block1_bn", "block2_conv", "block2_bn", "top"]
STATISTICS = {f"{bn}/moving_{each}" for bn in TOWER[1:4:2] for each in ("mean", "variance")}
AFFINE = {f"{bn}/{each}" for bn in TOWER[1:4:2] for each in ("gamma", "beta")}


def with_head(backbone, rate=0.1):
    model = keras.Sequential([keras.Input((8, 8, 3)), backbone, keras.layers.Dense(2, name="head")])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def fit(model, **kwargs):
    kwargs = {"batch_size": 4, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(inputs_of("tower"), numbers(4, 2, seed=7), **kwargs)


def names(scopes):
    """The variables of these scopes, all of them."""
    every = {"kernel", "bias"}, {"gamma", "beta", "moving_mean", "moving_variance"}
    return {f"{scope}/{each}" for scope in scopes for each in every[scope.endswith("_bn")]}


# --- BatchNormalization ----------------------------------------------------------------------

STILL = {"frozen": STATISTICS | AFFINE, "affine": STATISTICS, "train": set()}


@pytest.mark.parametrize(
    ("policy", "road"),
    [
        ("frozen", "constructor"),
        ("frozen", "unfreeze"),
        ("frozen", "trainable"),
        ("frozen", "groups"),
        ("affine", "groups"),
        ("train", "unfreeze"),
    ],
)
def test_the_policy_holds(saved, policy, road):
    """Also over a module that was told to move its statistics."""
    module = HubModule(saved("tower"), batch_norm="train")
    backbone = Backbone(module, batch_norm=policy, trainable=road == "constructor")
    if road == "unfreeze":
        backbone.unfreeze()
    elif road == "trainable":
        module.trainable = True
    elif road == "groups":
        module.trainable = True
        for group in module.groups:
            group.trainable = True
    model = with_head(backbone)
    before = weights(module)
    fit(model)
    assert moved(before, weights(module)) == before.keys() - STILL[policy]
    assert len(model.trainable_variables) == 2 + {"frozen": 6}.get(policy, 10)


def test_the_train_policy_moves_statistics_as_tensorflow_hub_does(saved):
    x = inputs_of("tower")
    theirs = kerashub().KerasLayer(str(saved("tower")), trainable=True)
    theirs(x, training=True)
    expected = {each.name.removesuffix(":0"): each.numpy() for each in theirs.weights}
    backbone = Backbone.from_hub(saved("tower"), trainable=True, batch_norm="train")
    backbone(x, training=True)
    for name in STATISTICS:
        assert_same(weights(backbone.model)[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("policy", ["frozen", "affine"])
def test_from_hub_holds_statistics_and_dropout(saved, policy):
    backbone = Backbone.from_hub(saved("tower"), trainable=True, batch_norm=policy)
    x = inputs_of("tower")
    before = weights(backbone.model)
    assert_same(backbone(x, training=True), backbone(x, training=False))
    assert moved(before, weights(backbone.model)) == set()


# --- thawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("block2", "block2_conv"),
        (0.2, "top"),
        ("all", "block1_conv"),
    ],
)
def test_what_is_selected_moves_alone(saved, start, first):
    backbone = Backbone.from_hub(saved("tower"))
    backbone.unfreeze(start)
    before = weights(backbone.model)
    fit(with_head(backbone))
    thawed = TOWER[TOWER.index(first) :]
    assert moved(before, weights(backbone.model)) == names(thawed) - STATISTICS - AFFINE


def test_the_summary_counts_what_trains(saved):
    backbone = Backbone.from_hub(saved("tower"))
    backbone.unfreeze("block2")
    convolutions = [3 * 3 * 3 * 4 + 4, 3 * 3 * 4 * 4 + 4]
    normalisation, top = 4 * 4, 4 * 4 + 4
    assert [tuple(row) for row in backbone.trainable_summary().rows] == [
        ("block1", 2, convolutions[0] + normalisation, 0, "frozen"),
        ("block2", 2, convolutions[1] + normalisation, convolutions[1], "frozen"),
        ("top", 1, top, top, "-"),
        ("total", 5, sum(convolutions) + 2 * normalisation + top, convolutions[1] + top, "frozen"),
    ]


def within_a_model(saved):
    """A backbone of two layers, of which the second is the module."""
    module = HubModule(saved("tower"), batch_norm="train")
    inner = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(1.0), module])
    return module, Backbone(inner)


@pytest.mark.parametrize("start", ["block2_conv/kernel", "block2_.*"])
def test_a_module_within_a_model_is_thawed_by_its_scopes(saved, start):
    module, backbone = within_a_model(saved)
    backbone.unfreeze(start)
    before = weights(module)
    fit(with_head(backbone))
    assert moved(before, weights(module)) == names(TOWER[2:]) - STATISTICS - AFFINE


def test_a_module_within_a_model_has_its_blocks(saved):
    _, backbone = within_a_model(saved)
    assert [block.name for block in backbone.blocks] == ["block1", "block2", "top"]


@pytest.mark.parametrize(
    ("name", "kwargs", "why"),
    [
        ("signatures", {"signature": "serving_default", "output_key": "sum"}, "a signature knows"),
        ("exported", {}, "model.export()"),
    ],
)
def test_why_it_cannot_be_thawed_is_said(saved, name, kwargs, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        Backbone.from_hub(saved(name), trainable=True, **kwargs)
    backbone = Backbone.from_hub(saved(name), **kwargs)
    with pytest.raises(ValueError, match=f"weights to train.*{re.escape(why)}"):
        backbone.unfreeze()
    assert not backbone.trainable
    backbone(inputs_of(name), training=True)


# --- in one fit ------------------------------------------------------------------------------


class Snapshots(keras.callbacks.Callback):
    """The weights of a module at the beginning and at the end of each epoch."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.taken = []

    def on_train_begin(self, logs=None):
        self.taken.append(weights(self.module))

    def on_epoch_end(self, epoch, logs=None):
        self.taken.append(weights(self.module))


def test_stages_move_what_they_say(saved):
    backbone = Backbone.from_hub(saved("tower"), batch_norm="affine")
    model = with_head(backbone)
    snapshots = Snapshots(backbone.model)
    stages = StagedUnfreezing(
        [
            Stage(epochs=1, learning_rate=0.1),
            Stage("top", epochs=1, learning_rate=0.1),
            Stage("block2", epochs=2, learning_rate=0.1),
            Stage("all", epochs=1, learning_rate=0.1),
        ]
    )
    history = fit(model, epochs=5, callbacks=[stages, snapshots]).history
    taken = snapshots.taken
    steps = [moved(*pair) for pair in itertools.pairwise(taken)]
    block2 = names(TOWER[2:]) - STATISTICS
    assert steps == [set(), names(["top"]), block2, block2, names(TOWER) - STATISTICS]
    assert history["stage"] == [0, 1, 2, 2, 3]
    assert history["trainable_params"] == [10, 30, 186, 186, 306]


def test_layer_decay_goes_by_the_blocks_of_the_module(saved):
    """Oracle: one step of gradient descent by hand, each block at its own rate."""
    x, y = inputs_of("tower"), numbers(4, 2, seed=7)
    backbone = Backbone.from_hub(saved("tower"), batch_norm="affine")
    model = with_head(backbone)
    kernel = model.get_layer("head").kernel.numpy()
    before = weights(backbone.model)
    loaded = tf.saved_model.load(str(saved("tower")))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((loaded(x, training=False) @ kernel - y) ** 2)
        loss += sum(each() for each in loaded.regularization_losses)
    gradients = tape.gradient(loss, loaded.trainable_variables)
    stages = StagedUnfreezing([Stage("all", epochs=1, learning_rate=0.8, layer_decay=0.5)])
    fit(model, callbacks=[stages])
    after = weights(backbone.model)
    rates = {"top": 0.4, "block2": 0.2, "block1": 0.1}
    for variable, gradient in zip(loaded.trainable_variables, gradients, strict=True):
        name = variable.name.removesuffix(":0")
        rate = rates[name.partition("/")[0].partition("_")[0]]
        np.testing.assert_allclose(
            after[name], before[name] - rate * gradient.numpy(), atol=1e-5, err_msg=name
        )


def test_gradual_thawing_meets_the_blocks(saved):
    model = with_head(Backbone.from_hub(saved("tower")))
    history = fit(
        model,
        epochs=4,
        callbacks=[StagedUnfreezing.gradual(epochs_per_stage=1, learning_rate=1e-3)],
    ).history
    assert history["trainable_params"] == [10, 30, 178, 290]


# --- images ----------------------------------------------------------------------------------


def test_a_feature_map_is_pooled(saved):
    backbone = Backbone.from_hub(saved("dict_output"), output_key="map", pooling="avg")
    x = inputs_of("dict_output")
    expected = kerashub().KerasLayer(str(saved("dict_output")))(x)["default"]
    assert_same(backbone(x), expected, atol=1e-6)
    assert backbone.compute_output_shape((None, 8, 8, 3)) == (None, 4)
    inputs = keras.Input((8, 8, 3))
    assert backbone(inputs).shape == (None, 4)


@pytest.mark.parametrize("kwargs", [{}, {"input_range": (-1, 1)}, {"input_range": (0.0, 255.0)}])
def test_images_come_to_the_size_and_range_of_the_module(saved, kwargs):
    backbone = Backbone.from_hub(saved("tower"), **kwargs)
    low, high = kwargs.get("input_range", (0, 1))
    preprocessing = backbone.preprocessing()
    white, black = np.full((1, 5, 6, 3), 255, "uint8"), np.zeros((2, 8, 8, 3), "uint8")
    assert_same(preprocessing(white), np.full((1, 8, 8, 3), high, "float32"), atol=1e-5)
    assert_same(preprocessing(black), np.full((2, 8, 8, 3), low, "float32"), atol=1e-5)
    gray = np.full((1, 8, 8, 3), 51.0)
    middle = np.full((1, 8, 8, 3), low + 0.2 * (high - low), "float32")
    assert_same(preprocessing(gray), middle, atol=1e-4)

    model = keras.Sequential([keras.Input((5, 6, 3), dtype="uint8"), preprocessing, backbone])
    theirs = kerashub().KerasLayer(str(saved("tower")))
    assert_same(model(white), theirs(np.full((1, 8, 8, 3), high, "float32")), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("tower", {}, (8, 8)),
        ("tower", {"image_size": 12}, (12, 12)),
        ("tower", {"image_size": (10, 12)}, (10, 12)),
        ("bare", {}, None),
    ],
)
def test_the_size_is_what_is_given_or_read(saved, name, kwargs, size):
    preprocessing = Backbone.from_hub(saved(name), **kwargs).preprocessing()
    assert preprocessing.image_size == size


def test_preprocessing_can_be_told_more(saved):
    preprocessing = Backbone.from_hub(saved("tower")).preprocessing(image_size=9, resize="pad")
    assert preprocessing(np.zeros((1, 4, 6, 3), "uint8")).shape == (1, 9, 9, 3)
    assert preprocessing.resize == "pad"


@pytest.mark.parametrize("input_range", [(1, 0), (1, 1), (255, 0)])
def test_a_range_that_does_not_ascend_is_refused(saved, input_range):
    with pytest.raises(ValueError, match=re.escape(f"input_range={input_range}")):
        Backbone.from_hub(saved("tower"), input_range=input_range)


# --- files -----------------------------------------------------------------------------------


def test_it_comes_back_whole(saved, tmp_path):
    backbone = Backbone.from_hub(
        saved("tower"), image_size=8, input_range=(-1, 1), batch_norm="train", name="base"
    )
    backbone.unfreeze("block2")
    model = keras.Sequential(
        [keras.Input((5, 6, 3)), backbone.preprocessing(), backbone, keras.layers.Dense(1)]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    images = 255 * numbers(2, 5, 6, 3)
    assert_same(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    again = loaded.get_layer("base")
    for other in (again, Backbone.from_config(backbone.get_config())):
        assert json.dumps(other.get_config()) == json.dumps(backbone.get_config())
        assert other.model.batch_norm == "train"
        assert [each.trainable for each in other.model.groups] == [False] * 2 + [True] * 3
        assert len(other.trainable_variables) == 6
        assert_same(other.preprocessing()(images), backbone.preprocessing()(images))
    assert float(np.min(again.preprocessing()(images))) < -0.9


def test_its_configuration_comes_back_equal(saved, tmp_path):
    backbone = Backbone.from_hub(saved("tower"), name="base")
    keras.Sequential([keras.Input((8, 8, 3)), backbone]).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert loaded.get_layer("base").get_config() == backbone.get_config()
