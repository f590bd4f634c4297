import sys

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import classification_report, confusion_matrix

from keras_xfer.images import ImageDataset, Sample
from keras_xfer.reports import (
    classification_table,
    confusion_table,
    most_wrong,
    predict_probabilities,
    predictions_table,
    read_predictions,
)

NAMES = ["cat", "dog", "eel"]


def passthrough(size=3):
    """A model whose output is its input."""
    inputs = keras.Input((size,))
    return keras.Model(inputs, keras.layers.Activation("linear")(inputs))


def frame(labels, answers, probability=0.9):
    return pd.DataFrame(
        {
            "file": [f"{i}.png" for i in range(len(labels))],
            "label": labels,
            "prediction": answers,
            "probability": probability,
            "correct": [label == answer for label, answer in zip(labels, answers, strict=True)],
        }
    )


@pytest.fixture
def answers():
    x = np.random.default_rng(0).dirichlet(np.ones(3), 70).astype("float32")
    return x, np.arange(70) % 3


@pytest.mark.core
def test_each_row_says_what_the_model_said(answers):
    x, y = answers
    table = predictions_table(passthrough(), (x, y), NAMES)
    assert list(table) == ["file", "label", "prediction", "probability", "correct"]
    assert table["file"].tolist() == [str(i) for i in range(70)]
    assert table["label"].tolist() == [NAMES[i] for i in y]
    assert table["prediction"].tolist() == [NAMES[i] for i in x.argmax(1)]
    np.testing.assert_allclose(table["probability"], x.max(1), rtol=1e-6)
    assert table["correct"].tolist() == (x.argmax(1) == y).tolist()
    assert table["correct"].dtype == bool


@pytest.mark.core
def test_all_forms_of_data_give_the_same_table(answers):
    x, y = answers
    one_hot = np.eye(3)[y]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            rows = slice(30 * i, 30 * (i + 1))
            return x[rows], one_hot[rows], np.ones(len(x[rows]))

    forms = [(x, one_hot), Batches(), [(x[:50], y[:50]), (x[50:], y[50:])]]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        forms.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(16))
    if keras.backend.backend() == "torch":
        import torch

        data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
        forms.append(torch.utils.data.DataLoader(data, batch_size=16))
    expected = predictions_table(passthrough(), (x, y), NAMES)
    for data in forms:
        pd.testing.assert_frame_equal(predictions_table(passthrough(), data, NAMES), expected)


@pytest.mark.core
def test_a_shuffled_dataset_keeps_files_with_their_answers(tmp_path):
    samples = []
    for i in range(10):
        path = tmp_path / ("dark" if i % 2 else "light") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (0,) * 3 if i % 2 else (255,) * 3).save(path)
        samples.append(Sample(path, 0 if i % 2 else 1))
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    light = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, light[:, :1])
    data = ImageDataset(samples, 8, 4, shuffle=True, seed=3, root=tmp_path)
    assert data.order.tolist() != list(range(10))
    table = predictions_table(model, data, ["dark", "light"])
    assert sorted(table["file"]) == sorted(data.files)
    assert [file.split("/")[0] for file in table["file"]] == table["prediction"].tolist()
    assert table["correct"].all()
    np.testing.assert_allclose(table["probability"], 1, atol=1e-6)


def test_one_output_is_the_second_class():
    x = np.array([[0.2], [0.8]], "float32")
    _, _, probabilities = predict_probabilities(passthrough(1), (x, np.array([0, 1])))
    np.testing.assert_allclose(probabilities, [[0.8, 0.2], [0.2, 0.8]], rtol=1e-6)
    table = predictions_table(passthrough(1), (x, np.array([[0.0], [1.0]])), ["no", "yes"])
    assert table["prediction"].tolist() == ["no", "yes"]
    assert table["correct"].all()


def test_without_labels():
    files, labels, probabilities = predict_probabilities(passthrough(), [(np.eye(3),)])
    np.testing.assert_array_equal(probabilities, np.eye(3))
    assert files == ["0", "1", "2"]
    assert labels is None
    with pytest.raises(ValueError, match="use predict_probabilities"):
        predictions_table(passthrough(), [(np.eye(3),)], NAMES)


def test_nan_is_no_prediction():
    x = np.array([[np.nan, np.nan, np.nan], [0, 1, 0]], "float32")
    table = predictions_table(passthrough(), (x, np.array([0, 1])), NAMES)
    assert table["prediction"].tolist() == ["", "dog"]
    assert table["correct"].tolist() == [False, True]
    assert np.isnan(table["probability"][0])
    assert confusion_table(table, NAMES).to_numpy().sum() == 1
    assert classification_table(table, NAMES).loc["cat", "support"] == 1


def test_no_images():
    table = frame([], [])
    assert confusion_table(table, NAMES).shape == (3, 3)
    assert (classification_table(table, NAMES) == 0).all(axis=None)
    assert len(classification_table(table)) == 2
    assert len(most_wrong(table)) == 0


@pytest.mark.parametrize(
    ("x", "y", "names", "message"),
    [
        (np.array([[5.0, -3.0, 0.0]]), [0], NAMES, "if these are logits"),
        (np.eye(3), [0, 1, 2], NAMES[:2], r"len\(class_names\)=2, model outputs=3"),
        (np.eye(3), [0, 1, 3], NAMES, r"Expected labels in \[0, 3\).* from 0 to 3"),
    ],
)
def test_what_does_not_agree_is_an_error(x, y, names, message):
    with pytest.raises(ValueError, match=message):
        predictions_table(passthrough(), (x.astype("float32"), np.array(y)), names)


def test_an_output_that_is_no_classifier():
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    with pytest.raises(ValueError, match=r"shape \(batch, 4, 4\)"):
        predictions_table(model, (np.zeros((2, 4, 4)), np.zeros(2, int)), NAMES)


pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1)


@settings(deadline=None)
@given(pairs)
def test_tables_are_scikit_learns(rows):
    labels, answers = map(list, zip(*rows, strict=True))
    table = frame(labels, answers)
    names = list("dcba")
    np.testing.assert_array_equal(
        confusion_table(table, names), confusion_matrix(labels, answers, labels=names)
    )
    expected = classification_report(
        labels, answers, labels=names, output_dict=True, zero_division=0
    )
    got = classification_table(table, names)
    assert list(got.index) == [*names, "macro avg", "weighted avg"]
    for name in got.index:
        assert got.loc[name].to_dict() == pytest.approx(expected[name])


def test_a_class_may_be_called_like_an_average():
    table = classification_table(frame(["accuracy", "macro avg"], ["accuracy", "accuracy"]))
    assert len(table) == 4
    assert table.iloc[1]["recall"] == 0


def test_a_class_that_is_not_among_the_names():
    with pytest.raises(ValueError, match="'eel' is not"):
        confusion_table(frame(["cat"], ["eel"]), ["cat", "dog"])


def test_most_wrong_is_the_surest_first():
    table = frame(["a"] * 5, ["a", "b", "b", "b", "b"], [0.99, 0.5, np.nan, 0.9, 0.5])
    assert most_wrong(table)["file"].tolist() == ["3.png", "1.png", "4.png", "2.png"]
    assert len(most_wrong(table, 2)) == 2


def test_predictions_survive_the_file(tmp_path):
    names = ["NA", "nan", "7", "1e5", "True", "null", "a,b", 'q"q', " x ", "é\n"]
    table = frame(names, names[::-1], np.linspace(0, 1, 10))
    table.to_csv(tmp_path / "predictions.csv", index=False)
    pd.testing.assert_frame_equal(
        read_predictions(tmp_path / "predictions.csv"), table, check_dtype=False
    )
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no predictions\.csv"):
        read_predictions(tmp_path / "other.csv")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "keras-xfer\[report\]"'):
        read_predictions("predictions.csv")
