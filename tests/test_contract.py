"""What every exported layer and callback must stand, whatever it is for."""

import copy
import inspect

import keras
import numpy as np
import pytest

import keras_xfer
from keras_xfer import Stage
from tests import schedules
from tests.schedules import BATCH, compiled

pytestmark = pytest.mark.core


def exported(base):
    return sorted(
        name
        for name in keras_xfer.__all__
        if inspect.isclass(getattr(keras_xfer, name))
        and issubclass(getattr(keras_xfer, name), base)
    )


ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
LAYERS = [name for name in exported(keras.Layer) if ON_TENSORFLOW or name != "HubModule"]
CALLBACKS = exported(keras.callbacks.Callback)


@pytest.fixture
def layer(request):
    """A function that makes a layer of that class for images of 6 x 6."""

    def make(name):
        if name == "HubModule":
            folder = request.getfixturevalue("saved")("feature_map")
            return keras_xfer.HubModule(folder, trainable=True)
        return _layer(name)

    return make


def _layer(name):
    if name == "BackbonePreprocessing":
        return keras_xfer.BackbonePreprocessing(1 / 127.5, -1.0)
    assert name == "Backbone", f"say here how to make a {name}"
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    return keras_xfer.Backbone(keras.Model(inputs, x), trainable=True, pooling="avg")


def callback(name, folder):
    """A callback of that class for the small model of `tests.schedules`."""
    if name == "StagedUnfreezing":
        return keras_xfer.StagedUnfreezing([Stage(epochs=1), Stage("all", learning_rate=1e-3)])
    if name == "BestCheckpoint":
        return keras_xfer.BestCheckpoint(folder / "best.keras", monitor="loss")
    if name == "BackupAndRestore":
        return keras_xfer.BackupAndRestore(folder / "backup")
    assert name == "EpochTiming", f"say here how to make a {name}"
    return keras_xfer.EpochTiming()


def images(count=4):
    return np.random.default_rng(0).uniform(0, 255, (count, 6, 6, 3)).astype("float32")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_goes_through_a_model(name, layer, tmp_path):
    """Called, trained in `fit`, saved, reloaded without custom objects: the same answers.

    Safely, but for HubModule, which runs the code of others."""
    x = images()
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), layer(name), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    model.fit(x, np.ones((4, 1)), epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    safe = name != "HubModule"
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=safe)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_from_its_configuration(name, layer):
    made = layer(name)
    again = type(made).from_config(made.get_config())
    assert again.get_config() == made.get_config()
    again.build((None, 6, 6, 3))
    again.set_weights(made.get_weights())
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(again(images())), keras.ops.convert_to_numpy(made(images()))
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_says_the_shape_and_dtype_of_its_output(name, layer):
    made = layer(name)
    spec = made.compute_output_spec(keras.KerasTensor((None, 6, 6, 3)))
    output = made(images())
    assert tuple(spec.shape)[1:] == tuple(output.shape)[1:]
    assert keras.backend.standardize_dtype(output.dtype) == spec.dtype


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_obeys_mixed_precision(name, layer):
    keras.config.set_dtype_policy("mixed_float16")
    output = layer(name)(images())
    assert keras.backend.standardize_dtype(output.dtype) == "float16"


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_never_changes_its_input(name, layer):
    x = images()
    before = x.copy()
    layer(name)(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.skipif(ON_TENSORFLOW, reason="there it works")
def test_a_savedmodel_needs_tensorflow():
    backend = keras.backend.backend()
    with pytest.raises(RuntimeError, match=f"Expected the TensorFlow backend.*'{backend}'"):
        keras_xfer.HubModule("/nowhere")
    with pytest.raises(RuntimeError, match=f"'{backend}'"):
        keras_xfer.Backbone.from_hub("/nowhere")


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_serves_two_fits_and_a_copy_of_it_too(name, tmp_path):
    made = callback(name, tmp_path)
    duplicate = copy.deepcopy(made)
    x, y = schedules.data()
    for each in (made, duplicate):
        model = compiled("sgd")
        model.fit(x, y, epochs=2, callbacks=[each], **BATCH)
        history = model.fit(x, y, epochs=3, initial_epoch=2, callbacks=[each], **BATCH).history
        assert len(history["loss"]) == 1


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_can_be_driven_by_hand(name, tmp_path):
    made = callback(name, tmp_path)
    model = compiled("sgd")
    x, y = schedules.data()
    model.train_on_batch(x, y)
    made.set_params({"epochs": 1, "steps": 1, "verbose": 0})
    made.set_model(model)
    made.on_train_begin()
    made.on_epoch_begin(0)
    made.on_train_batch_begin(0)
    logs = model.train_on_batch(x, y, return_dict=True)
    made.on_train_batch_end(0, logs)
    made.on_epoch_end(0, logs)
    made.on_train_end(logs)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_works_in_any_order_beside_the_others(name, tmp_path):
    x, y = schedules.data()
    others = [callback(each, tmp_path) for each in CALLBACKS if each != name]
    for callbacks in ([callback(name, tmp_path), *others], [*others, callback(name, tmp_path)]):
        model = compiled("sgd")
        for each in callbacks:
            if isinstance(each, keras_xfer.BestCheckpoint):
                each.resume = False
        history = model.fit(x, y, epochs=2, callbacks=callbacks, **BATCH).history
        assert history["stage"] == [0, 1]
        assert len(history["epoch_seconds"]) == 2
        assert (tmp_path / "best.keras").exists()
