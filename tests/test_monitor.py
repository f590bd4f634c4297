"""Monitor: what it compares, how it tells the direction, and which missing log it waits for."""

import copy
import math

import keras
import numpy as np
import pytest

from keras_xfer import monitor
from keras_xfer.monitor import Monitor, as_float, direction_of

pytestmark = pytest.mark.core


def small_model(**compile_arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", **{"loss": "mse", "metrics": ["mae"], **compile_arguments})
    return model


def begun(*arguments, model=None, **keywords):
    made = Monitor("Owner", *arguments, **keywords)
    made.begin(model or small_model())
    return made


class Watch(keras.callbacks.Callback):
    """A callback that monitors as the package's own do."""

    def __init__(self, name):
        super().__init__()
        self.values, self.monitor = [], Monitor("Watch", name)

    def on_train_begin(self, logs=None):
        self.monitor.begin(self.model)

    def on_test_end(self, logs=None):
        self.monitor.validated()

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(self.monitor.value(self.model, logs))


# Directions


def test_direction_of_every_metric_of_keras_is_the_one_that_keras_knows():
    model = small_model()
    known = {
        "min": monitor._LOWER_IS_BETTER,
        "max": monitor._HIGHER_IS_BETTER,
    }
    special = {
        "FBetaScore": {},
        "IoU": {"num_classes": 2, "target_class_ids": [0]},
        "OneHotIoU": {"num_classes": 2, "target_class_ids": [0]},
        "MeanIoU": {"num_classes": 2},
        "OneHotMeanIoU": {"num_classes": 2},
        "PrecisionAtRecall": {"recall": 0.5},
        "RecallAtPrecision": {"precision": 0.5},
        "SensitivityAtSpecificity": {"specificity": 0.5},
        "SpecificityAtSensitivity": {"sensitivity": 0.5},
    }
    checked = 0
    for name in dir(keras.metrics):
        cls = getattr(keras.metrics, name)
        if name in ("Metric", "Mean", "Sum", "MeanMetricWrapper") or not isinstance(cls, type):
            continue
        direction = {"up": "max", "down": "min"}.get(
            getattr(cls(**special.get(name, {})), "_direction", None)
        )
        if direction:
            assert issubclass(cls, known[direction]), name
        assert any(issubclass(cls, classes) for classes in known.values()), name
        assert (
            direction_of(f"val_{cls(**special.get(name, {})).name}", model) == direction
            or not direction
        )
        checked += 1
    assert checked > 35


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val_loss", "min"),
        ("loss", "min"),
        ("val_head_loss", "min"),
        ("val_accuracy", "max"),
        ("acc", "max"),
        ("val_auc_1", "max"),
        ("val_head_sparse_categorical_accuracy", "max"),
        ("val_f1_score", "max"),
        ("precision_2", "max"),
        ("val_mean_absolute_error", "min"),
        ("val_rmse", "min"),
        ("val_false_positives", "min"),
        ("val_quality", None),
        ("val_accuracy_of_x", None),
        ("val_glossy", None),
    ],
)
def test_direction_by_name(name, direction):
    assert direction_of(name, small_model()) == direction


def test_the_class_of_the_compiled_metric_goes_before_its_name():
    model = small_model(metrics=[keras.metrics.MeanAbsoluteError(name="quality")])
    model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0)  # TensorFlow builds metrics here
    assert begun("val_quality", model=model).direction == "min"


def test_so_it_does_in_the_first_fit():
    model = small_model(metrics=[keras.metrics.MeanAbsoluteError(name="accuracy")])
    watch = Watch("accuracy")
    model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0, callbacks=[watch])
    assert watch.monitor.direction == "min"


def test_a_direction_that_cannot_be_told_asks_for_the_mode():
    model = small_model(metrics=[])
    model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0)
    message = r"Owner cannot tell.*higher or a lower.*monitor='quality'.*mode='max' or mode='min'"
    with pytest.raises(ValueError, match=message):
        begun("quality", model=model)
    assert begun("quality", "max", model=model).direction == "max"


def test_a_model_that_is_not_built_may_tell_later():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    made = begun("quality", model=model)
    assert made.direction is None
    with pytest.raises(ValueError, match="Owner cannot tell"):
        made.value(model, {"quality": 0.5})


# Comparing


@pytest.mark.parametrize(
    ("mode", "min_delta", "value", "than", "better"),
    [
        ("max", 0.0, 0.5, None, True),
        ("max", 0.0, 0.75, 0.5, True),
        ("max", 0.0, 0.5, 0.5, False),
        ("max", 0.25, 0.75, 0.5, False),
        ("max", 0.25, 0.875, 0.5, True),
        ("max", 0.0, math.nan, None, False),
        ("max", 0.0, math.inf, 0.5, False),
        ("min", 0.0, 0.25, 0.5, True),
        ("min", 0.0, 0.75, 0.5, False),
        ("min", 0.25, 0.25, 0.5, False),
        ("min", 0.25, 0.125, 0.5, True),
        ("min", 0.0, -math.inf, 0.5, False),
    ],
)
def test_which_value_is_better(mode, min_delta, value, than, better):
    assert begun("quality", mode, min_delta).is_better(value, than) is better


@pytest.mark.parametrize("convert", [float, np.float32, np.array, keras.ops.convert_to_tensor])
def test_one_number_whatever_holds_it(convert):
    value = begun("loss").value(small_model(), {"loss": convert(0.5)})
    assert (type(value), value) == (float, 0.5)
    assert as_float(0.1) == 0.1  # not rounded to float32


@pytest.mark.parametrize("log", [[0.1, 0.2], "0.5", None])
def test_what_is_not_one_number_is_refused(log):
    with pytest.raises(ValueError, match=r"Owner expects .* one number.*Received: loss="):
        begun("loss").value(small_model(), {"loss": log})


# A log that is not there


def test_a_log_of_the_validation_is_waited_for_and_no_other():
    model = small_model()
    made = begun("val_loss", model=model)
    assert made.seen is None
    assert made.value(model, {"loss": 1.0}) is None
    assert made.seen is False
    made.validated()
    assert made.value(model, {"loss": 1.0, "val_loss": 0.5}) == 0.5
    assert made.value(model, {"loss": 1.0}) is None  # the next epoch is without again
    assert made.seen is True
    made.begin(model)
    assert made.seen is None

    message = r"Owner expects a log that every epoch .* has\. Received: monitor='{}'.*\['loss'\]"
    with pytest.raises(ValueError, match=message.format("accuracy")):
        begun("accuracy", model=model).value(model, {"loss": 1.0})
    made.validated()
    with pytest.raises(ValueError, match=message.format("val_loss")):
        made.value(model, {"loss": 1.0})
    with pytest.raises(ValueError, match="monitor='val_auc'"):  # nor could validation log it
        begun("val_auc", model=model).value(model, {"loss": 1.0})


def test_in_a_fit_of_a_deep_copy():
    x, y = np.ones((4, 3)), np.ones((4, 1))
    original = Watch("val_mae")
    watch = copy.deepcopy(original)
    arguments = {"epochs": 4, "validation_freq": 2, "verbose": 0, "callbacks": [watch]}
    history = small_model().fit(x, y, validation_data=(x, y), **arguments).history
    first, second = history["val_mae"]
    assert watch.values == [None, first, None, second]
    assert original.values == []
    with pytest.raises(ValueError, match="fit was given no validation_data"):
        small_model().fit(x, y, **arguments)


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"monitor": ""}, "monitor=''"),
        ({"monitor": None}, "monitor=None"),
        ({"mode": "up"}, "mode='up'"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"min_delta": math.inf}, "min_delta=inf"),
    ],
)
def test_wrong_arguments(arguments, received):
    with pytest.raises(ValueError, match=rf"Owner expects.*Received: {received}"):
        Monitor("Owner", **{"monitor": "loss", **arguments})
