"""structure and differences: which models are the same, and what is said of those that are not."""

import json

import keras
import pytest

from keras_xfer.structure import differences, structure

pytestmark = pytest.mark.core


def nested_model():
    inputs = keras.Input((8,))
    inner = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    joined = keras.layers.Concatenate()([keras.layers.Dense(4)(inputs), inner(inputs)])
    return keras.Model(inputs, keras.layers.Dense(2)(joined))


def test_structure_is_the_same_wherever_the_same_model_is_made(tmp_path):
    model = nested_model()
    expected = structure(model)
    assert structure(nested_model()) == expected  # other layer numbers
    model.save(tmp_path / "model.keras")
    assert structure(keras.models.load_model(tmp_path / "model.keras")) == expected
    model.trainable = False  # a stage is not another model
    assert structure(model) == expected
    model.layers[1].trainable = True
    assert structure(model) == expected
    assert expected["parameters"] == model.count_params()


def test_structure_tells_models_apart():
    layers = keras.layers
    models = [
        [layers.Dense(2), layers.Dense(3)],
        [layers.Dense(3), layers.Dense(2)],
        [layers.Dense(2), layers.Dropout(0.5), layers.Dense(3)],
        [layers.Dense(2), layers.Dense(3, use_bias=False)],
        [layers.Dense(2), layers.Dense(3, dtype="float16")],
    ]
    fingerprints = {
        structure(keras.Sequential([keras.Input((3,)), *model]))["sha256"] for model in models
    }
    assert len(fingerprints) == len(models)


def made(*layers):
    return structure(keras.Sequential([keras.Input((3,)), *layers]))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (lambda: [keras.layers.Dense(2)], []),
        (
            lambda: [keras.layers.Dense(2, use_bias=False)],
            ["2 and 1 weights", "8 and 6 parameters"],
        ),
        (lambda: [keras.layers.Dense(500)], ["8 and 2,000 parameters"]),
        (
            lambda: [keras.layers.Dense(2), keras.layers.Dense(1), keras.layers.ReLU()],
            ["1 and 3 layers", "2 and 4 weights", "8 and 11 parameters"],
        ),
        (lambda: [keras.layers.Dense(2, dtype="float16")], ["dtypes"]),
        (lambda: [keras.layers.EinsumDense("ab,bc->ac", 2, bias_axes="c")], ["classes of layers"]),
    ],
)
def test_differences_in_words(layers, expected):
    one = made(keras.layers.Dense(2))
    said = differences(one, json.loads(json.dumps(made(*layers()))))
    assert len(said) == len(expected)
    assert all(part in words for part, words in zip(expected, said, strict=True))
