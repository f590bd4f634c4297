"""What caching features at the freeze boundary gains, and how near it comes to what is possible.

    python -m benchmarks.feature_cache [--model MobileNetV2] [--parts abcde] [--output FILE.json]

(a) One epoch of a head: hand-written frozen Keras, the same head on cached features, and the same
    head on features in memory through tf.data, which is the limit.
(b) One epoch with the top of the backbone thawed, at three cuts: hand-written, and on activations
    cached at the cut. The bound is what the arithmetic allows: (prefix + 3 suffix) / (3 suffix),
    forward passes as `predict` runs them, a backward pass being twice a forward one.
(c) A schedule of 10 epochs of the head and 10 of the top: by hand, and `fit_staged` with the
    computing of all features.
(d) Writing and reading the store, and the disk's own `.npy` files.
(e) What `dtype="float16"` costs: the accuracy of a head on features of handwritten digits that the
    backbone, trained on five others, has not seen; over ten splits.

Everything of a part runs in one process, in alternation; medians. Images are random, weights too.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks import machine
from keras_xfer import Backbone, FeatureCache, Stage, fit_staged, split_model

CLASSES = 5
TENSORFLOW = keras.backend.backend() == "tensorflow"


class Case(NamedTuple):
    """An application, its image size, and three layers from which its top is thawed."""

    application: str
    image_size: int
    tops: tuple[str, str, str]


CASES = {
    case.application: case
    for case in (
        Case("MobileNetV2", 160, ("block_16_expand", "block_13_expand", "block_6_expand")),
        Case(
            "ResNet50", 224, ("conv5_block3_1_conv", "conv5_block1_1_conv", "conv4_block1_1_conv")
        ),
    )
}


class Epochs(keras.callbacks.Callback):
    """How long each epoch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def image_shape(case: Case) -> tuple[int, ...]:
    """Height, width and channels."""
    return (case.image_size, case.image_size, 3)


def hand_written(case: Case, top: str | None) -> keras.Model:
    """The recipe in plain Keras, BatchNormalization set frozen layer by layer."""
    base = getattr(keras.applications, case.application)(
        include_top=False, weights=None, pooling="avg", input_shape=image_shape(case)
    )
    thawed = False
    for layer in base.layers:
        thawed = thawed or layer.name == top
        layer.trainable = thawed and not isinstance(layer, keras.layers.BatchNormalization)
    inputs = keras.Input(image_shape(case))
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    return compiled(keras.Model(inputs, keras.layers.Dense(CLASSES)(base(x, training=False))))


def with_backbone(case: Case) -> keras.Model:
    """The same with a Backbone."""
    backbone = Backbone.from_application(
        case.application, weights=None, input_shape=image_shape(case), name="backbone"
    )
    scale = keras.layers.Rescaling(1 / 127.5, -1)
    inputs = keras.Input(image_shape(case))
    return compiled(keras.Model(inputs, keras.layers.Dense(CLASSES)(backbone(scale(inputs)))))


def compiled(model: keras.Model) -> keras.Model:
    """Compiled alike, everywhere."""
    model.compile(
        keras.optimizers.Adam(1e-5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # XLA is many times slower on a CPU under TensorFlow.
        jit_compile=False if TENSORFLOW else "auto",
    )
    return model


def images_of(case: Case, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (count, *image_shape(case))).astype("float32")
    return x, rng.integers(0, CLASSES, count)


def epoch_seconds(model: keras.Model, epochs: int, *args: Any, **kwargs: Any) -> list[float]:
    """Seconds of each epoch but the first, which compiles."""
    timing = Epochs()
    model.fit(*args, epochs=epochs + 1, verbose=0, callbacks=[timing], **kwargs)
    return timing.seconds[1:]


def readable(features: Any) -> Any:
    """The features as `fit` reads them fastest."""
    return features.as_tf_dataset() if TENSORFLOW else features


def head(case: Case, count: int, batch_size: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Part (a)."""
    x, y = images_of(case, count)
    frozen = hand_written(case, None)
    prefix, _ = split_model(with_backbone(case), "head")
    cached = FeatureCache(folder).features(
        prefix, (x, y), batch_size=batch_size, shuffle=True, verbose=0
    )
    stored = [cached.arranged(shuffle=False)[i] for i in range(len(cached))]
    features, labels = (np.concatenate(parts) for parts in zip(*stored, strict=True))
    width = features.shape[1]

    def new_head() -> keras.Model:
        return compiled(keras.Sequential([keras.Input((width,)), keras.layers.Dense(CLASSES)]))

    def in_memory() -> dict[str, Any]:
        if not TENSORFLOW:
            return {"x": features, "y": labels, "batch_size": batch_size}
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((features, labels))
        return {"x": data.shuffle(count).batch(batch_size).prefetch(tf.data.AUTOTUNE)}

    seconds: dict[str, list[float]] = {"hand": [], "cached": [], "limit": []}
    seconds["hand"] = epoch_seconds(frozen, 3, x, y, batch_size=batch_size)
    ratios = []
    for _ in range(repeats):
        for name, data in (("cached", {"x": readable(cached)}), ("limit", in_memory())):
            seconds[name].append(statistics.median(epoch_seconds(new_head(), 20, **data)))
        ratios.append(seconds["limit"][-1] / seconds["cached"][-1])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "hand_epoch_seconds": medians["hand"],
        "cached_epoch_seconds": medians["cached"],
        "limit_epoch_seconds": medians["limit"],
        "speedup": medians["hand"] / medians["cached"],
        "of_the_limit": statistics.median(ratios),
    }


def forward_seconds(model: keras.Model, x: Any, batch_size: int, repeats: int) -> float:
    """Seconds of a forward pass over `x`."""
    model.predict(x, batch_size=batch_size, verbose=0)
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model.predict(x, batch_size=batch_size, verbose=0)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def top(
    case: Case, at: str, count: int, batch_size: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """Part (b)."""
    x, y = images_of(case, count)
    by_hand = hand_written(case, at)
    model = with_backbone(case)
    model.get_layer("backbone").unfreeze(at)
    prefix, suffix = split_model(model, at)
    compiled(suffix)
    cached = FeatureCache(folder).features(
        prefix, (x, y), batch_size=batch_size, shuffle=True, verbose=0
    )
    seconds: dict[str, list[float]] = {"hand": [], "cached": []}
    for _ in range(repeats):
        seconds["hand"] += epoch_seconds(by_hand, 1, x, y, batch_size=batch_size)
        seconds["cached"] += epoch_seconds(suffix, 1, readable(cached))
    activations = cached.arranged(shuffle=False)
    below = forward_seconds(prefix, x, batch_size, repeats)
    parts = [activations[i][0] for i in range(len(activations))]
    several = isinstance(parts[0], (list, tuple))
    whole = (
        [np.concatenate(each) for each in zip(*parts, strict=True)]
        if several
        else np.concatenate(parts)
    )
    above = forward_seconds(suffix, whole, batch_size, repeats)
    hand, ours = statistics.median(seconds["hand"]), statistics.median(seconds["cached"])
    bound = (below + 3 * above) / (3 * above)
    return {
        "at": at,
        "hand_epoch_seconds": hand,
        "cached_epoch_seconds": ours,
        "prefix_seconds": below,
        "suffix_seconds": above,
        "speedup": hand / ours,
        "bound": bound,
        "of_the_bound": hand / ours / bound,
    }


def schedule(case: Case, count: int, batch_size: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Part (c)."""
    x, y = images_of(case, count)
    at = case.tops[1]
    model = hand_written(case, None)
    begin = time.perf_counter()
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)
    base = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    thawed = False
    for layer in base.layers:
        thawed = thawed or layer.name == at
        layer.trainable = thawed and not isinstance(layer, keras.layers.BatchNormalization)
    compiled(model)
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)
    by_hand = time.perf_counter() - begin

    model = with_backbone(case)
    stages = [
        Stage(epochs=epochs, learning_rate=1e-5),
        Stage(at, epochs=epochs, learning_rate=1e-6),
    ]
    timing = Epochs()
    begin = time.perf_counter()
    history = fit_staged(
        model, x, y, stages=stages, cache=folder, batch_size=batch_size, verbose=0,
        callbacks=[timing],
    )  # fmt: skip
    ours = time.perf_counter() - begin
    return {
        "hand_seconds": by_hand,
        "fit_staged_seconds": ours,
        "of_which_epochs_seconds": sum(timing.seconds),
        "speedup": by_hand / ours,
        "boundaries": [str(each) for each in history.boundaries],
    }


def store(megabytes: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Part (d)."""
    width = 1280
    rows = megabytes * 2**20 // (4 * width)
    x = np.random.default_rng(0).random((rows, width), "float32")
    extractor = keras.Sequential([keras.Input((width,)), keras.layers.Identity()])
    seconds: dict[str, list[float]] = {
        name: [] for name in ("write", "raw write", "read", "raw read")
    }
    raw = folder / "raw.npy"
    for repeat in range(repeats):
        begin = time.perf_counter()
        with raw.open("wb") as file:
            np.save(file, x)
            file.flush()
            os.fsync(file.fileno())
        seconds["raw write"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        cached = FeatureCache(folder / str(repeat)).features(
            extractor, x, batch_size=256, shuffle=True, verbose=0
        )
        seconds["write"].append(time.perf_counter() - begin)
        mapped = np.load(raw, mmap_mode="r")
        for _ in range(3):  # the first pass brings the pages into memory
            cached.epoch += 1
            begin = time.perf_counter()
            for i in range(len(cached)):
                cached[i]
            read = time.perf_counter() - begin
            begin = time.perf_counter()
            for i in range(len(cached)):
                mapped[cached.order[256 * i : 256 * (i + 1)]]
            raw_read = time.perf_counter() - begin
        seconds["read"].append(read)
        seconds["raw read"].append(raw_read)
        del cached
        shutil.rmtree(folder / str(repeat))
    size = x.nbytes / 1e9
    speeds = {name: size / statistics.median(values) for name, values in seconds.items()}
    return {
        "gigabytes": size,
        **{
            f"{name.replace(' ', '_')}_gigabytes_per_second": speed
            for name, speed in speeds.items()
        },
        "write_of_raw": statistics.median(
            b / a for a, b in zip(seconds["write"], seconds["raw write"], strict=True)
        ),
        "read_of_raw": statistics.median(
            b / a for a, b in zip(seconds["read"], seconds["raw read"], strict=True)
        ),
    }


def halved(folder: Path) -> dict[str, Any]:
    """Part (e)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[..., None] / 16).astype("float32")
    known = bunch.target < 5
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *(keras.layers.Conv2D(width, 3, activation="relu") for width in (32, 64, 128)),
            keras.layers.Flatten(),
        ]
    )
    model = compiled(keras.Sequential([base, keras.layers.Dense(5)]))
    model.optimizer.learning_rate = 1e-3
    model.fit(images[known], bunch.target[known], epochs=10, verbose=0)
    x, y = images[~known], bunch.target[~known] - 5
    features = {}
    for dtype in (None, "float16"):
        cached = FeatureCache(folder / str(dtype), dtype=dtype).features(base, (x, y), verbose=0)
        features[dtype] = np.concatenate([cached[i][0] for i in range(len(cached))])
    accuracies: dict[Any, list[float]] = {None: [], "float16": []}
    for split in range(10):
        order = np.random.default_rng(split).permutation(len(x))
        train, test = order[:100], order[100:]
        for dtype, of in features.items():
            keras.utils.set_random_seed(split)
            head = compiled(keras.Sequential([keras.Input(of.shape[1:]), keras.layers.Dense(5)]))
            head.optimizer.learning_rate = 1e-2
            head.fit(of[train], y[train], epochs=30, verbose=0, shuffle=False)
            answers = head.predict(of[test], verbose=0).argmax(1)
            accuracies[dtype].append(float((answers == y[test]).mean()))
    full = features[None]
    return {
        "accuracy": statistics.mean(accuracies[None]),
        "float16_accuracy": statistics.mean(accuracies["float16"]),
        "largest_difference": max(
            abs(a - b) for a, b in zip(accuracies[None], accuracies["float16"], strict=True)
        ),
        "largest_relative_error": float(
            np.max(np.abs(features["float16"] - full) / np.maximum(np.abs(full), 1e-3))
        ),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--parts", default="abcde", help="which of them, such as ad")
    parser.add_argument("--images", type=int, default=256, help="images an epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of each stage of part (c)")
    parser.add_argument("--megabytes", type=int, default=512, help="of part (d)")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"head": [], "top": [], "schedule": [], "store": None}
    count, batch_size, repeats = options.images, options.batch_size, options.repeats
    print(f"{count} images, batches of {batch_size}", flush=True)
    for name in options.model or CASES:
        case = CASES[name]
        label = {"model": name, "image_size": case.image_size, "images": count}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if "a" in options.parts:
                row = head(case, count, batch_size, repeats, folder / "a")
                results["head"].append({**label, **row})
                print(
                    f"(a) {name}: head epoch {row['hand_epoch_seconds']:.3g} s by hand, "
                    f"{row['cached_epoch_seconds']:.3g} s cached ({row['speedup']:.0f} times), "
                    f"{row['limit_epoch_seconds']:.3g} s from memory ({row['of_the_limit']:.2f} of it)",
                    flush=True,
                )
            for at in case.tops if "b" in options.parts else ():
                row = top(case, at, count, batch_size, repeats, folder / "b")
                results["top"].append({**label, **row})
                print(
                    f"(b) {name} from {at}: epoch {row['hand_epoch_seconds']:.3g} s by hand, "
                    f"{row['cached_epoch_seconds']:.3g} s cached ({row['speedup']:.2f} times), "
                    f"bound {row['bound']:.2f} ({row['of_the_bound']:.2f} of it)",
                    flush=True,
                )
            if "c" in options.parts:
                row = schedule(case, count, batch_size, options.epochs, folder / "c")
                results["schedule"].append({**label, **row})
                print(
                    f"(c) {name}: {options.epochs} + {options.epochs} epochs "
                    f"{row['hand_seconds']:.1f} s by hand, {row['fit_staged_seconds']:.1f} s by "
                    f"fit_staged ({row['speedup']:.1f} times); {'; '.join(row['boundaries'])}",
                    flush=True,
                )
        keras.backend.clear_session()
    if "d" in options.parts:
        with tempfile.TemporaryDirectory() as temporary:
            row = results["store"] = store(options.megabytes, repeats, Path(temporary))
        print(
            f"(d) store of {row['gigabytes']:.2f} GB: writes {row['write_gigabytes_per_second']:.2f} "
            f"GB/s ({row['write_of_raw']:.2f} of the disk's own), reads "
            f"{row['read_gigabytes_per_second']:.2f} GB/s ({row['read_of_raw']:.2f} of a memory map)",
            flush=True,
        )
    if "e" in options.parts:
        with tempfile.TemporaryDirectory() as temporary:
            row = results["float16"] = halved(Path(temporary))
        print(
            f"(e) float16: accuracy {row['float16_accuracy']:.2%}, float32 {row['accuracy']:.2%}; at "
            f"most {row['largest_difference']:.2%} apart in a split; features differ by at most "
            f"{row['largest_relative_error']:.1e} of their value",
            flush=True,
        )
    machine.write(options.output, results)
    return results


if __name__ == "__main__":
    main()
