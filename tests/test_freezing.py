"""Selecting, freezing and thawing, leaf by leaf; and what Keras itself does that made it necessary."""

import contextlib
import itertools

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, freezing

pytestmark = [
    pytest.mark.core,
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

layers = keras.layers
BACKEND = keras.backend.backend()


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def dense(name):
    return layers.Dense(3, name=name)


class Pair(layers.Layer):
    """Two layers as one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = dense("first"), dense("second")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build((None, 3))
        self.built = True

    def call(self, inputs):
        return self.second(self.first(inputs))


class Own(keras.Model):
    """A model whose `call` is its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.relu, self.two = dense("one"), layers.ReLU(name="relu"), dense("two")

    def build(self, input_shape):
        self.one.build(input_shape)
        self.two.build((None, 3))
        self.built = True

    def call(self, inputs):
        return self.two(self.relu(self.one(inputs)))


def nested_model():
    """a -> nested(b -> bn -> innermost(c)) -> pair -> relu -> d."""
    innermost = keras.Sequential([keras.Input((3,)), dense("c")], name="innermost")
    inside = keras.Input((3,), name="inside")
    x = layers.BatchNormalization(name="bn")(dense("b")(inside))
    nested = keras.Model(inside, innermost(x), name="nested")
    inputs = keras.Input((4,), name="inputs")
    x = Pair(name="pair")(nested(dense("a")(inputs)))
    return keras.Model(inputs, dense("d")(layers.ReLU(name="relu")(x)), name="whole")


def plain():
    return keras.Sequential(
        [keras.Input((4,)), dense("a"), layers.ReLU(name="relu"), dense("b"), dense("c")]
    )


def names(found):
    return [layer.name for layer in found]


def trains(model):
    """The layers whose own weights train, by hand: kernel and bias, gamma and beta."""
    leaves = [each for each in model._flatten_layers() if not each._layers and each.weights]
    state = {}
    for leaf in leaves:
        own = [w.trainable for w in leaf.weights if not w.path.endswith(("_mean", "_variance"))]
        assert set(own) == {leaf.trainable}  # the flag of a leaf and of its weights agree
        state[leaf.name] = leaf.trainable
    return {name for name, trainable in state.items() if trainable}


# --- reading a model -------------------------------------------------------------------------------


def test_units_are_the_layers_in_order_with_nested_models_opened():
    model = nested_model()
    assert names(freezing.units(model)) == [
        *("inputs", "a", "inside", "b", "bn", "c", "pair", "relu", "d")
    ]
    assert names(freezing.units(plain())) == ["a", "relu", "b", "c"]
    own = Own()
    own.build((None, 4))
    assert names(freezing.units(own)) == ["one", "relu", "two"]
    pair = Pair()
    pair.build((None, 4))
    assert names(freezing.units(pair)) == ["first", "second"]
    bare = dense("bare")
    bare.build((None, 4))
    assert freezing.units(bare) == [bare]


def test_a_shared_layer_is_one_unit():
    shared = dense("shared")
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(dense("between")(shared(inputs))))
    assert names(freezing.units(model))[1:] == ["shared", "between"]
    assert freezing.parameters([model]) == 2 * (3 * 3 + 3)
    assert freezing.parameters([shared, shared]) == 12


def test_walk_reaches_everything_once():
    model = nested_model()
    found = freezing.walk(model)
    assert found[0] is model
    assert len({id(layer) for layer in found}) == len(found)
    assert {"whole", "nested", "innermost", "c", "pair", "first", "second"} <= set(names(found))


def test_a_graph_is_what_keras_runs():
    model = nested_model()
    own = Own()
    own.build((None, 4))
    assert freezing.graph_of(model) is model
    assert freezing.graph_of(plain()) is not None
    assert freezing.graph_of(own) is None
    assert freezing.graph_of(model.get_layer("pair")) is None
    assert freezing.graph_of(keras.Sequential([dense("unbuilt")])) is None
    assert freezing.graph_nodes(own) is None

    class Overridden(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return 2.0 * super().call(inputs, training=training, mask=mask)

    inputs = keras.Input((4,))
    doubled = Overridden(inputs, dense("a")(inputs))
    assert freezing.graph_of(doubled) is None
    x = np.ones((2, 4), "float32")
    for trainable in (False, True):
        actual = Backbone(doubled, trainable=trainable)(x, training=True)
        np.testing.assert_allclose(numpy_of(actual), 2 * numpy_of(doubled.get_layer("a")(x)))


def test_the_graph_is_read_as_one_with_the_nested_ones():
    nodes, outputs = freezing.graph_nodes(nested_model())
    assert [node.layer.name for node in nodes] == [
        *("inputs", "a", "b", "bn", "c", "pair", "relu", "d")
    ]
    for before, after in itertools.pairwise(nodes):
        assert after.inputs == before.outputs
    assert outputs == nodes[-1].outputs


def test_a_nested_model_called_twice_runs_twice():
    inside = keras.Input((3,))
    nested = keras.Model(inside, dense("n")(inside))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, nested(layers.ReLU(name="relu")(nested(inputs))))
    nodes, _ = freezing.graph_nodes(model)
    assert [node.layer.name for node in nodes][1:] == ["n", "relu", "n"]
    assert len({node.outputs for node in nodes}) == 4  # four different tensors


@pytest.mark.filterwarnings("ignore:Layer 'nested'.*does not support masking")  # Keras's word
def test_a_mask_that_goes_into_a_nested_model_is_in_use_to_its_end():
    inside = keras.Input((4, 6))
    nested = keras.Model(inside, layers.GRU(3)(layers.Dense(6)(inside)), name="nested")
    tokens = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(5, 6, mask_zero=True)(tokens)
    nodes, _ = freezing.graph_nodes(keras.Model(tokens, nested(embedded)))
    produced = {tensor for node in nodes[:-1] for tensor in node.outputs}
    assert len(nodes[-1].inputs) == 2  # what goes through the dense layer, and the mask
    assert set(nodes[-1].inputs) <= produced


def test_parameters_are_counted():
    model = nested_model()
    bn = model.get_layer("nested").get_layer("bn")
    total = (4 * 3 + 3) + 5 * (3 * 3 + 3) + 4 * 3
    assert freezing.parameters([model]) == total == model.count_params()
    assert freezing.parameters([model], trainable_only=True) == total - 2 * 3
    bn.trainable = False
    assert freezing.parameters([model], trainable_only=True) == total - 4 * 3


def test_finding_the_backbone():
    def backbone(name):
        return Backbone(plain(), name=name)

    one, other = backbone("one"), backbone("other")
    inputs = keras.Input((4,))
    deep = keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), one])])
    both = keras.Model(inputs, layers.Concatenate()([deep(inputs), other(inputs)]))
    assert freezing.find_backbone(deep) is one
    assert freezing.find_backbone(one) is one
    assert freezing.find_backbone(both, "other") is other
    assert freezing.find_backbone(both, one) is one
    with pytest.raises(ValueError, match=r"exactly one .*'one', 'other'.*Name the one"):
        freezing.find_backbone(both)
    with pytest.raises(ValueError, match=r"Received: backbone='two'; found: 'one', 'other'"):
        freezing.find_backbone(both, "two")
    with pytest.raises(ValueError, match=r"found: none.*Wrap the pretrained model"):
        freezing.find_backbone(plain())
    namesakes = [keras.Sequential([keras.Input((4,)), backbone("same")])(inputs) for _ in range(2)]
    twins = keras.Model(inputs, layers.Add()(namesakes))
    for wanted in ("same", None):
        with pytest.raises(ValueError, match=r"one keras_xfer Backbone .*'same', 'same'"):
            freezing.find_backbone(twins, wanted)


# --- freezing and thawing --------------------------------------------------------------------------

ALL = {"a", "b", "bn", "c", "first", "second", "d"}


def test_set_trainable_is_exact_over_mixed_flags():
    model = nested_model()
    for value in (True, False):
        for mixed in ("a", "nested", "pair"):
            model.get_layer(mixed).trainable = not value
            freezing.set_trainable(model, value)
            assert trains(model) == (ALL if value else set())
            assert all(layer.trainable is value for layer in freezing.walk(model))
    # Where the parent already has the value, and the children do not.
    model.get_layer("nested").get_layer("b").trainable = True
    model.get_layer("pair").first.trainable = True
    freezing.set_trainable(model, False)
    assert trains(model) == set()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("all", ALL),
        (0, ALL),
        (1, ALL),  # 0 is the input
        (2, ALL - {"a"}),
        (3, {"first", "second", "d"}),
        (np.int64(3), {"first", "second", "d"}),
        (-1, {"d"}),
        (np.int32(-2), {"d"}),
        (-3, {"first", "second", "d"}),
        (-6, ALL),
        ("d", {"d"}),
        ("b", ALL - {"a"}),
        ("bn", ALL - {"a", "b"}),
        ("c", {"c", "first", "second", "d"}),
        ("nested", ALL - {"a"}),
        ("innermost", {"c", "first", "second", "d"}),
        ("pair", {"first", "second", "d"}),
        ("pai.", {"first", "second", "d"}),
        ("[bc]", ALL - {"a"}),
        ("bn|relu", ALL - {"a", "b"}),
        ("inner.*", {"c", "first", "second", "d"}),
        (0.1, {"d"}),
        (0.5, {"first", "second", "d"}),
        (np.float64(0.99), ALL),
    ],
)
def test_what_is_selected_trains_and_nothing_else(start, expected):
    model = nested_model()
    freezing.freeze(model)
    for _ in range(2):  # from frozen, and from an earlier thaw
        freezing.thaw(model, freezing.select(model, start))
        assert trains(model) == expected
        frozen = [unit for unit in freezing.units(model) if unit.name in ALL - expected]
        assert not any(unit.trainable for unit in frozen)
        freezing.thaw(model, 4)
    freezing.freeze(model)
    assert trains(model) == set()


def test_a_nested_model_of_which_nothing_trains_is_frozen_itself():
    model = nested_model()
    freezing.thaw(model, freezing.select(model, "pair"))
    assert model.trainable
    assert not model.get_layer("nested").trainable
    freezing.thaw(model, freezing.select(model, "c"))
    assert model.get_layer("nested").trainable


def test_block_names_come_after_layer_names_and_before_expressions():
    model = nested_model()
    a, _, pair = (model.get_layer(name) for name in ("a", "nested", "pair"))

    class Block:
        def __init__(self, name, *inside):
            self.name, self.layers = name, inside

    blocks = [Block("pair", a), Block("p.*", a), Block("top", pair, model.get_layer("d"))]
    position = {unit.name: i for i, unit in enumerate(freezing.units(model))}
    assert freezing.select(model, "pair", blocks=blocks) == position["pair"]
    assert freezing.select(model, "p.*", blocks=blocks) == position["a"]
    assert freezing.select(model, "top", blocks=blocks) == position["pair"]
    assert freezing.select(model, "p.*") == position["pair"]


@pytest.mark.parametrize("start", [True, False, None, [1], b"a", 1j])
def test_a_start_of_another_type_is_refused(start):
    with pytest.raises(TypeError, match="Received: start="):
        freezing.select(plain(), start)


@pytest.mark.parametrize("start", [0.0, 1.0, -0.5, 1.5, float("nan"), 4, -5, 100])
def test_a_start_out_of_range_is_refused(start):
    with pytest.raises(ValueError, match=r"Received: start="):
        freezing.select(plain(), start)
    with pytest.raises(ValueError, match=r"4 layers.*from -4 to 3"):
        freezing.select(plain(), 4)


def test_a_start_that_matches_nothing_names_the_nearest():
    model = nested_model()
    with pytest.raises(ValueError, match=r"none of the .* names\. Nearest: 'pair'"):
        freezing.select(model, "pear")
    with pytest.raises(ValueError, match=r"nor is it a regular expression"):
        freezing.select(model, "pair(")
    block = type("Block", (), {"name": "block_of_mine", "layers": ()})
    with pytest.raises(ValueError, match="Nearest: 'block_of_mine'"):
        freezing.select(model, "block_of_min", blocks=[block])
    with pytest.raises(ValueError, match="Nearest"):
        freezing.select(model, "pai")  # a whole name


def test_a_start_with_nothing_to_train_is_refused():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="bn")(dense("a")(inputs))
    model = keras.Model(inputs, layers.ReLU(name="relu")(x))
    for start in ("relu", -1, 0.1):
        with pytest.raises(ValueError, match=r"\['relu'\]; start at 'bn' or before"):
            freezing.select(model, start)
        with pytest.raises(ValueError, match=r"batch_norm='frozen'.*start at 'a' or before"):
            freezing.select(model, start, batch_norm="frozen")
    with pytest.raises(ValueError, match=r"\['bn', 'relu'\]; start at 'a' or before"):
        freezing.select(model, "bn", batch_norm="frozen")
    for policy in ("affine", "train"):
        assert freezing.select(model, "bn", batch_norm=policy) == 2
    weightless = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    with pytest.raises(ValueError, match="the model has nothing to train"):
        freezing.select(weightless, "all")


def test_a_start_is_judged_by_what_could_train_and_not_by_the_flags():
    model = nested_model()
    freezing.freeze(model)
    assert freezing.select(model, "d") == 8


@pytest.mark.parametrize("kind", ["subclassed", "layer", "leaf"])
def test_models_without_a_graph(kind):
    model = {"subclassed": Own, "layer": Pair, "leaf": lambda: dense("leaf")}[kind]()
    model.build((None, 4))
    freezing.freeze(model)
    assert trains(model) == set()
    freezing.thaw(model, freezing.select(model, -1))
    assert trains(model) == {{"subclassed": "two", "layer": "second", "leaf": "leaf"}[kind]}
    freezing.thaw(model, freezing.select(model, "all"))
    assert len(trains(model)) == (1 if kind == "leaf" else 2)


def test_a_shared_layer_follows_its_first_place():
    shared = dense("shared")
    inputs = keras.Input((3,))
    model = keras.Model(inputs, dense("top")(shared(dense("between")(shared(inputs)))))
    freezing.thaw(model, freezing.select(model, "between"))
    assert trains(model) == {"between", "top"}


def test_flags_are_told_and_set_again():
    model = nested_model()
    nested = model.get_layer("nested")
    freezing.freeze(model)
    nested.get_layer("b").trainable = True  # under a frozen parent
    model.get_layer("pair").trainable = True
    model.get_layer("pair").second.trainable = False
    nested.get_layer("bn").gamma.trainable = True  # a weight on its own
    model.get_layer("d").trainable = True
    model.get_layer("d").bias.trainable = False
    state = freezing.thawed(model)

    def flags(of):
        return [each.trainable for each in [*freezing.walk(of), *of.weights]]

    for setup in (freezing.freeze, freezing.thaw):
        other = nested_model()
        setup(other)
        freezing.restore_thawed(other, state)
        assert flags(other) == flags(model)
        assert freezing.thawed(other) == state


# --- BatchNormalization ----------------------------------------------------------------------------


def test_a_policy_is_one_of_three():
    for policy in ("frozen", "affine", "train"):
        assert freezing.check_batch_norm(policy) == policy
    for wrong in ("freeze", "FROZEN", None, True):
        with pytest.raises(ValueError, match=r"'frozen', 'affine', 'train'.*Received: batch_norm="):
            freezing.check_batch_norm(wrong)


def test_the_guard_takes_back_gamma_and_beta_and_nothing_else():
    model = nested_model()
    guard = freezing.BatchNormGuard(model, "frozen")
    assert names(guard.layers) == ["bn"]
    freezing.set_trainable(model, True)
    guard.enforce()
    assert trains(model) == ALL - {"bn"}
    guard.layers[0].beta.trainable = True
    guard.enforce()
    assert trains(model) == ALL - {"bn"}
    for policy in ("affine", "train"):
        freezing.set_trainable(model, True)
        freezing.BatchNormGuard(model, policy).enforce()
        assert trains(model) == ALL


def test_the_guard_says_what_it_does():
    first, second = layers.BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), first, dense("a"), second])
    freezing.thaw(model)
    first.trainable = False
    for policy, expected in [
        ("train", "frozen, train"),
        ("affine", "affine, frozen"),
        ("frozen", "frozen"),
    ]:
        guard = freezing.BatchNormGuard(model, policy)
        guard.enforce()
        assert freezing.batch_norm_state([model], guard.policy) == expected
    assert freezing.batch_norm_state([model.get_layer("a")], guard.policy) == "-"


# --- canaries: what Keras does today; when one of these fails, a workaround may go -----------------


@contextlib.contextmanager
def _gone(what):
    """Turns a failing canary into a sentence for the maintainer."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"Keras {keras.__version__} no longer does this: {what}") from error


@pytest.mark.skipif(BACKEND != "tensorflow", reason="AutoTrackable is TensorFlow's")
def test_canary_trainable_true_is_dropped_where_it_is_true_already():
    """Why `freezing.set_trainable` goes through the opposite, and Backbone.__setattr__."""
    model = plain()
    model.layers[0].trainable = False
    model.trainable = True
    with _gone("AutoTrackable drops `x.trainable = x.trainable`; simplify set_trainable"):
        assert model.layers[0].trainable is False


def test_canary_fit_overrides_training_false_of_a_functional_model():
    """https://github.com/keras-team/keras/issues/20285; keras 3.16 changes it (keras#23364)."""
    bn = layers.BatchNormalization(momentum=0.5)
    base = keras.Sequential([keras.Input((4,)), bn])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1)(base(inputs, training=False)))
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 4), "float32"), np.ones((4, 1), "float32"), verbose=0)
    with _gone("fit moves BatchNormalization called with training=False (keras#20285)"):
        assert numpy_of(bn.moving_mean).any()


@pytest.mark.parametrize(
    "noise", [layers.Dropout(0.5), layers.GaussianNoise(1.0)], ids=["Dropout", "GaussianNoise"]
)
def test_canary_frozen_noise_acts(noise):
    """https://github.com/keras-team/keras/issues/18092; why `freezing.call` exists."""
    model = keras.Sequential([keras.Input((100,)), noise])
    model.trainable = False
    x = np.ones((2, 100), "float32")
    with _gone("frozen noise layers act under training=True (keras#18092)"):
        assert not np.array_equal(numpy_of(model(x, training=True)), x)


def test_canary_frozen_spectral_normalization_writes():
    layer = layers.SpectralNormalization(layers.Dense(3))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.trainable = False
    before = numpy_of(layer.vector_u).copy()
    model(np.ones((2, 4), "float32"), training=True)
    with _gone("frozen SpectralNormalization writes its vector under training=True"):
        assert not np.array_equal(before, numpy_of(layer.vector_u))


def test_canary_the_default_training_is_written_into_the_graph():
    """Why `freezing._is_default` exists: Dropout's own default cannot be told from a wish."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dropout(0.5)(inputs))
    (nodes,) = (model._nodes_by_depth[0],)
    with _gone("a symbolic call writes training=False into the node's arguments"):
        assert nodes[0].arguments.kwargs == {"training": False}


def test_canary_an_explicit_training_reaches_the_layers_called_later():
    """Why `freezing.call` ends with `_SAY_TRAINING`."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.dropout = layers.Dense(100), layers.Dropout(0.5)

        def call(self, inputs, training=None):
            return self.dropout(self.dense(inputs, training=False))

    model = Model()
    x = np.ones((2, 100), "float32")
    with _gone("layer(x, training=False) silences the dropout of later layers in the same call"):
        np.testing.assert_array_equal(numpy_of(model(x, training=True)), numpy_of(model(x)))


def test_canary_a_frozen_parent_of_a_thawed_batch_normalization_lets_it_move():
    """https://github.com/keras-team/keras/issues/18092."""
    bn = layers.BatchNormalization(momentum=0.5)
    model = keras.Sequential([keras.Input((4,)), bn])
    model.trainable = False
    bn.trainable = True
    model(np.ones((4, 4), "float32"), training=True)
    with _gone("BatchNormalization in a frozen model moves if its own flag is True"):
        assert model.trainable_variables == []
        assert numpy_of(bn.moving_mean).any()
