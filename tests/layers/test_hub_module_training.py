"""HubModule trained: what moves, by how much, and what thaws. Oracles: gradient descent by hand on
the variables of tf.saved_model.load, and tensorflow_hub.KerasLayer trained by tf_keras."""

import re

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf  # not where the backend is another

from keras_xfer import Backbone, HubModule
from tests.layers.hub import assert_same, inputs_of, kerashub, moved, numbers, weights
from tests.test_devices import TWO_CPUS, run

OUTPUTS = {"tower": (4, 4), "reusable": (4, 3), "bare": (4, 3)}
TOWER = ["block1_conv", "block1_bn", "block2_conv", "block2_bn", "top"]
STATISTICS = {f"{bn}/moving_{each}" for bn in TOWER[1:4:2] for each in ("mean", "variance")}


def targets_of(name):
    return numbers(*OUTPUTS[name], seed=9)


def model_of(layer, name, optimizer=None, **kwargs):
    """A compiled model of this layer alone."""
    model = keras.Sequential([keras.Input(inputs_of(name).shape[1:]), layer])
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", **kwargs)
    return model


def fit(model, name, epochs=1):
    return model.fit(
        inputs_of(name), targets_of(name), batch_size=4, epochs=epochs, shuffle=False, verbose=0
    ).history["loss"]


def by_hand(folder, x, y, optimizer, *, training):
    """The weights after one step, and the loss before it."""
    loaded = tf.saved_model.load(str(folder))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((loaded(x, training=training) - y) ** 2)
        loss += sum(each() for each in loaded.regularization_losses)
    variables = loaded.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return {each.name.removesuffix(":0"): each.numpy() for each in loaded.variables}, float(loss)


def regularisation(folder, scope=""):
    """The SavedModel's losses, of the variables of that scope."""
    loaded = tf.saved_model.load(str(folder))
    variables = [v for v in loaded.trainable_variables if v.name.startswith(scope)]
    with tf.GradientTape() as tape:
        losses = [each() for each in loaded.regularization_losses]
        total = tf.add_n(losses)
    read = zip(variables, tape.gradient(total, variables), strict=True)
    # A sum of factors times squares: half of each variable times its gradient.
    return sum(float(tf.reduce_sum(v * g)) / 2 for v, g in read if g is not None)


# --- one step, and many ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(("name", "policy"), [("tower", "frozen"), ("reusable", "train")])
def test_a_step_is_that_of_the_savedmodels_own_variables(saved, name, policy, optimizer):
    import tf_keras

    x, y = inputs_of(name), targets_of(name)
    oracle = getattr(tf_keras.optimizers, optimizer)(0.1)
    expected, loss = by_hand(saved(name), x, y, oracle, training=policy == "train")

    layer = HubModule(saved(name), trainable=True, batch_norm=policy)
    model = model_of(layer, name, getattr(keras.optimizers, optimizer)(0.1))
    before = weights(layer)
    assert model.train_on_batch(x, y) == pytest.approx(loss, rel=1e-5)
    after = weights(layer)
    for each, value in expected.items():
        np.testing.assert_allclose(after[each], value, rtol=0, atol=2e-5, err_msg=each)
    still = {each for each in before if "moving" in each and policy == "frozen"}
    assert moved(before, after) == before.keys() - still


def test_a_training_is_that_of_tensorflow_hub(saved):
    """With statistics that move, over many steps."""
    import tf_keras

    x, y = numbers(16, 4), numbers(16, 3, seed=1)
    how = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}
    theirs = kerashub().KerasLayer(str(saved("reusable")), trainable=True)
    oracle = tf_keras.Sequential([tf_keras.Input((4,)), theirs])
    oracle.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    expected = oracle.fit(x, y, **how).history["loss"]

    layer = HubModule(saved("reusable"), trainable=True, batch_norm="train")
    model = model_of(layer, "reusable", keras.optimizers.SGD(0.1, momentum=0.9))
    assert model.fit(x, y, **how).history["loss"] == pytest.approx(expected, rel=1e-4)
    mine = weights(layer)
    for variable in theirs.weights:
        name = variable.name.removesuffix(":0")
        np.testing.assert_allclose(mine[name], variable.numpy(), atol=1e-4, err_msg=name)
    assert_same(model.predict(x, verbose=0), oracle.predict(x, verbose=0), atol=1e-4)


def test_a_loop_of_ones_own_gets_the_gradients(saved):
    x, y = inputs_of("tower"), targets_of("tower")
    loaded = tf.saved_model.load(str(saved("tower")))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((loaded(x, training=False) - y) ** 2)
    gradients = tape.gradient(loss, loaded.trainable_variables)
    expected = dict(zip([each.name for each in loaded.trainable_variables], gradients, strict=True))
    layer = HubModule(saved("tower"))
    layer.unfreeze("block2")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((layer(x, training=True) - y) ** 2)
    mine = tape.gradient(loss, [each.value for each in layer.trainable_variables])
    assert len(mine) == 6
    for variable, gradient in zip(layer.trainable_variables, mine, strict=True):
        assert_same(gradient, expected[variable.value.name], atol=1e-5)


def test_two_layers_over_one_object_share_its_variables(saved):
    """Oracle: a step by hand, of a model in which the module is called twice."""
    loaded = tf.saved_model.load(str(saved("bare")))
    x, y = inputs_of("bare"), targets_of("bare")
    before = {id(each): each.numpy() for each in loaded.__call__.concrete_functions[0].variables}
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((loaded(x) * loaded(2 * x) - y) ** 2)
    variables = loaded.__call__.concrete_functions[0].variables
    gradients = tape.gradient(loss, variables)
    inputs = keras.Input((4,))
    one, two = (HubModule(loaded, trainable=True) for _ in range(2))
    model = keras.Model(inputs, one(inputs) * two(2 * inputs))
    assert len(model.trainable_variables) == 4
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, y)
    for variable, gradient in zip(variables, gradients, strict=True):
        expected = before[id(variable)] - 0.1 * gradient
        np.testing.assert_allclose(variable.numpy(), expected, atol=1e-5)


# --- BatchNormalization and dropout ----------------------------------------------------------


def test_frozen_statistics_stay_and_dropout_is_off(saved):
    layer = HubModule(saved("tower"), trainable=True)
    x = inputs_of("tower")
    before = weights(layer)
    assert_same(layer(x, training=True), layer(x, training=True))
    assert_same(layer(x, training=True), layer(x, training=False))
    fit(model_of(layer, "tower"), "tower", epochs=2)
    assert moved(before, weights(layer)) == before.keys() - STATISTICS


def test_statistics_move_as_they_do_in_tensorflow_hub(saved):
    x = inputs_of("tower")
    theirs = kerashub().KerasLayer(str(saved("tower")), trainable=True)
    theirs(x, training=True)
    layer = HubModule(saved("tower"), trainable=True, batch_norm="train")
    before = weights(layer)
    layer(x, training=True)
    assert moved(before, weights(layer)) == STATISTICS
    expected = {each.name.removesuffix(":0"): each.numpy() for each in theirs.weights}
    for name in STATISTICS:
        assert_same(weights(layer)[name], expected[name], atol=1e-6)

    assert not np.array_equal(layer(x, training=True), layer(x, training=True))  # dropout
    still = weights(layer)
    assert_same(layer(x, training=False), layer(x, training=False))
    assert_same(layer(x), layer(x, training=False))
    assert moved(still, weights(layer)) == set()


@pytest.mark.parametrize("policy", ["frozen", "train"])
def test_frozen_nothing_moves(saved, policy):
    layer = HubModule(saved("tower"), batch_norm=policy)
    model = keras.Sequential([keras.Input((8, 8, 3)), layer, keras.layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before, x = weights(layer), inputs_of("tower")
    fit(model, "tower", epochs=2)
    assert_same(layer(x, training=True), layer(x, training=False))
    assert moved(before, weights(layer)) == set()
    assert len(model.trainable_variables) == 2  # the head's

    layer.trainable = True
    layer.freeze()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model, "tower")
    assert moved(before, weights(layer)) == set()


# --- losses of regularisation ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy"), [("tower", "frozen"), ("reusable", "train")])
def test_regularisation_counts_while_something_trains(saved, name, policy):
    layer = HubModule(saved(name), batch_norm=policy)
    model = model_of(layer, name, keras.optimizers.SGD(0.0))
    x, y = inputs_of(name), targets_of(name)
    bare = float(np.mean((model.predict(x, verbose=0) - y) ** 2))

    def added():
        return model.evaluate(x, y, batch_size=2, verbose=0) - bare

    assert added() == pytest.approx(0, abs=1e-6)
    assert model.losses == []
    for start, scope in (("all", ""), ("top", "top")):
        layer.unfreeze(start)
        expected = regularisation(saved(name), scope)  # of what trains, as Keras has it
        assert expected > 0.05
        model.compile(keras.optimizers.SGD(0.0), "mse")
        fit(model, name, epochs=2)
        if policy == "frozen":  # else the statistics have moved
            assert added() == pytest.approx(expected, rel=1e-4)
            assert added() == pytest.approx(expected, rel=1e-4)  # and not twice
            assert fit(model, name, epochs=2) == pytest.approx([bare + expected] * 2, rel=1e-4)
    model(x)
    model(x)
    assert sum(map(float, model.losses)) == pytest.approx(expected, rel=1e-5)
    layer.freeze()
    model(x)
    assert model.losses == []


def test_regularisation_counts_once_in_a_model_that_calls_it_twice(saved):
    """As it does in Keras's own layers, and in tensorflow_hub."""
    layer = HubModule(saved("reusable"), trainable=True)
    left, right = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([left, right], layer(left) - layer(right))
    model([numbers(4, 4), numbers(4, 4)])
    expected = regularisation(saved("reusable"))
    assert sum(map(float, model.losses)) == pytest.approx(expected, rel=1e-5)


# --- what cannot be trained ------------------------------------------------------------------

UNTRAINABLE = {
    "signatures": ({"signature": "serving_default", "output_key": "sum"}, "signature"),
    "exported": ({}, re.escape("model.export()")),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_what_knows_inference_alone_is_not_trained(saved, name):
    kwargs, why = UNTRAINABLE[name]
    with pytest.raises(ValueError, match=f"Expected trainable=False.*{why}.*Received"):
        HubModule(saved(name), trainable=True, **kwargs)
    layer = HubModule(saved(name), **kwargs)
    assert layer.weights
    with pytest.raises(ValueError, match=why):
        layer.unfreeze()
    assert not layer.trainable
    layer.trainable = True
    with pytest.raises(ValueError, match=f"Expected a frozen layer.*{why}.*trainable = False"):
        layer(inputs_of(name))
    layer.trainable = False
    layer(inputs_of(name))


def test_the_format_of_tensorflow_1_is_not_trained(saved):
    with pytest.raises(ValueError, match="TF1 Hub format"):
        HubModule(saved("tf1"), trainable=True)


def test_it_warns_once_where_nothing_trains(saved):
    with pytest.warns(UserWarning, match="'counter' is trainable but trains nothing"):
        layer = HubModule(saved("counting"), trainable=True, name="counter")
    layer(inputs_of("counting"))  # in silence: warnings are errors

    layer = HubModule(saved("counting"))
    layer.trainable = True
    with pytest.warns(UserWarning, match="trains nothing"):
        layer(inputs_of("counting"))
    layer(inputs_of("counting"))  # in silence: warnings are errors


# --- thawing a part --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("all", "block1_conv"),
        ("block2_conv/kernel", "block2_conv"),
        ("block2_conv/bias", "block2_conv"),  # together with what it shares its scope with
        ("block1_bn/moving_mean", "block1_bn"),
        ("block2_bn", "block2_bn"),
        ("block2", "block2_conv"),
        ("block2_.*", "block2_conv"),
        (".*_bn/gamma", "block1_bn"),
        (0, "block1_conv"),
        (2, "block2_conv"),
        (-1, "top"),
        (0.1, "top"),  # one of ten, and with it the other of its scope
        (0.2, "top"),
        (0.3, "block2_bn"),
        (0.4, "block2_bn"),
        (0.5, "block2_conv"),
        (0.99, "block1_conv"),
    ],
)
def test_what_is_selected_trains(saved, start, first):
    layer = HubModule(saved("tower"))
    layer.unfreeze(start)
    thawed = TOWER[TOWER.index(first) :]
    assert _thawed(layer) == thawed
    assert len(layer.trainable_variables) == 2 * len(thawed)
    assert len({id(each) for each in layer.trainable_variables}) == 2 * len(thawed)
    layer.freeze()
    assert layer.trainable_variables == []


def test_what_is_selected_moves_alone(saved):
    layer = HubModule(saved("tower"))
    model = model_of(layer, "tower")
    for start in ("top", "block2", "block1_bn"):  # again and again, wider each time
        before = weights(layer)
        layer.unfreeze(start)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        fit(model, "tower")
        first = {"block2": "block2_conv"}.get(start, start)
        thawed = TOWER[TOWER.index(first) :]
        expected = {each for each in before if each.partition("/")[0] in thawed} - STATISTICS
        assert moved(before, weights(layer)) == expected


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ("block2_cnv", ValueError, "start='block2_cnv'.*Nearest: .*'block2_conv'"),
        ("block2_conv/kernal", ValueError, "Nearest: .*'block2_conv/kernel'"),
        ("blok2", ValueError, "Nearest: .*'block2'"),
        ("block(", ValueError, "nor is it a regular expression"),
        (5, ValueError, "5 layers.*start=5"),
        (-6, ValueError, "start=-6"),
        (1.0, ValueError, "fraction.*start=1.0"),
        (0.0, ValueError, "fraction.*start=0.0"),
        (True, TypeError, "start=True"),
        (None, TypeError, "start=None"),
    ],
)
def test_a_start_that_says_nothing_is_refused(saved, start, error, message):
    layer = HubModule(saved("tower"))
    layer.unfreeze("top")
    with pytest.raises(error, match=message):
        layer.unfreeze(start)
    assert _thawed(layer) == ["top"]


def test_a_start_with_nothing_to_train_is_refused(saved):
    with pytest.raises(ValueError, match="at least one layer has weights to train"):
        HubModule(saved("counting")).unfreeze("calls")


def test_trainable_thaws_all_of_what_was_thawed_in_part(saved):
    layer = HubModule(saved("tower"))
    layer.unfreeze("top")
    assert layer.trainable
    layer.trainable = True
    assert len(layer.trainable_variables) == 10
    layer.unfreeze("top")
    model = model_of(layer, "tower")
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    assert len(model.trainable_variables) == 10


def test_the_order_is_that_of_the_forward_pass(saved):
    layer = HubModule(saved("reusable"))
    assert [group.aliases[0] for group in layer.groups] == ["low", "norm", "top"]
    layer.unfreeze("norm")
    assert [each.name for each in layer.trainable_variables] == ["gamma", "beta", "kernel"]


def test_variables_without_names_go_by_their_attributes(saved):
    layer = HubModule(saved("bare"))
    assert [group.aliases for group in layer.groups] == [
        ("c_low",),
        ("b_middle", "b_middle/0", "b_middle/1"),
        ("a_top",),
    ]
    before = weights(layer)
    layer.unfreeze("b_middle/1")
    fit(model_of(layer, "bare"), "bare")
    assert moved(before, weights(layer)) == {"b_middle/0", "b_middle/1", "a_top"}


def test_a_large_module_has_the_blocks_of_its_application(saved):
    """Oracle: the order of the layers in keras.applications, and the numbers in their names."""
    layer = HubModule(saved("mobilenet"))
    network = keras.applications.MobileNetV2(
        (32, 32, 3), alpha=0.35, include_top=False, weights=None
    )
    names = [each.name for each in network.layers if each.weights]
    assert [group.name for group in layer.groups] == names

    blocks = layer.blocks
    assert [each for block in blocks for each in block.layers] == layer.groups
    numbered = {f"block_{i}": f"block_{i}_" for i in range(1, 17)}
    of_name = {block.name: [each.name for each in block.layers] for block in blocks}
    for name, prefix in numbered.items():
        assert of_name[name] == [each for each in names if each.startswith(prefix)]

    for start, first in (
        ("block_16", "block_16_expand"),
        ("block_3", "block_3_expand"),
        ("Conv_1", "Conv_1"),
        ("block_12_project_BN/beta", "block_12_project_BN"),
    ):
        layer.unfreeze(start)
        assert _thawed(layer) == names[names.index(first) :]

    sizes = [len(each.trainable_weights) for each in network.layers if each.weights]
    layer.unfreeze(0.1)
    count, lowest = len(layer.trainable_variables), sizes[len(names) - len(_thawed(layer))]
    assert count >= round(0.1 * sum(sizes)) > count - lowest


def _thawed(layer):
    return [group.name for group in layer.groups if group.trainable]


# --- devices ---------------------------------------------------------------------------------


def test_two_replicas(saved):
    """Oracle: the same steps on one device."""
    code = f"""
        from keras_xfer import HubModule
        x = np.random.default_rng(0).uniform(0, 1, (8, 4)).astype("float32")
        y = np.random.default_rng(1).uniform(0, 1, (8, 3)).astype("float32")

        def trained(policy):
            keras.utils.set_random_seed(0)
            layer = HubModule({str(saved("reusable"))!r}, trainable=True, batch_norm=policy)
            model = keras.Sequential([keras.Input((4,)), layer])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
            return layer

        expected = trained("frozen").get_weights()
        for policy in ("frozen", "train"):
            with strategy.scope():
                layer = trained(policy)
            for weight in layer.weights:
                parts = strategy.experimental_local_results(weight.value)
                values = [each.numpy() for each in parts]
                assert len(values) == 2
                if weight.trainable or policy == "frozen":
                    np.testing.assert_array_equal(*values, err_msg=weight.path)
                np.testing.assert_allclose(weight.numpy(), np.mean(values, 0), rtol=1e-6)
            if policy == "frozen":
                for mine, theirs in zip(layer.get_weights(), expected, strict=True):
                    np.testing.assert_allclose(mine, theirs, atol=1e-5)
            else:
                assert all(
                    not np.allclose(mine, theirs)
                    for mine, theirs in zip(layer.get_weights(), expected, strict=True)
                )

        outside = HubModule({str(saved("reusable"))!r}, trainable=True, name="outside")
        with strategy.scope():
            try:
                keras.Sequential([keras.Input((4,)), outside])
            except ValueError as error:
                print("TOLD", json.dumps(str(error)))
    """
    told = run(code, TWO_CPUS)
    assert "HubModule 'outside' to be made within the scope of the MirroredStrategy" in told
    assert "strategy.scope()" in told


def test_losses_follow_the_precision_of_keras(saved):
    """A module of float32 under floatx float64: Keras cannot add the two by itself."""
    keras.config.set_floatx("float64")
    try:
        layer = HubModule(saved("reusable"), trainable=True)
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        loss = model.fit(numbers(4, 4), numbers(4, 3), verbose=0).history["loss"][0]
    finally:
        keras.config.set_floatx("float32")
    assert loss > regularisation(saved("reusable"))


def test_statistics_that_move_though_frozen_are_told(saved):
    """The SavedModel is called whole; the summary does not call frozen what moves."""
    backbone = Backbone.from_hub(saved("tower"), batch_norm="train")
    states = {row[0]: row[-1] for row in backbone.trainable_summary().rows}
    assert "train" not in states["total"]
    backbone.unfreeze("top")
    states = {row[0]: row[-1] for row in backbone.trainable_summary().rows}
    assert states["block1"] == states["total"] == "train"
