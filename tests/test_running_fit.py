import keras
import numpy as np
import pytest

from keras_xfer.running_fit import callbacks_of_fit, locals_of_fit, stand_before, stands_last

pytestmark = pytest.mark.core


class Late(keras.callbacks.Callback):
    """Writes down each hook that it gets."""

    def __init__(self, name, said, first=None):
        super().__init__()
        self.name, self.said, self.first = name, said, first

    def on_train_begin(self, logs=None):
        self.said.append((self.name, "train"))
        if self.first:
            self.first(self)

    def on_epoch_begin(self, epoch, logs=None):
        self.said.append((self.name, epoch))


class Early(Late):
    """Another class, for `stand_before`."""


def fit(callbacks, epochs=1, **kwargs):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.ones((2, 1), "float32")
    model.fit(x, x, epochs=epochs, callbacks=callbacks, verbose=0, **kwargs)
    return model


def test_the_names_inside_fit_are_read_where_it_runs():
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.update(locals_of_fit(self.model))
            assert callbacks_of_fit(self)[0] is self
            assert locals_of_fit(keras.Sequential()) == {}  # not of that model

    x = np.ones((2, 1), "float32")
    model = fit([Look()], validation_data=(x, x))
    assert seen["self"] is model
    assert seen["validation_data"][0] is x
    assert seen["epoch_iterator"].num_batches == 1
    assert locals_of_fit(model) == {}
    assert callbacks_of_fit(model) == []


def test_a_method_called_fit_of_something_else_is_not_taken_for_it():
    class Search:
        def fit(self, model):
            validation_data = None
            return locals_of_fit(model), validation_data

    assert Search().fit(keras.Sequential()) == ({}, None)


def test_a_callback_comes_to_stand_before_others():
    said = []

    def move(callback):
        stand_before(callback, (Early,))

    callbacks = [Late("a", said), Early("b", said), Early("c", said), Late("d", said, move), Late("e", said)]  # fmt: skip
    fit(callbacks)
    # Nobody's on_train_begin is lost or comes twice.
    assert [name for name, what in said if what == "train"] == list("abcde")
    assert [name for name, what in said if what == 0] == list("adbce")


@pytest.mark.parametrize("names", ["ab", "a"])
def test_one_that_stands_before_others_stays(names):
    said = []
    mover = Late("a", said, lambda callback: stand_before(callback, (Early,)))
    fit([mover, *(Early(name, said) for name in names[1:])])
    assert [name for name, what in said if what == 0] == list(names)


def test_a_callback_becomes_the_last_and_begins_when_all_have_begun():
    said, answers = [], []
    last = Late("b", said, lambda callback: answers.append(stands_last(callback)))
    history = keras.callbacks.History()
    fit([Late("a", said), last, Late("c", said), history])
    assert [name for name, what in said if what == "train"] == list("abcb")
    assert [name for name, what in said if what == 0] == list("acb")
    assert answers == [False, True]


def test_driven_by_hand_a_callback_stays_where_it_is():
    callback = Late("a", [])
    callback.set_model(keras.Sequential())
    stand_before(callback, (Late,))
    assert stands_last(callback)
