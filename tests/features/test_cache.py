"""What the cache serves is what the extractor gives, of whatever data."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_xfer.features import live
from keras_xfer.features.cache import FeatureCache
from keras_xfer.layers import Backbone

pytestmark = pytest.mark.core

rng = np.random.default_rng(0)
X = rng.random((23, 4), "float32")
Y = np.arange(23) % 3
W = rng.random(23, "float32")


def extractor(units=3):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation="tanh")])


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def collected(data):
    """All batches, as one nested structure of arrays."""
    batches = [data[i] for i in range(len(data))]
    return keras.tree.map_structure(lambda *leaves: np.concatenate(leaves), *batches)


def calls(monkeypatch):
    """How often an extractor is called with a batch from now on."""
    counted = []
    original = keras.Model.predict_on_batch

    def counting(self, x):
        counted.append(x)
        return original(self, x)

    monkeypatch.setattr(keras.Model, "predict_on_batch", counting)
    return counted


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size=5, drawn=None):
        super().__init__()
        self.arrays, self.size, self.drawn = arrays, size, drawn

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, i):
        order = np.arange(len(self.arrays[0]))
        if self.drawn is not None:
            if i == 0:
                self.order = self.drawn.permutation(len(order))
            order = self.order
        rows = order[i * self.size : (i + 1) * self.size]
        return tuple(array[rows] for array in self.arrays)


# Kinds of data


def test_arrays(cache):
    model = extractor()
    features, y, w = collected(cache.features(model, (X, Y, W), batch_size=8))
    close(features, model.predict(X, verbose=0))
    assert y.tolist() == Y.tolist()
    np.testing.assert_array_equal(w, W)
    assert features.dtype == np.float32
    assert y.dtype == Y.dtype


def test_inputs_alone(cache):
    model = extractor()
    data = cache.features(model, X)
    assert len(data) == 1
    assert len(data[0]) == 1
    close(data[0][0], model.predict(X, verbose=0))


def test_a_py_dataset_with_a_ragged_last_batch(cache):
    model = extractor()
    data = cache.features(model, Batches(X, Y))
    assert (data.batch_size, len(data), len(data[4][0])) == (5, 5, 3)
    features, y = collected(data)
    close(features, model.predict(X, verbose=0))
    assert y.tolist() == Y.tolist()


def test_a_tf_dataset_of_unknown_length(cache):
    tf = pytest.importorskip("tensorflow")
    model = extractor()
    native = tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: True).batch(4)
    assert native.cardinality() == tf.data.UNKNOWN_CARDINALITY
    features, y = collected(cache.features(model, native))
    close(features, model.predict(X, verbose=0))
    assert y.tolist() == Y.tolist()


def test_a_data_loader(cache):
    torch = pytest.importorskip("torch")
    model = extractor()
    rows = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    features, y = collected(cache.features(model, torch.utils.data.DataLoader(rows, batch_size=6)))
    close(features, model.predict(X, verbose=0))
    assert y.tolist() == Y.tolist()


def test_a_generator_needs_a_key_and_is_found_by_it(cache, monkeypatch):
    def generator():
        for i in range(0, 23, 6):
            yield X[i : i + 6], Y[i : i + 6]

    model = extractor()
    with pytest.raises(ValueError, match="key="):
        cache.features(model, generator())
    features, y = collected(cache.features(model, generator(), key="birds"))
    close(features, model.predict(X, verbose=0))
    assert y.tolist() == Y.tolist()
    counted = calls(monkeypatch)
    cache.features(model, generator(), key="birds")
    assert counted == []


def test_images_of_files_are_known_without_reading_them(cache, tmp_path, monkeypatch):
    from PIL import Image

    from keras_xfer.images import ImageDataset, Sample

    samples = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), 40 * i, "uint8")).save(path)
        samples.append(Sample(path, i))
    images = ImageDataset(samples, image_size=8, batch_size=2, shuffle=True)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.GlobalAveragePooling2D()])
    features, labels = collected(cache.features(model, images))
    np.testing.assert_allclose(features[:, 0], 40.0 * np.arange(5))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    counted = calls(monkeypatch)
    again = ImageDataset(samples, image_size=8, batch_size=2, shuffle=True, seed=3)
    cache.features(model, again)
    assert counted == []
    Image.fromarray(np.full((8, 8, 3), 7, "uint8")).save(samples[2].path)
    changed, _ = collected(cache.features(model, ImageDataset(samples, image_size=8)))
    assert changed[2, 0] == 7.0


def test_features_of_features(cache, monkeypatch):
    low, high = extractor(), keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    first = cache.features(low, (X, Y), shuffle=True, seed=1, batch_size=4)
    features, y = collected(cache.features(high, first))
    close(features, high.predict(low.predict(X, verbose=0), verbose=0))
    assert y.tolist() == Y.tolist()


# Structures


def test_several_inputs_and_outputs_and_dict_targets(cache):
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    merged = keras.layers.Concatenate()([a, b])
    model = keras.Model(
        {"a": a, "b": b}, {"sum": keras.ops.sum(merged, 1), "all": keras.layers.Dense(3)(merged)}
    )
    x = {"a": X, "b": X[:, :2]}
    y = {"kind": Y, "size": [W, Y + 1]}
    features, targets = collected(cache.features(model, (x, y), batch_size=5))
    expected = model.predict(x, verbose=0)
    assert set(features) == {"sum", "all"}
    close(features["sum"], expected["sum"])
    close(features["all"], expected["all"])
    assert targets["kind"].tolist() == Y.tolist()
    np.testing.assert_array_equal(targets["size"][0], W)
    assert targets["size"][1].tolist() == (Y + 1).tolist()


def test_a_list_of_outputs_and_a_backbone(cache):
    x = keras.Input((4,))
    model = Backbone(keras.Model(x, [keras.layers.Dense(2)(x), keras.layers.Dense(3)(x)]))
    features, _ = collected(cache.features(model, (X, Y), batch_size=7))
    assert isinstance(features, list)
    for actual, expected in zip(features, model.model.predict(X, verbose=0), strict=True):
        close(actual, expected)


def test_swapped_names_of_inputs_are_another_extractor(cache):
    def model(first, second):
        a, b = keras.Input((4,), name=first), keras.Input((4,), name=second)
        return keras.Model([a, b], a - b)

    x = {"p": X, "q": 2 * X}
    close(cache.features(model("p", "q"), x)[0][0], -X[:23])
    close(cache.features(model("q", "p"), x)[0][0], X[:23])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_half_precision(cache, policy):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype=policy)])
    features, _ = collected(cache.features(model, (X, Y), batch_size=8))
    expected = model.predict(X, batch_size=8, verbose=0)
    assert features.dtype == expected.dtype
    np.testing.assert_allclose(
        features.astype("float32"), expected.astype("float32"), rtol=0.02, atol=0.02
    )


# fit


def test_fit_with_class_weight_is_fit_on_arrays(cache):
    model = extractor()
    features = model.predict(X, verbose=0)
    weights = {0: 1.0, 1: 2.0, 2: 0.5}

    def losses(data, **kwargs):
        head = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="ones")]
        )
        head.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return head.fit(
            data, epochs=2, shuffle=False, class_weight=weights, verbose=0, **kwargs
        ).history["loss"]

    expected = losses(features, y=Y, batch_size=8)
    data = cache.features(model, (X, Y), batch_size=8)
    close(losses(data), expected)
    if keras.backend.backend() == "tensorflow":
        close(losses(data.as_tf_dataset()), expected)


# Finding again


def test_what_is_there_is_not_computed_again(cache, monkeypatch):
    model = extractor()
    first = collected(cache.features(model, (X, Y)))
    counted = calls(monkeypatch)
    again = collected(FeatureCache(cache.directory).features(model, (X, Y), batch_size=3))
    assert counted == []
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_weight_one_row_or_one_label_more_is_computed(cache, monkeypatch):
    model = extractor()
    cache.features(model, (X, Y))
    other_y = Y.copy()
    other_y[4] += 1
    other_x = X.copy()
    other_x[9, 1] += 1e-4
    assert collected(cache.features(model, (X, other_y)))[1].tolist() == other_y.tolist()
    close(collected(cache.features(model, (other_x, Y)))[0], model.predict(other_x, verbose=0))
    kernel = model.get_weights()
    kernel[0][2, 1] += 0.5
    model.set_weights(kernel)
    close(collected(cache.features(model, (X, Y)))[0], model.predict(X, verbose=0))
    assert len(cache.info().table.rows) == 4


def test_a_pipeline_that_reshuffles_rows_with_their_labels_is_found_again(cache, monkeypatch):
    model = extractor()
    data = Batches(X, Y, np.arange(23), drawn=np.random.default_rng(5))
    cache.features(model, data)
    counted = calls(monkeypatch)
    features, y, rows = collected(cache.features(model, data))
    assert counted == []
    close(features, model.predict(X, verbose=0)[rows.astype(int)])
    assert y.tolist() == Y[rows.astype(int)].tolist()


def test_data_that_change_from_pass_to_pass_are_refused_and_leave_nothing(cache):
    class Augmented(Batches):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + np.random.default_rng().random(x.shape, "float32"), y

    with pytest.raises(ValueError, match="differ from pass to pass.*augmentation"):
        cache.features(extractor(), Augmented(X, Y))
    shuffled = Batches(X, drawn=np.random.default_rng(5))
    with pytest.raises(ValueError, match="differ from pass to pass"):
        cache.features(extractor(), shuffled)
    assert cache.info().total_bytes == 0


def test_data_that_change_their_length(cache):
    class Growing(Batches):
        passes = 0

        def __len__(self):
            return 2 + self.passes

        def __getitem__(self, i):
            type(self).passes += i == 1
            return super().__getitem__(i)

    with pytest.raises(ValueError, match="rows in the first pass, 1[0-9] in the second"):
        cache.features(extractor(), Growing(X, Y))


STABLE = """
import keras, numpy as np
from keras_xfer.features.cache import FeatureCache

class Own(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.told = {"words": {"a", "b", "c"}, "mean": np.ones(3), "of": [str, (1, None, slice(2))]}

    def call(self, x):
        return x - self.told["mean"][0]

def compute(folder):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, kernel_initializer="ones")(inputs)
    x = keras.layers.Dropout(0.5)(keras.layers.Dense(2, kernel_initializer="ones")(x) + 1.5)
    model = keras.Model(inputs, [Own()(x), keras.layers.Flatten()(x) * 2])
    x = np.arange(8.0).reshape(2, 4)
    return FeatureCache(folder).features(model, (x, {"one": x, "other": x}), verbose=0)
"""


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="the same on every backend")
def test_another_process_finds_what_this_one_has_computed(tmp_path, monkeypatch):
    space = {"__name__": "own"}
    exec(STABLE, space)  # noqa: S102 - the same lines in both processes
    data = space["compute"](tmp_path)
    code = f"""
import keras, sys
keras.Model.predict_on_batch = None
exec({STABLE!r}, space := {{"__name__": "own"}})
print(space["compute"](sys.argv[1]).fingerprint())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == data.fingerprint()


def test_other_versions_compute_anew(cache, monkeypatch):
    model, x = extractor(), X[:2]

    def entries():
        cache.features(model, x)
        return len(cache.info().table.rows)

    for version, expected in [("4.0.0", 1), ("4.0.1", 1), ("4.1.0", 2), ("4.0.2", 2)]:
        monkeypatch.setattr(keras, "__version__", version)
        assert entries() == expected
    monkeypatch.setattr("keras_xfer.features.cache.__version__", "9.0")
    assert entries() == 3


# float16


def test_float16_halves_the_bytes_and_serves_what_was_computed(tmp_path):
    model = extractor(64)
    wide, narrow = FeatureCache(tmp_path / "wide"), FeatureCache(tmp_path / "half", dtype="float16")
    expected = model.predict(X, verbose=0)
    features, y = collected(narrow.features(model, (X, Y)))
    wide.features(model, (X, Y))
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected.astype("float16").astype("float32"))
    assert y.dtype == Y.dtype
    sizes = [
        sum(file.stat().st_size for file in cache.directory.rglob("features-*.npy"))
        for cache in (wide, narrow)
    ]
    assert sizes[1] - 128 == (sizes[0] - 128) / 2


def test_float16_falls_back_once_where_values_do_not_fit(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1.0)])
    x = X.copy()
    x[20, 2] = 65505.0
    cache = FeatureCache(tmp_path, dtype="float16")
    with pytest.warns(UserWarning, match="do not fit into float16") as warned:
        data = cache.features(model, (x, Y), batch_size=4)
    assert len([each for each in warned if each.category is UserWarning]) == 1
    close(collected(data)[0], x)
    counted = calls(monkeypatch)
    close(collected(FeatureCache(tmp_path, dtype="float16").features(model, (x, Y)))[0], x)
    FeatureCache(tmp_path).features(model, (x, Y))
    assert counted == []


# Views


def augmented(seed=7):
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.RandomFlip("horizontal_and_vertical", seed=seed),
            keras.layers.Flatten(),
        ]
    )


IMAGES = np.arange(12 * 16, dtype="float32").reshape(12, 4, 4, 1)


def test_views_are_served_in_turn_and_made_alike_in_any_process(tmp_path):
    served = []
    for folder in ("one", "other"):
        model = augmented()
        state = keras.ops.convert_to_numpy(model.layers[0].generator.state).copy()
        data = FeatureCache(tmp_path / folder).features(model, IMAGES, views=3, batch_size=5)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(model.layers[0].generator.state), state
        )
        views = []
        for _ in range(4):
            views.append(collected(data)[0])
            data.on_epoch_end()
        served.append(views)
    np.testing.assert_array_equal(served[0], served[1])
    first, second, third, again = served[0]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    flips = [IMAGES, IMAGES[:, ::-1], IMAGES[:, :, ::-1], IMAGES[:, ::-1, ::-1]]
    for view in (first, second, third):
        for i, row in enumerate(view):
            assert any(np.array_equal(row, flip[i].ravel()) for flip in flips)


def test_a_lost_shard_of_a_view_is_made_again_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_xfer.features.manifest._MOST_ROWS", 5)
    cache = FeatureCache(tmp_path)
    before = cache.features(augmented(), (IMAGES, np.arange(12)), views=2, batch_size=5)
    before.epoch = 1
    expected = collected(before)
    next(tmp_path.glob("*/features-0-view-1-00001.npy")).unlink()
    counted = calls(monkeypatch)
    with pytest.warns(UserWarning, match="features-0-view-1-00001.npy"):
        after = cache.features(augmented(), (IMAGES, np.arange(12)), views=2, batch_size=5)
    assert len(counted) == 1
    after.epoch = 1
    for one, other in zip(expected, collected(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_needs_views_and_views_need_augmentation(cache):
    with pytest.raises(ValueError, match="RandomFlip.*views=K"):
        cache.features(augmented(), IMAGES)
    with pytest.raises(ValueError, match="all be equal"):
        cache.features(extractor(), X, views=2)
    with pytest.raises(ValueError, match="views=0"):
        cache.features(extractor(), X, views=0)


def test_moving_statistics_cannot_be_stored(cache, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="moves")])
    monkeypatch.setattr(live, "live_layers", lambda extractor: extractor.layers[:1])
    for views in (1, 2):
        with pytest.raises(ValueError, match="'moves' of type BatchNormalization"):
            cache.features(model, X, views=views)


# Room


def test_the_least_recently_used_makes_room_but_never_what_is_open(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1.0)])
    data = [np.full((500, 4), i, "float32") for i in range(5)]  # 8,128 bytes each, and a manifest
    cache = FeatureCache(tmp_path, max_bytes=28_000)
    kept = cache.features(model, data[0])
    for i in (1, 2):
        cache.features(model, data[i])
        os.utime(next(p for p in sorted(tmp_path.iterdir(), key=os.path.getmtime)[::-1]
                      if not p.name.startswith((".", "keras"))), (i, i))  # fmt: skip
    cache.features(model, data[3])
    assert len(cache.info().table.rows) == 3
    assert cache.info().total_bytes <= 28_000
    np.testing.assert_array_equal(collected(kept)[0], data[0])
    assert [str(each) for each in cache.clear().kept] == [kept.fingerprint()]
    np.testing.assert_array_equal(collected(kept)[0], data[0])


def test_an_entry_beyond_max_bytes_is_refused_with_the_numbers(tmp_path):
    cache = FeatureCache(tmp_path, max_bytes=100)
    with pytest.raises(ValueError, match="at least 276.*max_bytes=100"):
        cache.features(extractor(), X)


def test_what_is_open_may_leave_no_room(tmp_path):
    cache = FeatureCache(tmp_path, max_bytes=12_000)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1.0)])
    kept = cache.features(model, np.zeros((500, 4), "float32"))
    with pytest.raises(ValueError, match="is open"):
        cache.features(model, np.ones((500, 4), "float32"))
    assert kept[0][0].sum() == 0


# Information and errors


def test_info_and_clear(cache):
    data = cache.features(extractor(), (X, Y))
    info = cache.info()
    ((_, what, rows, views, shape, dtype, size, _, complete),) = info.table.rows
    assert (rows, views, shape, dtype, complete) == (23, 1, "(3,)", "float32", "yes")
    assert what.endswith("(Sequential)")
    assert size == info.total_bytes
    assert "1 entries" in str(info)
    del data
    assert cache.clear() == (info.total_bytes, ())
    assert cache.info().total_bytes == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"verbose": "loud"}, "verbose='loud'"),
    ],
)
def test_wrong_arguments(cache, arguments, message):
    with pytest.raises(ValueError, match=message):
        cache.features(extractor(), X, **arguments)


def test_wrong_arguments_of_the_cache(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'"):
        FeatureCache(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="max_bytes=0"):
        FeatureCache(tmp_path, max_bytes=0)


def test_an_extractor_that_gives_no_row_a_row_is_refused(cache):
    class Mean(keras.layers.Layer):
        def call(self, x):
            return keras.ops.mean(x)

    layer = Mean()
    layer.build((None, 4))
    with pytest.raises(ValueError, match="a row of features for each row"):
        cache.features(layer, X)
