"""What a module of TensorFlow Hub costs in Keras 3: HubModule against the same network as a native
Keras model, and against tf_keras with hub.KerasLayer.

    python -m benchmarks.hub_module [--application NAME] [--output FILE.json]

The module is a SavedModel that tf_keras writes of its own keras.applications. Every way has a
process of its own (Keras 2 and Keras 3 each believe to be alone); they train in alternation, an epoch
of each by turns: frozen, then with everything thawed. Medians, and the median of the ratios of
neighbours (these machines are noisy).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

CLASSES = 5
# How the thawed module trains inside: hub.KerasLayer knows "train" alone.
WAYS = {
    "native Keras 3": "train",
    "tf_keras, hub.KerasLayer": "train",
    "HubModule, batch_norm='train'": "train",
    "HubModule": "frozen",
}


def write_module(application: str, image_size: int, folder: str) -> None:
    """A SavedModel of that application without its classifier, by tf_keras."""
    import tf_keras

    make = getattr(tf_keras.applications, application)
    shape = (image_size, image_size, 3)
    make(input_shape=shape, weights=None, include_top=False, pooling="avg").save(
        folder, save_format="tf"
    )


def make(way: str, trainable: bool, application: str, image_size: int, folder: str) -> Any:
    """A compiled model: features and a head."""
    shape = (image_size, image_size, 3)
    if way == "tf_keras, hub.KerasLayer":
        import tensorflow_hub as hub
        import tf_keras as keras

        features = hub.KerasLayer(folder, trainable=trainable)
        compiling = {}
    else:
        import keras

        compiling = {"jit_compile": False}  # XLA is many times slower on a CPU under TensorFlow
        if way == "native Keras 3":
            build = getattr(keras.applications, application)
            features = build(input_shape=shape, weights=None, include_top=False, pooling="avg")
            features.trainable = trainable
        else:
            from keras_xfer import HubModule

            features = HubModule(folder, trainable=trainable, batch_norm=WAYS[way])
    model = keras.Sequential([keras.Input(shape), features, keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, **compiling)
    return model


def work(options: argparse.Namespace) -> None:
    """A process: build both models of one way, then time an epoch whenever it is asked to."""
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    x = np.repeat(rng.uniform(0, 1, shape).astype("float32"), options.steps, 0)
    y = rng.integers(0, CLASSES, len(x))
    models = {}
    for state in ("frozen", "thawed"):
        begin = time.perf_counter()
        model = make(
            options.worker,
            state == "thawed",
            options.application,
            options.image_size,
            options.folder,
        )
        model.fit(x[: options.batch_size], y[: options.batch_size], verbose=0)
        models[state] = model
        print(f"ready {time.perf_counter() - begin}", flush=True)
    for line in sys.stdin:
        marks: list[float] = []

        def note(batch: int, logs: Any, marks: list[float] = marks) -> None:  # noqa: ARG001  # Keras's signature
            marks.append(time.perf_counter())

        keras = sys.modules["tf_keras" if "tf_keras" in options.worker else "keras"]
        clock = keras.callbacks.LambdaCallback(on_train_batch_end=note)
        models[line.strip()].fit(
            x, y, batch_size=options.batch_size, shuffle=False, verbose=0, callbacks=[clock]
        )
        print(f"step {statistics.median(np.diff(marks))}", flush=True)


def number(process: Any, word: str) -> float:
    """The number that a process says after `word`."""
    for line in process.stdout:
        if line.startswith(word):
            return float(line.split()[1])
    raise RuntimeError(f"A process ended before its time, with exit status {process.wait()}.")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way and state."""
    command = [sys.executable, "-m", "benchmarks.hub_module", "--folder", options.folder]
    for name in ("application", "image_size", "batch_size", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes, first = {}, {}
    try:
        for way in WAYS:  # one after the other, so that the first steps compare
            processes[way] = subprocess.Popen([*command, "--worker", way], **pipes)
            first[way] = {state: number(processes[way], "ready") for state in ("frozen", "thawed")}
        rows = []
        for state in ("frozen", "thawed"):
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for repeat in range(options.repeats + 1):
                for way in list(WAYS) if repeat % 2 else reversed(WAYS):
                    processes[way].stdin.write(f"{state}\n")
                    processes[way].stdin.flush()
                    step = number(processes[way], "step")
                    if repeat:  # the first epoch warms up
                        seconds[way].append(step)
            for way in WAYS:
                rows.append(
                    {
                        "application": options.application,
                        "image_size": options.image_size,
                        "batch_size": options.batch_size,
                        "state": state,
                        "way": way,
                        "first_step_seconds": first[way][state],
                        "step_seconds": statistics.median(seconds[way]),
                        **{
                            f"ratio_to_{name}": statistics.median(
                                a / b for a, b in zip(seconds[way], seconds[other], strict=True)
                            )
                            for name, other in (
                                ("native", "native Keras 3"),
                                ("keras_layer", "tf_keras, hub.KerasLayer"),
                            )
                        },
                        "all_step_seconds": seconds[way],
                    }
                )
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]] | None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--application", default="MobileNetV2")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps an epoch")
    parser.add_argument("--repeats", type=int, default=9, help="epochs counted of each")
    parser.add_argument("--output", help="a JSON file for the results")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
        return None
    with tempfile.TemporaryDirectory() as options.folder:
        write_module(options.application, options.image_size, options.folder)
        results = measure(options)
    print(
        f"{options.application} {options.image_size}, batches of {options.batch_size}\n"
        f"{'':<8}{'way':<31}{'first s':>8}{'step s':>9}{'/ native':>10}{'/ KerasLayer':>14}"
    )
    for row in results:
        print(
            f"{row['state']:<8}{row['way']:<31}{row['first_step_seconds']:>8.1f}"
            f"{row['step_seconds']:>9.4f}{row['ratio_to_native']:>10.3f}"
            f"{row['ratio_to_keras_layer']:>14.3f}"
        )
    from benchmarks import machine  # not above: it brings Keras 3 into the process of Keras 2

    machine.write(options.output, results)
    return results


if __name__ == "__main__":
    main()
