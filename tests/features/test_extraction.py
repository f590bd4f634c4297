"""How features are computed: in blocks of one shape, resumed, and never of rows in two orders."""

import itertools
import threading

import keras
import numpy as np
import pytest

from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.manifest import Leaf, rows_per_shard
from keras_xfer.features.progress import Progress
from keras_xfer.features.reading import Ahead

pytestmark = pytest.mark.core

N = 30
X = np.arange(4 * N, dtype="float32").reshape(N, 4)
Y = np.arange(N)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("keras_xfer.features.manifest._MOST_ROWS", 8)


def extractor():
    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(3.0)])


class Computed:
    """The batches that are computed; the one of number `fail_at` is interrupted."""

    def __init__(self):
        self.batches, self.fail_at = [], None

    def count(self, x):
        self.batches.append(x)
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt


@pytest.fixture
def computed(monkeypatch):
    counted = Computed()
    original = keras.Model.predict_on_batch

    def counting(self, x):
        counted.count(x)
        return original(self, x)

    monkeypatch.setattr(keras.Model, "predict_on_batch", counting)
    return counted


def rows_of(data):
    batches = [data[i] for i in range(len(data))]
    features, y = (np.concatenate(leaves) for leaves in zip(*batches, strict=True))
    np.testing.assert_array_equal(features, 3 * X[y])
    return y.tolist()


class Shuffling(keras.utils.PyDataset):
    """Rows with their labels, in another order in every pass."""

    def __init__(self):
        super().__init__()
        self.passes = itertools.count()

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 0:
            self.order = np.random.default_rng(next(self.passes)).permutation(N)
        rows = self.order[4 * i : 4 * (i + 1)]
        return X[rows], Y[rows]


def test_every_batch_has_one_shape_and_every_row_is_computed_once(tmp_path, computed):
    data = FeatureCache(tmp_path).features(extractor(), (X, Y), batch_size=8)
    assert rows_of(data) == list(range(N))
    assert {batch.shape for batch in computed.batches} == {(8, 4)}
    assert len(computed.batches) == 5  # one tells the shapes


def test_an_interruption_keeps_what_is_complete(tmp_path, computed):
    computed.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path).features(extractor(), (X, Y), batch_size=8)
    computed.batches.clear()
    computed.fail_at = None
    data = FeatureCache(tmp_path).features(extractor(), (X, Y), batch_size=8)
    assert rows_of(data) == list(range(N))
    assert [batch[0, 0] // 4 for batch in computed.batches] == [16, 24]


def test_rows_of_a_reshuffled_pipeline_are_never_mixed(tmp_path, computed):
    data = Shuffling()
    computed.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path).features(extractor(), data)
    computed.fail_at = None
    found = rows_of(FeatureCache(tmp_path).features(extractor(), data))
    assert sorted(found) == list(range(N))


def test_a_generator_in_another_order_is_refused_and_then_begins_anew(tmp_path, computed):
    def generator(order):
        for i in range(0, N, 8):
            yield X[order[i : i + 8]], Y[order[i : i + 8]]

    cache = FeatureCache(tmp_path)
    computed.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        cache.features(extractor(), generator(np.arange(N)), key="k")
    computed.fail_at = None
    back = np.arange(N)[::-1]
    with pytest.raises(ValueError, match="order of an earlier pass.*new iterator"):
        cache.features(extractor(), generator(back), key="k")
    assert rows_of(cache.features(extractor(), generator(back), key="k")) == back.tolist()


def test_an_error_in_the_data_is_raised_as_it_is(tmp_path):
    class Broken(Shuffling):
        def __getitem__(self, i):
            if i == 5:
                raise LookupError("page 5")
            return X[4 * i : 4 * (i + 1)], Y[4 * i : 4 * (i + 1)]

    with pytest.raises(LookupError, match="page 5"):
        FeatureCache(tmp_path).features(extractor(), Broken(), key="k")
    assert threading.active_count() < 20


def test_the_users_model_stays_as_it_is(tmp_path):
    model = extractor()
    model.compile("sgd", "mse")
    before = (model.optimizer, model.loss, [layer.name for layer in model.layers], model.trainable)
    FeatureCache(tmp_path).features(model, X)
    assert before == (
        model.optimizer, model.loss, [layer.name for layer in model.layers], model.trainable
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "rows_per_batch", "expected"),
    [((10,), 3, 6), ((2**22,), 3, 3), ((2**24,), 32, 1), ((10,), 32, 8)],
)
def test_shards_hold_whole_batches_and_no_more_than_64_mib(shape, rows_per_batch, expected):
    assert rows_per_shard([Leaf(shape, "float32", "float32")], rows_per_batch) == expected


def test_reading_ahead_stops_when_nobody_reads():
    seen = []

    def endless():
        for i in itertools.count():
            seen.append(i)
            yield i

    ahead = Ahead(endless())
    reading = iter(ahead)
    assert [next(reading) for _ in range(3)] == [0, 1, 2]
    ahead.stop()
    count = len(seen)
    assert count < 20
    assert len(seen) == count


# Progress


def test_progress_says_rows_speed_and_time_left(tmp_path, capsys):
    FeatureCache(tmp_path).features(extractor(), (X, Y), batch_size=8, verbose=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Features: 8/30 images, ")
    assert "images/s" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("Features: 30/30 images, ")


@pytest.mark.parametrize("verbose", [0, "auto"])
def test_short_work_says_nothing(tmp_path, capsys, verbose):
    FeatureCache(tmp_path).features(extractor(), (X, Y), verbose=verbose)
    assert capsys.readouterr().out == ""


def test_long_work_says_how_long_it_takes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress("Features", 8000, "auto")
    for now[0] in (1.0, 2.5, 3.0):
        progress.add(500)
    progress.close()
    assert capsys.readouterr().out.splitlines()[0] == (
        "Features: 1,000/8,000 images, 400 images/s, 0:18 left"
    )
