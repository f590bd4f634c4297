"""Cached features as a native `tf.data.Dataset`.

A pass over it from Python, which is what `fit` does, gathers its batches in Python: to set up the
functions of a tf.data pipeline takes longer than an epoch of a head on some hundred rows. Where
it is part of another pipeline, TensorFlow asks Python for the order at the beginning of a pass, and
for each batch.
"""

import collections
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_xfer.features.manifest import Manifest
from keras_xfer.features.nesting import describe, flatten, pack, tuples

if TYPE_CHECKING:
    from keras_xfer.features.dataset import CachedFeatures

_AHEAD = 8  # batches


def tf_dataset(features: "CachedFeatures", manifest: Manifest, *, prefetch: bool) -> Any:
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

    pipeline = _pipeline(features, manifest, tf, prefetch=prefetch)
    parts = [f"part_{i}" for i in range(len(pipeline.element_spec))]

    # A named tuple, which is a tuple to whatever takes structures apart, as no other subclass is.
    class Batch(collections.namedtuple("Batch", parts)):  # type: ignore[misc]
        """What a pass from Python gives; to a function of TensorFlow, of any number of rows."""

        __slots__ = ()

        def __tf_tracing_type__(self, _: Any) -> Any:
            return batch_type

    class BatchType(tf.types.experimental.TraceType):
        """What a function of TensorFlow takes a `Batch` for, so that the last one, which may be
        smaller, is not traced once more."""

        def __init__(self, specs: Any) -> None:
            self.specs = specs

        def is_subtype_of(self, other: Any) -> bool:
            return self == other

        def most_specific_common_supertype(self, others: Any) -> Any:
            return self if all(self == other for other in others) else None

        def placeholder_value(self, placeholder_context: Any) -> Any:
            return tf.nest.map_structure(
                lambda spec: spec.placeholder_value(placeholder_context), self.specs
            )

        def to_tensors(self, value: Any) -> Any:
            pairs = zip(tf.nest.flatten(self.specs), tf.nest.flatten(value), strict=True)
            return [each for spec, leaf in pairs for each in spec.to_tensors(leaf)]

        def from_tensors(self, tensors: Any) -> Any:
            return tf.nest.map_structure(lambda spec: spec.from_tensors(tensors), self.specs)

        def flatten(self) -> Any:
            return [each for spec in tf.nest.flatten(self.specs) for each in spec.flatten()]

        def cast(self, value: Any, cast_context: Any) -> Any:
            return tf.nest.map_structure(
                lambda spec, leaf: spec.cast(leaf, cast_context), self.specs, tuple(value)
            )

        def __eq__(self, other: object) -> bool:
            return bool(self.specs == getattr(other, "specs", None))

        def __hash__(self) -> int:
            return hash(tuple(tf.nest.flatten(self.specs)))

    class Batches(tf.data.Dataset):
        """`dataset`, but for passes from Python."""

        def __init__(self, dataset: Any) -> None:
            self._dataset = dataset
            self._features = features  # which the pipeline itself does not keep
            super().__init__(tf.data.experimental.to_variant(dataset))

        def _inputs(self) -> list[Any]:
            return [self._dataset]

        @property
        def element_spec(self) -> Any:
            return self._dataset.element_spec

        def __iter__(self) -> Iterator[Any]:
            if tf.executing_eagerly() and not prefetch:
                return Pass(self)
            return super().__iter__()

    class Pass:
        """One pass from Python; in a function of TensorFlow, one of its own iterators."""

        def __init__(self, dataset: Batches) -> None:
            self._dataset = dataset
            self._batches = features.one_pass()
            self._given = 0
            self._native: Any = None

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            if tf.inside_function():
                return self.native().get_next()
            if self._native is not None:
                return next(self._native)
            batch = Batch(*tf.nest.map_structure(tensor, tuples(next(self._batches))))
            self._given += 1
            return batch

        def get_next(self) -> Any:
            """The next batch, as `tf.data.Iterator` gives it."""
            try:
                return next(self)
            except StopIteration:
                raise tf.errors.OutOfRangeError(None, None, "End of sequence") from None

        @property
        def element_spec(self) -> Any:
            return self._dataset.element_spec

        def native(self) -> Any:
            """The iterator that goes on from here: to a graph, a call of Python is a constant."""
            if self._native is None:
                if self._given == len(features):
                    raise tf.errors.OutOfRangeError(None, None, "End of sequence")
                with tf.init_scope():
                    self._native = iter(self._dataset.skip(self._given))
            return self._native

        def __tf_tracing_type__(self, context: Any) -> Any:
            return PassType(self.native().__tf_tracing_type__(context))

    class PassType(tf.types.experimental.TraceType):
        """What a function of TensorFlow takes a `Pass` for, so that all are traced once."""

        def __init__(self, native: Any) -> None:
            self.native = native

        def is_subtype_of(self, other: Any) -> bool:
            # There is a class of that name for each dataset.
            return self.native.is_subtype_of(getattr(other, "native", None))

        def most_specific_common_supertype(self, others: Any) -> Any:
            return self if all(self == other for other in others) else None

        def placeholder_value(self, placeholder_context: Any) -> Any:
            return self.native.placeholder_value(placeholder_context)

        def to_tensors(self, value: Any) -> Any:
            native = getattr(value, "native", None)
            return self.native.to_tensors(value if native is None else native())

        def from_tensors(self, tensors: Any) -> Any:
            return self.native.from_tensors(tensors)

        def flatten(self) -> Any:
            return self.native.flatten()

        def cast(self, value: Any, cast_context: Any) -> Any:
            return self.native.cast(value.native(), cast_context)

        def __eq__(self, other: object) -> bool:
            return bool(self.native == getattr(other, "native", None))

        def __hash__(self) -> int:
            return hash(self.native)

    batch_type = BatchType(pipeline.element_spec)
    return Batches(pipeline)


def _pipeline(features: "CachedFeatures", manifest: Manifest, tf: Any, *, prefetch: bool) -> Any:
    """The batches of `features`, asked of Python by TensorFlow."""
    rows, batch_size, batches = features.num_samples, features.batch_size, len(features)
    leaves = [*manifest.feature_leaves, *manifest.rest_leaves]
    dtypes = [tf.as_dtype(leaf.dtype) for leaf in leaves]
    structure = describe(tuples((pack(manifest.features, leaves), *pack(manifest.rest, leaves))))
    # TensorFlow keeps what is called from a graph for as long as the process lives.
    reference = weakref.ref(features)

    def alive() -> "CachedFeatures":
        found = reference()
        assert found is not None  # noqa: S101  # the dataset holds it
        return found

    # They have no control flow to convert, and converting takes longer than all else here.
    plain = tf.autograph.experimental.do_not_convert

    def begin(_: Any) -> Any:
        return alive().order.astype(np.int64), np.int64(alive().epoch)

    def gather(chosen: Any, epoch: Any, is_last: Any) -> Any:
        batch = flatten(alive().batch_of(chosen, int(epoch)))
        if is_last:
            alive().epoch += 1
        return batch

    @plain
    def one_pass(order: Any, epoch: Any) -> Any:
        order.set_shape([rows])

        @plain
        def batch(index: Any) -> Any:
            chosen = order[index * batch_size : tf.minimum((index + 1) * batch_size, rows)]
            flat = tf.numpy_function(gather, [chosen, epoch, index + 1 >= batches], dtypes)
            for each, leaf in zip(flat, leaves, strict=True):
                each.set_shape([None, *leaf.shape])
            return pack(structure, flat)

        if not prefetch:
            return tf.data.Dataset.range(batches).map(batch)
        ahead = tf.data.Dataset.range(batches - 1).map(
            batch, num_parallel_calls=2, deterministic=True
        )
        # The last batch is made when it is asked for, not ahead: only then has the pass ended.
        last = tf.data.Dataset.range(batches - 1, batches).map(batch)
        return ahead.prefetch(_AHEAD).concatenate(last)

    dataset = (
        tf.data.Dataset.from_tensors(np.int64(0))
        .map(plain(lambda zero: tf.numpy_function(begin, [zero], [tf.int64, tf.int64])))
        .flat_map(one_pass)
        .apply(tf.data.experimental.assert_cardinality(batches))
    )
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False  # it would end a pass too early
    options.experimental_optimization.apply_default_optimizations = False  # longer than they save
    return dataset.with_options(options)
