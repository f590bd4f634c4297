"""custom_loop as it is taught: one traced step, and layers thawed between two epochs."""

import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks.recipes import materials
from benchmarks.recipes.by_hand import measured


def main(given: materials.Materials, output: Path) -> str:
    """Return what went wrong."""
    size, epochs = given.pixels(299), given.epochs(10)
    train, validation = keras.utils.image_dataset_from_directory(
        given.flowers(), image_size=(size, size), batch_size=32, validation_split=0.25,
        subset="both", seed=0,
    )  # fmt: skip
    preprocess = keras.applications.inception_v3.preprocess_input
    train = train.map(lambda x, y: (preprocess(x), y)).cache()
    validation = validation.map(lambda x, y: (preprocess(x), y)).cache()
    base = keras.applications.InceptionV3(
        input_shape=(size, size, 3), weights=given.weights, include_top=False, pooling="avg"
    )
    base.trainable = False
    head = [keras.layers.Dense(512, activation="relu"), keras.layers.Dense(5)]
    model = keras.Sequential([keras.Input((size, size, 3)), base, *head])
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(1e-3)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def test_step(images, labels):
        accuracy.update_state(labels, model(images, training=False))

    best, seconds, before = -np.inf, [], []
    for epoch in range(2 * epochs):
        if epoch == epochs:
            base.trainable = True
            optimizer.learning_rate.assign(1e-5)
            before = measured.values(base.weights)
        began = time.perf_counter()
        for images, labels in train:
            step(images, labels)
        seconds.append(time.perf_counter() - began)
        accuracy.reset_state()
        for images, labels in validation:
            test_step(images, labels)
        if float(accuracy.result()) > best:
            best = float(accuracy.result())
            model.save(output / "best.keras")
        print(f"epoch {epoch + 1}: {seconds[-1]:.1f} s, validation {float(accuracy.result()):.3f}")
    moved = measured.moved(base.weights, before)
    return (
        f"thawed, {moved} of the backbone's {len(before)} weights train: the step was traced before"
    )
