"""An extraction in small shards that may be killed at any moment and started again.

Imported by the processes that the tests start, each forked from one that has imported Keras
already. Each notes in a log which shards it begins to write and which it has written.
"""

import os
import time
from pathlib import Path

import keras
import numpy as np

from keras_xfer.features import manifest
from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.entry import Entry

ROWS, ROWS_PER_SHARD = 187, 8
SHARD_SECONDS = 0.03

X = np.random.default_rng(0).random((ROWS, 5), "float32")
Y = np.arange(ROWS)
KERNEL = np.random.default_rng(1).random((5, 3), "float32")


class Batches(keras.utils.PyDataset):
    """What has to be read again from the beginning."""

    def __len__(self):
        return -(-ROWS // 4)

    def __getitem__(self, i):
        return X[4 * i : 4 * (i + 1)], Y[4 * i : 4 * (i + 1)]


def make_extractor():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, use_bias=False)])
    model.set_weights([KERNEL])
    return model


def log_of(folder):
    return Path(folder).with_name(f"{Path(folder).name}.log")


def features(folder, kind):
    data = (X, Y) if kind == "arrays" else Batches()
    return FeatureCache(folder).features(make_extractor(), data, verbose=0)


def extract(folder, kind):
    """Compute what is missing, slowly."""
    manifest._MOST_ROWS = ROWS_PER_SHARD
    log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write_shard = Entry.write_shard

    def logged(self, manifest, index, *args):
        os.write(log, f"begin {index}\n".encode())
        time.sleep(SHARD_SECONDS)
        write_shard(self, manifest, index, *args)
        os.write(log, f"end {index}\n".encode())

    Entry.write_shard = logged
    features(folder, kind)
