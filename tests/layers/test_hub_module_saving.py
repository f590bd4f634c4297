"""HubModule saved: the same answers from every kind of file, and none from a source not trusted."""

import copy
import hashlib
import re
import tarfile

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf  # not where the backend is another

from keras_xfer import Backbone, BackupAndRestore, BestCheckpoint, HubModule
from tests import saved_models
from tests.layers.hub import assert_same, inputs_of, numbers, weights

HEADS = {"as it is": lambda layer: layer, "in a backbone": Backbone}


def model_of(layer, name="reusable"):
    """A model of that layer and a head."""
    dtype = "string" if name == "text" else "float32"
    inputs = keras.Input(inputs_of(name).shape[1:], dtype=dtype)
    outputs = keras.layers.Dense(2, name="head")(layer(inputs))
    return keras.Model(inputs, outputs)


def fit(model, name="reusable", epochs=1, **kwargs):
    if not model.compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = inputs_of(name), numbers(4, 2)
    return model.fit(x, y, batch_size=2, epochs=epochs, verbose=0, **kwargs)


def answers(model, name="reusable"):
    return model.predict(inputs_of(name), verbose=0)


# --- the whole model -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("reusable", "in a backbone"), ("text", "as it is")])
def test_a_model_file_gives_the_same_answers(saved, tmp_path, name, head):
    layer = HubModule(saved(name), trainable=True)
    model = model_of(HEADS[head](layer), name)
    untrained = answers(model, name)
    model.layers[1].trainable = False
    model.layers[1].trainable = True
    fit(model, name, epochs=2)
    trained = answers(model, name)
    assert not np.allclose(untrained, trained)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert_same(answers(loaded, name), trained)
    assert len(loaded.trainable_variables) == len(model.trainable_variables) > 2
    fit(loaded, name)  # and it trains on


SETTINGS = {
    "reusable": {"arguments": {"times": 2}, "batch_norm": "train", "tags": {"serve"}},
    "dict_output": {"output_key": "map", "output_shape": (6, 6, 4)},
    "signatures": {"signature": "serving_default", "signature_outputs_as_dict": True},
    "shapeless": {"output_shape": [3], "dtype": "float64"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_argument_comes_back(saved, tmp_path, name):
    layer = HubModule(saved(name), name="mine", **SETTINGS[name])
    inputs = keras.Input(inputs_of(name).shape[1:])
    keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    again = loaded.get_layer("mine")
    assert again.get_config() == layer.get_config()
    expected = {
        key: sorted(value) if key == "tags" else value for key, value in SETTINGS[name].items()
    }
    expected.pop("dtype", None)
    config = again.get_config()
    for key, value in expected.items():
        assert config[key] == (tuple(value) if key == "output_shape" else value)
    assert config["handle"] == str(saved(name))
    assert_same(again(inputs_of(name)), layer(inputs_of(name)))
    assert again.compute_dtype == layer.compute_dtype


@pytest.mark.parametrize("start", ["norm", "top", "all", None])
def test_what_is_thawed_comes_back(saved, tmp_path, start):
    layer = HubModule(saved("reusable"), name="module")
    if start is not None:
        layer.unfreeze(start)
    model_of(layer).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    again = loaded.get_layer("module")
    expected = {"norm": 3, "top": 1, "all": 4, None: 0}[start]
    assert len(again.trainable_variables) == expected
    assert [each.trainable for each in again.groups] == [each.trainable for each in layer.groups]
    before = again.get_weights()
    fit(loaded)
    changed = [not np.array_equal(*pair) for pair in zip(before, again.get_weights(), strict=True)]
    assert sum(changed) == expected


def test_groups_that_were_all_frozen_by_hand_come_back_frozen(saved):
    layer = HubModule(saved("reusable"), trainable=True)
    for group in layer.groups:
        group.trainable = False
    assert layer.trainable_variables == []
    assert HubModule.from_config(layer.get_config()).trainable_variables == []


def test_weights_frozen_by_hand_come_back_frozen(saved):
    layer = HubModule(saved("reusable"), trainable=True)
    next(each for each in layer.weights if each.name == "gamma").trainable = False
    again = HubModule.from_config(layer.get_config())
    assert [each.name for each in again.trainable_variables] == ["kernel", "beta", "kernel"]


# --- only from a source that is trusted ------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_nobody_loads_it_unawares(saved, tmp_path, head):
    layer = HEADS[head](HubModule(saved("reusable")))
    model = model_of(layer)
    model.save(tmp_path / "model.keras")
    for load in (
        lambda: keras.saving.load_model(tmp_path / "model.keras"),
        lambda: keras.saving.load_model(tmp_path / "model.keras", safe_mode=True),
        lambda: keras.models.model_from_json(model.to_json()),
        lambda: keras.layers.deserialize(keras.layers.serialize(layer)),
        lambda: keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer)),
        lambda: keras.Model.from_config(model.get_config()),
        lambda: type(layer).from_config(dict(layer.get_config())),
    ):
        with pytest.raises((ValueError, TypeError), match="safe_mode=False"):
            load()


@pytest.mark.parametrize("head", HEADS)
def test_who_holds_the_model_clones_it(saved, head):
    module = HubModule(saved("reusable"), name="module")
    module.unfreeze("norm")
    model = model_of(HEADS[head](module))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_same(answers(clone), answers(model))
    clone.set_weights([each + 1 for each in model.get_weights()])
    assert not np.allclose(answers(clone), answers(model))  # variables of its own
    assert [each.trainable for each in clone.variables] == [
        each.trainable for each in model.variables
    ]


def test_a_copy_has_variables_of_its_own(saved):
    layer = HubModule(saved("reusable"))
    layer.unfreeze("norm")
    duplicate = copy.deepcopy(layer)
    assert [each.trainable for each in duplicate.groups] == [False, True, True]
    duplicate.set_weights([each + 1 for each in layer.get_weights()])
    assert_same(layer.get_weights(), HubModule(saved("reusable")).get_weights())


# --- weights alone, and other files ----------------------------------------------------------


def test_files_of_weights(saved, tmp_path):
    model = model_of(HubModule(saved("reusable"), trainable=True))
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of(HubModule(saved("reusable"), batch_norm="train"))
    assert not np.allclose(answers(other), answers(model))
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(answers(other), answers(model))


@pytest.mark.parametrize("name", ["reusable", "text"])
def test_an_exported_model_gives_the_same_answers(saved, tmp_path, name):
    model = model_of(HubModule(saved(name), trainable=True), name)
    fit(model, name)
    model.export(tmp_path / "exported", verbose=False)
    expected = answers(model, name)
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    assert_same(loaded.serve(inputs_of(name)), expected, atol=1e-6)


def test_the_best_weights_are_kept(saved, tmp_path):
    x, y = inputs_of("reusable"), numbers(4, 2)
    whole, alone = tmp_path / "best.keras", tmp_path / "best.weights.h5"
    model = model_of(HubModule(saved("reusable"), trainable=True))
    best = BestCheckpoint(whole, monitor="val_loss")
    weights_alone = BestCheckpoint(alone, monitor="val_loss", save_weights_only=True)
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 if epoch < 2 else 5.0)
    history = fit(
        model, epochs=4, validation_data=(x, y), callbacks=[best, weights_alone, rates]
    ).history["val_loss"]
    assert best.best_epoch == int(np.argmin(history)) < 3
    loaded = keras.saving.load_model(whole, safe_mode=False)
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(min(history), rel=1e-5)
    other = model_of(HubModule(saved("reusable")))
    other.load_weights(alone)
    assert_same(answers(other), answers(loaded))


def test_an_interrupted_training_goes_on(saved, tmp_path):
    """Oracle: the training that was not interrupted."""

    def train(folder, epochs):
        keras.utils.set_random_seed(3)
        layer = HubModule(saved("reusable"), batch_norm="train")
        layer.unfreeze("norm")
        model = model_of(layer)
        backup = BackupAndRestore(folder, delete_checkpoint=False)
        history = fit(model, epochs=epochs, callbacks=[backup], shuffle=False)
        return model, history

    straight, expected = train(tmp_path / "one", 3)
    train(tmp_path / "two", 2)
    resumed, history = train(tmp_path / "two", 3)
    assert history.epoch == [0, 1, 2]
    assert history.history == expected.history
    assert_same(resumed.get_weights(), straight.get_weights())
    assert_same(
        [each.numpy() for each in resumed.optimizer.variables],
        [each.numpy() for each in straight.optimizer.variables],
    )


# --- handles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_handle_that_is_gone_is_named_and_can_be_found_elsewhere(tmp_path, head):
    old = saved_models.bare(tmp_path / "old")
    model = model_of(HEADS[head](HubModule(old, name="module")), "bare")
    model.save(tmp_path / "model.keras")
    expected = answers(model, "bare")
    new = old.rename(tmp_path / "new")

    def load():
        return keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)

    message = rf"layer 'module'[\s\S]*{re.escape(repr(str(old)))}[\s\S]*HubModule.relocated"
    with pytest.raises(OSError, match=message):
        load()
    with HubModule.relocated({str(old): new}):
        loaded = load()
    assert_same(answers(loaded, "bare"), expected)
    module = next(each for each in loaded._flatten_layers() if isinstance(each, HubModule))
    assert module.get_config()["handle"] == str(new)
    with pytest.raises(OSError, match="HubModule.relocated"):  # it is over
        load()
    loaded.save(tmp_path / "model.keras")
    assert_same(answers(load(), "bare"), expected)


def test_relocations_add_up(tmp_path):
    one, two = saved_models.bare(tmp_path / "one"), saved_models.list_input(tmp_path / "two")
    configs = [HubModule(each).get_config() for each in (one, two)]
    new = [one.rename(tmp_path / "new_one"), two.rename(tmp_path / "new_two")]
    with HubModule.relocated({str(one): new[0]}), HubModule.relocated({str(two): str(new[1])}):
        loaded = [HubModule.from_config(each) for each in configs]
    assert [each.handle for each in loaded] == [str(each) for each in new]


def test_an_object_that_was_loaded_is_not_saved_but_its_weights_are(saved, tmp_path):
    layer = HubModule(tf.saved_model.load(str(saved("reusable"))), trainable=True)
    model = model_of(layer)
    fit(model)
    with pytest.raises(NotImplementedError, match="a path or an address.*tf.saved_model.save"):
        layer.get_config()
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of(HubModule(saved("reusable")))
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(answers(other), answers(model))


def test_arguments_that_are_not_json_are_refused_when_saved(saved):
    layer = HubModule(saved("reusable"), arguments={"times": np.int64(2)})
    with pytest.raises(ValueError, match="arguments that JSON can hold.*times"):
        layer.get_config()


def test_an_archive_is_pinned(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    archive = tmp_path / "bare.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(saved("bare"), arcname=".")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    layer = HubModule(archive, sha256=sha256)
    assert layer.get_config()["sha256"] == sha256
    again = HubModule.from_config(layer.get_config())
    assert_same(again(inputs_of("bare")), HubModule(saved("bare"))(inputs_of("bare")))
    with pytest.raises(OSError, match=64 * "0"):
        HubModule(archive, sha256=64 * "0")
    archive.write_bytes(archive.read_bytes() + b"\0")  # it is another now
    with pytest.raises(OSError, match=sha256):
        HubModule.from_config(layer.get_config())


def test_weights_have_the_names_of_the_savedmodel(saved):
    layer = HubModule(saved("tower"), name="module")
    assert {each.path for each in layer.weights} == {f"module/{name}" for name in weights(layer)}


# --- another SavedModel behind the handle -----------------------------------------------------


def two_factors(folder, first):
    """x * a * b, of which the one or the other is read first."""

    class Factors(tf.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = tf.Variable([1.0], name="a"), tf.Variable([2.0], name="b")

        @tf.function(input_signature=[tf.TensorSpec([None, 1])])
        def __call__(self, x):
            return x * self.a * self.b if first == "a" else x * self.b * self.a

    tf.saved_model.save(Factors(), str(folder))
    return str(folder)


def test_values_are_never_given_to_another_variable(tmp_path):
    old, new = two_factors(tmp_path / "old", "a"), two_factors(tmp_path / "new", "b")
    model = keras.Sequential([keras.Input((1,)), HubModule(old)])
    model.save(tmp_path / "model.keras")
    with (
        HubModule.relocated({old: new}),
        pytest.raises(ValueError, match=r"values of \['b'\][\s\S]*another"),
    ):
        keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)


def test_a_scalar_output_shape_is_saved(saved, tmp_path):
    layer = HubModule(saved("counting"), output_shape=())
    assert HubModule.from_config(layer.get_config()).get_config()["output_shape"] == ()


def test_the_refusal_of_a_clone_says_how(saved):
    inner = keras.Sequential([keras.Input((4,)), HubModule(saved("reusable"))])
    model = keras.Sequential([keras.Input((4,)), inner])
    with pytest.raises(ValueError, match=r"enable_unsafe_deserialization\(\)[\s\S]*clone_model"):
        keras.models.clone_model(model)
