"""Each backbone is built once, and every trial gets it as it came."""

import gc
import weakref

import keras
import keras_tuner
import numpy as np
import pytest

from keras_xfer import Backbone
from keras_xfer.tuner.backbones import Backbones
from tests.tuner.hypermodels import SHAPE, assert_same, copies, differ, drawn, tiny

IMAGES = np.random.default_rng(1).uniform(0, 255, (2, *SHAPE)).astype("float32")


def take(of, name="tiny", shape=SHAPE, **kwargs):
    kwargs = {"batch_norm": "frozen", "pooling": "avg", "hp": None, **kwargs}
    return of.take(name, shape, **kwargs)


def spoil(backbone):
    for variable in backbone.model.variables:
        variable.assign(variable + 1)


# --- What may be one -------------------------------------------------------------------------


def test_names():
    def function():
        return tiny()

    given = ["MobileNetV2", "VGG16", function, tiny(name="own"), lambda: tiny()]
    assert Backbones(given, None).names == ("MobileNetV2", "VGG16", "function", "own", "backbone_4")
    assert Backbones({"a": tiny(), "b": tiny()}, None).names == ("a", "b")
    assert Backbones("MobileNetV2", None).names == ("MobileNetV2",)
    assert Backbones(tiny(), None).names == ("tiny",)
    assert Backbones(function, None).names == ("function",)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((), ValueError, "at least one backbone"),
        (["MobileNetv2"], ValueError, "Did you mean MobileNetV2"),
        (["VGG16", "VGG16"], ValueError, "two named 'VGG16'"),
        ([3], TypeError, "Received: 3"),
        ({"one": keras.Sequential([keras.layers.Dense(2)])}, ValueError, "not built yet"),
    ],
)
def test_what_cannot_be_one(given, error, message):
    with pytest.raises(error, match=message):
        Backbones(given, None)


def test_a_function_that_returns_something_else():
    with pytest.raises(TypeError, match="function of backbone 'wrong'.*Received: 3"):
        take(Backbones({"wrong": lambda: 3}, None), "wrong")


@pytest.mark.parametrize("kind", ["model", "backbone", "function", "of shape", "of hp"])
def test_each_kind_gives_its_features(kind):
    own = tiny()
    given = {
        "model": own,
        "backbone": Backbone(own),
        "function": lambda: tiny(),
        "of shape": lambda input_shape: tiny(shape=input_shape),
        "of hp": lambda hp: tiny(name=hp.Choice("which", ["one", "other"])),
    }[kind]
    hp = keras_tuner.HyperParameters()
    taken = take(Backbones({"given": given}, None), "given", hp=hp)
    assert taken.input_shape == SHAPE
    assert taken.backbone.name == "backbone"
    assert not taken.backbone.trainable_variables
    taken.backbone.model.set_weights(own.get_weights())
    expected = own(IMAGES).numpy()
    # A Backbone is pooled as it was told, anything else as the search says.
    pooled = taken.backbone(IMAGES).numpy()
    np.testing.assert_allclose(pooled, expected.mean(axis=(1, 2)), rtol=1e-5)
    assert [each.name for each in hp.space] == (["which"] if kind == "of hp" else [])


def test_pooling_by_the_trial_and_by_the_backbone_itself():
    own = tiny()
    maps = own(IMAGES).numpy()
    of = Backbones(
        {"tiny": own, "max": Backbone(own, pooling="max"), "vectors": tiny(pooled=True)}, None
    )
    assert of.without_maps() == ["max", "vectors"]
    pooled = take(of, pooling="max").backbone(IMAGES)
    np.testing.assert_allclose(pooled, maps.max(axis=(1, 2)), rtol=1e-5)
    kept = take(of, "max", pooling="avg").backbone(IMAGES)
    np.testing.assert_allclose(kept, maps.max(axis=(1, 2)), rtol=1e-5)
    vectors = take(of, "vectors", pooling="max").backbone(IMAGES)
    np.testing.assert_allclose(vectors, maps.mean(axis=(1, 2)), rtol=1e-5)


def test_the_trials_policy_of_batch_norm():
    of = Backbones({"tiny": Backbone(tiny(), batch_norm="train")}, None)
    for policy, count in (("frozen", 4), ("affine", 6), ("train", 6)):
        taken = take(of, batch_norm=policy)
        taken.backbone.unfreeze("all")
        assert taken.backbone.batch_norm == policy
        assert len(taken.backbone.trainable_variables) == count
        del taken
        gc.collect()


def test_a_function_is_random_the_same_everywhere():
    """In every process of a search, and whatever the seed; which it leaves alone."""

    def function():
        return keras.Sequential([keras.Input(SHAPE), keras.layers.Conv2D(4, 3)])

    keras.utils.set_random_seed(1)
    one = take(Backbones({"f": function}, None), "f").backbone
    after = np.random.random(3)  # Keras seeds the global one
    keras.utils.set_random_seed(2)
    other = take(Backbones({"f": function}, None), "f").backbone
    assert_same(one.model.get_weights(), other.model.get_weights())
    assert np.abs(one.model.get_weights()[0]).max() > 0.01
    keras.utils.set_random_seed(1)
    np.testing.assert_array_equal(np.random.random(3), after)


# --- As it came, to the bit ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "backbone", "function"])
def test_the_next_trial_gets_it_as_it_came(kind):
    own = tiny()
    before = copies(own.get_weights())
    given = {"model": own, "backbone": Backbone(own), "function": tiny}[kind]
    of = Backbones({"tiny": given}, None)
    taken = take(of)
    model = weakref.ref(taken.backbone.model)
    for _ in range(3):
        assert_same(taken.backbone.model.get_weights(), before)
        assert taken.backbone.model is model()  # none but this one
        assert_same(of.pristine_of(taken.backbone), before)
        taken.backbone.unfreeze("all")
        spoil(taken.backbone)
        del taken
        gc.collect()
        taken = take(of)
        assert not taken.backbone.trainable_variables
    assert_same(own.get_weights(), before)


def of_what_exists(kind, own):
    """A function that returns a model that is there already, or one that shares its layers."""
    backbone = Backbone(own)
    return {
        "model": lambda: own,
        "backbone": lambda: backbone,
        "of shared layers": lambda: keras.Model(own.inputs, own.get_layer("relu").output),
        "of hp": lambda hp: own,
        "of hp and shared layers": lambda hp: keras.Model(own.inputs, own.outputs),
    }[kind]


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize(
    "kind", ["model", "backbone", "of shared layers", "of hp", "of hp and shared layers"]
)
def test_a_function_that_returns_what_exists(kind, is_held):
    own = tiny()
    before = copies(own.get_weights())
    of = Backbones({"tiny": of_what_exists(kind, own)}, None)
    held = []
    for _ in range(3):
        taken = take(of)
        weights = taken.backbone.model.get_weights()
        assert_same(weights, before[: len(weights)])
        assert_same(of.pristine_of(taken.backbone), before[: len(weights)])
        taken.backbone.unfreeze("all")
        spoil(taken.backbone)
        if is_held:
            held.append((taken, copies(taken.backbone.model.get_weights())))
        del taken
        gc.collect()
    for taken, weights in held:
        assert_same(taken.backbone.model.get_weights(), weights)
    assert_same(own.get_weights(), before)


def test_a_function_that_loads_weights_into_what_exists():
    own = tiny()

    def function(hp):
        own.set_weights([weight * 0 + hp.get("fill") for weight in own.get_weights()])
        return own

    of = Backbones({"tiny": function}, None)
    for fill in (1, 2, 1):
        backbone = take(of, hp=drawn(fill=fill)).backbone
        assert all((weight == fill).all() for weight in backbone.model.get_weights())
        spoil(backbone)


@pytest.mark.parametrize("kind", ["model", "function"])
def test_a_normalization_comes_with_its_constants(kind):
    """EfficientNet has one, whose weights are ImageNet's mean and variance."""
    layers = [keras.Input(SHAPE), keras.layers.Normalization(), keras.layers.Conv2D(4, 3)]
    own = keras.Sequential(layers)
    own.layers[0].adapt(IMAGES)
    expected = keras.ops.convert_to_numpy(own(IMAGES)).mean(axis=(1, 2))
    backbone = take(Backbones({"tiny": own if kind == "model" else lambda: own}, None)).backbone
    np.testing.assert_allclose(backbone(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_made_again():
    class Own(keras.Model):
        def __init__(self, function):
            super().__init__()
            self.function, self.dense = function, keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(self.function(inputs))

    own = Own(lambda inputs: inputs)
    own(np.ones((1, 3)))
    with pytest.raises(ValueError, match="configuration.*backbone 'tiny'.*type Own.*get_config"):
        take(Backbones({"tiny": lambda: own}, None), shape=(3,))


def test_what_somebody_holds_is_left_alone():
    of = Backbones({"tiny": tiny()}, None)
    before = copies(tiny().get_weights())
    first = take(of).backbone
    spoil(first)
    held = copies(first.model.get_weights())
    second = take(of).backbone
    assert second.model is not first.model
    assert_same(second.model.get_weights(), before)
    spoil(second)
    third = take(of).backbone
    assert_same(third.model.get_weights(), before)
    assert_same(first.model.get_weights(), held)
    assert differ(held, before)
    assert all(of.pristine_of(each) is not None for each in (first, second, third))


def test_what_is_held_by_a_model_of_its_features():
    of = Backbones({"tiny": tiny()}, None)
    inputs = keras.Input(SHAPE)
    features = keras.Model(inputs, take(of).backbone(inputs))
    spoil(features.layers[-1])
    held = copies(features.get_weights())
    gc.collect()
    take(of)
    assert_same(features.get_weights(), held)


def test_the_users_own_may_be_trained_meanwhile():
    own = tiny()
    before = copies(own.get_weights())
    of = Backbones({"tiny": own}, None)
    for variable in own.variables:
        variable.assign(variable * 0 + 9)
    assert_same(take(of).backbone.model.get_weights(), before)
    assert all((weight == 9).all() for weight in own.get_weights())


def test_pristine_of_another():
    assert Backbones({"tiny": tiny()}, None).pristine_of(Backbone(tiny())) is None


def test_one_for_each_shape_and_policy():
    of = Backbones({"f": lambda input_shape: tiny(shape=input_shape)}, None)
    small, large = (take(of, "f", (size, size, 3)).backbone for size in (8, 10))
    assert (small.model.input_shape[1], large.model.input_shape[1]) == (8, 10)
    keras.config.set_dtype_policy("mixed_float16")
    mixed = take(of, "f").backbone
    assert mixed.model.get_layer("low").compute_dtype == "float16"
    assert small.model.get_layer("low").compute_dtype == "float32"


# --- What is known of its input --------------------------------------------------------------


def test_preprocessing_of_what_is_known():
    images = IMAGES.copy()
    application = Backbone.from_application(
        "MobileNetV2", input_shape=(32, 32, 3), alpha=0.35, weights=None
    )
    of = Backbones({"own": application, "function": lambda: application, "tiny": tiny()}, None)
    assert take(of).preprocessing is None
    expected = keras.applications.mobilenet_v2.preprocess_input(images.copy())
    for name in ("own", "function"):
        taken = take(of, name, (32, 32, 3))
        assert taken.input_shape == (32, 32, 3)
        np.testing.assert_allclose(taken.preprocessing()(images), expected, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="SavedModels are TensorFlow's")
@pytest.mark.parametrize("policy", ["frozen", "train"])
def test_a_savedmodel(saved, policy):
    import tensorflow as tf

    path = saved("tower")
    of = Backbones([path], None)
    assert of.names == (str(path),)
    assert Backbones([str(path)], None).names == of.names
    taken = take(of, str(path), batch_norm=policy)
    module = tf.saved_model.load(str(path))
    images = IMAGES / 255
    np.testing.assert_allclose(taken.backbone(images), module(images), rtol=1e-5)
    before = copies(taken.backbone.model.get_weights())
    taken.backbone.unfreeze("all")
    spoil(taken.backbone)
    model = weakref.ref(taken.backbone.model)
    del taken
    gc.collect()
    again = take(of, str(path), batch_norm=policy)
    assert again.backbone.model is model()
    assert_same(again.backbone.model.get_weights(), before)
    np.testing.assert_allclose(again.backbone(images), module(images), rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="SavedModels are TensorFlow's")
def test_a_function_that_returns_a_savedmodel(saved):
    own = Backbone.from_hub(saved("tower"), input_range=(-1, 1), image_size=8)
    taken = take(Backbones({"tower": lambda: own}, None), "tower")
    assert taken.backbone.model is not own.model
    np.testing.assert_allclose(taken.backbone(IMAGES), own(IMAGES), rtol=1e-5)
    np.testing.assert_allclose(taken.preprocessing()(IMAGES), IMAGES / 127.5 - 1, atol=1e-5)
