import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_xfer import applications, cli
from keras_xfer.cli import main
from keras_xfer.commands import job
from keras_xfer.reports import classification_table

CLASSES = ["Zürich 日本", "cat", "red panda"]  # by code point
SMALL = ["--backbone", "MobileNet", "--backbone-arg", "alpha=0.25", "--image-size", "32"]
OUTPUTS = {
    "model.keras",
    "labels.json",
    "history.csv",
    "predictions.csv",
    "metrics.json",
    "skipped.csv",
    "report.html",
    "run.json",
}


def command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "keras_xfer.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        **kwargs,
    )


def picture(rng, color, width, height):
    pixels = rng.integers(0, 90, (height, width, 3))
    pixels[..., color] += 120
    return Image.fromarray(pixels.astype("uint8"))


def fill(root, classes=CLASSES, count=8, suffix=".png"):
    rng = np.random.default_rng(0)
    for color, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            width, height = rng.integers(20, 90, 2)
            picture(rng, color % 3, width, height).save(root / name / f"{i}{suffix}")
    return root


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    return {path.name for path in folder.iterdir()}


def failed(capfd, status, *words):
    """One line on stderr that holds `words`, and exit status 2."""
    assert status == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("keras-xfer")
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Good pictures, ten JPEGs that end too early, and a text under an image's name."""
    root = fill(tmp_path_factory.mktemp("photos") / "photos")
    good = tmp_path_factory.mktemp("good") / "good.jpg"
    picture(np.random.default_rng(1), 0, 64, 48).save(good)
    content = good.read_bytes()
    for i in range(10):
        (root / "cat" / f"damaged{i}.jpg").write_bytes(content[: len(content) * (i + 1) // 12])
    (root / "red panda" / "notes.jpg").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet(
        input_shape=(32, 32, 3), include_top=False, pooling="avg", weights=None, alpha=0.25
    )
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    model.save_weights(path)
    return path


@pytest.fixture(scope="session")
def arguments(photos, weights):
    return [
        *("train", str(photos), "--weights", str(weights), *SMALL),
        *("--epochs", "2", "--batch-size", "6", "--test-split", "0.25", "--class-weights"),
        *("--head-epochs", "1", "--unfreeze", "conv_pw_12", "--seed", "3"),
    ]


@pytest.fixture(scope="session")
def trained(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "new" / "run"
    done = command(*arguments, "--output", run)
    assert (done.returncode, done.stderr) == (0, "")
    return run, done.stdout


# train


def test_train_says_what_it_found_and_did(trained):
    run, said = trained
    assert "24 images in 3 classes: 12 train, 6 validation, 6 test" in said
    assert "11 unreadable files" in said
    assert "epoch 1/2  head" in said
    assert "epoch 2/2  fine-tuning" in said
    assert "on the 6 test images" in said
    assert str(run) in said


def test_train_leaves_its_files_and_nothing_else(trained):
    run, _ = trained
    assert names(run) == OUTPUTS
    assert json.loads((run / "labels.json").read_text(encoding="utf-8")) == CLASSES


def test_skipped_files_are_listed_with_a_reason(trained, photos):
    rows = read(trained[0] / "skipped.csv")
    expected = {f"cat/damaged{i}.jpg" for i in range(10)} | {"red panda/notes.jpg"}
    assert {row["file"] for row in rows} == expected
    assert all(row["reason"] for row in rows)


def test_history_holds_the_schedule(trained):
    rows = read(trained[0] / "history.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["stage"] for row in rows] == ["0", "1"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([1e-3, 1e-4])
    # 256 features to 3 classes; then conv_pw_12, conv_dw_13 and conv_pw_13, without BatchNorm.
    head = 256 * 3 + 3
    thawed = 128 * 256 + 9 * 256 + 256 * 256
    assert [int(row["trainable_params"]) for row in rows] == [head, head + thawed]
    assert all(float(row["epoch_seconds"]) > 0 for row in rows)
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "samples_per_second"} <= set(rows[0])


def test_metrics_agree_with_the_predictions(trained):
    run, _ = trained
    rows = read(run / "predictions.csv")
    assert list(rows[0]) == ["file", "label", "prediction", "probability", "correct"]
    metrics = json.loads((run / "metrics.json").read_text())
    right = [row["label"] == row["prediction"] for row in rows]
    assert [row["correct"] == "True" for row in rows] == right
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    scores = classification_table(run / "predictions.csv", CLASSES)
    assert scores.loc["weighted avg", "recall"] == pytest.approx(np.mean(right))
    assert [row["label"] for row in rows] == [name for name in CLASSES for _ in range(2)]
    assert (metrics["split"], metrics["test_images"], metrics["skipped_images"]) == ("test", 6, 11)


def test_report_shows_the_run_and_loads_nothing(trained):
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    assert "Zürich 日本" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


RELOAD = """
import sys, json
import numpy as np
from PIL import Image
import keras
import keras_xfer
model = keras.saving.load_model(sys.argv[1], safe_mode=True)
assert model.input_shape == (None, None, None, 3) and model.inputs[0].dtype == "uint8"
print(json.dumps([
    model.predict(np.asarray(Image.open(path).convert("RGB"))[None], verbose=0)[0].tolist()
    for path in sys.argv[2:]
]))
"""


def test_the_saved_model_takes_whole_photographs(trained, photos):
    """Decoded here, at their own sizes: the answers are those of predictions.csv."""
    run, _ = trained
    rows = read(run / "predictions.csv")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RELOAD,
            str(run / "model.keras"),
            *(str(photos / row["file"]) for row in rows),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    answers = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    # What is left is the rounding of resized pixels to uint8 while training.
    expected = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(answers.max(axis=1), expected, atol=0.01)


def test_a_seed_decides_everything(trained, arguments, tmp_path):
    run, _ = trained
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    first, second = read(run / "predictions.csv"), read(tmp_path / "again" / "predictions.csv")
    assert [row["file"] for row in first] == [row["file"] for row in second]
    probabilities = [[float(row["probability"]) for row in rows] for rows in (first, second)]
    np.testing.assert_allclose(*probabilities, atol=1e-5)
    losses = [
        [float(r["loss"]) for r in read(p / "history.csv")] for p in (run, tmp_path / "again")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_run_replaces_an_earlier_one_and_spares_other_files(photos, tmp_path):
    """In 16 bits, from scratch, on everything that `--augment strong` does."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "history.csv").write_text("of an earlier run")
    (run / "mine.txt").write_text("mine")
    status = main(
        [
            *("train", str(photos), "--output", str(run), *SMALL, "--weights", "none"),
            *("--epochs", "1", "--mixed-precision", "--augment", "strong"),
        ]
    )
    assert status == 0
    assert names(run) == OUTPUTS | {"mine.txt"}
    assert [row["stage"] for row in read(run / "history.csv")] == ["0"]
    assert keras.config.dtype_policy().name == "float32"
    model = keras.saving.load_model(run / "model.keras")
    assert model.get_layer("backbone").model.layers[1].compute_dtype in ("float16", "bfloat16")
    answer = model.predict(np.zeros((2, 10, 70, 3), "uint8"), verbose=0)
    assert answer.dtype == "float32"
    np.testing.assert_allclose(answer.sum(axis=1), 1, atol=1e-5)


def test_a_diverging_loss_is_said(photos, tmp_path, capfd):
    status = main(
        [
            *("train", str(photos), "--output", str(tmp_path / "run"), *SMALL),
            *("--weights", "none", "--epochs", "2", "--learning-rate", "1e30", "--batch-size", "4"),
        ]
    )
    failed(capfd, status, "NaN", "--learning-rate")


# What a user can mend


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--batch-size", "-4"], ["--batch-size", "-4"]),
        (["--image-size", "0"], ["--image-size"]),
        (["--image-size", "16"], ["--image-size", "32", "16"]),
        (["--learning-rate", "-0.1"], ["--learning-rate", "positive"]),
        (["--learning-rate", "nan"], ["--learning-rate", "positive"]),
        (["--fine-tune-rate", "0"], ["--fine-tune-rate", "positive"]),
        (["--validation-split", "0"], ["--validation-split", "between 0 and 1"]),
        (["--validation-split", "1.5"], ["--validation-split", "between 0 and 1"]),
        (["--test-split", "-0.1"], ["--test-split"]),
        (["--test-split", "0.9"], ["--test-split", "leave"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--seed", "-1"], ["--seed"]),
        (["--head-epochs", "99"], ["--head-epochs", "15"]),
        (["--augment", "wild"], ["--augment", "strong"]),
        (["--backbone", "MobilNetV2"], ["--backbone", "MobileNetV2"]),
        (["--backbone-arg", "alpha"], ["NAME=VALUE"]),
        (["--backbone-arg", "beta=1", "--weights", "none"], ["--backbone-arg", "beta", "alpha"]),
        (["--weights", "none", "--unfreeze", "all"], ["--unfreeze", "--weights none"]),
        (["--unfreeze", "none", "--fine-tune-rate", "1e-5"], ["--fine-tune-rate", "head alone"]),
        (["--unfreeze", "none", "--head-epochs", "5"], ["--head-epochs", "head alone"]),
        (["--epochs", "1", "--unfreeze", "all"], ["--unfreeze", "1 of 1", "--epochs"]),
        (["--head-epochs", "15", "--fine-tune-rate", "1e-5"], ["--fine-tune-rate", "15 of 15"]),
        (["--weights", "nowhere.h5"], ["--weights", "nowhere.h5", "no such file"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_wrong_options(options, words, photos, tmp_path, capfd):
    run = tmp_path / "run"
    failed(capfd, main(["train", str(photos), "--output", str(run), *options]), *words)
    assert not run.exists()


def test_no_command_and_an_unknown_one(capfd):
    failed(capfd, main([]), "COMMAND")
    failed(capfd, main(["trian"]), "trian", "train")


def test_wrong_folders_of_images(tmp_path, capfd):
    run = ["--output", str(tmp_path / "run"), "--weights", "none"]
    failed(capfd, main(["train", str(tmp_path / "none"), *run]), "no such folder", "none")
    one = fill(tmp_path / "one", ["cat"], 2)
    failed(capfd, main(["train", str(one), *run]), "one class", "cat")
    empty = fill(tmp_path / "empty", ["cat", "dog"], 2)
    (empty / "bird").mkdir()
    failed(capfd, main(["train", str(empty), *run]), "bird", "No readable image")
    damaged = tmp_path / "damaged"
    for name in ("cat", "dog"):
        (damaged / name).mkdir(parents=True)
        (damaged / name / "1.jpg").write_bytes(b"\xff\xd8\xff")
    failed(capfd, main(["train", str(damaged), *run]), "No readable image", "cat", "dog")
    failed(capfd, main(["train", str(empty / "cat" / "0.png"), *run]), "is a file")
    assert not (tmp_path / "run").exists()


def test_wrong_outputs(photos, tmp_path, capfd):
    train = ["train", str(photos), "--weights", "none", "--output"]
    (tmp_path / "file").touch()
    failed(capfd, main([*train, str(tmp_path / "file")]), "--output", "is a file")
    failed(capfd, main([*train, str(photos / "run")]), "--output", "outside")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.keras").write_text("theirs")
    failed(capfd, main([*train, str(tmp_path / "theirs")]), "model.keras", "another folder")
    assert (tmp_path / "theirs" / "model.keras").read_text() == "theirs"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(photos, tmp_path, capfd):
    (tmp_path / "locked").mkdir(mode=0o500)
    status = main(["train", str(photos), "--output", str(tmp_path / "locked" / "run")])
    failed(capfd, status, "--output", "locked", "writable")


def test_a_file_system_that_refuses(photos, tmp_path, capfd, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(job.RunFolder, "write_json", refuse)
    status = main(
        ["train", str(photos), "--output", str(tmp_path / "run"), *SMALL, "--weights", "none"]
    )
    failed(capfd, status, "Permission denied", "permissions")
    assert not (tmp_path / "run").exists()


def test_weights_of_something_else(photos, weights, tmp_path, capfd):
    other = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(other)
    text = tmp_path / "text.h5"
    text.write_text("no weights")
    run = tmp_path / "run"
    for path in (other, text):
        status = main(["train", str(photos), "--output", str(run), *SMALL, "--weights", str(path)])
        failed(capfd, status, "--weights", path.name, "MobileNet")
    # The right network of another width.
    options = ["--backbone", "MobileNet", "--image-size", "32", "--weights", str(weights)]
    failed(capfd, main(["train", str(photos), "--output", str(run), *options]), "does not fit")
    assert not run.exists()


def test_an_unfreeze_that_matches_nothing(photos, weights, tmp_path, capfd):
    run = tmp_path / "run"
    options = [*SMALL, "--weights", str(weights), "--unfreeze", "conv_pw_99"]
    status = main(["train", str(photos), "--output", str(run), *options])
    failed(capfd, status, "--unfreeze", "conv_pw_9")
    assert not run.exists()


def test_imagenet_without_a_network(photos, tmp_path, capfd, monkeypatch):
    def refuse(*args, **kwargs):
        raise applications.WeightsUnavailableError("no network")

    monkeypatch.setattr(applications, "build", refuse)
    run = tmp_path / "run"
    status = main(["train", str(photos), "--output", str(run)])
    failed(capfd, status, "MobileNetV2", "--weights PATH", "--weights none")
    assert not run.exists()


def test_a_full_disk(photos, weights, tmp_path, capfd):
    """A real limit on the size of files, which lets the kernel refuse in the middle of one."""
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        status = main(
            [
                *("train", str(photos), "--output", str(run), *SMALL),
                *("--weights", str(weights), "--epochs", "1"),
            ]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    failed(capfd, status, "disk is full", "--output")
    assert not run.exists()


def test_a_disk_that_fills_up_at_the_end(photos, weights, tmp_path, capfd, monkeypatch):
    save = keras.Model.save

    def half(self, filepath, *args, **kwargs):
        if self.name != "image_classifier":
            return save(self, filepath, *args, **kwargs)
        filepath.write_bytes(b"half of a model")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", half)
    run = tmp_path / "run"
    status = main(
        [
            *("train", str(photos), "--output", str(run), *SMALL),
            *("--weights", str(weights), "--epochs", "1"),
        ]
    )
    failed(capfd, status, "disk is full", "--output")
    left = {"run.json", "skipped.csv", "labels.json", "history.csv", "unfinished"}
    assert names(run) == left  # --resume goes on from there
    assert len(read(run / "history.csv")) == 1


def test_anything_else_is_shown_whole(photos, tmp_path, capfd, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(job, "train", fail)
    assert main(["train", str(photos), "--output", str(tmp_path / "run")]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error
    assert "unforeseen" in error


# Interrupted


def test_an_interrupted_run_keeps_what_is_complete(photos, weights, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "keras_xfer.cli", "train", photos, "--output", run, *SMALL),
            *("--weights", weights, "--epochs", "5000", "--batch-size", "4"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("epoch    3/"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(error.splitlines()) == 1, error
    assert "keeps the model of epoch" in error
    kept = {"run.json", "skipped.csv", "labels.json", "history.csv", "model.keras", "unfinished"}
    assert names(run) == kept
    rows = read(run / "history.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
    assert None not in rows[-1].values()
    assert keras.saving.load_model(run / "model.keras").output_shape == (None, 3)


def test_interrupted_before_anything_was_learned(photos, tmp_path, capfd, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", interrupt)
    run = tmp_path / "a" / "run"
    status = main(["train", str(photos), "--output", str(run), *SMALL, "--weights", "none"])
    assert status == 130
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


# predict


def test_predict_agrees_with_predictions_csv(trained, photos, tmp_path, capfd):
    run, _ = trained
    expected = read(run / "predictions.csv")
    files = [str(photos / row["file"]) for row in expected]
    damaged = photos / "cat" / "damaged3.jpg"
    table = tmp_path / "table.csv"
    assert main(["predict", str(run), *files, str(damaged), "--csv", str(table)]) == 0
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == len(files)
    assert [line for line in shown.err.splitlines() if str(damaged) in line] == [
        shown.err.splitlines()[0]
    ]
    rows = read(table)
    assert list(rows[0]) == ["file", "rank", "prediction", "probability"]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * len(files)
    assert [row["file"] for row in rows[::3]] == files
    assert [row["prediction"] for row in rows[::3]] == [row["prediction"] for row in expected]
    found = np.array([float(row["probability"]) for row in rows]).reshape(-1, 3)
    np.testing.assert_allclose(found[:, 0], [float(r["probability"]) for r in expected], atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert (np.diff(found, axis=1) <= 0).all()


def test_predict_a_folder_on_a_terminal_without_utf8(trained, photos):
    run, _ = trained
    done = command(
        *("predict", run, photos, "--top", 1), env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 24
    assert "Z\\xfcrich" in done.stdout
    assert len(done.stderr.splitlines()) == 11
    assert "Traceback" not in done.stderr


def test_predict_names_what_it_cannot_read_and_takes_odd_names(trained, tmp_path, capfd):
    run, _ = trained
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / os.fsdecode(b"caf\xe9.png"))
    (tmp_path / "photos" / "IMG_1.HEIC").write_bytes(b"a phone's")
    table = tmp_path / "table.csv"
    assert main(["predict", str(run), str(tmp_path / "photos"), "--csv", str(table)]) == 0
    assert {Path(row["file"]).name for row in read(table)} == {"caf\\xe9.png"}
    (skipped,) = capfd.readouterr().err.splitlines()
    assert "IMG_1.HEIC: not a JPEG" in skipped


def test_tune_needs_pandas(photos, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "pandas", None)
    status = main(["tune", str(photos), "--output", str(tmp_path / "run"), "--max-trials", "1"])
    failed(capfd, status, "pandas", "keras-xfer[report]")
    assert not (tmp_path / "run").exists()


def test_predict_on_wrong_input(trained, photos, tmp_path, capfd):
    run, _ = trained
    image = str(photos / "cat" / "0.png")
    failed(capfd, main(["predict", str(tmp_path / "none"), image]), "No such folder", "none")
    failed(capfd, main(["predict", str(tmp_path), image]), "model.keras", "keras-xfer train")
    failed(capfd, main(["predict", str(run), str(tmp_path / "no.jpg")]), "no.jpg")
    failed(capfd, main(["predict", str(run), image, "--top", "0"]), "--top")
    damaged = str(photos / "cat" / "damaged1.jpg")
    failed(capfd, main(["predict", str(run), damaged]), "damaged1.jpg", "readable")
    kept = tmp_path / "kept.csv"
    kept.write_text("an earlier table")
    status = main(["predict", str(run), damaged, "--csv", str(kept)])
    failed(capfd, status, "damaged1.jpg", "readable")
    assert kept.read_text() == "an earlier table"
    status = main(["predict", str(run), image, "--csv", str(tmp_path / "no" / "table.csv")])
    failed(capfd, status, "Cannot write", "table.csv")

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "labels.json").write_text("[1, 2]")
    (broken / "model.keras").write_bytes((run / "model.keras").read_bytes()[:5000])
    failed(capfd, main(["predict", str(broken), image]), "labels.json", "class names")
    (broken / "labels.json").write_text('["cat", "dog"]')
    failed(capfd, main(["predict", str(broken), image]), "model.keras", "cannot be loaded")
    (broken / "model.keras").write_bytes((run / "model.keras").read_bytes())
    failed(capfd, main(["predict", str(broken), image]), "3 classes", "names 2")


# The shell


def test_help_explains_every_option(capfd):
    for name in ("demo", "train", "predict", "cache"):
        assert main([name, "--help"]) == 0
        assert "--" in capfd.readouterr().out
    commands = cli._parser()._subparsers._group_actions[0].choices
    for parser in commands.values():
        assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--epochs"], ["train", "."], ["cache", "info", "no-such"]]
)
def test_help_and_wrong_usage_load_no_framework(arguments):
    code = (
        "import sys; sys.argv[0] = 'keras-xfer'; from keras_xfer.cli import main; main();"
        "sys.exit('keras' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert done.returncode == 0


# Runs that are cut off


def cut_off(arguments, run, monkeypatch, epoch=1):
    """A run that is interrupted at the beginning of `epoch` (from 0)."""

    def interrupt(self, number, logs=None):
        if number == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keras.callbacks.TerminateOnNaN, "on_epoch_begin", interrupt)
        return main([*arguments, "--output", str(run)])


def without_times(rows):
    measured = ("seconds", "samples_per_second")
    return [
        {name: value for name, value in row.items() if not any(m in name for m in measured)}
        for row in rows
    ]


def test_a_resumed_run_ends_as_one_that_was_never_cut_off(
    arguments, trained, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "run"
    assert cut_off(arguments, run, monkeypatch) == 130
    assert "--resume" in capfd.readouterr().err
    assert {path.name for path in (run / "unfinished").iterdir()} == {
        "best.keras", "best.keras.json", "training_state.zip"
    }  # fmt: skip
    # What was asked for otherwise is refused, and nothing is lost.
    status = main([*arguments, "--output", str(run), "--resume", "--batch-size", "5"])
    failed(capfd, status, "batch_size was 6 and is 5", "--resume")
    assert main([*arguments, "--output", str(run), "--resume"]) == 0
    assert "Resumed  after epoch 1" in capfd.readouterr().out
    assert names(run) == OUTPUTS
    never = trained[0]
    assert (run / "predictions.csv").read_bytes() == (never / "predictions.csv").read_bytes()
    rows = [without_times(read(each / "history.csv")) for each in (run, never)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    # The same command once more: there is nothing to do, and nothing is done.
    before = (run / "model.keras").stat().st_mtime_ns
    assert main([*arguments, "--output", str(run), "--resume"]) == 0
    assert "nothing is left to do" in capfd.readouterr().out
    assert (run / "model.keras").stat().st_mtime_ns == before


def test_what_is_left_of_a_cut_off_run_is_looked_at(arguments, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    assert cut_off(arguments, run, monkeypatch) == 130
    capfd.readouterr()
    state = run / "unfinished" / "training_state.zip"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    status = main([*arguments, "--output", str(run), "--resume"])
    failed(capfd, status, "--resume", "training_state.zip", "damaged", "leave out --resume")
    assert state.read_bytes() == content[: len(content) // 2]


@pytest.mark.slow
def test_a_killed_run_goes_on(arguments, trained, tmp_path):
    run = tmp_path / "run"
    line = [sys.executable, "-m", "keras_xfer.cli", *arguments, "--output", str(run), "--resume"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (run / "unfinished" / "training_state.zip").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=True)
    assert "Resumed" in done.stdout
    assert names(run) == OUTPUTS
    never = trained[0]
    assert (run / "predictions.csv").read_bytes() == (never / "predictions.csv").read_bytes()


# A schedule from a file


def test_stages_from_a_file(photos, weights, tmp_path, capfd, monkeypatch):
    """The file is gone when training begins, as if somebody had moved it."""
    path = tmp_path / "stages.yaml"
    path.write_text(
        "stages:\n"
        "- {epochs: 1, learning_rate: 1e-3, name: first}\n"
        "- {unfreeze: conv_pw_13, epochs: 1, learning_rate: {head: 1e-3, backbone: 1e-4}}\n"
        "- {unfreeze: conv_pw_12, epochs: 1, learning_rate: 1e-4, layer_decay: 0.5}\n"
    )
    run = tmp_path / "run"
    line = ["train", str(photos), "--weights", str(weights), *SMALL, "--output", str(run)]
    content = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(keras.callbacks.TerminateOnNaN, "on_train_begin", lambda *_: path.unlink())
        assert main([*line, "--stages", str(path)]) == 0
    rows = read(run / "history.csv")
    assert [row["stage"] for row in rows] == ["0", "1", "2"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert [float(row["backbone_learning_rate"]) for row in rows[:2]] == pytest.approx([0, 1e-4])
    assert float(rows[2]["backbone_learning_rate"]) < 1e-4
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["first", "stage 2", "stage 3"]
    capfd.readouterr()

    # The same schedule from another file is the same run; another schedule is another run.
    path = tmp_path / "moved.yaml"
    path.write_text(content)
    assert main([*line, "--stages", str(path), "--resume"]) == 0
    assert "nothing is left to do" in capfd.readouterr().out
    path.write_text(content.replace("0.5", "0.6"))
    status = main([*line, "--stages", str(path), "--resume"])
    failed(capfd, status, "--resume", "layer_decay of stage 3 was 0.5 and is 0.6")

    failed(capfd, main([*line, "--stages", str(path), "--head-epochs", "1"]), "--stages")
    failed(capfd, main([*line, "--stages", str(tmp_path / "none.yaml")]), "no such file")
    path.write_text("- {epochs: 1}\n- {unfreeze: conv_pw_12, epoch: 1, learning_rate: 1e-4}")
    failed(capfd, main([*line, "--stages", str(path)]), "Stage 2", "'epochs'")
    path.write_text("- {epochs: 1}\n- {unfreeze: conv_wp_12, epochs: 1, learning_rate: 1e-4}")
    failed(capfd, main([*line, "--stages", str(path)]), "Stage 2", "'conv_pw_12'")
