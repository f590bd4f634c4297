import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from keras_xfer.bundle import read_bundle, write_bundle

leaves = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
    | st.floats(allow_nan=False)
    | numpy_strategies.arrays(
        st.sampled_from(["float32", "float64", "int64", "uint8", "bool"]),
        numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        elements={"allow_nan": False},
    )
)  # fmt: skip
trees = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ),
    max_size=4,
)


def same(one, other):
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(tree=trees)
def test_a_tree_comes_back_as_it_was(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.zip"
    write_bundle(path, tree)
    assert same(tree, read_bundle(path))


def test_types_that_numpy_does_not_know_by_itself(tmp_path):
    path = tmp_path / "state.zip"
    for name in ("bfloat16", "float8_e4m3fn"):
        array = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, name))
        for each in (array, array[0, 1:2].reshape(())):
            write_bundle(path, {"array": each, "number": np.float32(0.5), "nan": float("nan")})
            back = read_bundle(path)
            assert same(each, back["array"])
            assert back["number"] == 0.5
            assert back["nan"] != back["nan"]


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "state.zip"
    write_bundle(path, {"weights": np.arange(1000.0)})
    content = path.read_bytes()
    for damaged in (b"", content[:30], content[:-1], content[: len(content) // 2], b"x" * 500):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.zip"):
            read_bundle(path)
    middle = len(content) // 2  # inside the array: its checksum is wrong then
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match="state.zip"):
        read_bundle(path)
    with pytest.raises(FileNotFoundError):
        read_bundle(tmp_path / "missing.zip")


def test_another_archive_is_no_bundle(tmp_path):
    path = tmp_path / "state.zip"
    for name, text in (("readme.txt", "hello"), ("content.json", json.dumps({"epoch": 1}))):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, text)
        with pytest.raises(ValueError, match="state.zip"):
            read_bundle(path)


def test_nothing_is_pickled(tmp_path):
    path = tmp_path / "state.zip"
    write_bundle(path, {"fine": 1})
    for value in (np.array([object()]), {1, 2}, object(), {1: 2}, np.array(["text"])):
        with pytest.raises(TypeError, match=r"content\['state'\]"):
            write_bundle(path, {"state": value})
    assert read_bundle(path) == {"fine": 1}
