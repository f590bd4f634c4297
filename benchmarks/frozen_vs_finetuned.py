"""Time a frozen backbone against a fine-tuned one, and what keras_xfer adds to hand-written Keras.

    python -m benchmarks.frozen_vs_finetuned [--all] [--output FILE.json]

For each model, frozen, with its top thawed and with all of it thawed (BatchNormalization frozen):
seconds per epoch and images per second of hand-written Keras and of keras_xfer doing the same, on
images in memory. The two run in alternation, one epoch each, after one epoch each that is not
counted; medians, and the median of the ratios of neighbours (these machines are noisy).
"""

import argparse
import os
import statistics
import time
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks import machine
from keras_xfer import Backbone, BackbonePreprocessing, EpochTiming


class Case(NamedTuple):
    """An application, its image size, and the layer from which its top is thawed."""

    application: str
    image_size: int
    top: str | int


CASES = (
    Case("MobileNetV2", 160, 100),
    Case("EfficientNetB0", 224, 150),
    Case("InceptionV3", 299, 249),
)
STARTS = ("frozen", "top", "all")
CLASSES = 5


def hand_written(case: Case, start: str) -> keras.Model:
    """The recipe in plain Keras, BatchNormalization set frozen layer by layer."""
    base = getattr(keras.applications, case.application)(
        include_top=False, weights=None, pooling="avg", input_shape=(case.image_size,) * 2 + (3,)
    )
    first = {"frozen": len(base.layers), "top": case.top, "all": 0}[start]
    for i, layer in enumerate(base.layers):
        layer.trainable = i >= first and not isinstance(layer, keras.layers.BatchNormalization)
    inputs = keras.Input((case.image_size,) * 2 + (3,))
    x = inputs
    if case.application != "EfficientNetB0":  # which preprocesses by itself
        x = keras.layers.Rescaling(1 / 127.5, -1)(x)
    # training=False has no effect on what `fit` does here, see keras#20285, and is what people write.
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(base(x, training=False)))


def with_keras_xfer(case: Case, start: str) -> keras.Model:
    """The same with keras_xfer's layers."""
    shape = (case.image_size, case.image_size, 3)
    backbone = Backbone.from_application(case.application, input_shape=shape, weights=None)
    if start != "frozen":
        backbone.unfreeze(case.top if start == "top" else "all")
    layers = [backbone, keras.layers.Dense(CLASSES)]
    if case.application != "EfficientNetB0":
        layers.insert(0, BackbonePreprocessing.for_application(case.application))
    return keras.Sequential([keras.Input(shape), *layers])


def measure(
    case: Case, start: str, *, images: int, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Seconds of one epoch of each, in alternation."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (images, case.image_size, case.image_size, 3)).astype("float32")
    y = rng.integers(0, CLASSES, images)
    models = {"hand": hand_written(case, start), "keras_xfer": with_keras_xfer(case, start)}
    counts = {
        name: sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
        for name, model in models.items()
    }
    assert counts["hand"] == counts["keras_xfer"], counts
    for model in models.values():
        model.compile(
            keras.optimizers.Adam(1e-5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # XLA is many times slower on a CPU under TensorFlow.
            jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
        )
    callbacks = {"hand": [], "keras_xfer": [EpochTiming()]}
    seconds: dict[str, list[float]] = {"hand": [], "keras_xfer": []}
    for repeat in range(repeats + 1):
        order = list(models) if repeat % 2 else list(reversed(models))
        for name in order:
            begin = time.perf_counter()
            models[name].fit(
                x, y, batch_size=batch_size, verbose=0, shuffle=False, callbacks=callbacks[name]
            )
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    ratios = [
        ours / theirs for ours, theirs in zip(seconds["keras_xfer"], seconds["hand"], strict=True)
    ]
    return {
        "application": case.application,
        "image_size": case.image_size,
        "trains": start,
        "trainable_params": counts["hand"],
        "images": images,
        "batch_size": batch_size,
        "hand_epoch_seconds": statistics.median(seconds["hand"]),
        "epoch_seconds": statistics.median(seconds["keras_xfer"]),
        "images_per_second": images / statistics.median(seconds["keras_xfer"]),
        "cost_ratio": statistics.median(ratios),
        "all_seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--application", help="any model function of keras.applications")
    parser.add_argument("--image-size", type=int, default=224, help="with --application")
    parser.add_argument("--top", default="0.3", help="with --application: where the top begins")
    parser.add_argument("--all", action="store_true", help="the three default models, not one")
    parser.add_argument("--images", type=int, default=128, help="images an epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="epochs counted of each")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    cases = CASES if options.all else CASES[:1]
    if options.application:
        size = (options.image_size, options.image_size, 3)
        model = keras.applications.__dict__[options.application](
            include_top=False, weights=None, pooling="avg", input_shape=size
        )
        fraction = float(options.top)
        top = int(fraction) if fraction >= 1 else round(len(model.layers) * (1 - fraction))
        cases = (Case(options.application, options.image_size, top),)
    results = []
    print(
        f"{'model':<16}{'size':>5}  {'trains':<8}{'parameters':>12}{'s/epoch':>9}{'images/s':>10}"
        f"{'slowdown':>10}{'hand s':>8}{'cost':>8}"
    )
    for case in cases:
        frozen = None
        for start in STARTS:
            row = measure(
                case,
                start,
                images=options.images,
                batch_size=options.batch_size,
                repeats=options.repeats,
            )
            frozen = frozen or row["epoch_seconds"]
            row["slowdown"] = row["epoch_seconds"] / frozen
            results.append(row)
            print(
                f"{case.application:<16}{case.image_size:>5}  {start:<8}"
                f"{row['trainable_params']:>12,}{row['epoch_seconds']:>9.2f}"
                f"{row['images_per_second']:>10.1f}{row['slowdown']:>10.2f}"
                f"{row['hand_epoch_seconds']:>8.2f}{row['cost_ratio'] - 1:>+8.1%}",
                flush=True,
            )
            keras.backend.clear_session()
    machine.write(options.output, results)
    return results


if __name__ == "__main__":
    main()
