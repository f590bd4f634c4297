"""What a search costs: by hand, by HyperTransfer without and with cached features, and as a funnel.

    python -m benchmarks.search [--trials 20] [--seeds 3] [--ways ...] [--output FILE.json]

The same space, epochs and number of trials each time, on images of scikit-learn's handwritten
digits; the backbone is a small MobileNetV2 that the benchmark pretrains on five of them, the search
is over heads and fine-tuning for the five others. The ways, each in a process of its own:

- `by hand`: a KerasTuner hypermodel as it is usually written: freeze, fit, thaw, compile, fit
- `without cache`: HyperTransfer with a DurableTuner and the same oracle
- `with cache`: so, with `cache=`
- `funnel`: funnel_search
- `heads by hand`, `heads with cache`: no trial is fine-tuned

Seconds are those of the whole search; memory is the most that the process had; disk is what the
search left, features included. Accuracies are the best that a search saw on the validation images;
of several seeds (other candidates, other splits) mean and standard error; of one, the standard error
that so many images leave.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np

from benchmarks import machine
from keras_xfer import HyperTransfer, funnel_search
from keras_xfer.tuner import DurableTuner, durable

CLASSES = 5
BATCH_SIZE = 32
VALIDATED = 300
WAYS = ("by hand", "without cache", "with cache", "funnel", "heads by hand", "heads with cache")
SIZES = ("trials", "images", "image_size", "head_epochs", "fine_tune_epochs", "finalists")
UNFROZEN = {"block_13": 0.25, "block_6": 0.6}  # layer, and the share of the blocks above it


def digits(image_size: int, wanted: range, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, H, W, 3)` of range [0, 255] and labels from 0."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = np.flatnonzero(np.isin(bunch.target, wanted))
    chosen = np.random.default_rng(seed).permutation(chosen)
    pixels = 255.0 - bunch.images[chosen][..., None].repeat(3, -1) * 255 / 16
    images = keras.ops.image.resize(pixels, (image_size, image_size), interpolation="bicubic")
    images = np.clip(keras.ops.convert_to_numpy(images), 0, 255).round().astype("uint8")
    return images, bunch.target[chosen] - wanted.start


def application(input_shape: tuple[int, ...]) -> keras.Model:
    """The backbone, with random weights."""
    return keras.applications.MobileNetV2(
        input_shape=input_shape, include_top=False, weights=None, alpha=0.35
    )


def pretrain(image_size: int, path: Path) -> None:
    """Train the backbone on the digits 0 to 4, and write its weights."""
    keras.utils.set_random_seed(0)
    x, y = digits(image_size, range(5), 0)
    base = application(x.shape[1:])
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # a few hundred steps are all there are
    inputs = keras.Input(x.shape[1:])
    features = keras.layers.GlobalAveragePooling2D()(base(inputs / 127.5 - 1))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(features))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=8, verbose=0)
    base.save_weights(path)


class ByHand(keras_tuner.HyperModel):
    """As people write it: rescale, freeze, fit, thaw from a layer on, compile again, fit."""

    def __init__(self, weights: str, options: argparse.Namespace, stages: int) -> None:
        super().__init__()
        self.weights = weights
        self.options = options
        self.stages = stages

    def build(self, hp: Any) -> keras.Model:
        shape = (self.options.image_size, self.options.image_size, 3)
        base = application(shape)
        base.load_weights(self.weights)
        base.trainable = False
        inputs = keras.Input(shape)
        x = base(keras.layers.Rescaling(1 / 127.5, -1)(inputs), training=False)
        if hp.Choice("pooling", ["avg", "max"]) == "avg":
            x = keras.layers.GlobalAveragePooling2D()(x)
        else:
            x = keras.layers.GlobalMaxPooling2D()(x)
        for _ in range(hp.Int("head_layers", 0, 1)):
            x = keras.layers.Dense(hp.Int("head_units", 64, 256, step=64), "relu")(x)
        x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1))(x)
        model = keras.Model(inputs, keras.layers.Dense(CLASSES, "softmax")(x))
        self.compile(model, hp.Float("learning_rate", 1e-4, 1e-2, sampling="log"))
        return model

    def compile(self, model: keras.Model, rate: float) -> None:
        model.compile(
            keras.optimizers.Adam(rate),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,
        )

    def fit(self, hp: Any, model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("epochs", None)
        head, more = self.options.head_epochs, self.options.fine_tune_epochs
        history = model.fit(*args, epochs=head, **kwargs).history
        best = max(history["val_accuracy"])
        if self.stages > 1:
            base = next(layer for layer in model.layers if isinstance(layer, keras.Model))
            start = hp.Choice("unfreeze", list(UNFROZEN))
            thawed = False
            base.trainable = True
            for layer in base.layers:
                thawed = thawed or layer.name.startswith(start)
                is_norm = isinstance(layer, keras.layers.BatchNormalization)
                layer.trainable = thawed and not is_norm
            rate = hp.Float("backbone_learning_rate", 1e-5, 1e-3, sampling="log")
            self.compile(model, rate)
            history = model.fit(*args, epochs=more, **kwargs).history
            best = max(best, *history["val_accuracy"])
        return {"val_accuracy": best}


def hypermodel(weights: str, cache: str | None, options: Any, stages: int) -> HyperTransfer:
    """The same space."""

    def backbone(input_shape: tuple[int, ...]) -> keras.Model:
        model = application(input_shape)
        model.load_weights(weights)
        return model

    return HyperTransfer(
        CLASSES,
        backbones=[backbone],
        input_shape=(options.image_size, options.image_size, 3),
        max_stages=stages,
        cache=cache,
        tune=("pooling", "dropout", "learning_rate"),
        space={
            "head_layers": (0, 1),
            "head_units": (64, 256),
            "head_epochs": options.head_epochs,
            "unfreeze": list(UNFROZEN.values()),
            "backbone_learning_rate": (1e-5, 1e-3),
        }
        if stages > 1
        else {"head_layers": (0, 1), "head_units": (64, 256)},
    )


def peak_megabytes() -> float:
    """The most memory that this process had; `ru_maxrss` would count its parent's."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def search(way: str, seed: int, weights: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one search in this process."""
    x, y = digits(options.image_size, range(5, 10), 1 + seed)
    train = (x[: options.images], y[: options.images])
    validation = tuple(each[options.images : options.images + VALIDATED] for each in (x, y))
    stages = 1 if way.startswith("heads") else 2
    epochs = options.head_epochs + (options.fine_tune_epochs if stages > 1 else 0)
    folder = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        if way == "funnel":
            result = funnel_search(
                hypermodel(weights, str(folder / "features"), options, 2),
                *train,
                validation_data=validation,
                directory=folder,
                max_trials=options.trials,
                head_epochs=options.head_epochs,
                fine_tune_epochs=options.fine_tune_epochs,
                finalists=options.finalists,
                batch_size=BATCH_SIZE,
                seed=seed + 1,
                verbose=0,
            )
            accuracy = result.best_score
        else:
            cache = str(folder / "features") if "with cache" in way else None
            model: Any = hypermodel(weights, cache, options, stages)
            if "by hand" in way:
                model = ByHand(weights, options, stages)
            oracle = keras_tuner.oracles.RandomSearchOracle
            told = {"max_trials": options.trials, "seed": seed + 1}
            if "by hand" in way:
                tuner = keras_tuner.Tuner(
                    oracle("val_accuracy", **told), model, directory=str(folder)
                )
            else:
                tuner = DurableTuner(
                    durable(oracle)("val_accuracy", **told), model, directory=folder
                )
            tuner.search(
                *train,
                validation_data=validation,
                epochs=epochs,
                batch_size=BATCH_SIZE,
                verbose=0,
            )
            accuracy = tuner.oracle.get_best_trials(1)[0].score
        seconds = time.perf_counter() - began
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            "way": way,
            "seed": seed,
            "seconds": seconds,
            "val_accuracy": accuracy,
            "peak_megabytes": peak_megabytes(),
            "disk_megabytes": sum(path.stat().st_size for path in files) / 2**20,
            "validation_images": len(validation[0]),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _standard_error(accuracies: list[float], images: int) -> float:
    """Of the mean over several seeds; of one, by how many images it was measured on."""
    if len(accuracies) > 1:
        return statistics.stdev(accuracies) / len(accuracies) ** 0.5
    return (accuracies[0] * (1 - accuracies[0]) / images) ** 0.5


def _show(rows: list[dict[str, Any]]) -> None:
    base = {"heads by hand": "heads by hand", "heads with cache": "heads by hand"}
    print("| way | seconds | times | best val_accuracy | peak MB | disk MB |")
    print("|---|---|---|---|---|---|")
    by_way: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    seconds = {way: statistics.median(r["seconds"] for r in of) for way, of in by_way.items()}
    for way, of in by_way.items():
        accuracies = [row["val_accuracy"] for row in of]
        error = _standard_error(accuracies, of[0]["validation_images"])
        against = seconds.get(base.get(way, "by hand"))
        times = "-" if against is None else f"{against / seconds[way]:.1f}"
        print(
            f"| {way} | {seconds[way]:.1f} | {times} | {statistics.mean(accuracies):.4f} "
            f"± {error:.4f} | {max(row['peak_megabytes'] for row in of):.0f} | "
            f"{statistics.median(row['disk_megabytes'] for row in of):.0f} |",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run each way in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="a seed of all ways takes an hour"
    )
    parser.add_argument("--images", type=int, default=400, help="to train on")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--head-epochs", type=int, default=9)
    parser.add_argument("--fine-tune-epochs", type=int, default=6)
    parser.add_argument("--finalists", type=int, default=5, help="of the funnel")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", default=None, help="a JSON file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # way, seed, weights
    options = parser.parse_args(arguments)
    if options.one:
        way, seed, weights = options.one
        print("RESULT", json.dumps(search(way, int(seed), weights, options)))
        return []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "backbone.weights.h5")
        pretrain(options.image_size, Path(weights))
        common = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in SIZES]
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for way in options.ways:
                command = [sys.executable, "-m", "benchmarks.search", *common]
                done = subprocess.run(
                    [*command, "--one", way, str(seed), weights],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                told = next(t for t in done.stdout.splitlines() if t.startswith("RESULT "))
                rows.append(json.loads(told.removeprefix("RESULT ")))
                print(rows[-1], flush=True)
    _show(rows)
    machine.write(options.output, rows)
    return rows


if __name__ == "__main__":
    main()
