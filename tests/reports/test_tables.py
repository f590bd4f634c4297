import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report, confusion_matrix

from keras_xfer.reports import classification_table, confusion_table, most_wrong
from tests.reports.frames import NAMES, frame


def test_no_images():
    table = frame([], [])
    assert confusion_table(table, NAMES).shape == (3, 3)
    assert (classification_table(table, NAMES) == 0).all(axis=None)
    assert len(classification_table(table)) == 2
    assert len(most_wrong(table)) == 0


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


def test_tables_of_a_saved_file(tmp_path):
    names = ["7", "NA", "10"]
    table = frame(["7", "7", "NA", "10"], ["7", "NA", "NA", "7"], [0.5, 0.6, 0.7, 0.8])
    table.loc[3, ["prediction", "probability"]] = ["", np.nan]
    path = tmp_path / "predictions.csv"
    table.to_csv(path, index=False)
    for predictions in (path, str(path), table):
        assert confusion_table(predictions, names).to_numpy().tolist() == [
            [1, 1, 0],
            [0, 1, 0],
            [0, 0, 0],
        ]
        scores = classification_table(predictions, names)
        assert scores["support"].tolist() == [2, 1, 1, 4, 4]
        assert scores["recall"].tolist() == pytest.approx([0.5, 1, 0, 0.5, 0.5])
        assert scores["precision"].tolist() == pytest.approx([1, 0.5, 0, 0.5, 0.625])
        assert most_wrong(predictions)["file"].tolist() == ["1.png", "3.png"]
    assert list(classification_table(path).index[:-2]) == ["10", "7", "NA"]


def test_no_prediction_that_pandas_read_itself(tmp_path):
    path = tmp_path / "predictions.csv"
    frame(["a", "b"], ["a", ""]).to_csv(path, index=False)
    table = pd.read_csv(path)  # in which the empty string is NaN
    assert confusion_table(table).to_numpy().tolist() == [[1, 0], [0, 0]]


def test_one_class():
    table = frame(["a", "a"], ["a", ""])
    assert confusion_table(table).to_numpy().tolist() == [[1]]
    assert classification_table(table).loc["a"].tolist() == pytest.approx([1, 0.5, 2 / 3, 2])


@pytest.mark.parametrize("function", [classification_table, confusion_table, most_wrong])
@pytest.mark.parametrize("predictions", [pd.DataFrame({"x": [1]}), np.zeros(3), None])
def test_what_holds_no_predictions(function, predictions):
    with pytest.raises(ValueError, match="or the path of a predictions.csv"):
        function(predictions)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "keras-xfer\[report\]"'):
        classification_table("predictions.csv")
