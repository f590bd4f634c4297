import itertools
import sys

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from keras_xfer.images import ImageDataset, Sample
from keras_xfer.losses import SmoothedSparseCategoricalCrossentropy
from keras_xfer.reports import (
    classification_table,
    confusion_table,
    predict_probabilities,
    predictions_table,
    read_predictions,
)
from tests.reports.frames import NAMES, frame


def passthrough(size=3):
    """A model whose output is its input."""
    inputs = keras.Input((size,))
    return keras.Model(inputs, keras.layers.Activation("linear")(inputs))


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


# Any data that Keras takes.


def adding():
    """A model that adds its two inputs, called a and b."""
    inputs = {name: keras.Input((3,), name=name) for name in "ab"}
    return keras.Model(inputs, keras.layers.Add()(list(inputs.values())))


def adding_listed():
    inputs = [keras.Input((3,)) for _ in "ab"]
    return keras.Model(inputs, keras.layers.Add()(inputs))


def check(table, x, y):
    assert table["file"].tolist() == [str(i) for i in range(len(x))]
    assert table["label"].tolist() == [NAMES[i] for i in y]
    assert table["prediction"].tolist() == [NAMES[i] for i in np.argmax(x, 1)]
    np.testing.assert_allclose(table["probability"], np.max(x, 1), rtol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["dict", "list", "tuple"])
def test_several_inputs(answers, kind):
    x, y = answers
    halves = (x * 0.25, x * 0.75)
    inputs = {"dict": dict(zip("ab", halves, strict=True)), "list": list(halves), "tuple": halves}
    model = adding() if kind == "dict" else adding_listed()
    weights = np.ones(len(y))
    check(predictions_table(model, (inputs[kind], y), NAMES), x, y)
    check(predictions_table(model, (inputs[kind], y, weights), NAMES), x, y)

    def batches():
        for start in range(0, len(y), 20):
            part = slice(start, start + 20)
            cut = [half[part] for half in halves]
            named = dict(zip("ab", cut, strict=True))
            own = {"dict": named, "list": cut, "tuple": tuple(cut)}[kind]
            yield own, y[part], weights[part]

    check(predictions_table(model, batches(), NAMES), x, y)


@pytest.mark.core
@pytest.mark.parametrize(
    "labels",
    [
        lambda y: y[:, None],
        lambda y: y.astype("float32"),
        lambda y: y.tolist(),
        lambda y: y.astype("uint8"),
        lambda y: np.eye(3)[y],
        lambda y: np.eye(3)[y] * 0.9 + 1 / 30,  # smoothed
        lambda y: keras.ops.convert_to_tensor(y),
        lambda y: pd.Series(y),
        lambda y: {"output": y},
    ],
)
def test_labels_of_every_shape(answers, labels):
    x, y = answers
    check(predictions_table(passthrough(), (x, labels(y)), NAMES), x, y)
    check(predictions_table(passthrough(), [(x, labels(y))], NAMES), x, y)


@pytest.mark.core
def test_arrays_of_every_kind(answers):
    sparse = pytest.importorskip("scipy.sparse")
    x, y = answers
    for given in (keras.ops.convert_to_tensor(x), pd.DataFrame(x), sparse.csr_array(x)):
        check(predictions_table(passthrough(), (given, y), NAMES), x, y)
    for given in (x, keras.ops.convert_to_tensor(x), (x,), [(x[:40],), (x[40:],)], [x]):
        files, labels, probabilities = predict_probabilities(passthrough(), given)
        assert labels is None
        assert len(files) == 70
        np.testing.assert_allclose(probabilities, x, rtol=1e-6)


@pytest.mark.core
def test_a_dataset_of_tensorflow_on_every_backend(answers):
    tf = pytest.importorskip("tensorflow")
    x, y = answers
    data = tf.data.Dataset.from_tensor_slices((x, y, np.ones(70)))
    check(predictions_table(passthrough(), data.batch(16), NAMES), x, y)
    named = data.map(lambda x, y, w: ({"a": x, "b": 0 * x}, y)).batch(16)
    check(predictions_table(adding(), named, NAMES), x, y)
    with pytest.raises(ValueError, match=r"batch\(32\)"):
        predictions_table(passthrough(), data, NAMES)
    with pytest.raises(ValueError, match="no end"):
        predictions_table(passthrough(), data.batch(16).repeat(), NAMES)


@pytest.mark.core
def test_a_loader_of_torch_on_every_backend(answers):
    torch = pytest.importorskip("torch")
    x, y = answers
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    check(predictions_table(passthrough(), loader, NAMES), x, y)


@pytest.mark.core
def test_a_dataset_of_keras_that_only_counts_its_batches(answers):
    x, y = answers

    class Counted(keras.utils.PyDataset):
        num_batches = 7

        def __getitem__(self, i):
            return x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10]

    check(predictions_table(passthrough(), Counted(), NAMES), x, y)
    Counted.num_batches = None
    with pytest.raises(ValueError, match="no end"):
        predictions_table(passthrough(), Counted(), NAMES)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strings are TensorFlow's")
def test_strings():
    tf = pytest.importorskip("tensorflow")
    inputs = keras.Input((), dtype="string")
    words = keras.layers.TextVectorization(vocabulary=["cat", "dog"], output_mode="count")
    model = keras.Model(inputs, words(inputs))  # one for each word; unknown ones come first
    x = ["eel", "cat", "dog"] * 15
    y = np.arange(45) % 3
    forms = [
        (x, y),
        (np.array(x), y),
        (np.array(x, dtype=object), y),
        (tf.constant(x), y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
        ((np.array(x[i : i + 8], dtype=object), y[i : i + 8]) for i in range(0, 45, 8)),
    ]
    for data in forms:
        table = predictions_table(model, data, ["eel", "cat", "dog"])
        assert table["prediction"].tolist() == x
        assert table["correct"].all()


@pytest.mark.core
def test_each_row_passes_the_model_once_and_the_odd_batch_is_traced_with_the_others(answers):
    x, y = answers
    shapes, rows = [], []

    class Watched(keras.layers.Layer):
        def call(self, inputs):
            shapes.append(inputs.shape)
            return inputs

    def batches():
        for start in (0, 32, 64):
            rows.append(start)
            yield x[start : start + 32], y[start : start + 32]

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Watched()(inputs))
    shapes.clear()
    check(predictions_table(model, batches(), NAMES), x, y)
    assert rows == [0, 32, 64]
    assert {tuple(shape) for shape in shapes} == {(32, 3)}
    if keras.backend.backend() != "torch":  # which traces nothing
        assert len(shapes) == 1


@pytest.mark.core
def test_batches_of_any_sizes(answers):
    x, y = answers
    edges = [0, 1, 30, 30, 33, 60, 61, 70]
    data = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    check(predictions_table(passthrough(), data, NAMES), x, y)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.eye(3), [[1, 1, 0]] * 3), r"one class for each row.*\[1, 1, 0\]"),
        ((np.eye(3), [0.5, 1, 2]), r"Expected class indices.*0\.5"),
        ((np.eye(3), [np.nan, 1, 2]), "Expected class indices"),
        ((np.eye(3), ["a", "b", "c"]), "Expected class indices"),
        ((np.eye(3), np.zeros((3, 2, 2))), r"shape \(3, 2, 2\)"),
        ((np.eye(3), [0, 1]), "3 rows and 2 labels"),
        ([(np.eye(3), [0, 1])], "3 rows and 2 labels"),
        ((np.eye(3), {"a": [0, 1, 2], "b": [0, 1, 2]}), "labels of one output"),
        (iter([]), "at least one image"),
        ((np.zeros((0, 3)), np.zeros(0, int)), "at least one image"),
        (3, "Expected data that end"),
    ],
)
def test_data_that_do_not_do(data, message):
    with pytest.raises(ValueError, match=message):
        predictions_table(passthrough(), data, NAMES)


def test_a_model_of_two_outputs():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [keras.layers.Softmax()(inputs)] * 2)
    with pytest.raises(ValueError, match="a model with 2"):
        predictions_table(model, (np.eye(3), [0, 1, 2]), NAMES)


# Logits.


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def softmax(x):
    e = np.exp(np.asarray(x, "float64"))
    return e / e.sum(axis=1, keepdims=True)


LOGITS = np.array([[5.0, -3.0, 0.0], [0.1, 0.2, 0.3], [-40.0, 2.0, 30.0]], "float32")


@pytest.mark.core
def test_logits_of_several_outputs():
    data = (LOGITS, np.array([0, 1, 2]))
    _, _, probabilities = predict_probabilities(passthrough(), data, from_logits=True)
    assert probabilities.dtype == "float64"
    np.testing.assert_allclose(probabilities, softmax(LOGITS), rtol=1e-12)
    table = predictions_table(passthrough(), data, NAMES, from_logits=True)
    assert table["prediction"].tolist() == ["cat", "eel", "eel"]
    np.testing.assert_allclose(table["probability"], softmax(LOGITS).max(1), rtol=1e-12)


@pytest.mark.core
def test_logits_of_one_output():
    x = np.array([[-2.0], [0.5], [30.0]], "float32")
    _, _, probabilities = predict_probabilities(passthrough(1), (x,), from_logits=True)
    np.testing.assert_allclose(probabilities[:, 1], sigmoid(x[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


@pytest.mark.core
@pytest.mark.parametrize(
    ("loss", "is_logits"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), True),
        (keras.losses.CategoricalCrossentropy(from_logits=True), True),
        ([keras.losses.CategoricalFocalCrossentropy(from_logits=True)], True),
        (SmoothedSparseCategoricalCrossentropy(from_logits=True), True),
        (keras.losses.SparseCategoricalCrossentropy(), False),
        (SmoothedSparseCategoricalCrossentropy(), False),
        ("sparse_categorical_crossentropy", False),
        (keras.losses.sparse_categorical_crossentropy, False),
    ],
)
def test_the_loss_says_whether_answers_are_logits(loss, is_logits):
    x = np.array([[0.7, 0.2, 0.1]], "float32")  # which could be either
    model = passthrough()
    model.compile(loss=loss)
    for told, expected in ((None, is_logits), (True, True), (False, False)):
        _, _, probabilities = predict_probabilities(model, (x,), from_logits=told)
        np.testing.assert_allclose(probabilities, softmax(x) if expected else x, rtol=1e-6)


def test_a_binary_recipe_of_logits():
    # As in https://keras.io/guides/transfer_learning/: Dense(1), trained on logits.
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(50, 2)).astype("float32") * 4
    kernel, bias = (np.asarray(value) for value in model.get_weights())
    expected = sigmoid(x @ kernel + bias)[:, 0]
    y = (expected > 0.5).astype("float32")[:, None]
    table = predictions_table(model, (x, y), ["no", "yes"])
    assert table["correct"].all()
    np.testing.assert_allclose(table["probability"], np.maximum(expected, 1 - expected), rtol=1e-5)


def test_logits_that_nothing_told_of():
    with pytest.raises(ValueError, match="from -40 to 30: .* pass from_logits=True"):
        predict_probabilities(passthrough(), (LOGITS,))
    model = passthrough()
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="from_logits=True"):
        predictions_table(model, (LOGITS, [0, 1, 2]), NAMES)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "keras-xfer\[report\]"'):
        read_predictions("predictions.csv")
