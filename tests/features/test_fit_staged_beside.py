"""What stands beside the layers and the data of a staged training on cached features: losses and
metrics of their own below the cut or on the model, flags that callbacks set, data read once."""

import gc

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing, fit_staged
from keras_xfer.layers.backbone_part import BackbonePart
from tests.schedules import LOSS, assert_equal_weights, data

pytestmark = pytest.mark.core

HEAD = (Stage(epochs=2, learning_rate=1e-2),)
BOTH = (HEAD[0], Stage("high", epochs=2, learning_rate=1e-3))
BATCH = {"batch_size": 8, "shuffle": False, "verbose": 0}


class Penalty(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(keras.ops.mean(inputs))
        return inputs


class OwnResult(keras.Model):
    def get_metrics_result(self):
        return {**super().get_metrics_result(), "own": 1.0}


def compiled(*, below=None, **low):
    keras.utils.set_random_seed(1)
    dense = keras.layers.Dense
    base = keras.Sequential(
        [
            keras.Input((6,)),
            dense(8, activation="relu", name="low", **low),
            dense(4, activation="relu", name="high"),
        ]
    )
    before = [] if below is None else [below]
    layers = [keras.Input((6,)), *before, Backbone(base, name="base"), dense(3, name="head")]
    model = keras.Sequential(layers)
    model.compile("sgd", LOSS(from_logits=True), metrics=["accuracy"])
    return model


def plain(model, stages=HEAD, **kwargs):
    x, y = data()
    schedule = [StagedUnfreezing(stages), *kwargs.pop("callbacks", ())]
    epochs = sum(stage.epochs for stage in stages)
    return model.fit(x, y, epochs=epochs, callbacks=schedule, **{**BATCH, **kwargs})


def cached(model, stages=HEAD, **kwargs):
    x, y = data()
    return fit_staged(model, x, y, stages=stages, **{"boundary": "always", **BATCH, **kwargs})


def assert_equal_logs(one, other):
    assert one.history.keys() == other.history.keys()
    for name in one.history:
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=1e-4, err_msg=name)


# --- Losses and metrics --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        lambda: compiled(activity_regularizer=keras.regularizers.L2(0.1)),
        lambda: compiled(below=Penalty()),
    ],
    ids=["activity_regularizer", "add_loss"],
)
def test_losses_below_the_cut_count_or_are_not_cached(made):
    kwargs = {"validation_data": data()}
    assert_equal_logs(plain(made(), **kwargs), cached(made(), boundary="auto", **kwargs))


def test_a_layer_whose_losses_would_be_missing_is_named():
    with pytest.raises(ValueError, match=r"'low' \(Dense\) below the cut add to the loss"):
        cached(compiled(activity_regularizer=keras.regularizers.L2(1.0)))


def test_a_metric_that_the_model_has_as_an_attribute_is_logged():
    def made():
        model = compiled()
        model.extra = keras.metrics.Mean(name="extra")
        return model

    assert_equal_logs(plain(made()), cached(made(), boundary="auto"))


def test_a_model_that_makes_its_own_logs_has_them():
    def made():
        inner = compiled()
        inputs = keras.Input((6,))
        model = OwnResult(inputs, inner(inputs))
        model.compile("sgd", LOSS(from_logits=True))
        return model

    expected, found = plain(made()), cached(made(), boundary="auto")
    assert "own" in expected.history
    assert_equal_logs(expected, found)


# --- Callbacks -----------------------------------------------------------------------------------


class StopAtOnce(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.model.stop_training = True


def test_a_training_may_be_stopped_as_it_begins():
    expected = plain(compiled(), BOTH, callbacks=[StopAtOnce()])
    found = cached(compiled(), BOTH, callbacks=[StopAtOnce()])
    assert found.epoch == expected.epoch == [0]


def test_a_training_may_be_stopped_as_a_stage_begins():
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.stop_training = epoch == 2

    expected, found = compiled(), compiled()
    one = plain(expected, BOTH, callbacks=[Stop()])
    assert cached(found, BOTH, callbacks=[Stop()]).epoch == one.epoch == [0, 1, 2]
    assert_equal_weights(expected, found)


def test_weights_that_a_callback_writes_between_two_batches_train_on():
    class Shrink(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernel = self.model.get_layer("head").kernel
            kernel.assign(kernel * 0.9)

    expected, found = compiled(), compiled()
    plain(expected, BOTH, callbacks=[Shrink()])
    cached(found, BOTH, callbacks=[Shrink()])
    assert_equal_weights(expected, found)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_test_begin", "on_epoch_end"])
def test_an_interrupted_training_leaves_nothing_on_the_model(hook):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    model, stop = compiled(), keras.callbacks.Callback()
    setattr(stop, hook, interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(model, callbacks=[stop], validation_data=data())
    assert "jax_state_sync" not in vars(model)
    assert cached(model).epoch == [0, 1]


# --- Data ----------------------------------------------------------------------------------------


def batches():
    x, y = data()
    for first in range(0, 32, 8):
        yield x[first : first + 8], y[first : first + 8]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return list(batches())[index]


def test_batches_of_a_dataset_are_its_own_whatever_batch_size_says():
    def trained(boundary):
        model = compiled()
        common = {**BATCH, "batch_size": 4, "boundary": boundary}
        fit_staged(model, Batches(), stages=HEAD, **common)
        return int(model.optimizer.iterations)

    assert trained("always") == trained("never")


def test_a_generator_is_not_said_to_be_empty():
    common = {"stages": HEAD, "key": "these", "verbose": 0, "boundary": "always"}
    try:
        history = fit_staged(compiled(), batches(), **common)
    except (TypeError, ValueError) as error:
        assert "without any" not in str(error)  # noqa: PT017  # either is right
    else:
        assert len(history.epoch) == 2


def test_a_generator_without_end_is_not_counted():
    class EndlessError(Exception):
        pass

    def endless():
        for _ in range(100):
            yield from batches()
        raise EndlessError

    with pytest.raises((TypeError, ValueError)):
        fit_staged(compiled(), endless(), stages=HEAD, key="these", verbose=0)


# --- What is left --------------------------------------------------------------------------------


def parts():
    gc.collect()
    return sum(type(each) is BackbonePart for each in gc.get_objects())


def test_a_model_that_trains_again_and_again_does_not_grow():
    model = compiled()
    cached(model, BOTH)
    before, nodes = parts(), len(model.get_layer("head")._inbound_nodes)
    for _ in range(2):
        cached(model, BOTH)
    assert (parts(), len(model.get_layer("head")._inbound_nodes)) == (before, nodes)
