import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from keras_xfer.commands.recipe import UsageError
from keras_xfer.demo import split, write_digits
from keras_xfer.images import load_image, scan

OUTPUTS = {
    "model.keras",
    "labels.json",
    "history.csv",
    "predictions.csv",
    "metrics.json",
    "skipped.csv",
    "report.html",
    "run.json",
    "images",
    "pretraining",
}


def run_demo(output, *options):
    """Run by the command `KERAS_XFER`, where one is given: an installed wheel's."""
    installed = os.environ.get("KERAS_XFER")
    command = [installed] if installed else [sys.executable, "-m", "keras_xfer.cli"]
    return subprocess.run(
        [*command, "demo", "--output", str(output), *options],
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "images", range(5, 10))


def test_images_are_of_many_kinds_and_sizes(digits):
    kinds, sizes = set(), set()
    for path in digits.rglob("*.*"):
        with Image.open(path) as image:
            kinds.add((image.format, image.mode))
            sizes.add(image.size)
    assert {kind for kind, _ in kinds} == {"PNG", "JPEG", "GIF", "BMP", "WEBP"}
    assert {mode for _, mode in kinds} == {"L", "RGB", "P", "RGBA", "CMYK"}
    assert len(sizes) >= 15


def test_all_images_are_read_and_show_their_digit(digits):
    """However it is stored, the middle of the picture is scikit-learn's digit, dark on white."""
    found = scan(digits)
    assert found.class_names == ("eight", "five", "nine", "seven", "six")
    assert found.skipped == ()
    bunch = load_digits()
    counts = np.sum(list(found.counts().values()), axis=0)
    assert counts.tolist() == [int((bunch.target == digit).sum()) for digit in (8, 5, 9, 7, 6)]
    for sample in found.train[::7]:
        number = int(sample.path.stem)
        shown = 255 - load_image(sample.path, 64).mean(axis=2)
        # The crop keeps the middle square, which holds more paper than the digit's own square
        # where both margins are wide.
        pixels = np.asarray(
            Image.fromarray(bunch.images[number].astype("float32")).resize((64, 64))
        )
        assert np.corrcoef(shown.ravel(), pixels.ravel())[0, 1] > 0.5, sample.path


def test_split_is_as_large_as_said_and_shares_no_image(digits):
    folder = split(digits, range(5, 10), 1, train=20, validation=10)
    assert folder.counts()["train"] == [20] * 5
    assert folder.counts()["validation"] == [10] * 5
    parts = [{sample.path for sample in part} for part in (folder.train, folder.validation)]
    parts.append({sample.path for sample in folder.test})
    assert sum(map(len, parts)) == len(set().union(*parts)) == 896
    again = split(digits, range(5, 10), 1, train=20, validation=10)
    other = split(digits, range(5, 10), 2, train=20, validation=10)
    assert again == folder
    assert {sample.path for sample in other.train} != parts[0]


def test_somebody_elses_images_stay(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_text("mine")
    with pytest.raises(UsageError, match="does not hold the demo's images"):
        write_digits(tmp_path / "images", range(2))
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "mine.png"]


def check(output, said):
    assert {path.name for path in output.iterdir()} == OUTPUTS
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["comparison"]) == ["from scratch", "frozen", "staged"]
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # 896 digits from 5 to 9, less 20 and 10 a class.
    assert len(rows) == 896 - 150 == metrics["test_images"]
    accuracy = np.mean([row["correct"] == "True" for row in rows])
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["comparison"]["staged"]["accuracy"] == pytest.approx(accuracy)
    assert (output / "images" / rows[0]["file"]).is_file()
    for name, row in metrics["comparison"].items():
        assert row["epoch_seconds"] > 0
        assert f"{row['accuracy']:.1%}" in said
        assert name in said
    assert "From scratch".lower() in (output / "report.html").read_text().lower()
    return metrics["comparison"]


def test_the_smallest_form(tmp_path):
    output = tmp_path / "demo"
    done = run_demo(output, "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    check(output, done.stdout)
    assert "Pretraining" in done.stdout
    (backbone,) = (output / "pretraining").glob("*.keras")
    assert str(backbone) in done.stdout  # in the hint, for --weights


@pytest.mark.slow
def test_transfer_wins(tmp_path):
    done = run_demo(tmp_path / "demo")
    assert (done.returncode, done.stderr) == (0, "")
    comparison = check(tmp_path / "demo", done.stdout)
    assert comparison["staged"]["accuracy"] > comparison["from scratch"]["accuracy"] + 0.05
    assert comparison["staged"]["accuracy"] > comparison["frozen"]["accuracy"]
    first = (tmp_path / "demo" / "predictions.csv").read_bytes()
    again = run_demo(tmp_path / "demo")
    assert "used again" in again.stdout
    assert (tmp_path / "demo" / "predictions.csv").read_bytes() == first
