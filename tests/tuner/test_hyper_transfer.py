"""What a trial builds and how it trains: the oracles are keras.applications and trainings by hand."""

import gc

import keras
import keras_tuner
import numpy as np
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from keras_xfer.losses import SmoothedSparseCategoricalCrossentropy
from keras_xfer.tuner import HyperTransfer
from tests.tuner.hypermodels import (
    FIXED,
    SHAPE,
    Watching,
    assert_same,
    copies,
    data,
    differ,
    drawn,
    fit,
    hypermodel,
    inside,
    tiny,
)

TENSORFLOW = keras.backend.backend() == "tensorflow"


def features(model, images):
    """What a model's backbone gives for images."""
    until = keras.Model(model.input, model.get_layer("backbone").output)
    return keras.ops.convert_to_numpy(until(images, training=False))


def built(hp=None, **kwargs):
    return hypermodel(**kwargs).build(hp or keras_tuner.HyperParameters())


# --- Images come in as the backbone was trained on them --------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(("name", "module"), [("MobileNetV2", "mobilenet_v2"), ("VGG16", "vgg16")])
def test_images_of_an_application(name, module, dtype):
    """Range -1 to 1 of one; the other's channels turned round, and its means taken off."""
    model = built(backbones=[name], weights=None, input_shape=(32, 32, 3))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(dtype)
    original = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg"
    )
    original.set_weights(inside(model))
    prepare = getattr(keras.applications, module).preprocess_input
    expected = original.predict(prepare(images.astype("float32")), verbose=0)
    scale = np.abs(expected).max()  # small, of random weights
    np.testing.assert_allclose(features(model, images) / scale, expected / scale, atol=1e-4)
    unprepared = original.predict(images.astype("float32"), verbose=0)
    assert np.abs(unprepared - expected).max() > 0.01 * scale


def test_images_of_another_size():
    """Resized as Keras resizes, in the model, whether the search or the backbone says to what."""
    images = np.random.default_rng(0).uniform(0, 255, (2, 12, 16, 3)).astype("float32")
    own = tiny()
    resized = keras.layers.Resizing(8, 8)(images)
    expected = keras.ops.convert_to_numpy(own(resized)).mean(axis=(1, 2))
    by_backbone = built(backbones={"tiny": own}, input_shape=(12, 16, 3))
    by_search = built(
        backbones=[lambda input_shape: tiny(shape=input_shape)],
        input_shape=(12, 16, 3),
        space={**FIXED, "image_size": 8},
    )
    for model in (by_backbone, by_search):
        assert model.input_shape == (None, 12, 16, 3)
        assert model.get_layer("backbone").model.input_shape == (None, *SHAPE)
        np.testing.assert_allclose(features(model, images), expected, rtol=1e-3, atol=1e-4)


def test_image_size_is_searched():
    made = hypermodel(
        backbones=[lambda input_shape: tiny(shape=input_shape)],
        input_shape=(12, 12, 3),
        space={**FIXED, "image_size": [8, 10]},
    )
    for size in (8, 10):
        model = made.build(drawn(image_size=size))
        assert model.get_layer("backbone").model.input_shape == (None, size, size, 3)


@pytest.mark.parametrize("shape", [(16, 16, 3), (None, None, 3)])
@pytest.mark.parametrize("is_own", [True, False])
def test_image_size_of_a_backbone_that_takes_any(shape, is_own):
    images = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype("float32")
    own = tiny(shape=(None, None, 3))
    made = hypermodel(
        backbones=[own] if is_own else [lambda: tiny(shape=(None, None, 3))],
        input_shape=shape,
        space={**FIXED, "image_size": [16, 32]},
    )
    for size in (32, 16):
        resized = keras.layers.Resizing(size, size)(images)
        expected = keras.ops.convert_to_numpy(own(resized)).mean(axis=(1, 2))
        got = features(made.build(drawn(image_size=size)), images)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("image_size", [16, [8, 16]])
def test_image_size_of_a_backbone_that_takes_another(image_size):
    message = "backbone 'tiny', which takes images of 8 x 8 pixels"
    space = {**FIXED, "image_size": image_size}
    with pytest.raises(ValueError, match=message):
        hypermodel(space=space)
    hypermodel(space={**FIXED, "image_size": 8})
    # Of a function it is known once it has been called.
    made = hypermodel(backbones=[tiny], space=space)
    with pytest.raises(ValueError, match=message):
        made.build(drawn(image_size=16))


def test_grey_images_of_a_backbone_that_takes_colour():
    images = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 1)).astype("float32")
    expected = keras.ops.convert_to_numpy(tiny()(np.repeat(images, 3, axis=-1)))
    got = features(built(input_shape=(8, 8, 1)), images)
    np.testing.assert_allclose(got, expected.mean(axis=(1, 2)), rtol=1e-3, atol=1e-4)


def test_grey_images_of_an_application_with_weights(tmp_path):
    original = keras.applications.MobileNetV2((32, 32, 3), include_top=False, weights=None)
    original.save_weights(tmp_path / "colour.weights.h5")
    model = built(
        backbones=["MobileNetV2"],
        input_shape=(32, 32, 1),
        weights=str(tmp_path / "colour.weights.h5"),
    )
    assert model.get_layer("backbone").model.input_shape[-1] == 3


def test_images_of_any_size_are_resized_to_what_the_backbone_was_trained_on():
    model = built(backbones=["MobileNetV2"], weights=None, input_shape=None)
    inputs = model.get_layer("backbone").input
    assert tuple(inputs.shape[1:3]) == (224, 224)


def test_augmentation_acts_in_training_alone():
    model = built(space={**FIXED, "augment": 1.0})
    images = data()[0]
    still = built().get_layer("backbone")
    expected = keras.ops.convert_to_numpy(still(images))
    np.testing.assert_allclose(features(model, images), expected, rtol=1e-4, atol=1e-5)
    augmentation = model.get_layer("augmentation")
    assert np.abs(np.array(augmentation(images, training=True)) - images).max() > 1
    assert [layer.name for layer in model.layers][:2] == ["images", "augmentation"]
    assert "augmentation" not in [layer.name for layer in built().layers]


def test_whether_images_are_mirrored():
    for flip in (True, False):
        layers = built(space={**FIXED, "augment": 0.5}, flip=flip).get_layer("augmentation").layers
        assert any("flip" in layer.name for layer in layers) is flip


def test_a_model_that_augments_reloads(tmp_path):
    model = built(space={**FIXED, "augment": 0.5})
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").output_shape == (None, 3)


def test_a_model_reloads(tmp_path):
    model, _ = fit(hypermodel())
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    images = data()[0]
    np.testing.assert_array_equal(
        again.predict(images, verbose=0), model.predict(images, verbose=0)
    )


# --- The head, and what it is compiled with --------------------------------------------------


def test_the_head():
    space = {**FIXED, "head_layers": 2, "head_units": 10, "dropout": 0.3}
    model = built(space=space)
    assert [type(each).__name__ for each in model.layers[-4:]] == [
        "Dense",
        "Dense",
        "Dropout",
        "Dense",
    ]
    assert [each.units for each in model.layers if hasattr(each, "units")] == [10, 10, 3]
    assert model.get_layer("head_dropout").rate == 0.3
    weights = copies(model.layers[-4].weights + model.layers[-3].weights + model.layers[-1].weights)
    images = data()[0]
    x = features(model, images)
    for kernel, bias in (weights[0:2], weights[2:4]):
        x = np.maximum(x @ kernel + bias, 0)
    x = np.exp(x @ weights[4] + weights[5])
    expected = x / x.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-4, atol=1e-6)


def test_pooling():
    images = data()[0]
    maps = keras.ops.convert_to_numpy(tiny()(images))
    for pooling, expected in (("avg", maps.mean(axis=(1, 2))), ("max", maps.max(axis=(1, 2)))):
        got = features(built(space={**FIXED, "pooling": pooling}), images)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "loss", "activation", "labels"),
    [
        ({}, keras.losses.SparseCategoricalCrossentropy, "softmax", data()[1]),
        (
            {"space": {**FIXED, "label_smoothing": 0.1}},
            SmoothedSparseCategoricalCrossentropy,
            "softmax",
            data()[1],
        ),
        (
            {"label_mode": "categorical", "space": {**FIXED, "label_smoothing": 0.1}},
            keras.losses.CategoricalCrossentropy,
            "softmax",
            np.eye(3)[data()[1]],
        ),
        (
            {"num_classes": 1, "space": {**FIXED, "label_smoothing": 0.1}},
            keras.losses.BinaryCrossentropy,
            "sigmoid",
            data()[1] % 2,
        ),
        (
            {"num_classes": 2, "task": "regression"},
            keras.losses.MeanSquaredError,
            "linear",
            np.random.default_rng(0).random((24, 2)),
        ),
        ({"num_classes": 1, "task": "regression"}, keras.losses.MeanSquaredError, "linear", None),
    ],
)
def test_each_task(kwargs, loss, activation, labels):
    made = hypermodel(**kwargs)
    hp = keras_tuner.HyperParameters()
    model = made.build(hp)
    assert type(model.loss) is loss
    assert getattr(model.loss, "label_smoothing", 0) == kwargs.get("space", {}).get(
        "label_smoothing", 0
    )
    assert model.layers[-1].activation.__name__ == activation
    x = data()[0]
    if labels is None:
        labels = x.mean(axis=(1, 2, 3)) / 100
    history = made.fit(hp, model, x, labels, epochs=2, batch_size=8, verbose=0).history
    # The metric, recomputed by NumPy from the predictions.
    y, predicted = np.asarray(labels), model.predict(x, verbose=0)
    measured = dict(zip(model.metrics_names, model.evaluate(x, y, verbose=0), strict=False))
    measured.update(model.evaluate(x, y, verbose=0, return_dict=True))
    if activation == "linear":
        expected = np.abs(predicted - y.reshape(predicted.shape)).mean()
        assert measured["mae"] == pytest.approx(expected, rel=1e-4)
    else:
        classes = predicted[:, 0] > 0.5 if activation == "sigmoid" else predicted.argmax(axis=1)
        right = y.argmax(axis=1) if y.ndim == 2 else y
        assert measured["accuracy"] == pytest.approx((classes == right).mean())
    assert len(history["loss"]) == 2
    assert history["stage"] == [0, 1]


def test_the_users_own_head_loss_and_metrics():
    def head(hp, x):
        x = keras.layers.Dense(hp.Int("mine", 5, 9), activation="relu", name="mine")(x)
        return {"class": keras.layers.Dense(3, name="class")(x)}

    made = hypermodel(
        head=head,
        loss={"class": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        metrics={"class": ["sparse_top_k_categorical_accuracy"]},
    )
    hp = drawn()
    model = made.build(hp)
    assert [each.name for each in hp.space] == ["mine"]
    assert model.get_layer("mine").units == 5
    assert not any(layer.name == "predictions" for layer in model.layers)
    x, y = data()
    history = made.fit(hp, model, x, {"class": y}, epochs=3, verbose=0)
    assert "sparse_top_k_categorical_accuracy" in " ".join(history.history)
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", "Adam"),
        ("adamw", "AdamW"),
        ("rmsprop", "RMSprop"),
        ("sgd", "SGD"),
        ("lion", "Lion"),
    ],
)
def test_the_optimizer(name, kind):
    space = {**FIXED, "optimizer": name, "learning_rate": 0.03, "weight_decay": 0.2}
    optimizer = built(space=space).optimizer
    assert type(optimizer).__name__ == kind
    assert float(optimizer.learning_rate) == pytest.approx(0.03)
    assert optimizer.weight_decay == 0.2
    plain = built(space={**space, "weight_decay": None}).optimizer
    assert plain.weight_decay == getattr(keras.optimizers, kind)().weight_decay


# --- The dtype policy ------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "mixed_float16"])
def test_the_dtype_policy_survives_a_reset(asked):
    """KerasTuner clears the session before each trial, and the policy with it."""
    if asked is None:
        keras.config.set_dtype_policy("mixed_float16")
    made = hypermodel(dtype_policy=asked, backbones=[tiny])
    keras.utils.clear_session()
    keras.config.set_dtype_policy("float32")
    model = made.build(keras_tuner.HyperParameters())
    assert keras.config.dtype_policy().name == "float32"
    assert model.get_layer("backbone").model.get_layer("low").compute_dtype == "float16"
    assert model.get_layer("predictions").compute_dtype == "float32"
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert np.isfinite(model.predict(data()[0], verbose=0)).all()


def test_mixed_precision_trains():
    model, history = fit(hypermodel(dtype_policy="mixed_float16", backbones=[tiny]), epochs=6)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert differ(inside(model), tiny().get_weights())


# --- The schedule ----------------------------------------------------------------------------


def schedule(epochs, **kwargs):
    made = hypermodel(**kwargs)
    hp = keras_tuner.HyperParameters()
    return made.stages(hp, made.build(hp), epochs=epochs)


def test_the_stages():
    space = {**FIXED, "head_epochs": None, "warmup_epochs": 2, "layer_decay": 0.8}
    head, tuning = schedule(9, space=space)
    assert head == Stage(None, epochs=3, learning_rate=1e-2, warmup_epochs=2, name="head")
    assert tuning == Stage(
        "all",
        learning_rate={"head": 1e-2, "backbone": 5e-3},
        layer_decay=0.8,
        warmup_epochs=2,
        name="fine-tuning",
    )


def test_warmup_is_no_longer_than_its_stage():
    assert schedule(3, space={**FIXED, "warmup_epochs": 2})[0].warmup_epochs == 1


def test_one_stage_and_one_epoch():
    for stages in (schedule(9, max_stages=1), schedule(1, max_stages=3)):
        assert [(each.unfreeze, each.epochs) for each in stages] == [(None, None)]


def test_a_third_of_what_is_not_told():
    space = {name: value for name, value in FIXED.items() if name != "head_epochs"}
    assert [schedule(epochs, space=space)[0].epochs for epochs in (2, 3, 4, 9, 10)] == [
        1,
        1,
        2,
        3,
        4,
    ]


def test_more_stages_thaw_more():
    stages = schedule(5, max_stages=3, space={**FIXED, "unfreeze": "all"})
    assert [each.unfreeze for each in stages] == [None, "high", "all"]
    assert [each.epochs for each in stages] == [1, 2, None]


@pytest.mark.parametrize(
    ("unfreeze", "start"),
    [(0.1, "high"), (1.0, "all"), ("all", "all"), ("high", "high"), ("bn", "bn"), (-1, -1), (0, 0)],
)
def test_each_way_to_say_where_thawing_begins(unfreeze, start):
    """As `Backbone.unfreeze` understands it; a share is one of blocks."""
    _, history = fit(hypermodel(space={**FIXED, "unfreeze": unfreeze}), epochs=2)
    alone = Backbone(tiny())
    alone.unfreeze(start)
    head = 3 * 6 + 3
    expected = [head, head + sum(int(np.prod(w.shape)) for w in alone.trainable_variables)]
    assert history.history["trainable_params"] == expected
    assert history.history["backbone_learning_rate"] == pytest.approx([0, 5e-3])


@pytest.mark.parametrize(
    ("epochs", "count"),
    [
        (4, 4),
        (10, 7),
        *(
            pytest.param(
                *each,
            )
            for each in ((6, 4), (7, 4), (9, 5))
        ),
    ],
)
def test_the_last_stage_has_an_epoch(epochs, count):
    space = {**FIXED, "head_epochs": None, "unfreeze": "all"}
    *before, last = schedule(epochs, max_stages=count, space=space)
    assert len(before) == count - 1
    assert last.epochs is None
    assert all(each.epochs >= 1 for each in before)
    assert sum(each.epochs for each in before) < epochs


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (10, [("head", 9), ("fine-tuning", None)]),
        (11, [("head", 9), ("fine-tuning 1", 1), ("fine-tuning 2", None)]),
        (15, [("head", 9), ("fine-tuning 1", 3), ("fine-tuning 2", None)]),
    ],
)
def test_nothing_thaws_while_the_funnel_trains_heads(epochs, expected):
    space = {**FIXED, "head_epochs": None, "unfreeze": "all"}
    made, hp = hypermodel(max_stages=3, space=space), drawn(**{"tuner/head_epochs": 9})
    stages = made.stages(hp, made.build(hp), epochs=epochs)
    assert [(each.name, each.epochs) for each in stages] == expected
    assert stages[-1].unfreeze == "all"


def test_a_backbone_without_weights_has_its_head_trained():
    base = keras.Sequential([keras.Input(SHAPE), keras.layers.MaxPooling2D()], name="base")
    model, history = fit(hypermodel(backbones={"base": base}))
    assert history.history["stage"] == [0, 0, 0]
    assert len(model.trainable_variables) == 2


# --- The training, by hand -------------------------------------------------------------------


def by_hand(start, *, epochs=3, batch_norm="frozen", validation_data=None):
    """The same training without the hypermodel."""
    inputs = keras.Input(SHAPE)
    x = Backbone(tiny(), pooling="avg", batch_norm=batch_norm, name="backbone")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.set_weights(start)
    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    stages = [
        Stage(epochs=1, learning_rate=1e-2),
        Stage("all", learning_rate={"head": 1e-2, "backbone": 5e-3}),
    ]
    x, y = data()
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        validation_data=validation_data,
        callbacks=[StagedUnfreezing(stages)],
        verbose=0,
    )
    return model, history.history


@pytest.mark.parametrize("is_cached", [pytest.param(False, marks=pytest.mark.core), True])
def test_a_trial_is_the_training_by_hand(tmp_path, is_cached):
    made = hypermodel(cache=tmp_path if is_cached else None)
    hp = keras_tuner.HyperParameters()
    model = made.build(hp)
    start = copies(model.get_weights())
    _, history = fit(made, hp, model=model, validation_data=data())
    expected, told = by_hand(start, validation_data=data())
    assert_same(model.get_weights(), expected.get_weights(), atol=2e-5 if is_cached else 1e-6)
    assert differ(start[:8], expected.get_weights()[:8])
    assert history.history["stage"] == [0, 1, 1]
    for name in ("loss", "val_loss", "accuracy", "val_accuracy", "trainable_params"):
        assert history.history[name] == pytest.approx(told[name], rel=1e-3, abs=1e-5), name
    assert isinstance(history, keras.callbacks.History)
    assert {"epoch_seconds", "train_seconds"} <= set(history.history)
    assert not any(value != value for values in history.history.values() for value in values)


@pytest.mark.parametrize("batch_norm", ["affine", "train"])
def test_the_policy_of_batch_norm(batch_norm):
    made = hypermodel(space={**FIXED, "batch_norm": batch_norm})
    hp = keras_tuner.HyperParameters()
    model = made.build(hp)
    start = copies(model.get_weights())
    fit(made, hp, model=model)
    expected, _ = by_hand(start, batch_norm=batch_norm)
    # The bias before a BatchNormalization that trains has no gradient but rounding.
    assert_same(model.get_weights(), expected.get_weights(), atol=1e-4)
    bn = model.get_layer("backbone").model.get_layer("bn")
    moved = not np.allclose(bn.moving_mean, np.linspace(-1, 1, 4))
    assert moved is (batch_norm == "train")
    assert not np.allclose(bn.gamma, 1)


def test_arguments_by_position():
    """x, y, batch_size, epochs, verbose, as `Model.fit` takes them."""
    made = hypermodel()
    hp = keras_tuner.HyperParameters()
    one, other = made.build(hp), made.build(hp)
    other.set_weights(one.get_weights())
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    x, y = data()
    made.fit(hp, one, x, y, 8, 3, 0, shuffle=False, callbacks=[count])
    assert len(steps) == 9
    fit(made, hp, model=other)
    assert_same(one.get_weights(), other.get_weights())


def test_the_batch_size_is_searched():
    made = hypermodel(space={**FIXED, "batch_size": [4, 12]})
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    fit(made, drawn(batch_size=12), epochs=1, callbacks=[count])
    assert len(steps) == 2
    fit(made, drawn(batch_size=4), epochs=1, callbacks=[count])
    assert len(steps) == 2 + 6


@pytest.mark.skipif(not TENSORFLOW, reason="of tf.data")
@pytest.mark.parametrize("is_cached", [False, True])
def test_data_in_batches(tmp_path, is_cached):
    import tensorflow as tf

    made = hypermodel(cache=tmp_path if is_cached else None)
    hp = keras_tuner.HyperParameters()
    model = made.build(hp)
    start = copies(model.get_weights())
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(8)
    made.fit(hp, model, batches, epochs=3, validation_data=batches, shuffle=False, verbose=0)
    assert_same(model.get_weights(), by_hand(start)[0].get_weights(), atol=2e-5)
    searched = hypermodel(space={**FIXED, "batch_size": [4, 12]})
    with pytest.raises(ValueError, match="Leave batch_size out"):
        searched.fit(hp, model, batches, epochs=3)


@pytest.mark.skipif(not TENSORFLOW, reason="of tf.data")
@pytest.mark.parametrize("is_cached", [False, True])
def test_class_weight_may_leave_classes_out(tmp_path, is_cached):
    """They count as 1, as where Keras weighs arrays; the oracle weighs each row itself."""
    import tensorflow as tf

    x, y = data()
    made = hypermodel(cache=tmp_path if is_cached else None)
    hp = keras_tuner.HyperParameters()
    found, expected = made.build(hp), made.build(hp)
    expected.set_weights(found.get_weights())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    made.fit(hp, found, batches, class_weight={0: 3.0}, shuffle=False, verbose=0)
    fit(made, hp, model=expected, epochs=1, sample_weight=np.where(y == 0, 3.0, 1.0))
    assert_same(found.get_weights(), expected.get_weights(), atol=2e-5)


class Augmented(keras.utils.PyDataset):
    """Other images in every pass."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = (each[8 * index : 8 * (index + 1)] for each in data())
        return x + np.random.default_rng().normal(size=x.shape), y


def test_data_that_differ_from_pass_to_pass_end_a_search(tmp_path):
    made = hypermodel(cache=tmp_path)
    hp = keras_tuner.HyperParameters()
    with pytest.raises(keras_tuner.errors.FatalValueError, match="pass to pass.*'augment'.*cache"):
        made.fit(hp, made.build(hp), Augmented(), epochs=3, verbose=0)


@pytest.mark.parametrize(
    "is_cached",
    [
        False,
        pytest.param(
            True,
        ),
    ],
)
def test_one_epoch_where_nothing_is_told(tmp_path, is_cached):
    """As `Model.fit` does."""
    made = hypermodel(cache=tmp_path if is_cached else None)
    hp = keras_tuner.HyperParameters()
    history = made.fit(hp, made.build(hp), *data(), verbose=0)
    assert history.history["stage"] == [0]


@pytest.mark.parametrize("is_cached", [False, True])
def test_callbacks_see_the_training(tmp_path, is_cached):
    made = hypermodel(cache=tmp_path if is_cached else None)
    watching, stopping = Watching(), keras.callbacks.EarlyStopping("loss", min_delta=9, patience=2)
    model, history = fit(made, epochs=9, callbacks=[watching, [stopping]])
    assert len(watching.runs) == 1
    (run,) = watching.runs
    assert list(run["epochs"]) == [0, 1, 2]  # stopped
    assert run["model"] == model.name == "hyper_transfer"
    assert_same(run["epochs"][2], model.get_weights())
    assert_same(run["begin"][:8], run["epochs"][0][:8])  # the backbone, frozen
    assert differ(run["epochs"][0][:8], run["epochs"][1][:8])
    assert len(history.history["loss"]) == 3


@pytest.mark.parametrize(
    ("kwargs", "labels", "message"),
    [
        ({}, np.eye(3)[data()[1]], "label_mode='categorical'"),
        ({"label_mode": "categorical"}, data()[1], "label_mode='int'"),
    ],
)
def test_labels_of_another_kind(kwargs, labels, message):
    made = hypermodel(**kwargs)
    hp = keras_tuner.HyperParameters()
    with pytest.raises(ValueError, match=f"pass {message}"):
        made.fit(hp, made.build(hp), data()[0], labels, epochs=1, verbose=0)


def test_views_need_a_cache():
    made, hp = hypermodel(views=2), keras_tuner.HyperParameters()
    with pytest.raises(ValueError, match=r"Expected a cache.*cache=None, views=2.*cache="):
        made.fit(hp, made.build(hp), *data(), verbose=0)


# --- Weights never leak ----------------------------------------------------------------------


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_next_trial_begins_as_the_first(tmp_path, is_cached):
    own = tiny()
    before = copies(own.get_weights())
    space = {**FIXED, "batch_norm": "train"}
    made = hypermodel(backbones={"tiny": own}, space=space, cache=tmp_path if is_cached else None)
    ends = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        model = made.build(keras_tuner.HyperParameters())
        assert_same(inside(model), before)
        assert [each.path.split("/")[0] for each in model.trainable_variables] == [
            "predictions",
            "predictions",
        ]
        fit(made, model=model)
        ends.append(copies(model.get_weights()))
        assert all(differ([one], [other]) for one, other in zip(inside(model), before, strict=True))
        del model
        gc.collect()
    assert_same(*ends)  # the same training
    assert_same(own.get_weights(), before)


def test_a_model_that_is_held_is_left_alone():
    made = hypermodel()
    first, _ = fit(made)
    images = data()[0]
    held, predicted = copies(first.get_weights()), first.predict(images, verbose=0)
    for _ in range(2):
        other, _ = fit(made, epochs=2)
        assert other.get_layer("backbone").model is not first.get_layer("backbone").model
    assert_same(first.get_weights(), held)
    np.testing.assert_array_equal(first.predict(images, verbose=0), predicted)
    first.fit(*data(), verbose=0)  # and can be trained on
    assert differ(first.get_weights(), held)


def test_two_hypermodels_of_one_backbone():
    own = Backbone(tiny(), batch_norm="affine", pooling="max", name="own")
    before = copies(own.get_weights())
    one, other = (hypermodel(backbones=[own]) for _ in range(2))
    model, _ = fit(one)
    assert differ(inside(model), before)
    assert_same(inside(other.build(keras_tuner.HyperParameters())), before)
    assert_same(own.get_weights(), before)
    assert not own.trainable_variables
    assert (own.name, own.pooling, own.batch_norm) == ("own", "max", "affine")


# --- SavedModels -----------------------------------------------------------------------------


@pytest.mark.skipif(not TENSORFLOW, reason="SavedModels are TensorFlow's")
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_savedmodel_trains_and_comes_back(saved, tmp_path, is_cached):
    made = hypermodel(
        backbones=[saved("tower")],
        space={**FIXED, "unfreeze": "all"},
        cache=tmp_path if is_cached else None,
    )
    model = made.build(keras_tuner.HyperParameters())
    before = inside(model)
    model, history = fit(made, model=model)
    assert history.history["stage"] == [0, 1, 1]
    assert differ(inside(model), before)
    del model
    gc.collect()
    assert_same(inside(made.build(keras_tuner.HyperParameters())), before)


# --- Arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes=0"),
        ({"max_stages": 0}, ValueError, "max_stages=0"),
        ({"views": True}, ValueError, "views=True"),
        ({"task": "detection"}, ValueError, "task='detection'"),
        ({"label_mode": "binary"}, ValueError, "label_mode='binary'"),
        ({"input_shape": (8, 8)}, ValueError, r"input_shape=\(8, 8\)"),
        ({"cache": 3}, TypeError, "cache=3"),
    ],
)
def test_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        hypermodel(**kwargs)


def test_a_backbone_that_gives_neither_maps_nor_vectors():
    base = keras.Sequential([keras.Input(SHAPE), keras.layers.Reshape((64, 3))], name="rows")
    with pytest.raises(ValueError, match=r"backbone 'rows', which gives \(None, 64, 3\).*head="):
        built(backbones=[base])


def test_what_is_told_of_a_search():
    told = hypermodel(space={"dropout": [0.1, 0.2], "learning_rate": 0.5}).describe()
    assert told["fixed"]["learning_rate"] == 0.5
    assert "dropout" in {each["config"]["name"] for each in told["searched"]}
    assert told["backbones"] == ["tiny"]
    assert isinstance(HyperTransfer(2, backbones=[tiny], name="mine"), keras_tuner.HyperModel)
