"""`keras-xfer train --hub` and `predict --trust`, on SavedModels of three small convolutions."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from keras_xfer.cli import main
from keras_xfer.commands import hub_backbone
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.commands.runs import RunFolder
from tests.test_cli import OUTPUTS, cut_off, failed, names, read, without_times

KERNELS = [(3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 4, 6)]


def kernels():
    """Positive, so that bright images give large features, of about 1."""
    rng = np.random.default_rng(0)
    drawn = [rng.random(shape, "float32") for shape in KERNELS]
    return [2 * values / values.sum((0, 1, 2)) for values in drawn]


def network(
    folder, *, height=16, width=16, gives="vector", as_signature=False, trainable=True, batch=None
):
    """Three convolutions and their mean: images (B, height, width, 3) in, (B, 6) out."""
    import tensorflow as tf

    variables = [
        tf.Variable(values, name=f"block_{i}/kernel", trainable=trainable)
        for i, values in enumerate(kernels(), 1)
    ]

    @tf.function(input_signature=[tf.TensorSpec([batch, height, width, 3], name="images")])
    def run(images):
        x = features(images, variables)
        mean = tf.reduce_mean(x, (1, 2))
        return {
            "vector": mean,
            "map": x,
            "default": {"default": x, "other": mean},
            "several": {"one": mean, "another": x},
            "whole numbers": tf.cast(mean, tf.int32),
        }[gives]

    module = tf.Module()
    module.kernels = variables
    if as_signature:
        tf.saved_model.save(module, str(folder), signatures={"serving_default": run})
    else:
        module.__call__ = run
        tf.saved_model.save(module, str(folder))
    return folder


def features(images, weights):
    import tensorflow as tf

    for kernel in weights:
        images = tf.nn.relu(tf.nn.conv2d(images, kernel, 2, "SAME"))
    return images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs of two classes that differ in brightness, 16 pixels each way."""
    root = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    for name, light in (("dark", 0), ("light", 128)):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(light, light + 128, (16, 16, 3)).astype("uint8")
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def net(root):
    return network(root / "net")


@pytest.fixture(scope="module")
def line(root, net):
    return [
        *("train", str(root / "photos"), "--hub", str(net), "--hub-range", "-1", "1"),
        *("--epochs", "3", "--batch-size", "2", "--learning-rate", "0.1", "--head-epochs", "2"),
    ]


@pytest.fixture(scope="module")
def trained(root, line):
    """With the handle as a path relative to a folder that is not the one of later commands."""
    told = list(line)
    told[3] = "net"
    run = root / "run"
    with contextlib.chdir(root):
        assert main([*told, "--output", str(run)]) == 0
    return run


def train(root, hub, run, *options):
    return main(
        [
            *("train", str(root / "photos"), "--hub", str(hub), "--output", str(run)),
            *("--epochs", "2", "--batch-size", "8", *options),
        ]
    )


def predictions(root, run, tmp_path, *options):
    """The probability of each class for the files of predictions.csv."""
    files = [str(root / "photos" / row["file"]) for row in read(run / "predictions.csv")]
    table = tmp_path / "table.csv"
    status = main(["predict", str(run), *files, "--csv", str(table), *options])
    return status, read(table) if table.exists() else []


# train


def test_a_run_leaves_its_files_and_the_whole_handle(trained, net):
    assert names(trained) == OUTPUTS
    record = json.loads((trained / "run.json").read_text())
    assert (record["hub"], record["hub_range"]) == (str(net), [-1, 1])
    assert not {"backbone", "weights"} & set(record)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["backbone"], metrics["image_size"]) == (str(net), 16)
    assert metrics["accuracy"] == 1


def test_the_head_trains_first_then_the_top_of_the_module(trained):
    rows = read(trained / "history.csv")
    head = 6 * 2 + 2
    assert [int(row["trainable_params"]) for row in rows] == [head, head, head + 3 * 3 * 4 * 6]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.1, 0.1, 0.01])


def test_predictions_are_those_of_the_trained_network(trained, root, tmp_path):
    """Computed here from the weights in the file, without the SavedModel."""
    import tensorflow as tf

    model = keras.saving.load_model(trained / "model.keras", safe_mode=False)
    weights = [weight.numpy() for weight in model.get_layer("backbone").weights]
    changed = [bool((new != old).any()) for new, old in zip(weights, kernels(), strict=True)]
    best = json.loads((trained / "metrics.json").read_text())["best_epoch"]
    assert changed == [False, False, best == 2]
    kernel, bias = model.get_layer("logits").get_weights()
    rows = read(trained / "predictions.csv")
    pixels = np.stack([np.asarray(Image.open(root / "photos" / row["file"])) for row in rows])
    x = tf.reduce_mean(features(pixels.astype("float32") / 127.5 - 1, weights), (1, 2))
    expected = tf.nn.softmax(x @ kernel + bias).numpy()
    assert [["dark", "light"][each] for each in expected.argmax(1)] == [
        row["prediction"] for row in rows
    ]
    np.testing.assert_allclose(
        [float(row["probability"]) for row in rows], expected.max(1), atol=1e-5
    )
    # And `predict`, in whatever folder.
    status, shown = predictions(root, trained, tmp_path, "--trust")
    assert status == 0
    found = [float(row["probability"]) for row in shown if row["rank"] == "1"]
    np.testing.assert_allclose(found, expected.max(1), atol=1e-5)


def test_a_run_that_was_cut_off_goes_on(line, trained, root, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    assert cut_off(line, run, monkeypatch) == 130
    other = shutil.copytree(root / "net", tmp_path / "other")
    changed = [str(other) if word == str(root / "net") else word for word in line]
    capfd.readouterr()
    status = main([*changed, "--output", str(run), "--resume"])
    failed(capfd, status, "--resume", f"hub was '{root / 'net'}' and is '{other}'")
    status = main([*line, "--output", str(run), "--resume", "--hub-range", "0", "1"])
    failed(capfd, status, "hub_range was [-1.0, 1.0] and is [0.0, 1.0]")
    assert main([*line, "--output", str(run), "--resume"]) == 0
    assert "Resumed  after epoch 1" in capfd.readouterr().out
    rows = [without_times(read(each / "history.csv")) for each in (run, trained)]
    assert rows[0] == rows[1]
    assert (run / "predictions.csv").read_bytes() == (trained / "predictions.csv").read_bytes()
    assert main([*line, "--output", str(run), "--resume"]) == 0
    assert "nothing is left to do" in capfd.readouterr().out


def test_another_kind_of_backbone_is_another_run(tmp_path):
    (tmp_path / "model.keras").touch()
    hub, application = Recipe(hub="/net").to_dict(), Recipe().to_dict()
    said = []
    for then, now in ((hub, application), (application, hub)):
        (tmp_path / "run.json").write_text(json.dumps(then))
        with pytest.raises(UsageError) as caught:
            RunFolder(tmp_path).check_resumable(now)
        said.append(str(caught.value).partition("otherwise: ")[2].partition(". Give")[0])
    assert said == ["hub was '/net' and is None", "hub was None and is '/net'"]


@pytest.mark.parametrize(
    "given",
    [
        {"height": None, "width": None, "gives": "map"},
        {"gives": "default"},
    ],
)
def test_feature_maps_are_averaged(given, root, tmp_path):
    """The SavedModel of any size in 16 bits, at a size of the user's."""
    hub = network(tmp_path / "net", **given)
    options = ["--image-size", "24", "--mixed-precision"] if "height" in given else []
    assert train(root, hub, tmp_path / "run", *options, "--unfreeze", "none") == 0
    model = keras.saving.load_model(tmp_path / "run" / "model.keras", safe_mode=False)
    backbone = model.get_layer("backbone")
    x = np.random.default_rng(0).random((2, 24 if options else 16, 24 if options else 16, 3))
    expected = features(x.astype("float32"), kernels()).numpy().mean((1, 2))
    found = keras.ops.convert_to_numpy(keras.ops.cast(backbone(x.astype("float32")), "float32"))
    np.testing.assert_allclose(found, expected, rtol=0.02 if options else 1e-5)


def test_a_pinned_archive(root, net, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    archive = tmp_path / "net.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(net, ".")
    pin = hashlib.sha256(archive.read_bytes()).hexdigest()
    run = tmp_path / "run"
    failed(capfd, train(root, archive, run, "--hub-sha256", "a" * 64), "--hub-sha256", pin)
    failed(capfd, train(root, net, run, "--hub-sha256", pin), "this is a folder", str(net))
    status = train(root, archive, run, "--hub-sha256", pin, "--epochs", "1")
    assert status == 0
    assert predictions(root, run, tmp_path, "--trust")[0] == 0
    capfd.readouterr()
    status, _ = predictions(root, run, tmp_path, "--trust", "--hub", str(net))
    failed(capfd, status, "--hub", "give that archive")


# What cannot be trained


@pytest.fixture(scope="module")
def untrainable(root):
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(4, 3, 2),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.export(root / "exported", verbose=False)
    network(root / "signature", as_signature=True, gives="map")
    network(root / "constant", trainable=False)
    return root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exported", "model.export()"),
        ("signature", "a signature knows inference alone"),
        ("constant", "nothing to train"),
    ],
)
def test_the_head_of_what_cannot_be_trained(name, reason, untrainable, root, tmp_path, capfd):
    run = tmp_path / "run"
    for options in (
        ["--unfreeze", "all"],
        ["--head-epochs", "1"],
        ["--fine-tune-rate", "1e-4"],
    ):
        status = train(root, untrainable / name, run, *options)
        failed(capfd, status, options[0], str(untrainable / name), reason)
    stages = tmp_path / "stages.yaml"
    stages.write_text("- {epochs: 1}\n- {unfreeze: all, epochs: 1, learning_rate: 1e-4}")
    status = train(root, untrainable / name, run, "--stages", str(stages))
    failed(capfd, status, "--stages", str(untrainable / name), reason)
    assert not run.exists()
    stages.write_text("- {epochs: 2}")
    options = {"exported": [], "signature": ["--stages", str(stages)]}.get(name)
    if options is None:  # not worth the seconds
        return
    assert train(root, untrainable / name, run, *options) == 0
    said = capfd.readouterr().out.splitlines()
    (why,) = [each for each in said if "the head alone trains" in each]
    assert reason in why
    assert [row["stage"] for row in read(run / "history.csv")] == ["0", "0"]


# What a user can mend


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backbone", "MobileNetV2"], ["--hub", "leave out --backbone"]),
        (["--weights", "imagenet"], ["--hub", "--weights"]),
        (["--backbone-arg", "alpha=1"], ["--hub", "--backbone-arg"]),
        (["--hub-range", "1", "0"], ["--hub-range", "1 0"]),
        (["--hub-range", "0", "inf"], ["--hub-range", "inf"]),
        (["--hub-sha256", "12"], ["--hub-sha256", "64"]),
        (["--image-size", "24"], ["--image-size", "16 x 16", "24"]),
        (["--unfreeze", "block_9"], ["--unfreeze", "block_9", "block_3"]),
    ],
)
def test_wrong_options(options, words, root, net, tmp_path, capfd):
    failed(capfd, train(root, net, tmp_path / "run", *options), *words)
    assert not (tmp_path / "run").exists()


def test_options_of_hub_alone(root, tmp_path, capfd):
    line = ["train", str(root / "photos"), "--output", str(tmp_path / "run")]
    for options in (["--hub-range", "-1", "1"], ["--hub-sha256", "a" * 64], ["--hub", ""]):
        failed(capfd, main([*line, *options]), "--hub")


def text(folder):
    import tensorflow as tf

    module = tf.Module()
    module.__call__ = tf.function(
        lambda sentences: tf.zeros((tf.size(sentences), 3)),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    tf.saved_model.save(module, str(folder))
    return folder


def channels_first(folder, *, size=16):
    import tensorflow as tf

    module = tf.Module()
    module.__call__ = tf.function(
        lambda images: tf.reduce_mean(images, (2, 3)),
        input_signature=[tf.TensorSpec([None, 3, size, size])],
    )
    tf.saved_model.save(module, str(folder))
    return folder


def tf1(folder):
    folder.mkdir()
    (folder / "saved_model.pb").touch()
    (folder / "tfhub_module.pb").touch()
    return folder


def damaged(folder):
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"no SavedModel")
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, ["there is nothing", "Check the path"]),
        (lambda _: "https://127.0.0.1:9/model", ["no connection", "Check the address"]),
        (lambda _: "kaggle://google/nnlm", ["kaggle://owner/model/framework/variation"]),
        (lambda _: "file://elsewhere/net", ["this machine"]),
        (lambda _: "ftp://elsewhere/net", ["ftp://", "https://"]),
        (tf1, ["TF1", "TensorFlow 2"]),
        (damaged, ["damaged"]),
        (text, ["does not take colour images", "string", "feature vector"]),
        (lambda folder: network(folder, gives="several"), ["'another', 'one'", "output_key"]),
        (lambda folder: network(folder, gives="whole numbers"), ["int32", "feature vector"]),
        (lambda folder: network(folder, height=None, width=None), ["any size", "--image-size N"]),
        (lambda folder: network(folder, width=24), ["16 x 24", "square", "from_hub"]),
        (lambda folder: network(folder, batch=1), ["batches of one size", "TensorSpec([None"]),
        (lambda folder: network(folder, batch=2), ["batches of one size", "TensorSpec([None"]),
        (channels_first, ["wants the channels", "first", "from_hub"]),
        (
            lambda folder: channels_first(folder, size=None),
            ["wants the channels", "first", "from_hub"],
        ),
        (
            lambda folder: network(folder, as_signature=True, gives="several"),
            ["'another', 'one'", "output_key"],
        ),
    ],
    ids=[
        *("nothing", "unreachable", "kaggle", "another-machine", "scheme", "tf1", "damaged", "text"),
        *("several", "whole-numbers", "any-size", "oblong", "batch-of-1", "batch-of-2"),
        *("channels-first", "channels-first-of-any-size", "signature-of-several"),
    ],
)  # fmt: skip
def test_wrong_handles(make, words, root, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("keras_xfer.handles.downloads.RETRY_WAITS_SECONDS", (0, 0))
    handle = str(make(tmp_path / "net"))
    failed(capfd, train(root, handle, tmp_path / "run"), handle, *words)
    assert not (tmp_path / "run").exists()


def test_another_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(UsageError, match="KERAS_BACKEND=jax.*--backbone"):
        hub_backbone.build(Recipe(hub="/net"))


def test_what_is_not_there_is_said_before_a_framework_is_loaded(root, trained):
    code = (
        "import sys; sys.argv[0] = 'keras-xfer'; from keras_xfer.cli import main;"
        "assert main(sys.argv[1:]) == 2; sys.exit('keras' in sys.modules)"
    )
    photos = str(root / "photos")
    for line in (
        ["train", photos, "--output", str(root / "new"), "--hub", str(root / "none")],
        ["predict", str(trained), photos],
    ):
        done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (0, 1), done.stderr


# predict


def test_predict_asks_for_trust(trained, root, net, tmp_path, capfd):
    status, rows = predictions(root, trained, tmp_path)
    failed(capfd, status, "runs the code of the SavedModel", str(net), "--trust")
    assert rows == []


def test_predict_of_a_module_that_has_moved(trained, root, net, tmp_path, capfd, monkeypatch):
    _, expected = predictions(root, trained, tmp_path, "--trust")
    net.rename(tmp_path / "moved")
    try:
        capfd.readouterr()
        status, _ = predictions(root, trained, tmp_path, "--trust")
        failed(capfd, status, str(net), "there is nothing", "--hub HANDLE")
        status, _ = predictions(root, trained, tmp_path, "--trust", "--hub", str(tmp_path / "no"))
        failed(capfd, status, "--hub", str(tmp_path / "no"), str(net))
        monkeypatch.chdir(tmp_path)
        status, rows = predictions(root, trained, tmp_path, "--trust", "--hub", "moved")
    finally:
        (tmp_path / "moved").rename(net)
    assert status == 0
    assert rows == expected


def nodes(config):
    """All dicts of a configuration, however deep."""
    if isinstance(config, dict):
        yield config
    for each in config.values() if isinstance(config, dict) else config:
        if isinstance(each, dict | list):
            yield from nodes(each)


def edited(trained, run, edit):
    """A run whose model.keras says something else."""
    run.mkdir()
    for name in ("labels.json", "predictions.csv"):
        shutil.copy(trained / name, run)
    with (
        zipfile.ZipFile(trained / "model.keras") as old,
        zipfile.ZipFile(run / "model.keras", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                edit({each["class_name"]: each for each in nodes(config) if "class_name" in each})
                content = json.dumps(config)
            new.writestr(name, content)
    return run


HIDDEN = {"handle": "/other", "name": "hidden"}


@pytest.mark.parametrize(
    "edit",
    [
        lambda of: of["Dropout"].update(class_name="Lambda"),
        lambda of: of["Dropout"].update(registered_name="keras_xfer>HubModule", config=HIDDEN),
        lambda of: of["Dropout"].update(registered_name="keras_xfer>Backbone"),
        lambda of: of["Dropout"].update(class_name="keras_xfer>HubModule", config=HIDDEN),
        lambda of: of["HubModule"].update(class_name="Dense"),
        lambda of: of["HubModule"]["config"].update(handle=["/other"]),
        lambda of: of["Dropout"].update(module="os"),
        lambda of: of["Dropout"].pop("module"),
        lambda of: of["Dropout"].update(class_name=["Dense"]),
        lambda of: of["Dropout"].update(class_name="TFSMLayer", config="/other"),
        lambda of: of["Dense"]["config"].update(
            activation={"class_name": "function", "config": "keras_xfer>HubModule"}
        ),
        lambda of: of["Dense"]["config"].update(activation={"class_name": "__lambda__"}),
        lambda of: of["__keras_tensor__"].update(registered_name="keras_xfer>HubModule"),
        lambda of: of["Dense"]["config"].update(name={"class_name": "\x1b[31m", "config": {}}),
    ],
)
def test_trust_is_of_the_named_module_alone(edit, trained, root, tmp_path, capfd):
    """A model file with what Keras might make something else of than it seems to be."""
    run = edited(trained, tmp_path / "run", edit)
    for trust in (["--trust"], []):
        status, _ = predictions(root, run, tmp_path, *trust)
        failed(capfd, status, "class_name=", "Do not trust it")


def test_all_modules_are_named(trained, root, net, tmp_path, capfd):
    def edit(of):
        of["Dropout"].update({**of["HubModule"], "config": HIDDEN})

    run = edited(trained, tmp_path / "run", edit)
    status, _ = predictions(root, run, tmp_path)
    failed(capfd, status, "'/other'", repr(str(net)), "--trust")


def test_a_module_that_no_name_betrays_is_not_made(trained, root, tmp_path, capfd):
    """Without a HubModule in sight, Keras loads in its safe mode."""
    run = edited(
        trained,
        tmp_path / "run",
        lambda of: of["HubModule"].update(class_name="Sequential", registered_name=None),
    )
    status, _ = predictions(root, run, tmp_path, "--trust")
    failed(capfd, status, "cannot be loaded")


def test_hub_is_for_models_that_hold_one(tmp_path, capfd):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    (tmp_path / "labels.json").write_text('["a", "b"]')
    status = main(["predict", str(tmp_path), str(tmp_path), "--hub", "net"])
    failed(capfd, status, "--hub", "holds no SavedModel")


def test_handles_of_another_form_are_left_alone():
    from keras_xfer.commands.hub_handles import look

    look("gs://bucket/net", None)  # asked for when TensorFlow is there


def test_a_damaged_model_is_told_as_ever(trained, root, tmp_path, capfd):
    for name in ("labels.json", "predictions.csv"):
        shutil.copy(trained / name, tmp_path)
    (tmp_path / "model.keras").write_bytes((trained / "model.keras").read_bytes()[:3000])
    status, _ = predictions(root, tmp_path, tmp_path, "--trust")
    failed(capfd, status, "cannot be loaded")


def test_applications_are_as_they_were():
    recipe = Recipe().to_dict()
    assert recipe["hub"] is None
    assert not {"hub_range", "hub_sha256"} & set(recipe)
    backbone = SimpleNamespace(model=keras.layers.Dense(2))
    assert hub_backbone.why_frozen(backbone) is None
