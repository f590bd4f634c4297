"""Features of all rows of a source, computed and written shard by shard.

Three things go on at once: rows are read ahead in one thread, the extractor computes, and shards
are written behind it in another.
"""

import concurrent.futures
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_xfer import freezing
from keras_xfer.features import live
from keras_xfer.features.entry import Entry, stored
from keras_xfer.features.manifest import Leaf, Manifest, rows_per_shard
from keras_xfer.features.nesting import describe, flatten, pack
from keras_xfer.features.progress import Progress
from keras_xfer.features.reading import Ahead, Block, ShardEnd, blocks
from keras_xfer.features.source import Leaves, Source
from keras_xfer.features.unchanged import once

_LARGEST_FLOAT16 = 65504.0


class DoesNotFitError(Exception):
    """A feature that float16 cannot hold."""


class Extraction:
    """Computes the features of one entry.

    Args:
        extractor: a built layer.
        source: what its features are computed of.
        views: int, passes that are stored; more than one of them with augmentation.
        narrow: bool, whether floats are stored as float16.
    """

    def __init__(self, extractor: keras.Layer, source: Source, *, views: int, narrow: bool) -> None:
        self._source = source
        self._views = views
        self._narrow = narrow
        augment = views > 1
        self._runner = once(
            extractor, ("runner", augment), lambda: _Runner(extractor, augment=augment)
        )
        self._seeds = _seeds(extractor) if augment else []
        self._padded_rows: int = 0

    def plan(self, key: str, what: str) -> Manifest:
        """The manifest of an entry of which nothing is computed yet."""
        source = self._source
        leaves = [leaf[: source.rows_per_batch] for leaf in source.first]
        features = self._compute(leaves, 0, 0)
        feature_leaves = [Leaf.of(feature, narrow=self._narrow) for feature in flatten(features)]
        rest_leaves = [Leaf.of(leaf) for leaf in source.first[source.x_leaves :]]
        per_shard = rows_per_shard(feature_leaves + rest_leaves, source.rows_per_batch)
        return Manifest(
            key=key,
            what=what,
            views=self._views,
            rows_per_shard=per_shard,
            rows_per_batch=min(source.rows_per_batch, per_shard),
            features=describe(features),
            feature_leaves=feature_leaves,
            rest=source.rest_structure,
            rest_leaves=rest_leaves,
        )

    def run(
        self,
        entry: Entry,
        manifest: Manifest,
        progress: Progress,
        make_room: Callable[[int], None],
    ) -> None:
        """Compute and write what is missing.

        Args:
            entry: where.
            manifest: what there is; kept up to date.
            progress: told of every row.
            make_room: called with the bytes that are about to be written.

        Raises:
            DoesNotFitError: see there.
            OrderChangedError: what is there belongs to another order of the rows.
            ValueError: the data changed from pass to pass.
            OSError: they cannot be written.
        """
        num_rows = self._source.num_rows
        self._padded_rows = min(manifest.rows_per_batch, num_rows or manifest.rows_per_batch)
        if num_rows is not None:
            make_room(num_rows * manifest.row_bytes() - manifest.num_bytes())
        entry.begin(manifest)
        ahead = Ahead(blocks(self._source, manifest))
        writer = concurrent.futures.ThreadPoolExecutor(1)
        writes: list[concurrent.futures.Future[None]] = []
        columns: dict[str, list[np.ndarray]] = {}
        rows = 0
        try:
            for item in ahead:
                if isinstance(item, Block):
                    for name, part in self._block(manifest, item).items():
                        columns.setdefault(name, []).append(part)
                    progress.add(len(item.leaves[0]))
                    continue
                rows = max(rows, item.shard * manifest.rows_per_shard + item.rows)
                if not columns:
                    continue
                if num_rows is None:
                    make_room(item.rows * manifest.row_bytes())
                writes.append(writer.submit(_write, entry, manifest, item, columns, num_rows))
                columns = {}
                while len(writes) > 2:
                    writes.pop(0).result()
            for write in writes:
                write.result()
        finally:
            ahead.stop()
            writer.shutdown(wait=True)  # what is computed is kept
        entry.finish(manifest, num_rows if num_rows is not None else rows)

    def _block(self, manifest: Manifest, block: Block) -> dict[str, np.ndarray]:
        """What the files of a shard get of one block."""
        missing = manifest.missing(block.shard)
        names = manifest.names(block.shard)
        by_view: dict[int | None, Leaves] = {None: block.leaves[self._source.x_leaves :]}
        for view in range(manifest.views):
            if any(names[name][1] == view for name in missing):
                features = flatten(self._compute(block.leaves, view, block.first_row))
                by_view[view] = [
                    self._stored(feature, leaf)
                    for feature, leaf in zip(features, manifest.feature_leaves, strict=True)
                ]
        parts = {view: iter(leaves) for view, leaves in by_view.items()}
        found = {}
        for name, (leaf, of_view) in names.items():  # those of a view in the order of its leaves
            part = next(parts[of_view]) if of_view in parts else None
            if part is not None and name in missing:
                found[name] = part if of_view is not None else stored(part, leaf)
        return found

    def _stored(self, feature: np.ndarray, leaf: Leaf) -> np.ndarray:
        narrowed = leaf.stored == "float16" and leaf.dtype != "float16"
        if narrowed and (np.abs(feature) > _LARGEST_FLOAT16).any():  # a maximum may be NaN
            raise DoesNotFitError
        return stored(feature, leaf)

    def _compute(self, leaves: Leaves, view: int, first_row: int) -> Any:
        """The features of a block."""
        rows = len(leaves[0])
        inputs = leaves[: self._source.x_leaves]
        padded_rows = self._padded_rows = max(rows, self._padded_rows)
        if rows < padded_rows:  # one shape, so that nothing is compiled twice
            index = np.minimum(np.arange(padded_rows), rows - 1)
            inputs = [leaf[index] for leaf in inputs]
        with _seeded(self._seeds, view, first_row):
            features = self._runner.predict_on_batch(pack(self._source.x_structure, inputs))
        found = flatten(features)
        if any(np.ndim(each) == 0 or len(each) != padded_rows for each in found):
            raise ValueError(
                "Expected an extractor that gives a row of features for each row of inputs. "
                f"Received: shapes {[np.shape(each) for each in found]} for {padded_rows} rows."
            )
        return pack(describe(features), [np.asarray(each)[:rows] for each in found])


class _Runner(keras.Model):
    """Calls the extractor, compiled as `predict` does it, and leaves the extractor as it is."""

    def __init__(self, extractor: keras.Layer, *, augment: bool) -> None:
        super().__init__(name="extraction", autocast=False)
        self.extractor = extractor
        self.augment = augment
        self.built = True

    def call(self, inputs: Any) -> Any:
        return live.call(self.extractor, inputs, augment=self.augment)


def _seeds(extractor: keras.Layer) -> list[keras.random.SeedGenerator]:
    """What the random layers draw from."""
    found = {
        id(value): value
        for layer in live.random_layers(extractor)
        for inner in freezing.walk(layer)
        for value in live.generators(inner)
    }
    return list(found.values())


@contextlib.contextmanager
def _seeded(
    seeds: Sequence[keras.random.SeedGenerator], view: int, first_row: int
) -> Iterator[None]:
    """Within it what is drawn depends on the seeds of the layers, the view and the row alone, so
    that a shard that is computed again is the same to the last bit."""
    before = [np.array(keras.ops.convert_to_numpy(seed.state)) for seed in seeds]
    for i, seed in enumerate(seeds):
        text = f"{seed.get_config()['seed']} {i} {view} {first_row}"
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
        seed.state.assign(np.array([drawn, 0], before[i].dtype))
    try:
        yield
    finally:
        for seed, state in zip(seeds, before, strict=True):
            seed.state.assign(state)


def _write(
    entry: Entry,
    manifest: Manifest,
    end: ShardEnd,
    columns: dict[str, list[np.ndarray]],
    num_rows: int | None,
) -> None:
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    rows = end.rows if num_rows is None else num_rows
    needed = max(0, rows * manifest.row_bytes() - (manifest.num_bytes() if num_rows else 0))
    entry.write_shard(manifest, end.shard, end.rows, end.source, arrays, needed)
