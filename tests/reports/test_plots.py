import io
import sys
import warnings

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from PIL import Image

from keras_xfer.reports import plot_class_scores, plot_confusion, plot_most_wrong
from keras_xfer.reports.pictures import thumbnail

PREDICTIONS = ["file", "label", "prediction", "probability", "correct"]


def draw(figure):
    figure.savefig(io.BytesIO(), format="png")
    return figure


@pytest.mark.parametrize("classes", [0, 1, 2, 10, 20, 21, 120])
def test_confusion_of_any_size(classes):
    names = [f"class {i}" for i in range(classes)]
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    if classes:
        counts[0] = 0  # a class without images
    axes = draw(plot_confusion(pd.DataFrame(counts, names, names))).axes[0]
    texts = [int(text.get_text()) for text in axes.texts]
    assert texts == (counts[counts > 0].tolist() if classes <= 20 else [])
    if classes:
        shown = axes.images[0].get_array()
        totals = np.maximum(counts.sum(1, keepdims=True), 1)
        np.testing.assert_allclose(shown, counts / totals)
        assert 1 <= len(axes.get_yticklabels()) <= 40


@pytest.mark.parametrize("classes", [0, 1, 3, 120])
def test_class_scores_begin_with_the_worst(classes):
    f1 = np.linspace(1, 0, classes)
    scores = pd.DataFrame(
        {"precision": f1, "recall": f1, "f1-score": f1, "support": 1},
        index=[f"class {i}" for i in range(classes)],
    )
    averages = pd.DataFrame(
        [[0.5, 0.5, 0.5, classes]] * 2, ["macro avg", "weighted avg"], scores.columns
    )
    axes = draw(plot_class_scores(pd.concat([scores, averages]))).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"class {i}" for i in range(classes)][::-1][:40]


def test_names_are_drawn_as_they_are():
    # A dollar sign would start mathematics, and an unbalanced brace would end in an exception.
    names = [r"$\frac{$", "a$b$c", "x" * 200]
    counts = pd.DataFrame(np.eye(3), names, names)
    labels = [text.get_text() for text in draw(plot_confusion(counts)).axes[0].get_yticklabels()]
    assert labels[:2] == names[:2]
    assert labels[2] == "x" * 27 + "…"
    scores = pd.DataFrame(dict.fromkeys(["precision", "recall", "f1-score"], 0.5), names)
    draw(plot_class_scores(scores))


def test_most_wrong_shows_images(tmp_path):
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_text("text")
    table = pd.DataFrame(
        [
            ["red.png", "a", "b", 0.9, False],
            ["gone.png", "a", "b", 0.8, False],
            ["bad.png", "a", "$", float("nan"), False],
            ["red.png", "a", "a", 1.0, True],
        ],
        columns=["file", "label", "prediction", "probability", "correct"],
    )
    axes = draw(plot_most_wrong(table, root=tmp_path)).axes
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["b, 90.0%", "b, 80.0%", "$, nan%"]
    assert axes[0].images[0].get_array()[0, 0].tolist() == [200, 0, 0]
    assert len(draw(plot_most_wrong(table.iloc[:0])).axes) == 0


def test_thumbnails(tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "x.jpg")
    assert thumbnail(tmp_path / "x.jpg", 100).size == (100, 50)
    Image.new("RGBA", (4, 4)).save(tmp_path / "x.png")
    assert thumbnail(tmp_path / "x.png", 100).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((1000, 1500), 32896, "uint16")).save(tmp_path / "deep.png")
    deep = thumbnail(tmp_path / "deep.png", 150)
    assert (deep.size, deep.getpixel((70, 50))) == ((150, 100), (128, 128, 128))
    assert thumbnail(tmp_path / "gone.jpg", 100) is None


def wrong(*files):
    return pd.DataFrame([[file, "a", "b", 0.9, False] for file in files], columns=PREDICTIONS)


def shown(figure):
    return [axes.images[0].get_array() for axes in draw(figure).axes]


def pictures(kind):
    """Three images of 4 x 6, whose first pixel is 0, 51 and 255."""
    images = np.zeros((3, 4, 6, 3))
    images[1:, 0, 0] = [[51] * 3, [255] * 3]
    return {
        "uint8": images.astype("uint8"),
        "float in [0, 255]": images.astype("float32"),
        "float in [0, 1]": images / 255,
        "grey": images[..., 0].astype("uint8"),
        "one channel": images[..., :1] / 255,
        "channels first": np.moveaxis(images, -1, 1),
        "list": list(images.astype("uint8")),
        "tensor": keras.ops.convert_to_tensor(images / 255, dtype="float32"),
        "batches": [(images[:2], [0, 0]), (images[2:], [0])].__iter__(),
        "PyDataset": Batches(images),
    }[kind]


class Batches(keras.utils.PyDataset):
    """A batch of two images, and one of the third."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __len__(self):
        return 2

    def __getitem__(self, index):
        batch = self.images[2 * index : 2 * index + 2]
        return batch, np.zeros(len(batch), int)


@pytest.mark.parametrize(
    "kind",
    [
        "uint8", "float in [0, 255]", "float in [0, 1]", "grey", "one channel", "channels first",
        "list", "tensor", "batches", "PyDataset",
    ],
)  # fmt: skip
def test_most_wrong_shows_arrays(kind):
    figure = plot_most_wrong(wrong("2", "0", "1"), images=pictures(kind))
    assert [image[0, 0].tolist() for image in shown(figure)] == [[255] * 3, [0] * 3, [51] * 3]
    assert shown(figure)[0].shape == (4, 6, 3)
    assert not shown(figure)[0][1:].any()


def test_which_image_of_which_row():
    images = pictures("uint8")
    # By the number that is the file, also after others were left out; else by the row.
    table = wrong("0", "1", "2").iloc[1:]
    assert [image[0, 0, 0] for image in shown(plot_most_wrong(table, images=images))] == [51, 255]
    table = wrong("x.png", "y.png", "z.png")
    table["probability"] = [0.1, 0.2, 0.3]
    table["correct"] = [False, True, False]
    assert [image[0, 0, 0] for image in shown(plot_most_wrong(table, images=images))] == [255, 0]
    by_file = {"z.png": images[1], "x.png": images[2]}
    assert [image[0, 0, 0] for image in shown(plot_most_wrong(table, images=by_file))] == [51, 255]


def test_a_dark_image_is_dark_beside_others():
    images = [np.full((2, 2), 1.0), np.full((2, 2), 200.0)]
    assert [image[0, 0, 0] for image in shown(plot_most_wrong(wrong("0", "1"), images=images))] == [
        1,
        200,
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 4)), "Received: images without 1, the file '1'"),
        ({"1": np.zeros((4, 4))}, "Received: images without '0'"),
        (np.full((2, 4, 4), -1.0), r"\(images \+ 1\) / 2"),
        (np.full((2, 4, 4), 256), "from 256 to 256"),
        (np.zeros((2, 4, 4, 5)), r"shape \(4, 4, 5\)"),
        (np.zeros((2, 4)), r"shape \(4,\)"),
    ],
)
def test_images_that_do_not_do(images, message):
    with pytest.raises(ValueError, match=message):
        plot_most_wrong(wrong("0", "1"), images=images)


def test_root_and_images_exclude_each_other():
    with pytest.raises(ValueError, match="Received: both"):
        plot_most_wrong(wrong("0"), root=".", images=np.zeros((1, 4, 4)))


def test_most_wrong_of_a_saved_file(tmp_path):
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "red.png")
    table = wrong("red.png", "gone.png")
    table.loc[1, ["prediction", "probability"]] = ["", np.nan]
    table.to_csv(tmp_path / "predictions.csv", index=False)
    axes = draw(plot_most_wrong(tmp_path / "predictions.csv", root=tmp_path)).axes
    assert [each.get_title() for each in axes] == ["b, 90.0%\nis a", "no prediction\nis a"]
    assert axes[0].images[0].get_array()[0, 0].tolist() == [200, 0, 0]
    assert len(draw(plot_most_wrong(str(tmp_path / "predictions.csv"), 1, root=tmp_path)).axes) == 1
    with pytest.raises(ValueError, match="path of a predictions.csv"):
        plot_most_wrong(table.drop(columns="file"))


def test_pyplot_is_left_alone():
    before = (pyplot.get_backend(), dict(matplotlib.rcParams))
    draw(plot_confusion(pd.DataFrame(np.eye(2), ["a", "b"], ["a", "b"])))
    draw(plot_most_wrong(wrong("0"), images=np.zeros((1, 4, 4))))
    assert pyplot.get_fignums() == []
    assert (pyplot.get_backend(), dict(matplotlib.rcParams)) == before


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with warnings.catch_warnings(), pytest.raises(ImportError, match=r"keras-xfer\[report\]"):
        plot_confusion(pd.DataFrame())
