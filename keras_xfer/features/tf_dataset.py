"""Cached features as a native `tf.data.Dataset`.

A pass over it from Python, which is what `fit` does, gathers its batches in Python: to set up the
functions of a tf.data pipeline takes longer than an epoch of a head on some hundred rows. Where
it is part of another pipeline, TensorFlow gathers them of tensors, and Python is asked twice in a
pass: for its order at the beginning, and told of its end with the last batch. So it is too where
the last batch is smaller: `fit` traces its step for every shape that comes from Python, and weighs
the losses of several outputs otherwise then, while an iterator of TensorFlow's leaves the shape open.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_xfer.features.entry import Column, Columns
from keras_xfer.features.manifest import Manifest
from keras_xfer.features.nesting import pack, tuples

if TYPE_CHECKING:
    from keras_xfer.features.dataset import CachedFeatures

_AHEAD = 8  # batches


def tf_dataset(features: "CachedFeatures", manifest: Manifest, columns: Columns) -> Any:
    """The batches of `features` in their order; see `CachedFeatures.as_tf_dataset`."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "as_tf_dataset needs tensorflow: pip install tensorflow. Without it, pass the features "
            "themselves to fit: they are a keras.utils.PyDataset."
        ) from error

    def tensor(leaf: Any) -> Any:
        return None if leaf is None else tf.constant(leaf)

    class Batches(tf.data.Dataset):
        """`dataset`, but for passes from Python."""

        def __init__(self, dataset: Any) -> None:
            self._dataset = dataset
            super().__init__(tf.data.experimental.to_variant(dataset))

        def _inputs(self) -> list[Any]:
            return [self._dataset]

        @property
        def element_spec(self) -> Any:
            return self._dataset.element_spec

        def __iter__(self) -> Iterator[Any]:
            if tf.executing_eagerly() and not features.num_samples % features.batch_size:
                batches = features.one_pass()
                return (tf.nest.map_structure(tensor, tuples(batch)) for batch in batches)
            return super().__iter__()

    return Batches(_pipeline(features, manifest, columns, tf))


def _pipeline(features: "CachedFeatures", manifest: Manifest, columns: Columns, tf: Any) -> Any:
    """The batches of `features`, gathered by TensorFlow."""
    rows, batch_size, batches = features.num_samples, features.batch_size, len(features)
    gathers = [_gather(column, tf) for view in columns.views for column in view]
    rest_gathers = [_gather(column, tf) for column in columns.rest]
    leaves = len(manifest.feature_leaves)

    def begin(_: Any) -> Any:
        return features.order.astype(np.int64), np.int64(features.epoch % features.views)

    def end() -> None:
        features.on_epoch_end()

    def batch(index: Any, order: Any, view: Any) -> Any:
        chosen = order[index * batch_size : tf.minimum((index + 1) * batch_size, rows)]
        by_view = [
            lambda i=i: [gather(chosen) for gather in gathers[i * leaves : (i + 1) * leaves]]
            for i in range(features.views)
        ]
        of_view = by_view[0]() if len(by_view) == 1 else tf.switch_case(view, by_view)
        found = pack(manifest.features, of_view)
        rest = pack(manifest.rest, [gather(chosen) for gather in rest_gathers])
        return tuples((found, *rest))

    def last_batch(index: Any, order: Any, view: Any) -> Any:
        found = batch(index, order, view)
        with tf.control_dependencies([tf.numpy_function(end, [], [])]):
            return tf.nest.map_structure(tf.identity, found)

    def one_pass(order: Any, view: Any) -> Any:
        order.set_shape([rows])
        view.set_shape([])
        view = tf.cast(view, tf.int32)
        ahead = tf.data.Dataset.range(batches - 1).map(
            lambda index: batch(index, order, view), num_parallel_calls=2, deterministic=True
        )
        # The last batch is made when it is asked for, not ahead: only then has the pass ended.
        last = tf.data.Dataset.range(batches - 1, batches).map(
            lambda index: last_batch(index, order, view)
        )
        return ahead.prefetch(_AHEAD).concatenate(last)

    dataset = (
        tf.data.Dataset.from_tensors(np.int64(0))
        .map(lambda zero: tf.numpy_function(begin, [zero], [tf.int64, tf.int64]))
        .flat_map(one_pass)
        .apply(tf.data.experimental.assert_cardinality(batches))
    )
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False  # it would end a pass too early
    options.experimental_optimization.apply_default_optimizations = False  # longer than they save
    return dataset.with_options(options)


def _gather(column: Column, tf: Any) -> Any:
    """A function of row numbers that gives these rows."""
    leaf = column.leaf
    dtype = tf.as_dtype(leaf.dtype)
    if column.in_memory:
        tensor = tf.constant(column.whole())

        def gather(chosen: Any) -> Any:
            stored = tf.gather(tensor, chosen)
            if leaf.stored == leaf.dtype:
                return stored
            if leaf.stored.startswith("uint"):
                return tf.bitcast(stored, dtype)
            return tf.cast(stored, dtype)

    else:

        def gather(chosen: Any) -> Any:
            found = tf.numpy_function(column.take, [chosen], dtype, stateful=False)
            found.set_shape([None, *leaf.shape])
            return found

    return gather
