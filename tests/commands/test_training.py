import dataclasses

import keras
import numpy as np
import pytest
from PIL import Image

from keras_xfer.callbacks import BestCheckpoint
from keras_xfer.commands import training
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.images import scan
from keras_xfer.layers import Backbone
from keras_xfer.stages import Stage, stages_to_yaml

SMALL = {"backbone": "MobileNet", "backbone_args": {"alpha": 0.25}, "image_size": 32}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("uint8")


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that differ in brightness alone."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, light in (("dark", 0), ("light", 128)):
        (root / name).mkdir()
        for i in range(15):
            pixels = rng.integers(light, light + 128, (32, 32, 3)).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return scan(root)


# Schedules


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 15}, (5, 10)),
        ({"epochs": 1}, (1, 0)),
        ({"epochs": 2}, (1, 1)),
        ({"epochs": 4, "head_epochs": 0}, (0, 4)),
        ({"epochs": 4, "head_epochs": 4}, (4, 0)),
        ({"epochs": 4, "unfreeze": None}, (4, 0)),
        ({"epochs": 4, "weights": None}, (0, 4)),
    ],
)
def test_epochs_of_the_stages(options, expected):
    assert Recipe(**options).stage_epochs == expected


def test_default_schedule_is_head_first_then_the_top_at_a_tenth():
    backbone = Backbone.from_application(
        "MobileNetV2", input_shape=(32, 32, 3), weights=None, alpha=0.35
    )
    head, top = training.schedule(Recipe(learning_rate=0.02, epochs=6), backbone)
    assert (head.unfreeze, head.epochs, head.learning_rate) == (None, 2, 0.02)
    assert (top.unfreeze, top.epochs) == ("block_11", 4)  # six of 17
    assert top.learning_rate == pytest.approx(0.002)


def test_from_scratch_everything_trains_at_once():
    recipe = Recipe(weights=None, epochs=3, **SMALL)
    classifier = training.build(recipe, 2)
    (stage,) = training.schedule(recipe, classifier.backbone)
    assert (stage.unfreeze, stage.epochs) == ("all", 3)
    assert classifier.backbone.batch_norm == "train"


def test_an_unfreeze_of_nothing_is_a_usage_error():
    recipe = Recipe(weights="some.h5", unfreeze="conv_pw_99", **SMALL)
    backbone = Backbone.from_application("MobileNet", weights=None, alpha=0.25)
    with pytest.raises(UsageError, match="--unfreeze: .*conv_pw_99"):
        training.schedule(recipe, backbone)


def test_a_schedule_without_gaps_needs_no_epochs():
    stages = [Stage(epochs=2), Stage("all", epochs=20, patience=3, learning_rate=1e-4)]
    assert training.epochs_of(Recipe(epochs=1), stages) == 22


@pytest.mark.parametrize(
    ("stages", "least", "without"),
    [
        ([Stage(epochs=14), Stage("all", learning_rate=1e-4)], 15, "stage 2"),
        ([Stage(patience=3), Stage("all", epochs=20, learning_rate=1e-4)], 21, "stage 1"),
        ([Stage(patience=3), Stage(epochs=2), Stage(patience=3)], 4, "stage 1, stage 3"),
    ],
)
def test_epochs_are_the_most_where_a_stage_has_none(stages, least, without):
    for epochs in (least, least + 5):
        assert training.epochs_of(Recipe(epochs=epochs), stages) == epochs
    with pytest.raises(UsageError) as caught:
        training.epochs_of(Recipe(epochs=least - 1), stages)
    own = least - len(without.split(","))
    assert str(caught.value).startswith(
        f"--epochs: expected at least {least}: the {own} that the stages say, and one for each that "
        f"says none ({without}). Received: {least - 1}. "
    )


def test_too_few_epochs_are_told_before_anything_is_replaced():
    """`schedule` is asked before the run's folder is touched."""
    backbone = Backbone.from_application("MobileNet", weights=None, alpha=0.25)
    recipe = Recipe(epochs=3, stages=(Stage(epochs=3), Stage("all", learning_rate=1e-4)))
    with pytest.raises(UsageError, match="--epochs: expected at least 4"):
        training.schedule(recipe, backbone)


def test_a_file_of_stages_is_read_once(tmp_path):
    path = tmp_path / "stages.yaml"
    written = [Stage(epochs=2), Stage("all", epochs=3, learning_rate=1e-4, name="top")]
    stages_to_yaml(written, path)
    recipe = training.read_stages(Recipe(stages=str(path), learning_rate=0.01))
    path.unlink()
    backbone = Backbone.from_application("MobileNet", weights=None, alpha=0.25)
    assert training.schedule(recipe, backbone) == [
        Stage(epochs=2, learning_rate=0.01, name="stage 1"),
        written[1],
    ]
    assert recipe.to_dict()["stages"] == [
        {"unfreeze": None, "epochs": 2},
        {"unfreeze": "all", "epochs": 3, "learning_rate": 1e-4, "name": "top"},
    ]


# Models


def test_the_served_model_is_the_trained_one_with_a_softmax():
    classifier = training.build(Recipe(weights=None, **SMALL), 3)
    logits = numpy(classifier.trained(PIXELS, training=False)).astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(numpy(classifier.served(PIXELS)), expected, atol=1e-6)


def test_the_served_model_crops_the_middle():
    """Of a wide picture whose sides differ, the answer is that of its middle."""
    classifier = training.build(Recipe(weights=None, **SMALL), 3)
    noise = np.random.default_rng(1).integers(0, 256, (4, 32, 20, 3)).astype("uint8")
    wide = np.concatenate([noise, PIXELS, noise], axis=2)
    np.testing.assert_allclose(
        numpy(classifier.served(wide)), numpy(classifier.served(PIXELS)), atol=1e-6
    )


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_acts_while_training_alone(augment):
    classifier = training.build(Recipe(weights=None, augment=augment, **SMALL), 3)
    layer = classifier.trained.get_layer("augmentation")
    kinds = [type(each).__name__ for each in layer.layers]
    light = ["RandomFlip", "RandomTranslation", "RandomZoom"]
    assert kinds == (light if augment == "light" else [*light, "RandomRotation", "RandomShear"])
    np.testing.assert_array_equal(numpy(layer(PIXELS, training=False)), PIXELS)
    changed = numpy(layer(PIXELS, training=True))
    assert changed.shape == PIXELS.shape
    assert (np.abs(changed - PIXELS).mean(axis=(1, 2, 3)) > 1).all()
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_no_flip():
    layers = training.build(Recipe(weights=None, flip=False, **SMALL), 3).trained
    kinds = {type(each) for each in layers.get_layer("augmentation").layers}
    assert keras.layers.RandomFlip not in kinds


# Training


def fit(folder, recipe, tmp_path):
    with training.reproducible(recipe):
        classifier = training.build(recipe, 2)
        checkpoint = BestCheckpoint(
            tmp_path / "best.keras", restore_best_weights=True, resume=False
        )
        return classifier, training.fit(classifier, folder, recipe, checkpoint)


def test_from_scratch_learns_what_it_is_then_judged_by(folder, tmp_path):
    """With the network's own momentum, BatchNormalization's statistics after so few steps would
    still be those of the random start, and the validation accuracy that of guessing."""
    recipe = Recipe(
        weights=None, epochs=12, batch_size=4, learning_rate=1e-2, augment="none", **SMALL
    )
    classifier, fitted = fit(folder, recipe, tmp_path)
    assert fitted.best_accuracy() == 1
    assert fitted.rows[fitted.best_epoch]["val_accuracy"] == 1
    data = training.dataset(classifier, folder, "validation", 4)
    scores = classifier.trained.evaluate(data, verbose=0, return_dict=True)
    assert scores["accuracy"] == 1


def test_class_weights_count_every_class_alike(folder, tmp_path):
    few = [sample for sample in folder.train if sample.label == 0][:1]
    many = [sample for sample in folder.train if sample.label == 1]
    uneven = dataclasses.replace(folder, train=(*few, *many))
    recipe = Recipe(
        weights=None, epochs=1, augment="none", dropout=0.0, class_weights=True, **SMALL
    )
    with training.reproducible(recipe):
        classifier = training.build(recipe, 2)
        # Certain of the second class: right for all images but one.
        classifier.trained.get_layer("logits").set_weights(
            [np.zeros((256, 2)), np.array([-5.0, 5.0])]
        )
        checkpoint = BestCheckpoint(tmp_path / "best.keras", resume=False)
        fitted = training.fit(classifier, uneven, recipe, checkpoint)
    # The loss is 10 for the one wrong image and about 0 for the others: over both classes 5,
    # over the images 10 / 13.
    assert fitted.rows[0]["loss"] == pytest.approx(5, rel=0.01)


def test_mixed_precision_leaves_the_policy_as_it_was():
    recipe = Recipe(weights=None, mixed_precision=True, **SMALL)
    with training.reproducible(recipe):
        classifier = training.build(recipe, 3)
    assert keras.config.dtype_policy().name == "float32"
    assert classifier.trained.get_layer("augmentation").layers[0].compute_dtype == "float32"
    assert classifier.backbone.model.layers[1].compute_dtype == "bfloat16"
    assert keras.backend.standardize_dtype(classifier.served(PIXELS).dtype) == "float32"
