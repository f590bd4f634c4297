"""What `CachedFeatures` serves: batches, orders, epochs, and the same from TensorFlow."""

import sys

import keras
import numpy as np
import pytest

from keras_xfer.features import entry
from keras_xfer.features.cache import FeatureCache

pytestmark = pytest.mark.core

N = 11
X = np.arange(4 * N, dtype="float32").reshape(N, 4)
Y = {"row": np.arange(N), "weight": np.linspace(0, 1, N)}


def augmentation():
    return [keras.layers.RandomBrightness(0.5, value_range=(0, 50), seed=1)]


@pytest.fixture(params=["in memory", "mapped"])
def where(request, monkeypatch):
    """Both ways of serving, and shards that are smaller than a batch may reach."""
    monkeypatch.setattr("keras_xfer.features.manifest._MOST_ROWS", 4)
    if request.param == "mapped":
        monkeypatch.setattr(entry, "IN_MEMORY_BYTES", 0)


def served(folder, *, views=1, x=X, **kwargs):
    inner = augmentation() if views > 1 else [keras.layers.Rescaling(2.0)]
    model = keras.Sequential([keras.Input(x.shape[1:]), *inner])
    return FeatureCache(folder).features(model, (x, Y), views=views, **kwargs)


def batches(data):
    return [data[i] for i in range(len(data))]


def rows_of(data):
    return np.concatenate([y["row"] for _, y in batches(data)]).tolist()


@pytest.mark.usefixtures("where")
def test_every_epoch_has_the_order_that_seed_and_epoch_say(tmp_path):
    data = served(tmp_path, batch_size=4, shuffle=True, seed=5)
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(N)
        assert data.order.tolist() == order.tolist()
        features, targets = zip(*batches(data), strict=True)
        assert [len(batch) for batch in features] == [4, 4, 3]
        np.testing.assert_array_equal(np.concatenate(features), 2 * X[order])
        assert rows_of(data) == order.tolist()
        weights = np.concatenate([target["weight"] for target in targets])
        np.testing.assert_array_equal(weights, Y["weight"][order])
        data.on_epoch_end()
    data.epoch = 1
    assert rows_of(data) == np.random.default_rng([5, 1]).permutation(N).tolist()


def test_arranged_serves_the_same_otherwise(tmp_path):
    data = served(tmp_path, batch_size=4, shuffle=True, seed=5)
    data.on_epoch_end()
    other = data.arranged(batch_size=6, seed=2)
    assert (other.epoch, other.batch_size, other.shuffle, other.seed) == (0, 6, True, 2)
    assert rows_of(other) == np.random.default_rng([2, 0]).permutation(N).tolist()
    assert rows_of(data.arranged(shuffle=False)) == list(range(N))
    assert data.epoch == 1
    assert data.in_order().fingerprint() == data.fingerprint()


def test_an_arranged_one_keeps_the_entry_open(tmp_path):
    data = served(tmp_path).arranged(batch_size=2)
    assert FeatureCache(tmp_path).clear().num_bytes == 0
    assert rows_of(data) == list(range(N))


def test_a_batch_that_is_not_there(tmp_path):
    data = served(tmp_path, batch_size=4)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"index={index}"):
            data[index]


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"seed": -1}])
def test_arranged_checks_its_arguments(tmp_path, kwargs):
    with pytest.raises(ValueError, match="at least"):
        served(tmp_path).arranged(**kwargs)


def test_views_change_from_epoch_to_epoch_and_have_no_one_fingerprint(tmp_path):
    x = np.tile(X[..., None, None], (1, 1, 4, 1)).reshape(N, 4, 4, 1)
    data = served(tmp_path, views=2, x=x, batch_size=N)
    first = data[0][0]
    data.epoch = 1
    assert not np.array_equal(data[0][0], first)
    data.epoch = 2
    np.testing.assert_array_equal(data[0][0], first)
    with pytest.raises(ValueError, match="views=2"):
        data.fingerprint()


# tf.data


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


def same(native, expected):
    for got, batch in zip(native, expected, strict=True):
        flat = keras.tree.flatten(got), keras.tree.flatten(batch)
        for one, other in zip(*flat, strict=True):
            assert one.dtype.as_numpy_dtype == other.dtype
            np.testing.assert_array_equal(one.numpy(), other)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("through", ["itself", "a pipeline", "ahead"])
@pytest.mark.parametrize("views", [1, 2])
def test_tf_data_gives_the_same_batches_in_three_epochs(tmp_path, tf, through, views):
    x = X if views == 1 else np.tile(X[..., None, None], (1, 1, 4, 1)).reshape(N, 4, 4, 1)
    data = served(tmp_path, views=views, x=x, batch_size=4, shuffle=True, seed=3)
    reference = data.arranged()
    native = data.as_tf_dataset(prefetch=through == "ahead")
    if through == "a pipeline":
        native = native.map(lambda *batch: batch)
    for epoch in range(3):
        assert data.epoch == epoch
        same(native, batches(reference))
        reference.on_epoch_end()
    assert data.epoch == 3


@pytest.mark.parametrize("through", ["itself", "a pipeline", "ahead"])
def test_a_look_at_it_is_no_epoch_and_the_epoch_can_be_set(tmp_path, tf, through):
    data = served(tmp_path, batch_size=2, shuffle=True, seed=3)
    native = data.as_tf_dataset(prefetch=through == "ahead")
    if through == "a pipeline":
        native = native.map(lambda *batch: batch)
    next(iter(native))
    for _ in native.take(3):
        pass
    assert data.epoch == 0
    passing = iter(native)
    data.epoch = 7
    rows = np.concatenate([y["row"].numpy() for _, y in passing])
    assert rows.tolist() == np.random.default_rng([3, 7]).permutation(N).tolist()
    assert data.epoch == 8


def test_what_tf_data_says_of_itself(tmp_path, tf):
    native = served(tmp_path, batch_size=4).as_tf_dataset()
    assert isinstance(native, tf.data.Dataset)
    assert (int(native.cardinality()), len(native)) == (3, 3)
    assert native.element_spec == (
        tf.TensorSpec((None, 4), tf.float32),
        {"row": tf.TensorSpec((None,), tf.int64), "weight": tf.TensorSpec((None,), tf.float64)},
    )


@pytest.mark.parametrize("through", ["itself", "a pipeline", "ahead"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tf_data_serves_what_was_computed_in_other_dtypes(tmp_path, tf, dtype, through):
    layer = keras.layers.Rescaling(1.0, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    model = keras.Sequential([keras.Input((4,)), layer])
    cache = FeatureCache(tmp_path, dtype="float16" if dtype == "float16" else None)
    data = cache.features(model, X, batch_size=4)
    native = data.as_tf_dataset(prefetch=through == "ahead")
    same(native.map(lambda x: (x,)) if through == "a pipeline" else native, batches(data))


def test_fit_advances_the_epoch_as_often_as_it_passes(tmp_path, tf):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("of TensorFlow's trainer")
    x = X / X.max()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1.0)])
    data = FeatureCache(tmp_path).features(model, (x, Y["row"]), batch_size=2, shuffle=True)

    def trained(passed):
        head = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
        head.compile("sgd", "mse")
        head.fit(passed, epochs=3, shuffle=False, verbose=0)
        return head.get_weights()

    native = trained(data.as_tf_dataset())
    assert data.epoch == 3
    by_hand = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
    by_hand.compile("sgd", "mse")
    for epoch in range(3):
        order = np.random.default_rng([0, epoch]).permutation(N)
        by_hand.fit(x[order], Y["row"][order], batch_size=2, shuffle=False, verbose=0)
    for one, other in zip(native, by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_without_tensorflow_as_tf_dataset_says_so(tmp_path, monkeypatch):
    data = served(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="needs tensorflow"):
        data.as_tf_dataset()


def test_a_function_of_tensorflow_is_traced_once_for_batches_of_any_number_of_rows(tmp_path, tf):
    data = served(tmp_path, batch_size=4)
    traces = []

    @tf.function(reduce_retracing=True)
    def step(batch):
        traces.append(batch[0].shape)
        return tf.reduce_sum(batch[0]), batch[1]["row"]

    for _ in range(2):
        found = [step(batch) for batch in data.as_tf_dataset()]
        sums = [float(batch[0].sum()) for batch in batches(data)]
        assert [float(total) for total, _ in found] == sums
        assert np.concatenate([row.numpy() for _, row in found]).tolist() == rows_of(data)
    assert [shape.as_list() for shape in traces] == [[None, 4]]
    plain = (tf.ones((3, 4)), {"row": tf.range(3), "weight": tf.ones(3)})
    assert float(step(plain)[0]) == 12.0  # an ordinary tuple gets a trace of its own
    assert len(traces) == 2
