"""A schedule on cached features ends as the same schedule without a cache, in every way that can be
told: weights, optimizer, logs, what callbacks saw."""

import contextlib
import io

import keras
import numpy as np
import pytest

from keras_xfer import (
    Backbone,
    BackupAndRestore,
    BestCheckpoint,
    EpochTiming,
    FeatureCache,
    Stage,
    StagedUnfreezing,
    fit_staged,
)
from tests.schedules import LOSS, assert_equal_weights, weights

pytestmark = pytest.mark.core

# What the trainer of a backend cannot change: JAX would compile for minutes what the others prove.
but_jax = pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX compiles for long")
# TensorFlow traces both ways of training anew in each stage, which takes longer than they run.
EAGER = {"run_eagerly": True} if keras.backend.backend() == "tensorflow" else {}
SCHEDULE = (
    Stage(epochs=2, learning_rate=1e-2),
    Stage("middle", epochs=2, learning_rate={"head": 2e-3, "backbone": 1e-3}),
)
LONG = (
    SCHEDULE[0],
    Stage("high", epochs=1, learning_rate=3e-3),
    SCHEDULE[1],
    Stage("all", epochs=1, learning_rate=1e-3),
)


def data():
    rng = np.random.default_rng(0)
    return rng.random((30, 6), "float32"), rng.integers(0, 3, 30)


def backbone(**kwargs):
    dense = keras.layers.Dense
    base = keras.Sequential(
        [
            keras.Input((6,)),
            dense(16, activation="relu", name="low"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dropout(0.2, seed=5),
            dense(16, activation="relu", name="middle", kernel_regularizer="l2"),
            keras.layers.BatchNormalization(name="bn2"),
            dense(4, activation="relu", name="high"),
        ]
    )
    for bn in (base.get_layer("bn"), base.get_layer("bn2")):
        bn.moving_mean.assign(np.linspace(0, 0.3, 16))
    return Backbone(base, name="base", **kwargs)


def compiled(optimizer=None, *, seed=1, batch_norm="frozen", **kwargs):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Rescaling(2.0, name="scale"),
            backbone(batch_norm=batch_norm),
            keras.layers.Dropout(0.3, seed=6),
            keras.layers.Dense(3, name="head", kernel_regularizer="l2"),
        ]
    )
    kwargs = {"metrics": ["accuracy"], **EAGER, **kwargs}
    model.compile(optimizer or keras.optimizers.Adam(1e-2), LOSS(from_logits=True), **kwargs)
    return model


def traced(optimizer=None, **kwargs):
    """As users compile it, for what depends on how a step is run."""
    return compiled(optimizer, run_eagerly=False, **kwargs)


def plain(model, schedule=SCHEDULE, *, epochs=4, callbacks=(), **kwargs):
    """The schedule as it runs without a cache."""
    x, y = data()
    stages = schedule if isinstance(schedule, StagedUnfreezing) else StagedUnfreezing(schedule)
    kwargs = {"batch_size": 8, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, epochs=epochs, callbacks=[stages, *callbacks], **kwargs)


def cached(model, schedule=SCHEDULE, *, x=None, y=None, **kwargs):
    if x is None:
        x, y = data()
        kwargs = {"batch_size": 8, **kwargs}
    kwargs = {"shuffle": False, "verbose": 0, **kwargs}
    kwargs.setdefault("boundary", "always")
    return fit_staged(model, x, y, stages=schedule, **kwargs)


def assert_equal_histories(one, other):
    one, other = one.history, other.history
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, err_msg=name)


def slots(model):
    return [np.array(v) for v in map(keras.ops.convert_to_numpy, model.optimizer.variables)]


def assert_equal_runs(schedule=SCHEDULE, optimizer=lambda: None, made=traced, **kwargs):
    """Train both ways; return the boundaries of the cached one."""
    expected, found = made(optimizer()), made(optimizer())
    before = weights(found)
    assert_equal_histories(
        plain(expected, schedule, **kwargs),
        history := cached(found, schedule, **kwargs),
    )
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, weights(found), strict=True))
    for mine, theirs in zip(slots(expected), slots(found), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-7)
    return [each.at for each in history.boundaries]


# --- The same training ---------------------------------------------------------------------------


def test_a_schedule_ends_as_it_does_without_a_cache():
    at = assert_equal_runs(LONG, epochs=6, validation_data=data())
    assert at == ["head", "before high", "before middle", None]


@but_jax
@pytest.mark.parametrize("batch_norm", ["affine", "train"])
def test_batch_normalization_above_the_cut_trains_as_it_does_without_a_cache(batch_norm):
    def made(optimizer):
        return traced(optimizer, batch_norm=batch_norm)

    at = assert_equal_runs(SCHEDULE, made=made, validation_data=data())
    assert at == ["head", "before middle"]


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            lambda: keras.optimizers.SGD(1e-2, momentum=0.9, global_clipnorm=0.5),
            id="sgd",
            marks=but_jax,
        ),
        pytest.param(
            lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, use_ema=True, ema_momentum=0.8),
            id="ema",
            marks=but_jax,
        ),
        pytest.param(
            lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
            id="accumulation",
            marks=but_jax,
        ),
        pytest.param(
            lambda: keras.optimizers.Adam(
                keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.8)
            ),
            id="schedule",
            marks=but_jax,
        ),
    ],
)
def test_every_kind_of_optimizer_goes_on_from_stage_to_stage(optimizer):
    assert_equal_runs(optimizer=optimizer)


@but_jax
def test_rates_that_change_within_a_stage_do_so():
    cosine = keras.optimizers.schedules.CosineDecay(3e-3, 8)
    stages = [
        Stage(epochs=2, learning_rate=1e-2, warmup_epochs=1),
        Stage("middle", epochs=3, learning_rate=cosine, layer_decay=0.5, warmup_epochs=0.5),
    ]
    assert_equal_runs(stages, epochs=5)


@but_jax
def test_stages_that_end_early_go_back_to_the_best_epoch():
    def stages():
        return StagedUnfreezing(
            [
                Stage(epochs=5, learning_rate=0.5, patience=1),
                Stage("high", epochs=5, learning_rate=0.3, patience=2),
                Stage("all", epochs=2, learning_rate=1e-3),
            ],
            monitor="val_loss",
            restore_best=True,
        )

    expected, found = compiled(), compiled()
    one = plain(expected, stages(), epochs=12, validation_data=data())
    other = cached(found, stages(), epochs=12, validation_data=data())
    assert_equal_histories(one, other)
    assert one.history["stage"].count(0) < 5, "the first stage did not end early"
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


@but_jax
def test_class_weights_sample_weights_and_a_ragged_last_batch_count():
    rng = np.random.default_rng(3)
    every_other = {"validation_data": data(), "validation_freq": 2}
    assert_equal_runs(sample_weight=rng.random(30), **every_other)
    assert_equal_runs(SCHEDULE[:1], class_weight={0: 0.2, 1: 1.0, 2: 5.0}, epochs=2)


def test_several_steps_may_run_as_one():
    if keras.backend.backend() == "torch":
        pytest.skip("torch runs one step at a time")
    assert_equal_runs(made=lambda optimizer: traced(optimizer, steps_per_execution=3))


@but_jax
def test_it_may_run_eagerly():
    stages = [Stage(epochs=2, learning_rate=1e-2)]
    assert_equal_runs(
        stages, made=lambda optimizer: compiled(optimizer, run_eagerly=True), epochs=2
    )


def test_mixed_precision_trains_on_features_of_its_precision():
    def made(optimizer):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            return traced(optimizer)
        finally:
            keras.config.set_dtype_policy("float32")

    expected, found = made(None), made(None)
    assert_equal_histories(plain(expected), history := cached(found))
    assert_equal_weights(expected, found, rtol=1e-2, atol=1e-3)
    assert isinstance(found.optimizer, keras.optimizers.LossScaleOptimizer)
    assert history.boundaries[0].bytes_per_image == 4 * 2


@but_jax
def test_a_model_with_several_inputs_and_outputs():
    def made(_):
        keras.utils.set_random_seed(1)
        image, other = keras.Input((6,), name="image"), keras.Input((2,), name="other")
        features = backbone()(image)
        both = keras.layers.Concatenate()([features, keras.layers.Dense(3, name="side")(other)])
        outputs = {
            "kind": keras.layers.Dense(3, name="kind")(both),
            "size": keras.layers.Dense(1, name="size")(both),
        }
        model = keras.Model({"image": image, "other": other}, outputs)
        model.compile(
            "adam",
            {"kind": LOSS(from_logits=True), "size": "mse"},
            loss_weights={"kind": 1.0, "size": 0.3},
            metrics={"kind": ["accuracy"]},
            **EAGER,
        )
        return model

    x, y = data()
    inputs = {"image": x, "other": x[:, :2]}
    labels = {"kind": y, "size": x[:, :1]}
    expected, found = made(None), made(None)
    common = {"batch_size": 8, "shuffle": False, "verbose": 0, "validation_data": (inputs, labels)}
    one = expected.fit(inputs, labels, epochs=4, callbacks=[StagedUnfreezing(SCHEDULE)], **common)
    other = fit_staged(found, inputs, labels, stages=SCHEDULE, boundary="always", **common)
    assert_equal_histories(one, other)
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


class Batches(keras.utils.PyDataset):
    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return tuple(each[8 * index : 8 * (index + 1)] for each in self.arrays)


@but_jax
def test_data_may_come_as_a_dataset():
    expected = compiled()
    plain(expected)
    found = compiled()
    cached(found, x=Batches(data()), validation_data=Batches(data()))
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


@but_jax
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras's, of its first epoch
def test_data_may_come_from_tf_data_of_unknown_length():
    tf = pytest.importorskip("tensorflow")
    expected = compiled()
    plain(expected, LONG, epochs=6)
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(8)
    unknown = batches.filter(lambda x, y: True)
    assert int(unknown.cardinality()) == -2
    found = compiled()
    cached(found, LONG, x=unknown, validation_data=batches)
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


@but_jax
def test_every_epoch_has_an_order_of_its_own_and_the_same_with_and_without_a_cache():
    def trained(**kwargs):
        model = compiled()
        cached(model, SCHEDULE[:1], **kwargs)
        return model

    never = trained(shuffle=True, seed=1, boundary="never")
    always = trained(shuffle=True, seed=1, boundary="always")
    assert_equal_weights(never, always, rtol=1e-4, atol=1e-7)
    for other in (trained(shuffle=True, seed=2), trained()):
        with pytest.raises(AssertionError):
            assert_equal_weights(always, other, rtol=1e-4, atol=1e-7)


@but_jax
def test_without_a_seed_the_order_is_that_of_keras_set_random_seed():
    def trained(seed):
        model = compiled()
        keras.utils.set_random_seed(seed)
        cached(model, SCHEDULE[:1], shuffle=True)
        return model

    assert_equal_weights(trained(3), trained(3))
    with pytest.raises(AssertionError):
        assert_equal_weights(trained(3), trained(4))


@but_jax
def test_the_last_rows_are_split_off_for_validation():
    expected, found = compiled(), compiled()
    one = plain(expected, validation_split=0.3)
    assert_equal_histories(one, cached(found, validation_split=0.3))
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


# --- What callbacks see --------------------------------------------------------------------------


class Watching(keras.callbacks.Callback):
    """Uses the model on its own inputs in the middle of its training."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.seen = []

    def on_train_begin(self, logs=None):
        self.calls.append("begin")

    def on_train_end(self, logs=None):
        self.calls.append("end")
        self.logs = logs

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(epoch)

    def on_epoch_end(self, epoch, logs=None):
        x, y = data()
        self.seen.append((self.model.evaluate(x, y, verbose=0)[0], logs["val_loss"]))


def test_callbacks_see_the_whole_model_and_one_training(tmp_path):
    model, watching = traced(), Watching()
    best = BestCheckpoint(tmp_path / "best.keras", "val_loss")
    timing = EpochTiming()
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = cached(model, LONG, callbacks=[timing, watching, best, log], validation_data=data())
    assert watching.calls == ["begin", *range(6), "end"]
    assert watching.model is model
    assert watching.logs["val_loss"] == history.history["val_loss"][-1]
    for own, logged in watching.seen:
        assert own == pytest.approx(logged, rel=1e-4)
    loaded = keras.models.load_model(tmp_path / "best.keras")
    x, y = data()
    assert loaded.evaluate(x, y, verbose=0)[0] == pytest.approx(best.best, rel=1e-4)
    assert len(loaded.get_layer("base").model.layers) == 6
    assert timing.by_stage()["epochs"].tolist() == [2, 1, 2, 1]
    assert all(row["samples_per_second"] > 0 for row in timing.rows)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7
    assert history is model.history
    assert history.epoch == list(range(6))


def test_a_callback_may_end_it_all_within_a_stage():
    class Enough(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 2

    history = cached(compiled(), callbacks=[Enough()])
    assert history.epoch == [0, 1, 2]


@but_jax
def test_rates_lowered_by_a_callback_stay_so_until_a_stage_has_its_own():
    def lowering():
        return [keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=10.0, factor=0.5)]

    expected, found = compiled(), compiled()
    one = plain(expected, callbacks=lowering())
    assert_equal_histories(one, cached(found, callbacks=lowering()))
    assert len(set(one.history["learning_rate"])) == 3  # one more than the stages have


def test_a_failing_callback_leaves_a_model_that_works():
    class Failing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.params["steps"] == 4 and batch == 2:
                raise RuntimeError("stop here")

    model = compiled()
    with pytest.raises(RuntimeError, match="stop here"):
        cached(model, callbacks=[Failing()])
    x, y = data()
    assert np.isfinite(model.evaluate(x, y, verbose=0)[0])
    plain(model, SCHEDULE[:1], epochs=1)


def test_a_run_goes_on_from_its_backup(tmp_path):
    class InterruptError(Exception):
        pass

    class Interrupt(keras.callbacks.Callback):
        def __init__(self, epoch):
            super().__init__()
            self.at = epoch

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == self.at:
                raise InterruptError

    expected = compiled()
    one = cached(expected, shuffle=True, seed=4)
    for seed, at in ((8, 1), (9, 2), (10, 3)):  # within a stage, and where one begins
        model = compiled(seed=1)
        with contextlib.suppress(InterruptError):
            cached(
                model,
                shuffle=True,
                seed=4 if at == 1 else seed,  # the run's own is in the backup
                cache=tmp_path / "features",
                callbacks=[BackupAndRestore(tmp_path / "backup"), Interrupt(at)],
            )
    found = compiled(seed=7)  # another start, which the backup replaces
    other = cached(
        found,
        shuffle=True,
        seed=11,
        cache=tmp_path / "features",
        callbacks=[BackupAndRestore(tmp_path / "backup")],
    )
    assert_equal_histories(one, other)
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)


@but_jax
def test_the_model_trains_and_saves_afterwards(tmp_path):
    model = traced()
    cached(model)
    x, y = data()
    before = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").evaluate(x, y, verbose=0) == (
        pytest.approx(before, rel=1e-5)
    )
    model.fit(x, y, epochs=1, verbose=0)
    assert model.evaluate(x, y, verbose=0) != before
    cached(model)  # a second schedule begins anew
    assert model.history.history["stage"] == [0, 0, 1, 1]


# --- The cache -----------------------------------------------------------------------------------


@but_jax
def test_a_second_run_computes_nothing_again(tmp_path):
    cache = FeatureCache(tmp_path)
    cached(compiled(), SCHEDULE[:1], cache=cache)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(files) >= 2
    cached(compiled(), SCHEDULE[:1], cache=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files
    cached(compiled(seed=2), SCHEDULE[:1], cache=tmp_path)  # other weights
    assert len(list(tmp_path.rglob("*.npy"))) > len(files)


def test_without_a_cache_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cached(compiled(), SCHEDULE[:1])
    assert not list(tmp_path.iterdir())


@but_jax
def test_views_keep_augmented_passes():
    def made():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4, 4, 1)),
                keras.layers.RandomFlip(seed=1, name="flip"),
                Backbone(
                    keras.Sequential(
                        [keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()]
                    )
                ),
                keras.layers.Dense(3),
            ]
        )
        model.compile("sgd", LOSS(from_logits=True))
        return model

    rng = np.random.default_rng(0)
    x, y = rng.random((16, 4, 4, 1), "float32"), rng.integers(0, 3, 16)
    stages = [Stage(epochs=4, learning_rate=1e-9)]
    fit = {"stages": stages, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
    model = made()
    history = fit_staged(model, x, y, views=2, boundary="always", **fit).history
    assert history["loss"][0] == pytest.approx(history["loss"][2], rel=1e-5)
    assert history["loss"][0] != pytest.approx(history["loss"][1], rel=1e-5)
    logits = model.predict(x, verbose=0)
    still = float(np.mean(keras.ops.convert_to_numpy(LOSS(from_logits=True)(y, logits))))
    assert history["val_loss"][0] == pytest.approx(still, rel=1e-5)
    with pytest.raises(ValueError, match=r"'flip' \(RandomFlip\).*views=K"):
        fit_staged(made(), x, y, boundary="always", **fit)
    uncached = fit_staged(made(), x, y, **fit)
    assert uncached.boundaries[0].at is None
    assert "'flip'" in uncached.boundaries[0].reason


@but_jax
def test_it_says_where_each_stage_is_cut_and_why():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cached(compiled(), LONG, verbose=2, boundary="auto")
    lines = [line for line in said.getvalue().splitlines() if line.startswith("fit_staged, ")]
    assert lines[0].startswith("fit_staged, stage 1: cached at the head, 100% of the forward pass")
    assert lines[-1] == (
        "fit_staged, stage 4: uncached, it lasts a single epoch, which would use each feature once"
    )


# --- Errors --------------------------------------------------------------------------------------


def check_uncached(make, reason, error=None):
    """A model that cannot be cut trains as a whole, says why, and is refused where it must be cut."""
    history = cached(model := make(), boundary="auto")
    assert {each.at for each in history.boundaries} == {None}
    assert reason in history.boundaries[0].reason
    expected = make()
    plain(expected)
    assert_equal_weights(expected, model)
    with pytest.raises(ValueError, match=error or reason):
        cached(make())


class OwnStep(keras.Model):
    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


def test_a_model_with_steps_of_its_own_trains_uncached():
    def own(_=None):
        made = compiled()
        inputs = keras.Input((6,))
        model = OwnStep(inputs, made(inputs))
        model.compile("adam", LOSS(from_logits=True), metrics=["accuracy"])
        return model

    check_uncached(own, "OwnStep has a train_step of its own")


class OwnCall(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x, training=None):
        return self.inner(x, training=training)


def test_a_model_without_a_graph_trains_uncached():
    def own():
        model = OwnCall(compiled())
        model.build((None, 6))
        model.compile("adam", LOSS(from_logits=True), metrics=["accuracy"], **EAGER)
        return model

    check_uncached(own, "no graph to cut", "no graph to cut.*functional API")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"boundary": "sometimes"}, ValueError, "'auto', 'always', 'never'"),
        ({"callbacks": [StagedUnfreezing(SCHEDULE)]}, ValueError, "stages="),
        ({"bach_size": 3}, TypeError, "nearest is 'batch_size'"),
        ({"cache": 3}, TypeError, "Received: cache=3"),
        ({"validation_split": 0.99}, ValueError, "validation_split=0.99 with 30 rows"),
        ({"x": [[1.0]], "y": [1]}, ValueError, "numpy.asarray"),
        ({"steps_per_epoch": 3}, ValueError, "steps_per_epoch=3"),
        ({"schedule": [Stage(epochs=1), Stage("all", learning_rate=1e-4)]}, ValueError, "stage 2"),
    ],
)
def test_what_it_cannot_do_it_says(wrong, error, message):
    with pytest.raises(error, match=message):
        cached(compiled(), **wrong)


def test_a_model_must_be_compiled():
    model = keras.Sequential([keras.Input((6,)), backbone(), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="compile"):
        cached(model)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's traces")
def test_features_are_traced_once_and_steps_for_batches_of_any_number_of_rows(
    monkeypatch,
):
    traces = []
    for name in ("train_step", "test_step", "predict_step"):
        own = getattr(keras.Model, name)

        def step(self, batch, own=own, name=name):
            traces.append((name, keras.tree.flatten(batch)[0].shape[0]))
            return own(self, batch)

        monkeypatch.setattr(keras.Model, name, step)
    epochs = [Stage(epochs=2, learning_rate=1e-2)]
    cached(traced(), epochs, validation_data=data(), validation_batch_size=8)  # 30 rows by 8
    # A step is traced once more where Adam's variables are made in it.
    assert set(traces) == {("predict_step", 8), ("train_step", None), ("test_step", None)}
    assert traces.count(("predict_step", 8)) == traces.count(("test_step", None)) == 1
