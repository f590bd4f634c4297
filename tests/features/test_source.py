"""What data are read as, and what is refused with words that help."""

import keras
import numpy as np
import pytest

from keras_xfer.features import digests
from keras_xfer.features.nesting import pack
from keras_xfer.features.source import source_of

pytestmark = pytest.mark.core

X = np.arange(24.0).reshape(12, 2)
Y = np.arange(12)


def read(source, first=0):
    """All rows of a source from one on, as `(x, *rest)`."""
    batches = list(source.read(first))
    leaves = [np.concatenate(column) for column in zip(*batches, strict=True)]
    return pack(source.structure, leaves)


class Listed(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


def test_arrays_of_the_backend_and_nested_ones():
    data = ({"a": keras.ops.convert_to_tensor(X), "b": [X[:, 0]]}, Y)
    source = source_of(data, batch_size=5)
    assert (source.num_rows, source.rows_per_batch, len(source.first[0])) == (12, 5, 5)
    x, y = read(source, 5)
    np.testing.assert_allclose(x["a"], X[5:])
    np.testing.assert_array_equal(x["b"][0], X[5:, 0])
    assert y.tolist() == Y[5:].tolist()


def test_iterables_of_batches_are_read_again_and_again():
    class Loader:
        def __iter__(self):
            return iter([[X[:5], Y[:5]], [X[5:5], Y[5:5]], [X[5:], Y[5:]]])

    source = source_of(Loader())
    for _ in range(2):
        x, y = read(source)
        np.testing.assert_array_equal(x, X)
        assert y.tolist() == Y.tolist()
    assert source.rows_per_batch == 5


def test_strings_are_inputs_but_no_labels():
    texts = np.array(["one", "three"])
    source = source_of((texts, np.arange(2)))
    assert read(source)[0].tolist() == ["one", "three"]
    assert source.content() != source_of((np.array(["one", "two"]), np.arange(2))).content()
    with pytest.raises(ValueError, match="labels and sample weights as numbers"):
        source_of((X[:2], texts))


def test_content_is_by_value_and_by_order_for_arrays():
    def content(*data):
        return source_of(data).content()

    assert content(X, Y) == content(X.copy(), Y.copy())
    others = [
        (X[::-1], Y[::-1]),
        (X, Y + 1),
        (X.astype("float32"), Y),
        (X.reshape(12, 2, 1), Y),
        (X,),
    ]
    assert len({str(content(*other)) for other in [(X, Y), *others]}) == 6


def test_rows_with_labels_may_come_in_any_order_but_not_without():
    def content(order, labels):
        arrays = (X, Y) if labels else (X,)
        cut = [tuple(array[order][i : i + 4] for array in arrays) for i in (0, 4, 8)]
        return source_of(Listed(cut)).content()

    forth, back = np.arange(12), np.arange(12)[::-1]
    assert content(forth, True) == content(back, True)
    assert content(forth, False) != content(back, False)


def test_the_size_of_batches_does_not_matter():
    contents = [
        source_of(Listed([(X[i : i + n], Y[i : i + n]) for i in range(0, 12, n)])).content()
        for n in (3, 4, 6)
    ]
    assert contents[0] == contents[1] == contents[2]


def test_a_label_that_moves_to_another_row_is_seen():
    one = digests.of_rows([X, Y])
    other = digests.of_rows([X, Y[::-1].copy()])
    assert not set(one) & set(other)


def test_a_key_stands_for_the_content():
    assert source_of((X, Y), key="k").content() == source_of((X + 1, Y), key="k").content()
    assert source_of(Listed([(X, Y)]), key="k").content()["key"] == "k"
    assert source_of((X, Y), key="k").content() != source_of((X[1:], Y[1:]), key="k").content()
    assert source_of((X, Y), key="k").content() != source_of(X, key="k").content()
    assert source_of(iter([(X, Y)]), key="k").one_pass
    with pytest.raises(TypeError, match="key=3"):
        source_of(X, key=3)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X, Y[:5]), ValueError, r"one number of rows.*\(12, 2\), \(5,\)"),
        (X[:0], ValueError, "at least one row"),
        (Listed([]), ValueError, "at least one row"),
        (Listed([(X[:0], Y[:0])]), ValueError, "at least one row"),
        (Listed([(X, 3.0)]), ValueError, "come one by one"),
        ((X, Y, Y, Y), ValueError, "a tuple of 4 parts"),
        (np.array([object(), None]), ValueError, "Python objects"),
        ("images/", TypeError, "type str"),
        (5, TypeError, "type int"),
        ({3: X}, ValueError, "strings as the keys"),
    ],
)
def test_what_cannot_be_read_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        source_of(data)


@pytest.mark.parametrize("second", [(X.astype("float32"), Y), (X[:, :1], Y), (X,), ([X], Y)])
def test_batches_that_differ_from_the_first_are_refused(second):
    with pytest.raises(ValueError, match="every batch to be like the first"):
        source_of(Listed([(X, Y), second])).content()


class Endless(Listed):
    num_batches = None


class Undetermined(keras.utils.PyDataset):
    def __getitem__(self, i):
        return X, Y


@pytest.mark.parametrize("data", [Endless([(X, Y)]), Undetermined()])
def test_a_py_dataset_without_an_end_is_refused(data):
    with pytest.raises(ValueError, match="data that end.*num_batches"):
        source_of(data)


def test_an_endless_tf_dataset_is_refused():
    tf = pytest.importorskip("tensorflow")
    native = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    with pytest.raises(ValueError, match=r"data that end.*take\(n\)"):
        source_of(native.repeat())
    assert len(read(source_of(native.repeat(2)))[1]) == 24
    with pytest.raises(ValueError, match="batch"):
        source_of(native.unbatch())


def test_tensors_of_torch_on_whatever_backend():
    torch = pytest.importorskip("torch")
    values = torch.arange(6, dtype=torch.bfloat16, requires_grad=True)
    x, y = read(source_of((values, torch.arange(6))))
    assert x.tolist() == y.tolist() == [0, 1, 2, 3, 4, 5]


def test_images_are_known_by_their_files_or_by_their_content(tmp_path):
    from PIL import Image

    from keras_xfer.images import ImageDataset, Sample

    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")

    def dataset(folder="one", labels=(0, 1, 2), size=8, **kwargs):
        samples = [Sample(tmp_path / folder / f"{i}.png", label) for i, label in enumerate(labels)]
        return ImageDataset(samples, size, **kwargs)

    shuffled = dataset(shuffle=True, seed=4, batch_size=2)
    shuffled.epoch = 3
    assert shuffled.fingerprint() == dataset().fingerprint()
    others = [
        dataset("other"), dataset(labels=(0, 1, 1)), dataset(size=9), dataset(resize="pad"),
        dataset(labels=(0, 1)),
    ]  # fmt: skip
    assert len({each.fingerprint() for each in [shuffled, *others]}) == 6
    assert dataset().fingerprint(content=True) == dataset("other").fingerprint(content=True)
    ordered = shuffled.in_order()
    assert ordered.order.tolist() == [0, 1, 2]
    assert shuffled.order.tolist() == np.random.default_rng([4, 3]).permutation(3).tolist()
    before = dataset().fingerprint(content=True)
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "one" / "1.png")
    assert dataset().fingerprint(content=True) != before
