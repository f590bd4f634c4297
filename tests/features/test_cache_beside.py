"""The cache beside the beaten track: code that changes, odd arrays, little room, odd loops."""

import contextlib
import copy
import errno
import functools
import gc
import os
import pickle
import shutil
import sys
import threading
import types

import keras
import numpy as np
import pytest

from keras_xfer import files
from keras_xfer.features import FeatureCache, identity, split_model
from keras_xfer.features.entry import Entry
from keras_xfer.features.manifest import Manifest, Shard
from keras_xfer.features.store import MARKER, Store
from keras_xfer.layers import Backbone, HubModule

core = pytest.mark.core
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a layer of TensorFlow"
)

X = np.arange(80, dtype="float32").reshape(20, 4)
Y = np.arange(20)


def defect(reason):
    return pytest.mark.xfail(strict=True, reason=reason)


def model(*layers, shape=(4,)):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input(shape), *layers])


def rescaling(factor=3.0):
    return model(keras.layers.Rescaling(factor))


def served(data):
    return np.concatenate([data[i][0] for i in range(len(data))])


def same(one, other):
    return identity.of_extractor(one) == identity.of_extractor(other)


def defined(source, name, **names):
    """What `source` defines, as if somebody had written it into a file of their own."""
    space = {"keras": keras, "functools": functools, "__name__": "own", **names}
    exec(source, space)  # noqa: S102
    return space[name]


# Code that changes


def own(body, before="", **names):
    """A layer of a class of one's own."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    source = f"{before}\nclass Own(keras.layers.Layer):\n{indented}"
    layer = defined(source, "Own", **names)()
    layer.build((None, 4))
    return layer


_WRAPPER = """
def times(factor):
    def outer(method):
        @functools.wraps(method)
        def call(self, x):
            return method(self, x) * factor
        return call
    return outer
"""
_CLOSURE = """
def make(factor):
    def call(self, x):
        return x * factor
    return call
"""


@core
@pytest.mark.parametrize(
    "make",
    [
        lambda n: own(f"factor = {n}\ndef call(self, x): return x * self.factor"),
        lambda n: own(f"def call(self, x, factor={n}): return x * factor"),
        lambda n: own(f"def call(self, x, *, factor={n}): return x * factor"),
        lambda n: own(
            f"@staticmethod\ndef act(x): return x * {n}\ndef call(self, x): return self.act(x)"
        ),
        lambda n: own(
            f"@property\ndef factor(self): return {n}\ndef call(self, x): return x * self.factor"
        ),
        lambda n: own(f"call = make({n})", _CLOSURE),
        lambda n: own(f"@times({n})\ndef call(self, x): return x", _WRAPPER),
        lambda n: own("def call(self, x): return x * FACTOR", FACTOR=n),
        lambda n: own("def call(self, x): return act(x)", f"def act(x): return x * {n}"),
    ],
    ids=[
        "class attribute",
        "default",
        "keyword default",
        "staticmethod",
        "property",
        "closure",
        "wrapper",
        "global",
        "helper",
    ],
)
def test_all_code_of_a_layer_of_ones_own_matters(make):
    assert same(make(2), make(2))
    assert not same(make(2), make(3))


def activation(n):
    return defined(f"def act(x): return x * {n}", "act")


@core
@pytest.mark.parametrize(
    "make",
    [
        lambda n: model(keras.layers.Lambda(activation(n))),
        lambda n: model(keras.layers.Activation(activation(n))),
        lambda n: model(keras.layers.Dense(3, activation(n), kernel_initializer="ones")),
        lambda n: model(keras.layers.Lambda(defined("act = lambda x: x * N", "act", N=n))),
    ],
    ids=["Lambda", "Activation", "Dense", "global of a lambda"],
)
def test_the_code_of_functions_matters(make):
    assert same(make(2), make(2))
    assert not same(make(2), make(3))


@core
def test_preprocessing_of_another_application_is_never_served(tmp_path):
    x = np.full((2, 3, 3, 3), 255.0, "float32")
    for module in (keras.applications.mobilenet_v2, keras.applications.vgg16):
        preprocess = model(keras.layers.Lambda(module.preprocess_input), shape=(3, 3, 3))
        features = FeatureCache(tmp_path).features(preprocess, x)
        np.testing.assert_allclose(served(features), module.preprocess_input(x.copy()), rtol=1e-5)


@on_tensorflow
def test_a_saved_model_that_moves_is_the_same(tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.__call__ = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec([None, 4])])
    tf.saved_model.save(module, str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = (model(HubModule(str(tmp_path / name))) for name in ("one", "other"))
    assert same(one, other)


@core
def test_what_code_reads_of_modules_objects_and_layers_matters():
    def reads(value, name="THING.factor"):
        return model(
            keras.layers.Lambda(defined(f"act = lambda x: x * {name}", "act", THING=value))
        )

    def module(factor):
        made = types.ModuleType("birds")
        made.factor, made.other = factor, object()
        return made

    def initial(value):
        layer = keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(value))
        layer.build((None, 4))
        return layer

    for make in (
        module,
        lambda factor: types.SimpleNamespace(factor=factor),
        lambda factor: defined(f"class Thing:\n    factor = {factor}", "Thing"),
        lambda factor: defined(f"class Thing:\n    factor = {factor}", "Thing")(),
    ):
        assert same(reads(make(2)), reads(make(2)))
        assert not same(reads(make(2)), reads(make(3)))
    assert not same(reads(initial(2.0), "THING(x)"), reads(initial(3.0), "THING(x)"))
    assert not same(reads(np.ones(4), "THING"), reads(2 * np.ones(4), "THING"))


_DOTTED = "import mylib.ops\ndef act(x): return mylib.ops.scale(x)"
_LOCAL = "def act(x):\n    import mylib.ops\n    return mylib.ops.scale(x)"
_FROM = "def act(x):\n    from mylib.ops import scale\n    return scale(x)"
_AS = "def act(x):\n    from mylib import ops as o\n    return o.scale(x)"
_RELATIVE = "def act(x):\n    from .ops import scale\n    return scale(x)"


@core
@pytest.mark.parametrize("source", [_DOTTED, _LOCAL, _FROM, _AS, _RELATIVE])
def test_modules_that_are_reached_by_dots_or_imported_inside_are_read(source, monkeypatch):
    def make(n):
        package, ops = types.ModuleType("mylib"), types.ModuleType("mylib.ops")
        package.ops, package.mylib = ops, package  # as modules name each other
        ops.scale, ops.mylib = defined(f"def scale(x): return x * {n}", "scale"), package
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "mylib", package)
        monkeypatch.setitem(sys.modules, "mylib.ops", ops)
        act = defined(source, "act", __package__="mylib")
        return identity.of_extractor(model(keras.layers.Lambda(act)))

    assert make(2) == make(2)
    assert make(2) != make(3)


_OPERATIONS = """
class Own(keras.Operation):
    def call(self, x):
        return x * FACTOR
    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)
def scaled(x):
    return x * FACTOR
def called(x):
    return Own()(x)
def mapped(x):
    return keras.ops.vectorized_map(scaled, x)
"""


@core
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("how", ["called", "mapped"])
def test_operations_of_ones_own_matter(how, cut):
    def make(n):
        x = keras.Input((4,))
        y = defined(_OPERATIONS, how, FACTOR=n)(x)
        if not cut:
            return keras.Model(x, y)
        above = keras.layers.Dense(1, name="above")
        return split_model(model(Backbone(keras.Model(x, above(y)))), "above")[0]

    assert same(make(2), make(2))
    assert not same(make(2), make(3))


@core
def test_helpers_that_call_each_other_are_read_once():
    def make(n):
        source = f"""
def even(x, i=4): return x if not i else odd(x, i - 1)
def odd(x, i): return {n} * x if not i else even(x, i - 1)
"""
        return model(keras.layers.Lambda(defined(source, "even")))

    assert same(make(2), make(2))
    assert not same(make(2), make(3))


_SUBCLASSED = """
class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Rescaling(FACTOR)
    def call(self, x):
        return self.first(x)
"""


@core
def test_layers_inside_a_subclassed_model_matter(tmp_path):
    for factor in (2.0, 3.0):
        extractor = defined(_SUBCLASSED, "Own", FACTOR=factor)()
        extractor(X)
        np.testing.assert_allclose(
            served(FeatureCache(tmp_path).features(extractor, X)), factor * X, rtol=1e-6
        )


@core
def test_a_lambda_that_moves_by_a_line_is_the_same():
    one = defined("act = lambda x: x * 2", "act")
    other = defined("\n\n\nact = lambda x: x * 2", "act")
    assert same(model(keras.layers.Lambda(one)), model(keras.layers.Lambda(other)))


@on_tensorflow
def test_the_weights_of_words_matter():
    def make(texts):
        layer = keras.layers.TextVectorization(max_tokens=5, output_mode="tf_idf")
        layer.adapt(texts)
        return keras.Sequential([keras.Input((), dtype="string"), layer])

    one, other = make(["a a a", "b b", "c"]), make(["a a a", "b b", "b c", "a a"])
    assert one.layers[0].get_vocabulary() == other.layers[0].get_vocabulary()
    assert not same(one, other)


@on_tensorflow
def test_another_saved_model_in_the_same_place_is_never_served(tmp_path):
    import tensorflow as tf

    class Module(tf.Module):
        def __init__(self, factor):
            super().__init__()
            self.v, self.factor = tf.Variable(tf.ones(4)), factor

        @tf.function(input_signature=[tf.TensorSpec([None, 4])])
        def __call__(self, x):
            return x * self.v * self.factor

    for factor in (2.0, 3.0):
        module = Module(factor)
        tf.saved_model.save(module, str(tmp_path / "module"))
        extractor = model(HubModule(str(tmp_path / "module")))
        features = FeatureCache(tmp_path / "cache").features(extractor, X)
        np.testing.assert_allclose(served(features), factor * X)


@core
def test_the_data_format_of_pooling_matters(request):
    request.addfinalizer(functools.partial(keras.config.set_image_data_format, "channels_last"))

    def make(data_format):
        keras.config.set_image_data_format(data_format)
        return Backbone(model(keras.layers.Rescaling(1.0), shape=(4, 5, 3)), pooling="avg")

    assert not same(make("channels_last"), make("channels_first"))


@core
def test_policies_that_give_the_same_features_are_one():
    def make(batch_norm):
        return Backbone(model(keras.layers.BatchNormalization()), batch_norm=batch_norm)

    assert same(make("frozen"), make("affine"))


@core
def test_the_order_and_the_names_of_inputs_and_outputs_matter():
    def make(inputs, outputs):
        a, b = keras.Input((4,)), keras.Input((4,))
        y = [keras.layers.Subtract()([a, b]), keras.layers.Rescaling(2.0)(a)]
        return keras.Model([[a, b][i] for i in inputs], outputs(y))

    models = [
        make((0, 1), lambda y: y),
        make((1, 0), lambda y: y),
        make((0, 1), lambda y: y[::-1]),
        make((0, 1), lambda y: {"p": y[0], "q": y[1]}),
        make((0, 1), lambda y: {"q": y[0], "p": y[1]}),
    ]
    assert [[same(a, b) for b in models] for a in models] == np.eye(5, dtype=bool).tolist()


@core
def test_what_layers_learned_of_data_matters():
    def adapted(layer, data):
        layer.adapt(data)
        return model(layer)

    data = np.random.default_rng(0).random((9, 4))
    makes = [lambda x: adapted(keras.layers.Normalization(), x)]
    if keras.backend.backend() == "tensorflow":
        makes.append(lambda x: adapted(keras.layers.Discretization(num_bins=3), x))
    for make in makes:
        assert same(make(data), make(data))
        assert not same(make(data), make(2 * data))


def graph():
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(3, 3, padding="same")(x)
    y = keras.layers.Activation("relu")(keras.layers.BatchNormalization()(y)) * 2.0
    return keras.Model(x, keras.layers.GlobalAveragePooling2D()(y + x))


@core
@pytest.mark.parametrize(
    "make",
    [
        graph,
        lambda: model(Backbone(model(keras.layers.Dense(3), keras.layers.BatchNormalization()))),
    ],
    ids=["graph", "Backbone"],
)
def test_a_copy_and_a_reloaded_model_are_the_same(make, tmp_path):
    first = make()
    first.save(tmp_path / "model.keras")
    clone = keras.models.clone_model(first)
    clone.set_weights(first.get_weights())
    before = identity.of_extractor(first)
    first.compile("sgd", "mse")
    first.predict(np.ones((2, *first.input_shape[1:])), verbose=0)
    first.trainable = not first.trainable
    assert before == identity.of_extractor(first)
    assert before == identity.of_extractor(clone)
    assert before == identity.of_extractor(keras.saving.load_model(tmp_path / "model.keras"))


# Odd arrays


@core
def test_the_order_of_bytes_matters(tmp_path):
    cache = FeatureCache(tmp_path)
    x = X.astype(">f4")
    cache.features(rescaling(), x.view("<f4"))  # the same bytes, other numbers
    np.testing.assert_array_equal(served(cache.features(rescaling(), x)), 3 * X)


@core
@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(X),
        X[::2, ::-1],
        np.broadcast_to(X[:1], (20, 4)),
        X.astype(">f4"),
    ],
    ids=["Fortran", "strided", "broadcast", "big-endian"],
)
def test_arrays_in_whatever_layout_are_served_right(x, tmp_path):
    labels = np.arange(len(x)).astype(">i8")[::-1]
    data = FeatureCache(tmp_path).features(rescaling(), (x, labels))
    np.testing.assert_array_equal(served(data), 3 * x.astype("float32"))
    np.testing.assert_array_equal(data[0][1], labels)
    np.testing.assert_array_equal(served(FeatureCache(tmp_path).features(rescaling(), x)), 3 * x)


@core
def test_what_float16_cannot_hold_is_seen_beside_nan(tmp_path):
    x = np.array([[np.nan, 1e6, 1, 2]], "float32")
    with pytest.warns(UserWarning, match="65504"):
        data = FeatureCache(tmp_path, dtype="float16").features(rescaling(), x)
    np.testing.assert_array_equal(served(data), 3 * x)


@core
def test_labels_that_come_later_under_one_key_are_served(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.features(rescaling(), X, key="birds")
    features, labels = cache.features(rescaling(), (X, Y), key="birds")[0]
    np.testing.assert_array_equal(labels, Y)
    np.testing.assert_array_equal(features, 3 * X)


@core
def test_labels_of_a_structured_dtype_are_refused_in_words(tmp_path):
    labels = np.zeros(20, [("a", "f4"), ("b", "f4")])
    with pytest.raises(ValueError, match="Expected.*labels"):
        FeatureCache(tmp_path).features(rescaling(), (X, labels))


# Little room


@core
@defect("headers and manifests are not counted before they are written")
def test_a_folder_holds_no_more_than_max_bytes(tmp_path):
    cache = FeatureCache(tmp_path, max_bytes=3000)
    for i in range(4):
        cache.features(rescaling(), X + i)
        gc.collect()
    assert cache.info().total_bytes <= cache.max_bytes


@core
@defect("room is asked for once, at the beginning, and what others take meanwhile is not seen")
def test_two_that_compute_at_once_hold_no_more_than_max_bytes(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, max_bytes=15_000)
    write_shard, between = Entry.write_shard, [lambda: cache.features(rescaling(), X.repeat(30, 0))]

    def interrupted(self, *args):
        if between:  # as another process would
            between.pop()()
        return write_shard(self, *args)

    monkeypatch.setattr(Entry, "write_shard", interrupted)
    with contextlib.suppress(ValueError):  # or is told that there is no room
        cache.features(rescaling(), 1 + X.repeat(30, 0))
    assert cache.info().total_bytes <= cache.max_bytes


@core
@pytest.mark.skipif(os.name != "posix", reason="fcntl")
def test_without_file_descriptors_nothing_that_is_open_is_removed(tmp_path, monkeypatch):
    data = FeatureCache(tmp_path).features(rescaling(), X)
    opened = os.open

    def none_left(path, *args, **kwargs):
        if str(path).endswith(".open"):
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", none_left)
    with contextlib.suppress(OSError):
        FeatureCache(tmp_path).clear()
    assert FeatureCache(tmp_path).info().total_bytes > 0
    assert len(data) == 1


@core
@defect(
    "the whole manifest is written with every shard; those of tiny rows are few, see _MOST_ROWS"
)
def test_what_is_written_beside_features_grows_as_they_do(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_xfer.features.manifest._MOST_ROWS", 1)
    write_text = files.write_text
    written = []

    def counting(filepath, text):
        written.append(len(text))
        write_text(filepath, text)

    monkeypatch.setattr(files, "write_text", counting)
    totals = []
    for rows in (12, 96):
        written.clear()
        FeatureCache(tmp_path).features(rescaling(), X.repeat(10, 0)[:rows], batch_size=1)
        totals.append(sum(written))
    assert totals[1] < 16 * totals[0]  # of eight times the rows


# Odd loops


@core
def test_fit_counts_passes_and_no_more(tmp_path):
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=8, shuffle=True)
    held_out = data.arranged(batch_size=4)
    head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    head.compile("sgd", "mse")
    head.fit(data, epochs=2, validation_data=held_out, shuffle=False, verbose=0)
    assert (data.epoch, held_out.epoch) == (2, 2)


@pytest.mark.parametrize("batch_size", [3, 5])
def test_an_iterator_given_to_a_tf_function_moves_on(tmp_path, batch_size):
    tf = pytest.importorskip("tensorflow")
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=batch_size)
    iterator = iter(data.as_tf_dataset())
    step = tf.function(lambda iterator: next(iterator)[1])
    labels = [step(iterator).numpy().tolist() for _ in range(3)]
    assert labels == [data[i][1].tolist() for i in range(3)]


def test_an_iterator_goes_from_python_into_a_graph_and_back(tmp_path):
    tf = pytest.importorskip("tensorflow")
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=4, shuffle=True)
    traces = []

    @tf.function
    def step(iterator):
        traces.append(1)
        return next(iterator)[1]

    for epoch in range(3):
        assert data.epoch == epoch
        expected = [data[i][1].tolist() for i in range(len(data))]
        iterator = iter(data.as_tf_dataset())
        found = [next(iterator)[1], step(iterator), step(iterator), *(y for _, y in iterator)]
        assert [y.numpy().tolist() for y in found] == expected
        with pytest.raises(tf.errors.OutOfRangeError):
            iterator.get_next()
    assert len(traces) == 1
    iterator = iter(data.as_tf_dataset())
    captured = tf.function(lambda: next(iterator)[1])
    order = [data[i][1].tolist() for i in range(5)]
    assert [captured().numpy().tolist() for _ in range(5)] == order


def test_an_iterator_is_one_of_tf_data(tmp_path):
    pytest.importorskip("tensorflow")
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=5)
    features, _ = iter(data.as_tf_dataset()).get_next()
    np.testing.assert_array_equal(features, data[0][0])


def test_tf_data_in_other_pipelines(tmp_path):
    tf = pytest.importorskip("tensorflow")
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=3, shuffle=True)
    expected = []
    for epoch in range(2):
        data.epoch = epoch
        expected += [data[i][1].tolist() for i in range(len(data))]
    data.epoch = 0
    dataset = data.as_tf_dataset()
    assert [y.numpy().tolist() for _, y in dataset.repeat(2).prefetch(20)] == expected
    assert data.epoch == 2
    one = [y.numpy().tolist() for _, y in dataset.take(1)]
    assert [y.numpy().tolist() for _, y in dataset.take(1)] == one
    assert data.epoch == 2
    assert all((a[1] == b[1]).numpy().all() for a, b in tf.data.Dataset.zip((dataset, dataset)))
    assert data.epoch == 4

    @tf.function
    def total():
        found = tf.constant(0, tf.int64)
        for _, y in dataset:
            found += tf.reduce_sum(y)
        return found

    assert [int(total()), int(total())] == [190, 190]
    assert data.epoch == 6


@on_tensorflow
def test_several_steps_in_one_execution_lose_no_batch(tmp_path):
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=3)
    head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    head.compile("sgd", "mse", steps_per_execution=8)
    head.fit(data.as_tf_dataset(), epochs=3, shuffle=False, verbose=0)
    assert data.epoch == 3
    assert int(head.optimizer.iterations) == 21


@core
def test_a_copy_and_a_pickle_serve_the_same(tmp_path):
    data = FeatureCache(tmp_path).features(rescaling(), (X, Y), batch_size=3, shuffle=True)
    data.epoch = 2
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert [other[i][1].tolist() for i in range(7)] == [data[i][1].tolist() for i in range(7)]


@core
def test_a_manifest_is_summed_up_while_shards_are_added():
    class Files(dict):
        def values(self):  # as the other thread does at any moment; see `_make_room`
            manifest.shards[len(manifest.shards)] = Shard(1, None, {})
            return super().values()

    manifest = Manifest("key", "what", 1, 1, 1, None, [], None, [])
    manifest.shards = {0: Shard(1, None, Files(a=(7, ""))), 1: Shard(1, None, {"b": (8, "")})}
    assert manifest.num_bytes() == 15


@core
def test_a_folder_that_another_process_is_making_is_not_refused(tmp_path, monkeypatch):
    listed = Store._listed
    with contextlib.ExitStack() as stack:

        def listed_late(self):
            stack.enter_context(files.replacing(self.directory / MARKER)).write_text("{}")
            return listed(self)

        monkeypatch.setattr(Store, "_listed", listed_late)
        FeatureCache(tmp_path)


@core
def test_threads_that_want_the_same_compute_it_once(tmp_path, monkeypatch):
    begun = []
    begin = Entry.begin
    monkeypatch.setattr(Entry, "begin", lambda *args: (begun.append(1), begin(*args))[1])
    cache, extractor, found = FeatureCache(tmp_path), rescaling(), []
    threads = [
        threading.Thread(target=lambda: found.append(served(cache.features(extractor, X))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [np.array_equal(each, 3 * X) for each in found] == [True] * 4
    assert len(begun) == 1


@core
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")  # noqa: PTH112
def test_an_interruption_leaves_no_thread_lock_or_file_open(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    cache.features(rescaling(), X)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    predict, calls = keras.Model.predict_on_batch, []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(keras.Model, "predict_on_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.features(rescaling(), (X, Y), batch_size=4)
    gc.collect()
    now = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    assert now[0] <= before[0]
    assert now[1] <= before[1]
    assert len(cache.features(rescaling(), (X, Y), batch_size=4)) == 5


@core
def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache("der Ordner ä")
    monkeypatch.chdir("/")
    cache.features(rescaling(), X)
    assert (tmp_path / "der Ordner ä" / "keras_xfer_features.json").exists()
