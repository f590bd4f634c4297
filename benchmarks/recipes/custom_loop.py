"""flowers_speed in a loop of your own (TensorFlow), without `fit`; the best validation kept.

python -m benchmarks.recipes.custom_loop [--smoke] [--output DIR]
"""

from pathlib import Path

import keras
import tensorflow as tf

from benchmarks.recipes import materials
from keras_xfer import Backbone, BestCheckpoint, EpochTiming
from keras_xfer.images import scan


def make_step(model: keras.Model, rate: float):
    """A train step with an optimizer of its own."""
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True)
    def step(images, labels):
        with tf.GradientTape() as tape:
            value = model.compute_loss(y=labels, y_pred=model(images, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables))
        return value

    return step


def main(given: materials.Materials, output: Path) -> EpochTiming:
    """Ten epochs of the head, ten of all."""
    size, epochs = given.pixels(299), given.epochs(10)
    train, validation, _ = scan(given.flowers(), validation_split=0.25).datasets(size)
    shape = (size, size, 3)
    backbone = Backbone.from_application("InceptionV3", input_shape=shape, weights=given.weights)
    head = [keras.layers.Dense(512, activation="relu"), keras.layers.Dense(5, "softmax")]
    model = keras.Sequential([keras.Input(shape), backbone.preprocessing(), backbone, *head])
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    timing, best = EpochTiming(), BestCheckpoint(output / "best.keras", resume=False)
    callbacks = keras.callbacks.CallbackList([timing, best], model=model)
    callbacks.on_train_begin()
    for stage, rate in enumerate((1e-3, 1e-5)):
        backbone.trainable = stage == 1
        step = make_step(model, rate)  # traced anew, for what is trainable now
        for epoch in range(stage * epochs, (stage + 1) * epochs):
            callbacks.on_epoch_begin(epoch)
            for batch in range(len(train)):
                loss = float(step(*map(tf.constant, train[batch])))
                callbacks.on_train_batch_end(batch, {"loss": loss})
            train.on_epoch_end()
            accuracy = model.evaluate(validation)[1]
            callbacks.on_epoch_end(epoch, {"stage": stage, "val_accuracy": accuracy})
    print(f"best validation accuracy {best.best:.3f} in epoch {best.best_epoch + 1}")
    return timing


if __name__ == "__main__":
    materials.run(main)
