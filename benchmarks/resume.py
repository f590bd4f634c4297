"""What a backup costs: seconds and bytes, beside Keras's own BackupAndRestore.

    python -m benchmarks.resume [--output FILE.json]

For each model, frozen and all thawed (Adam), the saving at the end of an epoch and the restoring at
the start of a fit, of both callbacks in alternation; medians. keras_xfer's waits until the file is
on the disk (fsync) and keeps the last good one until then; Keras's does neither, and saves the
weights and the optimizer alone.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_xfer
from benchmarks import machine

CASES = (("MobileNetV2", 160), ("ResNet50", 224))


def make(application: str, image_size: int, trains: str) -> keras.Model:
    """A model that has taken one step."""
    shape = (image_size, image_size, 3)
    backbone = keras_xfer.Backbone.from_application(
        application, input_shape=shape, weights=None, trainable=trains == "all"
    )
    model = keras.Sequential([keras.Input(shape), backbone, keras.layers.Dense(5)])
    model.compile(
        keras.optimizers.Adam(1e-5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )
    model.fit(np.zeros((4, *shape), "float32"), np.zeros(4), verbose=0)
    return model


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(application: str, image_size: int, trains: str, repeats: int) -> dict[str, Any]:
    """Seconds of a save and of a restoring, and the bytes on the disk."""
    model = make(application, image_size, trains)
    row: dict[str, Any] = {"application": application, "image_size": image_size, "trains": trains}
    with tempfile.TemporaryDirectory() as folder:
        callbacks = {
            "keras_xfer": keras_xfer.BackupAndRestore(f"{folder}/ours"),
            "keras": keras.callbacks.BackupAndRestore(f"{folder}/keras"),
        }
        seconds: dict[str, list[float]] = {
            f"{name}_{what}_seconds": [] for name in callbacks for what in ("save", "restore")
        }
        for callback in callbacks.values():
            callback.set_params({"epochs": 99})
            callback.set_model(model)
            callback.on_train_begin()
        for epoch in range(repeats + 1):
            for name in list(callbacks) if epoch % 2 else list(reversed(callbacks)):
                callback = callbacks[name]
                save = timed(lambda: callback.on_epoch_end(epoch))  # noqa: B023  # called here
                restore = timed(callback.on_train_begin)
                if epoch:
                    seconds[f"{name}_save_seconds"].append(save)
                    seconds[f"{name}_restore_seconds"].append(restore)
        for name, place in (("keras_xfer", "ours"), ("keras", "keras")):
            row[f"{name}_bytes"] = sum(
                path.stat().st_size for path in Path(folder, place).iterdir()
            )
        row.update({name: statistics.median(values) for name, values in seconds.items()})
        row["all_seconds"] = seconds
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="saves counted of each")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    print(
        f"{'model':<18}{'trains':<8}{'save s':>8}{'Keras s':>9}{'restore s':>11}{'Keras s':>9}"
        f"{'MB':>8}{'Keras MB':>10}"
    )
    results = []
    for application, image_size in CASES:
        for trains in ("frozen", "all"):
            row = measure(application, image_size, trains, options.repeats)
            results.append(row)
            print(
                f"{application + ' ' + str(image_size):<18}{trains:<8}"
                f"{row['keras_xfer_save_seconds']:>8.3f}{row['keras_save_seconds']:>9.3f}"
                f"{row['keras_xfer_restore_seconds']:>11.3f}{row['keras_restore_seconds']:>9.3f}"
                f"{row['keras_xfer_bytes'] / 1e6:>8.1f}{row['keras_bytes'] / 1e6:>10.1f}",
                flush=True,
            )
            keras.backend.clear_session()
    machine.write(options.output, results)
    return results


if __name__ == "__main__":
    main()
