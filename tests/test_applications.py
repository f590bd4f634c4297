"""The table of keras.applications against keras.applications itself."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_xfer.applications import (
    APPLICATIONS,
    ApplicationSpec,
    WeightsUnavailableError,
    build,
    identify,
    spec_for,
)

NAMES = sorted(
    name
    for name in dir(keras.applications)
    if callable(getattr(keras.applications, name)) and name[0].isupper()
)
ON_TORCH = keras.backend.backend() == "torch"
# One or two of each family by default.
SMALL = {
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "VGG19",
    "Xception",
}
SLOW_UNLESS_SMALL = [
    name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]


def function_of(name):
    if name == "NASNetMobile" and ON_TORCH:
        pytest.skip("keras.applications has no NASNetMobile on torch")
    return getattr(keras.applications, name)


def small_model(name, /, **arguments):
    size = spec_for(name).min_image_size
    return function_of(name)(
        **{"weights": None, "include_top": False, "input_shape": (size, size, 3), **arguments}
    )


def preprocessed(spec, images):
    """The formula in `ApplicationSpec`'s docstring."""
    outputs = images.astype("float64") * spec.scale + spec.offset
    return outputs[..., ::-1] if spec.channel_order == "bgr" else outputs


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.core
def test_the_table_holds_every_model_function():
    assert sorted(APPLICATIONS) == NAMES
    assert len(NAMES) == 40


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_spec_is_what_keras_applications_does(name):
    spec = spec_for(name)
    assert spec.name == name
    module = getattr(keras.applications, spec.module)
    # MobileNetV3's module holds its preprocess_input alone.
    assert getattr(module, name, None) in (getattr(keras.applications, name), None)
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 4, 3)).astype("float32")
    expected = module.preprocess_input(images.copy())
    np.testing.assert_allclose(preprocessed(spec, images), expected, rtol=0, atol=1e-4)
    assert spec.url.startswith("https://keras.io/api/applications/")
    assert spec.input_range == (0.0, 255.0)


@pytest.mark.parametrize("name", NAMES)
def test_minimum_size_is_that_of_the_model(name):
    too_small = spec_for(name).min_image_size - 1
    with pytest.raises(ValueError, match=f"at least {too_small + 1}x"):
        function_of(name)(include_top=False, weights=None, input_shape=(too_small, too_small, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "MobileNetV3" not in name])
def test_default_size_is_that_of_the_model(name):
    # MobileNetV3 takes any size, also with its classifier: its weights are of 224.
    with_classifier = function_of(name)(weights=None)
    assert with_classifier.input_shape == (None, *(spec_for(name).default_image_size,) * 2, 3)


def test_specs_are_frozen():
    with pytest.raises(AttributeError):
        spec_for("VGG16").mode = "tf"


@pytest.mark.core
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("resnet50", "ResNet50"),
        ("mobilenet_v2", "MobileNetV2"),
        ("EfficentNetB0", "EfficientNetB0"),
        ("efficientnetv2-s", "EfficientNetV2S"),
    ],
)
def test_unknown_name_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"application='{wrong}'.*{right}"):
        spec_for(wrong)


def test_unknown_name_far_from_all_lists_them():
    with pytest.raises(ValueError, match=r"Known: .*VGG16.*Xception"):
        spec_for("???")


# --- identify -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOW_UNLESS_SMALL)
def test_identify_names_the_model(name):
    spec = identify(small_model(name))
    assert spec == spec_for(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_identify_with_classifier_or_one_channel(name):
    size = max(spec_for(name).min_image_size, 96)
    with_classifier = small_model(name, include_top=True, classes=5, input_shape=(size, size, 3))
    assert identify(with_classifier) == spec_for(name)
    gray = identify(small_model(name, input_shape=(size, size, 1)))
    assert (gray.name, gray.channels) == (name, 1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("VGG16", {"include_top": True, "classes": 3, "classifier_activation": None}),
        ("MobileNetV2", {"alpha": 0.35, "pooling": "max", "name": "encoder"}),
        ("MobileNet", {"alpha": 0.25, "input_shape": (None, None, 3)}),
        ("MobileNetV3Small", {"alpha": 0.75, "minimalistic": True, "include_top": True}),
        ("ConvNeXtTiny", {"name": "encoder", "pooling": "avg"}),
        ("ResNet50", {"name": "my_model"}),
    ],
)
def test_identify_whatever_the_arguments(name, arguments):
    assert identify(small_model(name, **arguments)) == spec_for(name)


@pytest.mark.parametrize(
    ("name", "divide", "add"),
    [
        ("EfficientNetV2S", 128, -1),
        pytest.param("EfficientNetV2M", 128, -1, marks=pytest.mark.slow),
        pytest.param("EfficientNetV2L", 128, -1, marks=pytest.mark.slow),
        ("MobileNetV3Small", 127.5, -1),
        pytest.param("MobileNetV3Large", 127.5, -1, marks=pytest.mark.slow),
    ],
)
def test_identify_without_built_in_preprocessing_asks_for_rescaling(name, divide, add):
    spec = identify(small_model(name, include_preprocessing=False))
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, 4, 3))
    np.testing.assert_allclose(preprocessed(spec, images), images / divide + add, atol=1e-9)


@pytest.mark.parametrize("name", ["ConvNeXtTiny", "EfficientNetV2B0"])
def test_identify_without_built_in_preprocessing_asks_for_torch_mode(name):
    spec = identify(small_model(name, include_preprocessing=False))
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, 4, 3)).astype("float32")
    expected = keras.applications.imagenet_utils.preprocess_input(images.copy(), mode="torch")
    np.testing.assert_allclose(preprocessed(spec, images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("ConvNeXtTiny", "torch"),  # leaves its preprocessing out
        ("EfficientNetV2B0", "builtin"),  # scales to [-1, 1] by itself instead
        pytest.param("EfficientNetV2S", "builtin", marks=pytest.mark.slow),
        ("VGG16", "caffe"),
    ],
)
def test_identify_with_other_channels(name, mode):
    spec = identify(small_model(name, input_shape=(32, 32, 1)))
    assert (spec.mode, spec.channels) == (mode, 1)


@pytest.mark.parametrize(
    "name",
    ["ConvNeXtTiny", "EfficientNetB0", pytest.param("EfficientNetV2B0", marks=pytest.mark.slow)],
)
def test_identify_survives_a_keras_file(name, tmp_path):
    model = small_model(name)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert identify(again) == identify(model) == spec_for(name)


def test_identify_survives_a_keras_file_without_preprocessing(tmp_path):
    model = small_model("MobileNetV3Small", include_preprocessing=False)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert identify(again) == identify(model)
    assert identify(again).mode == "tf"


def test_identify_with_a_head_of_the_users_on_top():
    base = small_model("MobileNetV2", pooling="avg")
    model = keras.Model(base.input, keras.layers.Dense(3)(base.output))
    assert identify(model) == spec_for("MobileNetV2")


def layers_of_the_users():
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(4, 3, name="block1_conv1"),
            keras.layers.MaxPooling2D(name="block1_pool"),
            keras.layers.Conv2D(4, 3, name="block2_conv1"),
        ]
    )


def narrow_vgg16():
    """All of VGG16's names, none of its weights' shapes."""
    x = inputs = keras.Input((32, 32, 3))
    for block, count in enumerate((2, 2, 3, 3, 3), start=1):
        for conv in range(1, count + 1):
            x = keras.layers.Conv2D(2, 3, padding="same", name=f"block{block}_conv{conv}")(x)
    return keras.Model(inputs, x, name="vgg16")


def vgg16_behind(layer):
    inputs = keras.Input((32, 32, 3))
    return keras.applications.VGG16(weights=None, include_top=False, input_tensor=layer(inputs))


def part_of_vgg16():
    base = small_model("VGG16")
    return keras.Model(base.input, base.get_layer("block4_pool").output)


@pytest.mark.parametrize(
    "make",
    [
        layers_of_the_users,
        narrow_vgg16,
        part_of_vgg16,
        lambda: vgg16_behind(keras.layers.Rescaling(1 / 255)),
        lambda: vgg16_behind(keras.layers.Rescaling(0.0)),
        lambda: vgg16_behind(keras.layers.Conv2D(3, 1)),
        lambda: vgg16_behind(lambda inputs: inputs / 255),
        lambda: keras.Sequential([keras.layers.Dense(1)]),
        lambda: keras.layers.Dense(1),
        lambda: None,
    ],
)
def test_identify_answers_none_to_what_it_does_not_know(make):
    assert identify(make()) is None


# --- build ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "MobileNetV3Small",
        "EfficientNetV2B0",
        pytest.param("ConvNeXtTiny", marks=pytest.mark.slow),
        pytest.param("NASNetMobile", marks=pytest.mark.slow),
    ],
)
def test_build_takes_a_name_where_the_function_does_not(name):
    function_of(name)
    model = build(name, input_shape=(32, 32, 3), weights=None, name="encoder")
    assert model.name == "encoder"
    assert len(model.output_shape) == 2
    assert identify(model) == spec_for(name)
    assert model.get_config()["name"] == "encoder"


def test_the_function_still_fails_with_a_name():
    # When this no longer fails, `build` may hand `name` over.
    with pytest.raises(KeyError):
        keras.applications.EfficientNetV2B0(weights=None, include_top=False, name="encoder")


def test_build_equals_the_function():
    arguments = {"input_shape": (32, 32, 3), "weights": None, "alpha": 0.35, "pooling": "max"}
    ours = build("MobileNetV2", **arguments)
    theirs = keras.applications.MobileNetV2(include_top=False, **arguments)
    assert ours.name == theirs.name
    assert ours.output_shape == theirs.output_shape
    # The first and the last layer are numbered.
    ours_inside, theirs_inside = ([layer.name for layer in m.layers[1:-1]] for m in (ours, theirs))
    assert ours_inside == theirs_inside
    assert ours.count_params() == theirs.count_params()


def test_build_takes_images_of_any_size_by_default():
    model = build("MobileNetV2", weights=None, alpha=0.35, pooling=None)
    assert model.input_shape == (None, None, None, 3)
    assert model.output_shape == (None, None, None, 1280)


@pytest.mark.slow
def test_build_gives_nasnet_its_default_size():
    function_of("NASNetMobile")
    assert build("NASNetMobile", weights=None).input_shape == (None, 224, 224, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("Resnet50", {}, ValueError, "ResNet50"),
        ("InceptionV3", {"input_shape": (74, 74, 3)}, ValueError, r"at least 75x75.*\(74, 74, 3\)"),
        ("VGG16", {"input_shape": (31, None, 3)}, ValueError, "at least 32x32"),
        ("VGG16", {"input_shape": (32, 32)}, ValueError, r"\(height, width, channels\)"),
        ("VGG16", {"input_shape": (32, 32, 1), "weights": "imagenet"}, ValueError, "3 channels"),
        ("VGG16", {"input_shape": (32, 32, None)}, ValueError, "known number of channels"),
        ("NASNetMobile", {"input_shape": (None, None, 3)}, ValueError, "fixed image size"),
        ("VGG16", {"include_top": True}, ValueError, "`include_top`.*include_top=True"),
        ("VGG16", {"classes": 10}, ValueError, "`classes`"),
        ("VGG16", {"classifier_activation": None}, ValueError, "`classifier_activation`"),
        ("VGG16", {"pooling": "mean"}, ValueError, "pooling='mean'"),
        ("VGG16", {"alpha": 0.5}, TypeError, "no argument `alpha`.*input_tensor"),
        ("VGG16", {"weights": "imagnet"}, FileNotFoundError, "'imagenet', None or the path"),
        ("VGG16", {"weights": "no/such.weights.h5"}, FileNotFoundError, "no/such.weights.h5"),
        ("VGG16", {"weights": Path("no/such.h5")}, FileNotFoundError, "no/such.h5"),
    ],
)
def test_build_refuses(name, arguments, error, message):
    with pytest.raises(error, match=message):
        build(name, **{"weights": None, **arguments})


def test_build_loads_weights_from_a_path(tmp_path):
    arguments = {"input_shape": (32, 32, 3), "alpha": 0.25}
    first = build("MobileNet", weights=None, **arguments)
    first.save_weights(tmp_path / "first.weights.h5")
    for weights in (tmp_path / "first.weights.h5", str(tmp_path / "first.weights.h5")):
        second = build("MobileNet", weights=weights, **arguments)
        for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


# --- downloads, from a server on this machine: nothing here reaches the internet --------------------

FETCH = """
import functools, http.server, json, pathlib, sys, threading, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")
import keras
from keras_xfer.applications import build

case = None
folder = pathlib.Path(sys.argv[1])
home = pathlib.Path(sys.argv[2])
small = dict(input_shape=(128, 128, 3), alpha=0.25, pooling=None)
file_name = "mobilenet_2_5_128_tf_no_top.h5"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if case == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif case == "dropped":
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
threading.Thread(target=server.serve_forever, daemon=True).start()
for function in (keras.applications.MobileNet, keras.applications.EfficientNetB0):
    # The constant of its module that the function makes the address of its weights from.
    (constant,) = {"BASE_WEIGHT_PATH", "BASE_WEIGHTS_PATH"} & set(function.__globals__)
    function.__globals__[constant] = f"http://127.0.0.1:{server.server_port}/"


def attempt(application, **arguments):
    try:
        model = build(application, weights="imagenet", **arguments)
    except Exception as error:
        answer = {"type": type(error).__name__, "message": str(error)}
        left = sorted(path.name for path in home.rglob("*.h5"))
        print("ANSWER", json.dumps({"case": case, "left": left, **answer}))
    else:
        return model


for case in ("missing", "short", "dropped"):
    attempt("MobileNet", **small)
case = "damaged"
(folder / "efficientnetb0_notop.h5").write_bytes(b"not the weights")
attempt("EfficientNetB0")
case = "there"
original = keras.applications.MobileNet(weights=None, include_top=False, **small)
original.save(folder / file_name)
loaded = attempt("MobileNet", name="encoder", **small)
same = all((a == b).all() for a, b in zip(original.get_weights(), loaded.get_weights(), strict=True))
print("ANSWER", json.dumps({"case": case, "same": bool(same), "name": loaded.name}))
case = "unreadable"
(home / "models" / file_name).write_bytes(b"not the weights")
attempt("MobileNet", **small)
case = "refused"
(home / "models" / file_name).unlink()
server.shutdown()
server.server_close()
attempt("MobileNet", **small)
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """What happened in each case, by its name."""
    folder = tmp_path_factory.mktemp("downloads")
    for name in ("served", "home"):
        (folder / name).mkdir()
    (folder / "fetch.py").write_text(FETCH)
    environment = {
        **os.environ,
        "KERAS_HOME": str(folder / "home"),  # read when Keras is imported, hence a process
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "no_proxy": "*",
    }
    command = [sys.executable, folder / "fetch.py", folder / "served", folder / "home"]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert run.returncode == 0, run.stderr
    # Keras's progress bar leaves its line open.
    answers = [line.split("ANSWER ")[1] for line in run.stdout.splitlines() if "ANSWER " in line]
    return {answer["case"]: answer for answer in map(json.loads, answers)}


def test_download_and_load(downloads):
    assert downloads["there"] == {"case": "there", "same": True, "name": "encoder"}


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("refused", "URL fetch failure on http://127.0.0.1"),
        ("missing", "404"),
        ("short", "URL fetch failure"),
        ("dropped", "closed connection"),
        ("damaged", "corrupted"),
    ],
)
def test_a_download_that_fails_is_one_clear_error(downloads, case, cause):
    answer = downloads[case]
    assert answer["type"] == "WeightsUnavailableError"
    assert "could not be downloaded" in answer["message"]
    assert cause in answer["message"]
    assert "weights=None" in answer["message"]
    assert "weights=PATH" in answer["message"]
    # Nothing half-written is left that a second try would take for the weights.
    assert not [name for name in answer["left"] if name.startswith("mobilenet")]


def test_an_error_after_the_download_is_left_alone(downloads):
    assert downloads["unreadable"]["type"] == "OSError"


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (ConnectionResetError("reset"), WeightsUnavailableError),
        (TimeoutError("slow"), WeightsUnavailableError),
        (Exception("URL fetch failure on http://x: None -- no route"), WeightsUnavailableError),
        (ValueError("Incomplete or corrupted file detected. The md5"), WeightsUnavailableError),
        (Exception("something else"), Exception),
        (ValueError("You are trying to load"), ValueError),
        (PermissionError("models"), PermissionError),
        (OSError(28, "No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_only_failed_downloads_are_called_that(monkeypatch, error, becomes):
    def function(*, include_top, input_shape, weights, pooling):
        raise error

    monkeypatch.setattr(keras.applications, "VGG16", function)
    with pytest.raises(becomes) as caught:
        build("VGG16")
    assert type(caught.value) is becomes
    if becomes is WeightsUnavailableError:
        assert caught.value.__cause__ is error
        assert "VGG16" in str(caught.value)
        assert isinstance(caught.value, OSError)
    else:
        assert caught.value is error


def test_spec_documents_every_field():
    for field in inspect.signature(ApplicationSpec).parameters:
        assert f"\n        {field}: " in ApplicationSpec.__doc__
