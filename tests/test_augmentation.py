"""Augmentation changes training images as it says, and nothing else."""

import keras
import numpy as np
import pytest

from keras_xfer.images import make_augmentation

pytestmark = pytest.mark.core

NOTHING = {"shift": 0.0, "zoom": 0.0, "flip": False}
ALL = {"shift": 0.2, "zoom": 0.2, "rotation": 0.1, "shear": 0.1}


def ramp(count=64, width=10):
    """Images whose value is the column, ten times over."""
    row = 10 * np.arange(width, dtype="float32")
    return np.broadcast_to(row[None, None, :, None], (count, 6, width, 3)).copy()


def run(model, images, *, training=True):
    return keras.ops.convert_to_numpy(model(images, training=training))


def test_it_does_nothing_but_in_training():
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    model = make_augmentation(**ALL, seed=1)
    np.testing.assert_array_equal(run(model, images, training=False), images)
    changed = run(model, images)
    assert changed.shape == images.shape
    assert all(np.abs(one - other).max() > 1 for one, other in zip(changed, images, strict=True))
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_keras_own_shear_still_does_not_load():
    """Once it does, keras_xfer.layers.random_shear can go."""
    layer = keras.layers.RandomShear(0.1, 0.1)
    with pytest.raises(TypeError, match="in the range"):
        keras.layers.RandomShear.from_config(layer.get_config())


def test_flipping_alone():
    """Each image is itself or its mirror image, and there are some of both."""
    images = np.random.default_rng(0).uniform(0, 255, (64, 5, 7, 3)).astype("float32")
    got = run(make_augmentation(shift=0, zoom=0, seed=2), images)
    is_same = np.array([np.array_equal(*pair) for pair in zip(got, images, strict=True)])
    assert 10 < is_same.sum() < 54
    np.testing.assert_allclose(got[~is_same], images[~is_same, :, ::-1], atol=1e-4)


def test_shifting_by_no_more_than_it_says():
    """The middle of a ramp moves by one number, and the edge repeats."""
    got = run(make_augmentation(**{**NOTHING, "shift": 0.2}, seed=3), ramp())
    moved = got[:, 0, 2:8, 0] - ramp()[:, 0, 2:8, 0]
    inner = np.median(moved, axis=1)
    assert np.abs(inner).max() <= 20 + 1e-3  # 0.2 of ten columns
    assert np.abs(inner).max() > 10
    assert got.min() == 0
    assert got.max() == pytest.approx(90)
    assert (np.diff(got, axis=2) >= -1e-3).all()


@pytest.mark.parametrize("what", ["shift", "zoom", "rotation", "shear"])
def test_nothing_comes_in_from_beyond_the_edge(what):
    images = np.full((8, 8, 8, 3), 200, "float32")
    model = make_augmentation(**{**NOTHING, what: 0.4}, seed=4)
    assert len(model.layers) == 1
    np.testing.assert_allclose(run(model, images), 200, rtol=1e-5)
    assert np.abs(run(model, ramp(8)) - ramp(8)).max() > 1


def test_what_it_is_made_of():
    kinds = [type(layer).__name__ for layer in make_augmentation(**ALL).layers]
    assert kinds == [
        "RandomFlip",
        "RandomTranslation",
        "RandomZoom",
        "RandomRotation",
        "RandomShear",
    ]
    assert make_augmentation(shift=0.1, zoom=0, name="mine").name == "mine"


def test_seeds():
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    one, same, other = (run(make_augmentation(**ALL, seed=seed), images) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1
    assert [layer.seed for layer in make_augmentation(**ALL, seed=5).layers] == [5, 6, 7, 8, 9]


def test_float32_whatever_the_policy():
    keras.config.set_dtype_policy("mixed_float16")
    model = make_augmentation(**{**NOTHING, "shift": 0.1}, seed=7)
    images = np.full((2, 4, 4, 3), 254.3, "float32")
    got = run(model, images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, 254.3, atol=1e-3)  # float16 has 254.25 and 254.375


@pytest.mark.parametrize("shear", [0.0, 0.1])
def test_it_reloads(tmp_path, shear):
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    augmentation = make_augmentation(**{**ALL, "shear": shear}, seed=8)
    model = keras.Sequential([keras.Input((8, 8, 3)), augmentation])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(run(again, images), run(model, images))
    np.testing.assert_array_equal(run(again, images, training=False), images)
