"""What StagedUnfreezing costs: at a transition, and in every step after it.

    python -m benchmarks.staged_overhead [--application NAME] [--output FILE.json]

The schedule thaws nothing, the top half of the blocks, then everything; once at one rate for all and
once with layer decay, where each block has an optimizer of its own. Beside it the same by hand: set
the flags, `compile`, `fit`, three times over.

A transition is what the first step of a stage costs more than its median step (tracing, and
compilation where there is any) and what changing over costs before it (`retarget`, or `compile`).
The steps of the last stage are timed in alternation, an epoch of each by turns; medians, and the
median of the ratios of neighbours (these machines are noisy).
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks import machine
from keras_xfer import Backbone, Stage, StagedUnfreezing

CLASSES = 5
RATES = (1e-3, 1e-4, 1e-5)


class Clock(keras.callbacks.Callback):
    """When epochs begin and steps end."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.epochs.append({"begin": time.perf_counter(), "ends": []})

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.epochs[-1]["ends"].append(time.perf_counter())

    def steps(self, epoch: int) -> list[float]:
        """Seconds of the steps of an epoch, the first counted from its beginning."""
        marks = self.epochs[epoch]
        return [
            b - a for a, b in zip([marks["begin"], *marks["ends"]], marks["ends"], strict=False)
        ]


class Timed(StagedUnfreezing):
    """The schedule, which notes how long it took to begin each epoch."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        begin = time.perf_counter()
        super().on_epoch_begin(epoch, logs)
        self.begun.append(time.perf_counter() - begin)


def make(application: str, image_size: int) -> keras.Model:
    """A backbone and a head."""
    keras.utils.set_random_seed(0)
    shape = (image_size, image_size, 3)
    backbone = Backbone.from_application(application, input_shape=shape, weights=None)
    return keras.Sequential([keras.Input(shape), backbone, keras.layers.Dense(CLASSES)])


def compile_model(model: keras.Model, rate: float) -> None:
    """As people write it."""
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # XLA is many times slower on a CPU under TensorFlow.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )


def measure(application: str, image_size: int, **options: int) -> list[dict[str, Any]]:
    """One row a way of doing it."""
    steps, batch_size, repeats = options["steps"], options["batch_size"], options["repeats"]
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (batch_size, image_size, image_size, 3)).astype("float32")
    y = rng.integers(0, CLASSES, batch_size)
    data = {"x": np.repeat(x, steps, 0), "y": np.repeat(y, steps), "batch_size": batch_size}
    fit = {**data, "verbose": 0, "shuffle": False}

    models = {name: make(application, image_size) for name in ("by hand", "staged", "layer decay")}
    backbone = models["staged"].layers[0]
    middle = backbone.blocks[len(backbone.blocks) // 2].name
    starts = (None, middle, "all")
    clocks = {name: Clock() for name in models}
    schedules = {}
    for name, decay in (("staged", 1.0), ("layer decay", 0.8)):
        schedules[name] = Timed(
            [
                Stage(start, epochs=1 if i < 2 else None, learning_rate=rate, layer_decay=decay)
                for i, (start, rate) in enumerate(zip(starts, RATES, strict=True))
            ]
        )
        schedules[name].begun = []
        compile_model(models[name], RATES[0])
        models[name].fit(**fit, epochs=3, callbacks=[schedules[name], clocks[name]])
    changes = []
    for start, rate in zip(starts, RATES, strict=True):
        begin = time.perf_counter()
        inner = models["by hand"].layers[0]
        inner.freeze() if start is None else inner.unfreeze(start)
        compile_model(models["by hand"], rate)
        changes.append(time.perf_counter() - begin)
        models["by hand"].fit(**fit, callbacks=[clocks["by hand"]])

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats):
        order = list(models) if repeat % 2 else list(reversed(models))
        for name in order:
            callbacks = [clocks[name]]
            if name != "by hand":
                callbacks.insert(0, schedules[name])
            models[name].fit(
                **fit, initial_epoch=3 + repeat, epochs=4 + repeat, callbacks=callbacks
            )
            seconds[name].append(statistics.median(clocks[name].steps(-1)[1:]))
    rows = []
    for name in models:
        before = changes if name == "by hand" else schedules[name].begun
        first = [clocks[name].steps(epoch)[0] for epoch in (1, 2)]
        typical = [statistics.median(clocks[name].steps(epoch)[1:]) for epoch in (1, 2)]
        ratios = [a / b for a, b in zip(seconds[name], seconds["by hand"], strict=True)]
        retracing = statistics.mean(f - t for f, t in zip(first, typical, strict=True))
        changing = statistics.mean(before[1:3])
        rows.append(
            {
                "application": application,
                "image_size": image_size,
                "batch_size": batch_size,
                "way": name,
                "groups": len(getattr(models[name].optimizer, "_members", [None])),
                "change_seconds": changing,
                "retracing_seconds": retracing,
                "step_seconds": statistics.median(seconds[name]),
                "step_cost_ratio": statistics.median(ratios),
                "all_step_seconds": seconds[name],
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--application", default="MobileNetV2")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="steps an epoch")
    parser.add_argument("--repeats", type=int, default=9, help="epochs counted of each")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    results = measure(
        options.application,
        options.image_size,
        steps=options.steps,
        batch_size=options.batch_size,
        repeats=options.repeats,
    )
    print(
        f"{options.application} {options.image_size}, batches of {options.batch_size}\n"
        f"{'way':<12}{'groups':>7}{'change s':>10}{'retracing s':>13}{'step s':>9}{'cost':>8}"
    )
    for row in results:
        print(
            f"{row['way']:<12}{row['groups']:>7}{row['change_seconds']:>10.3f}"
            f"{row['retracing_seconds']:>13.2f}{row['step_seconds']:>9.4f}"
            f"{row['step_cost_ratio'] - 1:>+8.1%}"
        )
    machine.write(options.output, results)
    return results


if __name__ == "__main__":
    main()
