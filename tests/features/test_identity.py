"""Equal models have one identity, whatever they are called; others have another."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xfer.features import identity
from keras_xfer.layers import Backbone

pytestmark = pytest.mark.core


def seeded(make):
    keras.utils.set_random_seed(1)
    return make()


def sequential(units=3, activation="relu", name=None, dtype=None):
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(units, activation=activation, name=name, dtype=dtype),
            keras.layers.Dropout(0.2),
        ]
    )


def graph(swapped=False, factor=2.0, cut=False):
    x = keras.Input((4,))
    a = keras.layers.Dense(3, kernel_initializer="ones")(x)
    b = keras.layers.Dense(3, kernel_initializer="ones")(a)
    y = keras.layers.Subtract()([b, a] if swapped else [a, b]) * factor
    return keras.Model(x, a if cut else y)


def same(one, other):
    return identity.of_extractor(one) == identity.of_extractor(other)


@pytest.mark.parametrize(
    "make",
    [
        sequential,
        graph,
        lambda: Backbone(graph()),
        lambda: keras.Sequential(
            [keras.Input((4,)), Backbone(sequential(units=4)), sequential(units=2)]
        ),
        lambda: keras.Sequential([keras.Input((3, 4)), keras.layers.TimeDistributed(sequential())]),
    ],
)
def test_equal_models_are_one_whatever_keras_calls_their_layers(make):
    first = seeded(make)
    keras.layers.Dense(1)
    assert same(first, seeded(make))
    first.trainable = False
    assert same(first, seeded(make))


def test_names_do_not_matter_but_what_looks_like_one_does():
    assert same(seeded(lambda: sequential(name="low")), seeded(lambda: sequential(name="relu")))
    assert not same(
        seeded(lambda: sequential(name="relu", activation="relu")),
        seeded(lambda: sequential(name="gelu", activation="gelu")),
    )


def test_what_is_thawed_does_not_matter():
    one, other = (seeded(lambda: Backbone(sequential())) for _ in range(2))
    other.unfreeze()
    assert same(one, other)


def test_how_batch_normalization_trains_does_not_matter():
    def make(policy):
        keras.utils.set_random_seed(1)
        normalized = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
        backbone = Backbone(keras.Sequential([keras.Input((4,)), *normalized]), batch_norm=policy)
        return keras.Sequential([keras.Input((4,)), backbone])

    assert same(make("frozen"), make("train"))  # a search over policies has one set of features
    assert same(make("frozen"), make("affine"))


def test_what_else_uses_a_layer_does_not_matter():
    plain = graph()
    shared = graph()
    before = keras.Input((4,))
    for layer in shared.layers[1:2]:
        layer(before)
    assert same(plain, shared)


@pytest.mark.parametrize(
    "kwargs", [{"swapped": True}, {"factor": 3.0}, {"cut": True}], ids=lambda kwargs: str(kwargs)
)
def test_wiring_constants_and_the_cut_matter(kwargs):
    assert not same(graph(), graph(**kwargs))


@pytest.mark.parametrize(
    "kwargs", [{"activation": "tanh"}, {"dtype": "bfloat16"}, {"dtype": "mixed_bfloat16"}]
)
def test_configurations_and_dtype_policies_matter(kwargs):
    assert not same(seeded(sequential), seeded(lambda: sequential(**kwargs)))


@settings(max_examples=20, deadline=None)
@given(place=st.tuples(st.integers(0, 3), st.integers(0, 2)), change=st.sampled_from([1e-6, -1, 9]))
def test_every_weight_matters(place, change):
    model = seeded(sequential)
    before = identity.of_extractor(model)
    kernel, bias = model.get_weights()
    changed = kernel.copy()
    changed[place] += change
    model.set_weights([changed, bias])
    assert (identity.of_extractor(model) == before) == np.array_equal(changed, kernel)


def test_the_state_of_random_numbers_does_not_matter():
    model = seeded(sequential)
    before = identity.of_extractor(model)
    model(np.ones((2, 4)), training=True)
    assert identity.of_extractor(model) == before


def test_a_vocabulary_matters():
    pytest.importorskip("tensorflow")

    def make(words):
        layer = keras.layers.StringLookup(vocabulary=words)
        layer.build((None,))
        return layer

    assert same(make(["a", "b"]), make(["a", "b"]))
    assert not same(make(["a", "b"]), make(["b", "a"]))


def test_code_of_ones_own_matters():
    def make(factor):
        space = {"keras": keras, "__name__": "own"}
        exec(  # noqa: S102 - as if somebody had edited the file
            "class Own(keras.layers.Layer):\n"
            f"    def call(self, x):\n        return x * {factor}\n",
            space,
        )
        layer = space["Own"]()
        layer.build((None, 4))
        return layer

    assert same(make(2), make(2))
    assert not same(make(2), make(3))


class Silent(keras.layers.Layer):
    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return x


class Arrayed(Silent):
    def get_config(self):
        return {**super(Silent, self).get_config(), "table": np.asarray(self.table)}


def test_a_layer_that_does_not_say_what_it_is_is_named():
    model = keras.Sequential([keras.Input((4,)), Silent(object(), name="mute")])
    with pytest.raises(ValueError, match="'mute' of type Silent.*get_config\\(\\)"):
        identity.of_extractor(model)


def test_arrays_in_a_configuration_matter():
    def make(table):
        return keras.Sequential([keras.Input((4,)), Arrayed(table)])

    assert same(make([1, 2]), make([1, 2]))
    assert not same(make([1, 2]), make([1, 3]))


def test_what_is_not_built_or_no_layer_is_refused():
    with pytest.raises(ValueError, match="not built.*build"):
        identity.of_extractor(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(TypeError, match="type function"):
        identity.of_extractor(lambda x: x)
