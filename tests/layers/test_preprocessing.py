"""BackbonePreprocessing against keras.applications' own preprocess_input, NumPy and Pillow."""

import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keras_xfer.applications import APPLICATIONS, ApplicationSpec, spec_for
from keras_xfer.layers.preprocessing import BackbonePreprocessing

pytestmark = pytest.mark.core

NAMES = sorted(
    name
    for name in dir(keras.applications)
    if callable(getattr(keras.applications, name)) and name[0].isupper()
)


def numpy_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


def oracle(name, images, data_format=None):
    """keras.applications' own preprocess_input, on a copy: it writes into its input."""
    module = getattr(keras.applications, spec_for(name).module)
    return module.preprocess_input(images.astype("float32"), data_format=data_format)


def assert_same(actual, expected, spread=255.0):
    np.testing.assert_allclose(numpy_of(actual), expected, rtol=0, atol=1e-5 * spread)


def spread_of(name):
    """The width of the range that `preprocess_input` of that model maps to."""
    ends = oracle(name, np.array([[[[0, 0, 0], [255, 255, 255]]]]))
    return float(ends.max() - ends.min())


# --- parity ---------------------------------------------------------------------------------------


def test_every_model_function_is_covered():
    assert len(NAMES) == 40
    assert sorted(APPLICATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_equals_preprocess_input(name):
    layer = BackbonePreprocessing.for_application(name)
    ramp = np.arange(256)[:, None, None] * np.ones((1, 2, 3))
    for images in (np.random.default_rng(0).uniform(0, 255, (2, 5, 7, 3)), ramp):
        assert_same(layer(images.astype("float32")), oracle(name, images), spread_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_uint8_equals_preprocess_input_of_floats(name):
    images = pixels(2, 5, 7, 3)
    layer = BackbonePreprocessing.for_application(name)
    assert_same(layer(images), oracle(name, images), spread_of(name))


@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV2", "DenseNet121", "EfficientNetB0"])
def test_channels_first_equals_preprocess_input(name):
    images = pixels(2, 3, 5, 7)
    layer = BackbonePreprocessing.for_application(name, data_format="channels_first")
    expected = oracle(name, images, "channels_first")
    assert_same(layer(images), expected, spread_of(name))
    assert_same(layer(images[0]), expected[0], spread_of(name))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["VGG16", "Xception", "DenseNet201", "ConvNeXtTiny"]),
    batch=st.integers(0, 3) | st.none(),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(["uint8", "int32", "float32", "float64"]),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
    gray=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity_and_shape_hold_for_all_images(name, batch, size, dtype, data_format, gray, seed):
    channels = 1 if gray else 3
    shape = (*size, channels) if data_format == "channels_last" else (channels, *size)
    shape = shape if batch is None else (batch, *shape)
    # A brightest pixel far from [0, 1], which would rightly warn.
    images = np.maximum(pixels(*shape, seed=seed), 2).astype(dtype)
    before = images.copy()
    layer = BackbonePreprocessing.for_application(name, data_format=data_format)
    outputs = layer(images)
    axis = -1 if data_format == "channels_last" else -3
    rgb = np.repeat(images, 3, axis=axis) if gray else images
    assert_same(outputs, oracle(name, rgb, data_format), spread_of(name))
    assert tuple(outputs.shape) == layer.compute_output_shape(shape) == rgb.shape
    np.testing.assert_array_equal(images, before)


TORCH = "torch"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ConvNeXtTiny", TORCH),
        ("EfficientNetV2B0", TORCH),
        ("EfficientNetV2S", (128, -1)),
        ("MobileNetV3Small", (127.5, -1)),
        ("EfficientNetB0", (255, 0)),
    ],
)
def test_models_that_preprocess_inside_get_their_input_unchanged(name, own):
    # The graph itself: what its first layers make of the layer's output is what the literature
    # says the first convolution takes, so that nothing is left to do outside.
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the graph is the same on every backend, and slow to build on JAX")
    model = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(32, 32, 3)
    )
    last = [
        layer
        for layer in model.layers
        if type(layer) in (keras.layers.Rescaling, keras.layers.Normalization)
    ][-1]
    images = pixels(1, 32, 32, 3)
    actual = keras.Model(model.input, last.output)(
        BackbonePreprocessing.for_application(name)(images)
    )
    if own == TORCH:
        expected = keras.applications.imagenet_utils.preprocess_input(
            images.astype("float32"), mode="torch"
        )
    else:
        expected = images / own[0] + own[1]
    assert_same(actual, expected, 1)


# --- input_range ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VGG16", "MobileNet", "DenseNet121", "EfficientNetB0"])
@pytest.mark.parametrize("input_range", [(0, 1), (-1, 1), (0, 65535), (16, 235)])
def test_input_range_is_mapped_to_255(name, input_range):
    images = pixels(2, 4, 4, 3)
    low, high = input_range
    in_range = (images / 255.0 * (high - low) + low).astype("float32")
    layer = BackbonePreprocessing.for_application(name, input_range=input_range)
    assert_same(layer(in_range), oracle(name, images), spread_of(name))


def test_uint16_input():
    images = pixels(2, 4, 4, 3)
    layer = BackbonePreprocessing.for_application("ResNet50V2", input_range=(0, 65535))
    assert_same(layer(images.astype("uint16") * 257), oracle("ResNet50V2", images), 2)


# --- channels -------------------------------------------------------------------------------------


def test_alpha_is_refused_or_dropped():
    images = pixels(2, 4, 5, 4)
    with pytest.raises(ValueError, match=r"channels=4.*alpha='drop'"):
        BackbonePreprocessing.for_application("VGG16")(images)
    layer = BackbonePreprocessing.for_application("VGG16", alpha="drop", image_size=(4, 5))
    assert_same(layer(images), oracle("VGG16", images[..., :3]))
    first = BackbonePreprocessing.for_application(
        "VGG16", alpha="drop", data_format="channels_first"
    )
    assert_same(
        first(images.transpose(0, 3, 1, 2)),
        oracle("VGG16", images[..., :3]).transpose(0, 3, 1, 2),
    )
    assert layer.compute_output_shape((None, None, None, 4)) == (None, 4, 5, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 5), r"one image \(height, width, channels\).*inputs.shape=\(5, 5\)"),
        ((1, 2, 3, 4, 3), r"inputs.shape=\(1, 2, 3, 4, 3\)"),
        ((5, 5, 2), r"1 or 3 channels.*channels=2"),
        ((3, 5, 5), r"channels=5.*data_format='channels_last'"),
    ],
)
def test_what_is_no_image_is_refused(shape, message):
    layer = BackbonePreprocessing(1.0, 0.0)
    with pytest.raises(ValueError, match=message):
        layer(np.zeros(shape, "uint8"))
    with pytest.raises(ValueError, match=message):
        layer(keras.KerasTensor(shape))
    with pytest.raises(ValueError, match=message):
        layer.compute_output_shape(shape)


def test_unknown_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"channels=None.*channels=3"):
        BackbonePreprocessing(1.0, 0.0)(keras.Input((None, None, None)))


def test_a_list_of_images_is_one_batch_or_refused():
    layer = BackbonePreprocessing.for_application("VGG16", image_size=4)
    images = pixels(2, 4, 4, 3)
    assert_same(layer(list(images)), oracle("VGG16", images))
    with pytest.raises(ValueError, match=r"one shape.*one by one"):
        layer([pixels(4, 4, 3), pixels(5, 4, 3)])


def test_a_ragged_tensor_is_refused():
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("ragged tensors belong to TensorFlow")
    with pytest.raises(ValueError, match="ragged"):
        BackbonePreprocessing(1.0, 0.0, image_size=4)(
            tf.ragged.stack([pixels(4, 4, 3), pixels(5, 4, 3)])
        )


# --- resizing -------------------------------------------------------------------------------------


def bilinear(image, height, width):
    """Bilinear resizing with pixel centres at half integers, written out."""

    def positions(size, new_size):
        centre = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
        low = np.floor(centre).astype(int)
        return low, np.minimum(low + 1, size - 1), centre - low

    top, bottom, fy = positions(image.shape[0], height)
    left, right, fx = positions(image.shape[1], width)
    fy, fx = fy[:, None, None], fx[None, :, None]
    image = image.astype("float64")
    upper = image[top][:, left] * (1 - fx) + image[top][:, right] * fx
    lower = image[bottom][:, left] * (1 - fx) + image[bottom][:, right] * fx
    return upper * (1 - fy) + lower * fy


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    image_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.booleans(),
)
def test_stretch_is_bilinear(size, image_size, batch):
    image = pixels(*size, 3)
    layer = BackbonePreprocessing(1.0, 0.0, image_size=image_size)
    actual = numpy_of(layer(image[None] if batch else image))
    actual = actual[0] if batch else actual
    np.testing.assert_allclose(actual, bilinear(image, *image_size), atol=0.01)


@pytest.mark.parametrize(
    ("size", "window"), [((20, 40), np.s_[:, 10:30]), ((40, 20), np.s_[10:30])]
)
def test_crop_keeps_the_middle(size, window):
    image = pixels(*size, 3)
    layer = BackbonePreprocessing(1.0, 0.0, image_size=10, resize="crop")
    np.testing.assert_allclose(
        numpy_of(layer(image)), bilinear(image[window], 10, 10), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("input_range", [(0, 255), (-1, 1)])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_pad_puts_black_around(data_format, input_range):
    image = np.full((10, 20, 3), input_range[1], "float32")
    image = image if data_format == "channels_last" else image.transpose(2, 0, 1)
    layer = BackbonePreprocessing(
        1.0, 0.0, image_size=20, resize="pad", input_range=input_range, data_format=data_format
    )
    outputs = numpy_of(layer(image))
    outputs = outputs if data_format == "channels_last" else outputs.transpose(1, 2, 0)
    expected = np.zeros((20, 20, 3))
    expected[5:15] = 255
    np.testing.assert_allclose(outputs, expected, atol=1e-3)


def test_antialias_is_pillows_bilinear():
    image = pixels(64, 48, 3)
    outputs = numpy_of(BackbonePreprocessing(1.0, 0.0, image_size=(16, 12), antialias=True)(image))
    for channel in range(3):
        expected = Image.fromarray(image[..., channel].astype("float32")).resize(
            (12, 16), Image.Resampling.BILINEAR
        )
        np.testing.assert_allclose(outputs[..., channel], np.asarray(expected), atol=0.05)


def test_nearest_keeps_values():
    image = pixels(9, 9, 3)
    outputs = BackbonePreprocessing(1.0, 0.0, image_size=3, interpolation="nearest")(image)
    np.testing.assert_array_equal(numpy_of(outputs), image[1::3, 1::3])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 400, 3), (3000, 4000, 1), (0, 8, 9, 3)])
def test_extreme_sizes(resize, shape):
    layer = BackbonePreprocessing.for_application("ResNet50", image_size=(8, 6), resize=resize)
    outputs = layer(np.full(shape, 255, "uint8"))
    assert tuple(outputs.shape) == (*shape[:-3], 8, 6, 3) == layer.compute_output_shape(shape)


# --- values that cannot be meant ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ([0.0, 256.0], {}, "outside input_range"),
        ([-1.0, 200.0], {}, "outside input_range"),
        ([0.0, 1.0], {}, r"lies in \[0, 1\]"),
        ([0.3, 0.6], {}, r"lies in \[0, 1\]"),
        ([0.0, 255.0], {"input_range": (0, 1)}, "outside input_range"),
        (np.array([0, 255], "uint8"), {"input_range": (0, 1)}, "outside input_range"),
        (np.array([0, 300], "int32"), {}, "outside input_range"),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_values_that_cannot_be_meant_warn_once_a_layer(values, arguments, message, as_tensor):
    dtype = getattr(values, "dtype", "float32")
    images = np.resize(np.asarray(values, dtype), (2, 2, 2, 3))
    images = keras.ops.convert_to_tensor(images) if as_tensor else images
    layer = BackbonePreprocessing(1.0, 0.0, **arguments)
    with pytest.warns(UserWarning, match=message):
        layer(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(images)
    with pytest.warns(UserWarning, match=message):
        BackbonePreprocessing(1.0, 0.0, **arguments)(images)


@pytest.mark.parametrize(
    ("images", "arguments"),
    [
        (np.zeros((4, 4, 3), "float32"), {}),  # black in any range
        (np.ones((4, 4, 3), "uint8"), {}),  # nearly black: an integer is never in [0, 1]
        (np.full((4, 4, 3), 255.0, "float32"), {}),
        (np.full((4, 4, 3), 255.001, "float32"), {}),  # rounding
        (np.full((4, 4, 3), 0.5, "float32"), {"input_range": (0, 1)}),
        (np.full((4, 4, 3), -1.0, "float32"), {"input_range": (-1, 1)}),
        (np.zeros((0, 4, 4, 3), "float32"), {}),
        (np.ones((4, 4, 3), "bool"), {"input_range": (0, 1)}),
        (np.full((4, 4, 3), np.nan, "float32"), {}),
    ],
)
def test_right_values_do_not_warn(images, arguments):
    BackbonePreprocessing(1.0, 0.0, **arguments)(images)


def test_shape_inference_on_ones_does_not_warn():
    # On torch, Keras builds a model by calling it on ones where a layer of it, here the first,
    # cannot run on the meta device.
    class NeedsValues(keras.layers.Layer):
        def call(self, inputs):
            if keras.backend.backend() == "torch":
                inputs.cpu().numpy()
            return inputs

        def compute_output_shape(self, input_shape):
            return input_shape

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.needs_values = NeedsValues()
            self.preprocessing = BackbonePreprocessing(1.0, 0.0)
            self.head = keras.layers.Dense(1)

        def call(self, inputs):
            return self.head(self.preprocessing(self.needs_values(inputs)))

    model = Model()
    model.compile("sgd", "mse", jit_compile=False)
    with warnings.catch_warnings(record=True) as caught:
        # Recorded: Keras would try again after a warning that is an error, and succeed.
        warnings.simplefilter("always")
        model.fit(pixels(2, 4, 4, 3).astype("float32"), np.zeros((2, 4, 4, 1)), verbose=0)
    assert not [warning for warning in caught if "input_range" in str(warning.message)]


def test_a_black_image_does_not_use_the_warning_up():
    layer = BackbonePreprocessing(1.0, 0.0)
    layer(np.zeros((4, 4, 3), "float32"))
    with pytest.warns(UserWarning, match="lies in"):
        layer(np.full((4, 4, 3), 0.5, "float32"))


def test_nan_stays_visible_where_it_is():
    images = pixels(1, 4, 4, 3).astype("float32")
    images[0, 1, 2, 0] = np.nan
    outputs = numpy_of(BackbonePreprocessing.for_application("MobileNetV2")(images))
    np.testing.assert_array_equal(np.isnan(outputs), np.isnan(images))


# --- inside a model, tf.data, files ---------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_a_model(jit_compile):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("torch.compile needs a C++ compiler")
    inputs = keras.Input((None, None, 3), dtype="uint8")
    outputs = BackbonePreprocessing.for_application("VGG16", image_size=8)(inputs)
    assert outputs.shape == (None, 8, 8, 3)
    model = keras.Model(inputs, outputs)
    model.compile(jit_compile=jit_compile)
    images = pixels(3, 8, 8, 3)
    assert_same(model.predict(images, verbose=0), oracle("VGG16", images))
    assert model.predict(pixels(2, 5, 9, 3), verbose=0).shape == (2, 8, 8, 3)


def test_trains_inside_a_model_and_does_not_warn_while_tracing():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            BackbonePreprocessing.for_application("MobileNetV2"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse", jit_compile=False)
    history = model.fit(pixels(4, 6, 6, 1), np.zeros(4), verbose=0, batch_size=2)
    assert np.isfinite(history.history["loss"][0])


def test_under_torch_compile():
    if keras.backend.backend() != "torch":
        pytest.skip("about torch")
    import torch

    layer = BackbonePreprocessing.for_application("VGG16")
    images = pixels(2, 4, 4, 3)
    compiled = torch.compile(lambda x: layer(x), backend="eager")
    assert_same(compiled(torch.tensor(images)), oracle("VGG16", images))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_arithmetic_is_float32_under_mixed_precision(policy):
    layer = BackbonePreprocessing.for_application("MobileNetV2", dtype=policy)
    images = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3)).astype("float32")
    outputs = layer(images)
    compute_dtype = keras.DTypePolicy(policy).compute_dtype
    assert keras.backend.standardize_dtype(outputs.dtype) == compute_dtype
    assert layer(keras.Input((4, 4, 3))).dtype == compute_dtype
    # One rounding at the end, not one of the input before: bit for bit the rounded oracle, but
    # for the last bit of float32.
    expected = keras.ops.cast(oracle("MobileNetV2", images), compute_dtype)
    np.testing.assert_allclose(
        numpy_of(keras.ops.cast(outputs, "float32")),
        numpy_of(keras.ops.cast(expected, "float32")),
        atol=2**-8 if compute_dtype == "bfloat16" else 2**-11,
        rtol=0,
    )
    same = numpy_of(keras.ops.equal(outputs, expected)).mean()
    assert same > 0.9


def test_float64():
    layer = BackbonePreprocessing.for_application("DenseNet121", dtype="float64")
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless told")
    images = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3))
    outputs = layer(images)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(numpy_of(outputs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV2"])
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_in_tf_data_of_any_backend(name, resize, policy):
    tf = pytest.importorskip("tensorflow")
    images = pixels(5, 8, 8, 3)
    layer = BackbonePreprocessing.for_application(name, image_size=8, resize=resize, dtype=policy)
    dynamic = tf.data.Dataset.from_generator(
        lambda: iter(images), output_signature=tf.TensorSpec((None, None, 3), tf.uint8)
    )
    expected = oracle(name, images)
    tolerance = 1e-3 if policy == "float32" else 0.0626  # half a step of float16 near 255
    for mapped in (dynamic.map(layer).batch(5), dynamic.batch(5).map(layer)):
        assert mapped.element_spec.shape.as_list() == [None, 8, 8, 3]
        assert mapped.element_spec.dtype == keras.DTypePolicy(policy).compute_dtype
        (outputs,) = [batch.numpy() for batch in mapped]
        np.testing.assert_allclose(outputs.astype("float32"), expected, rtol=0, atol=tolerance)


def test_in_tf_data_on_images_of_several_sizes_one_by_one():
    tf = pytest.importorskip("tensorflow")
    several = [pixels(4, 9, 1), pixels(7, 3, 1)]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(several), output_signature=tf.TensorSpec((None, None, 1), tf.uint8)
    )
    layer = BackbonePreprocessing(1.0, 0.0, image_size=5)
    for outputs, image in zip(dataset.map(layer), several, strict=True):
        expected = bilinear(np.repeat(image, 3, axis=-1), 5, 5)
        np.testing.assert_allclose(outputs.numpy(), expected, atol=0.01)


def test_in_tf_data_an_unknown_rank_is_refused():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_generator(
        lambda: iter([pixels(4, 4, 3)]), output_signature=tf.TensorSpec(None, tf.uint8)
    )
    with pytest.raises(ValueError, match=r"known rank.*expand_animations=False"):
        dataset.map(BackbonePreprocessing(1.0, 0.0))


ARGUMENTS = {
    "scale": (0.5, 1.0, 2.0),
    "offset": [1, 2, 3],
    "channel_order": "bgr",
    "image_size": (6, 4),
    "resize": "pad",
    "interpolation": "nearest",
    "antialias": True,
    "input_range": (-1, 1),
    "data_format": "channels_first",
    "alpha": "drop",
    "name": "prepare",
    "dtype": "mixed_bfloat16",
}


def test_config_round_trip():
    layer = BackbonePreprocessing(**ARGUMENTS)
    config = layer.get_config()
    again = BackbonePreprocessing.from_config(config)
    assert again.get_config() == config
    assert set(config) >= set(ARGUMENTS)
    assert config["image_size"] == [6, 4]
    assert config["scale"] == [0.5, 1.0, 2.0]
    assert again.dtype_policy.name == "mixed_bfloat16"
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8)).astype("float32")
    np.testing.assert_array_equal(
        numpy_of(keras.ops.cast(layer(images), "float32")),
        numpy_of(keras.ops.cast(again(images), "float32")),
    )


@pytest.mark.parametrize("image_size", [None, 6])
def test_keras_file_round_trip(tmp_path, image_size):
    inputs = keras.Input((None, None, 3), dtype="uint8")
    layer = BackbonePreprocessing.for_application("DenseNet121", image_size=image_size)
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(layer(inputs)))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(again.layers[1]) is BackbonePreprocessing
    assert again.layers[1].get_config() == layer.get_config()
    images = pixels(2, 8, 9, 3)
    np.testing.assert_array_equal(
        model.predict(images, verbose=0), again.predict(images, verbose=0)
    )


# --- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (1, 2)}, r"`scale`.*scale=\(1, 2\)"),
        ({"scale": "1"}, "`scale`"),
        ({"scale": float("nan")}, "`scale`"),
        ({"offset": None}, "`offset`"),
        ({"channel_order": "rbg"}, "'rgb', 'bgr'.*'rbg'"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 2.5}, "image_size=2.5"),
        ({"image_size": (4, 4, 3)}, r"image_size=\(4, 4, 3\)"),
        ({"resize": "squash", "image_size": 4}, "'stretch', 'crop', 'pad'"),
        ({"resize": "crop"}, "needs an `image_size`"),
        ({"interpolation": "linear"}, "'bilinear'"),
        ({"input_range": (255, 0)}, r"input_range=\(255, 0\)"),
        ({"input_range": 255}, "input_range=255"),
        ({"data_format": "NHWC"}, "'channels_last'"),
        ({"alpha": "keep"}, "'error', 'drop'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BackbonePreprocessing(**{"scale": 1.0, "offset": 0.0, **arguments})


def test_unknown_application_names_the_nearest():
    with pytest.raises(ValueError, match="ResNet50"):
        BackbonePreprocessing.for_application("resnet_50")


def test_from_spec_refuses_models_of_other_channels():
    import dataclasses

    spec: ApplicationSpec = dataclasses.replace(spec_for("VGG16"), channels=1)
    with pytest.raises(ValueError, match=r"spec.channels=1.*Rescaling"):
        BackbonePreprocessing.from_spec(spec)


def test_scale_and_offset_are_in_rgb_order_whatever_the_output():
    red = np.zeros((1, 1, 3), "uint8")
    red[..., 0] = 10
    layer = BackbonePreprocessing((2, 3, 4), (1, 5, 7), channel_order="bgr")
    np.testing.assert_array_equal(numpy_of(layer(red))[0, 0], [7, 5, 21])
