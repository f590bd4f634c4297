"""Equal models have one identity, whatever they are called; others have another."""

import collections
import fractions

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xfer.features import FeatureCache, identity, split_model
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


# What is below a cut inside a Backbone


def below(calculate, inputs=1, order=None, dtype=None):
    """The prefix of a model that is cut above what `calculate` makes of the backbone's inputs."""
    keras.utils.set_random_seed(1)
    given = [keras.Input((4,), dtype=dtype) for _ in range(inputs)]
    x = keras.layers.Dense(4, name="low")(calculate(*given))
    base = keras.Model(
        [given[i] for i in order or range(inputs)], keras.layers.Dense(4, name="top")(x)
    )
    outer = [keras.Input((4,)) for _ in range(inputs)]
    backbone = Backbone(base)
    model = keras.Model(outer, keras.layers.Dense(1)(backbone(outer if inputs > 1 else outer[0])))
    return split_model(model, "top")[0]


def attention(**kwargs):
    def calculate(x):
        x = keras.layers.Reshape((2, 2))(x)
        attend = keras.layers.MultiHeadAttention(1, 2, kernel_initializer="ones")
        return keras.layers.Flatten()(attend(x, x, **kwargs))

    return calculate


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 1.0, lambda x: x * 2.0),
        (lambda x: 2.0 - x, lambda x: x - 2.0),
        (lambda x: x[:, 0:1], lambda x: x[:, 1:2]),
        (lambda x: x + np.eye(4)[0], lambda x: x + np.eye(4)[1]),
        (attention(), attention(use_causal_mask=True)),
    ],
    ids=["constant", "order", "slice", "array", "argument"],
)
def test_arguments_below_a_cut_inside_a_backbone_matter(one, other):
    assert same(below(one), below(one))  # whatever numbers Keras gives to operations
    assert not same(below(one), below(other))


def test_inputs_of_a_backbone_that_is_cut_matter():
    def plain():
        return below(lambda a, b: a - b, inputs=2)

    assert same(plain(), plain())
    assert not same(plain(), below(lambda a, b: a - b, inputs=2, order=(1, 0)))
    assert not same(plain(), below(lambda a, b: a - b, inputs=2, dtype="int32"))


# What a layer of one's own holds


class Standardise(keras.layers.Layer):
    def __init__(self, shape=(4,), **kwargs):
        super().__init__(**kwargs)
        self.shape = shape

    def adapt(self, data):
        self.mean = data.mean(0)

    def call(self, x):
        return keras.ops.subtract(x, self.mean)


def test_what_a_layer_of_ones_own_has_learned_is_never_served_of_another(tmp_path):
    layer = Standardise()
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    for data in (x, x + 1, x):
        layer.adapt(data)
        extractor = keras.Sequential([keras.Input((4,)), layer])
        (features,) = FeatureCache(tmp_path).features(extractor, x)[0]
        np.testing.assert_allclose(features, x - data.mean(0), rtol=1e-6)
    assert len(FeatureCache(tmp_path).info().table.rows) == 2


class Table:
    def __init__(self, rows):
        self.rows = rows


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (float, 1, 2),
        (str, "a", "b"),
        (lambda n: n * keras.ops.ones(2), 1, 2),
        (lambda n: [0, {"a": [(n, None)]}], 1, 2),
        (lambda n: {"a": slice(n), "b": {n, "c"}}, 1, 2),
        (lambda n: Table(n * np.ones(2)), 1, 2),
        (lambda n: fractions.Fraction(n, 3), 1, 2),
        (lambda n: collections.deque([n]), 1, 2),
        (keras.DTypePolicy, "float32", "bfloat16"),
    ],
    ids=["float", "str", "tensor", "list", "dict", "object", "Fraction", "deque", "policy"],
)
def test_what_a_layer_of_ones_own_is_told_afterwards_matters(make, one, other):
    def holding(value):
        layer = Standardise()
        layer.build((None, 4))
        layer.held = make(value)
        return layer

    assert same(holding(one), holding(one))
    assert not same(holding(one), holding(other))


def test_what_becomes_of_a_layer_of_ones_own_in_use_does_not_matter(tmp_path):
    class Own(keras.Model):
        def __init__(self, size=(2, 3), **kwargs):
            super().__init__(**kwargs)
            self.dense = [keras.layers.Dense(n) for n in size]
            self.rates, self.size = {"drop": 0.5}, tuple(size)
            self.drop, self.loss_of = keras.layers.Dropout(0.5), keras.metrics.Mean()

        def call(self, x):
            return self.dense[1](self.drop(self.dense[0](x)))

        def get_config(self):
            return {**super().get_config(), "size": self.size}

    model = Own()
    model(np.ones((2, 4)))
    before = identity.of_extractor(model)
    model.compile("sgd", "mse")
    weights = model.get_weights()
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    model.predict(np.ones((4, 4)), verbose=0)
    model.set_weights(weights)
    model.trainable = False
    assert identity.of_extractor(model) == before
    model.save(tmp_path / "own.keras")
    loaded = keras.saving.load_model(tmp_path / "own.keras", custom_objects={"Own": Own})
    assert identity.of_extractor(loaded) == before


def test_a_graph_in_a_class_of_ones_own_is_known_again():
    class Own(keras.Model):
        pass

    def make():
        x = keras.Input((4,))
        return Own(x, keras.layers.Dense(2, kernel_initializer="ones")(x) * 2)

    one, other = make(), make()
    keep = identity.of_extractor(one), vars(one)  # whose ids no other object gets
    assert identity.of_extractor(other) == keep[0]
