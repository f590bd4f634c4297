"""Label smoothing of integer labels: the oracle is Keras's own loss on the same labels, one-hot."""

import keras
import numpy as np
import pytest

from keras_xfer.losses import SmoothedSparseCategoricalCrossentropy

pytestmark = pytest.mark.core

LABELS = np.array([2, 0, 1, 2, 3])
ONE_HOT = np.eye(4, dtype="float32")[LABELS]


def predictions(*, from_logits):
    logits = np.random.default_rng(0).normal(0, 2, (5, 4)).astype("float32")
    if from_logits:
        return logits
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_it_is_keras_loss_of_one_hot_labels(shape, smoothing, from_logits, reduction):
    arguments = {"from_logits": from_logits, "reduction": reduction}
    loss = SmoothedSparseCategoricalCrossentropy(smoothing, **arguments)
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=smoothing, **arguments)
    y_pred = predictions(from_logits=from_logits)
    for dtype in ("int32", "uint8", "float32"):
        got = keras.ops.convert_to_numpy(loss(LABELS.astype(dtype).reshape(shape), y_pred))
        np.testing.assert_allclose(got, expected(ONE_HOT, y_pred), rtol=1e-6)


def test_its_closed_form():
    """Of two classes: half of the smoothing goes to the other one."""
    loss = SmoothedSparseCategoricalCrossentropy(0.2)
    expected = -(0.9 * np.log(0.75) + 0.1 * np.log(0.25))
    assert float(loss([1], [[0.25, 0.75]])) == pytest.approx(expected, rel=1e-6)


def test_sample_weights():
    loss = SmoothedSparseCategoricalCrossentropy(0.3)
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=0.3)
    y_pred, weight = predictions(from_logits=False), np.array([0.0, 1, 2, 0.5, 3], "float32")
    got = float(loss(LABELS, y_pred, sample_weight=weight))
    assert got == pytest.approx(float(expected(ONE_HOT, y_pred, sample_weight=weight)), rel=1e-6)
    assert got != pytest.approx(float(loss(LABELS, y_pred)), rel=1e-3)


def test_training_with_it_and_its_file(tmp_path):
    """As training on one-hot labels; and a model compiled with it reloads."""
    x = np.random.default_rng(1).normal(size=(5, 6)).astype("float32")

    def model(loss):
        keras.utils.set_random_seed(3)
        made = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="softmax")])
        made.compile(keras.optimizers.SGD(0.5), loss)
        return made

    mine = model(SmoothedSparseCategoricalCrossentropy(0.25, name="smoothed"))
    theirs = model(keras.losses.CategoricalCrossentropy(label_smoothing=0.25))
    start = mine.get_weights()[0]
    for made, labels in ((mine, LABELS), (theirs, ONE_HOT)):
        made.fit(x, labels, epochs=3, batch_size=2, shuffle=False, verbose=0)
    assert np.abs(mine.get_weights()[0] - start).max() > 0.01
    for one, other in zip(mine.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    mine.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.loss.get_config() == mine.loss.get_config()
    assert again.loss.get_config()["label_smoothing"] == 0.25
    assert again.evaluate(x, LABELS, verbose=0) == pytest.approx(
        theirs.evaluate(x, ONE_HOT, verbose=0), rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2])
def test_smoothing_out_of_its_range(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing={smoothing}"):
        SmoothedSparseCategoricalCrossentropy(smoothing)
