"""`FeatureCache`: the features of frozen layers, computed once and found again by content."""

import datetime
import functools
import os
import sys
import warnings
from typing import Any, NamedTuple

import keras

from keras_xfer import freezing, tables
from keras_xfer._version import __version__
from keras_xfer.features import digests, identity, live
from keras_xfer.features.dataset import CachedFeatures, OpenEntry
from keras_xfer.features.entry import Columns, Entry
from keras_xfer.features.extraction import DoesNotFitError, Extraction
from keras_xfer.features.manifest import FORMAT, Manifest
from keras_xfer.features.progress import Progress, check_verbose
from keras_xfer.features.reading import OrderChangedError
from keras_xfer.features.source import DataChangedError, Source, source_of
from keras_xfer.features.store import Store


class Cleared(NamedTuple):
    """What `FeatureCache.clear` did."""

    num_bytes: int  # that were removed
    kept: tuple[str, ...]  # keys of what is open somewhere


class CacheInfo(NamedTuple):
    """What `FeatureCache.info` tells."""

    table: tables.Table
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.table}\n{len(self.table.rows)} entries, {self.total_bytes:,} bytes"


class FeatureCache:
    """The features of frozen layers: computed once, found again by content, shared by processes.

    While layers are frozen, what they give for an image never changes; a head that trains on cached
    features is tens to hundreds of times faster. Features are found again by what they were computed
    of: weights and structure of the extractor, and the data. Processes that want the same features
    at the same time compute them once. A process that is killed loses no more than the shard
    it was at, and what is damaged on the disk is found out and computed again.

    Args:
        directory: str or path, a folder of its own. It is made when it is first needed.
        dtype: None stores what is computed; `"float16"` stores floats in half the bytes, each to
            5e-4 of its value; heads on them were as accurate (benchmarks/feature_cache.py, part e).
            Where they do not fit (beyond 65504), they are stored as computed, and a warning says
            so.
        max_bytes: int or None, the most bytes that the folder may hold. What was not used for the
            longest time makes room, but for what is open in any process.

    Raises:
        ValueError: `directory` holds something else or another version's features, `dtype` is
            neither of its choices, or `max_bytes` is not positive.
        NotADirectoryError: `directory` is a file.

    Example:

    >>> import tempfile, numpy as np
    >>> extractor = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> x, y = np.random.rand(10, 4), np.arange(10) % 2
    >>> cache = FeatureCache(tempfile.mkdtemp())
    >>> train = cache.features(extractor, (x, y), batch_size=4, shuffle=True)
    >>> head = keras.Sequential([keras.layers.Dense(2)])
    >>> head.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = head.fit(train, epochs=2, verbose=0)

    Reference:
        https://keras.io/guides/transfer_learning/
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        if dtype not in (None, "float16"):
            raise ValueError(f"Expected dtype to be None or 'float16'. Received: dtype={dtype!r}.")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(
                f"Expected max_bytes of at least 1, or None. Received: max_bytes={max_bytes!r}."
            )
        self._store = Store(directory, max_bytes)
        self.directory = self._store.directory
        self.dtype = dtype
        self.max_bytes = max_bytes

    def features(
        self,
        extractor: keras.Layer,
        data: Any,
        *,
        views: int = 1,
        key: str | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        verbose: str | int = "auto",
    ) -> CachedFeatures:
        """The features that `extractor` gives for `data`, computed unless they are there already.

        Args:
            extractor: a built `keras.Model` or `keras.layers.Layer`; it runs in inference mode.
            data: arrays `x`, `(x, y)` or `(x, y, sample_weight)`, each nested as the extractor and
                the loss take it; a `keras.utils.PyDataset`, a batched `tf.data.Dataset`, a torch
                `DataLoader`, or another iterable of batches. They must end.
            views: int, how many passes are stored. With more than one, random layers of the
                extractor (augmentation) act, and epoch `e` serves view `e % views`.
            key: str or None, a name for the data instead of their content: saves the pass that
                reads them to know them again, and is needed where there is one pass only. Data
                that change need a new name.
            batch_size: int or None, rows of a batch that is served (of arrays, also computed). None
                is 32 for arrays, the data's own for others.
            shuffle: bool, whether what is served is in a new order in every epoch.
            seed: int >= 0, of that order.
            verbose: `"auto"` shows progress once it takes longer than two seconds, 1 always, 0
                never.

        Returns:
            CachedFeatures, batches of `(features, *rest)`.

        Raises:
            TypeError: `extractor` is no layer, or `data` is nothing that can be read.
            ValueError: the extractor is not built, acts otherwise while training (see `views`) or
                has a layer without a configuration; the data do not end, have no rows, or change
                from pass to pass; `max_bytes` is too small.
            OSError: the disk is full, or the folder cannot be written.
        """
        check_verbose(verbose)
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"Expected `batch_size` of at least 1. Received: batch_size={batch_size}"
            )
        extractor_identity = identity.of_extractor(extractor)
        check_views(extractor, views)
        source = source_of(data, batch_size=batch_size, key=key)
        told = {
            "format": FORMAT,
            "versions": _versions(),
            "extractor": extractor_identity,
            "inputs": source.inputs(),
            "input_names": _input_names(extractor, source),
            "views": views,
            "data": source.content(),
        }
        keys = {dtype: digests.of_json({**told, "dtype": dtype}) for dtype in (None, "float16")}
        entry = self._open(_Request(extractor, source, views, keys), self.dtype, verbose)
        return CachedFeatures(
            entry, batch_size or source.rows_per_batch, shuffle=shuffle, seed=seed
        )

    def info(self) -> CacheInfo:
        """What the folder holds.

        Returns:
            CacheInfo, a `table` of one row an entry, the last used first, and `total_bytes`.

        Example:

        >>> import tempfile
        >>> FeatureCache(tempfile.mkdtemp()).info().total_bytes
        0
        """
        return _info(self._store)

    def clear(self) -> Cleared:
        """Remove all features that no process has open.

        Returns:
            Cleared, the `num_bytes` that were removed and the keys of what was `kept`.

        Raises:
            OSError: they cannot be removed.

        Example:

        >>> import tempfile
        >>> FeatureCache(tempfile.mkdtemp()).clear()
        Cleared(num_bytes=0, kept=())
        """
        removed, kept = 0, []
        for stored in self._store.stored():
            if self._store.remove(stored.key):
                removed += stored.num_bytes
            else:
                kept.append(stored.key)
        return Cleared(removed, tuple(kept))

    def _open(self, request: "_Request", dtype: str | None, verbose: str | int) -> OpenEntry:
        """The entry that is asked for, which no other process removes from now on."""
        key = request.keys[dtype]
        entry = self._store.entry(key)
        hold = self._store.hold(key)
        manifest = entry.load()
        if manifest is None or not manifest.is_usable:
            with self._store.computing(key, announce=verbose != 0):
                hold = self._store.hold(key)  # now there is a folder to hold it in
                manifest = entry.load(announce=True)  # as another process may have left it
                if manifest is None or not manifest.is_usable:
                    manifest = self._compute(request, dtype, entry, manifest, verbose)
        if manifest.replaced_by is not None:
            return self._open(request, None, verbose)
        self._store.touch(key)
        return OpenEntry(entry.folder, manifest, Columns(entry.folder, manifest), hold)

    def _compute(
        self,
        request: "_Request",
        dtype: str | None,
        entry: Entry,
        manifest: Manifest | None,
        verbose: str | int,
    ) -> Manifest:
        """Compute what `manifest` lacks. The caller holds the lock."""
        source = request.source
        extraction = Extraction(
            request.extractor, source, views=request.views, narrow=dtype == "float16"
        )
        while True:
            if manifest is None:
                entry.discard()
                manifest = extraction.plan(request.keys[dtype], request.what)
            make_room = functools.partial(self._make_room, request.keys[dtype], manifest)
            progress = Progress("Features", source.num_rows, verbose)
            try:
                extraction.run(entry, manifest, progress, make_room)
                return manifest
            except DoesNotFitError:
                return _replaced(entry, manifest, request)
            except OrderChangedError:
                entry.discard()
                if source.one_pass:
                    raise ValueError(
                        "Expected rows in the order of an earlier pass, of which features were "
                        "kept. Received: other rows, or in another order. What was kept is "
                        "removed: call again with a new iterator."
                    ) from None
                manifest = None  # nothing is kept now that could contradict the next pass
            except DataChangedError:
                entry.discard()
                raise
            finally:
                progress.close()

    def _make_room(self, key: str, manifest: Manifest, needed_bytes: int) -> None:
        total_bytes = manifest.num_bytes() + needed_bytes
        self._store.make_room(needed_bytes, total_bytes=total_bytes, key=key)


class _Request(NamedTuple):
    """What is asked for."""

    extractor: keras.Layer
    source: Source
    views: int
    keys: dict[str | None, str]  # by the dtype of the store

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.extractor.name} ({type(self.extractor).__name__})"


def _replaced(entry: Entry, manifest: Manifest, request: _Request) -> Manifest:
    """Note, for other processes too, that float16 does not hold these features."""
    if request.source.one_pass:
        entry.discard()
        raise ValueError(
            "Expected features that float16 holds (up to 65504), or data that can be read again "
            "to store larger ones. Received: data that can be read once. Call again with a new "
            "iterator and FeatureCache(dtype=None)."
        )
    warnings.warn(
        "Features of more than 65504 do not fit into float16: those of "
        f"{request.what} are stored as they are computed.",
        UserWarning,
        stacklevel=5,
    )
    entry.discard()
    manifest.shards.clear()
    manifest.replaced_by = request.keys[None]
    entry.begin(manifest)
    return manifest


def check_views(extractor: keras.Layer, views: int) -> None:
    """Refuse an extractor whose features `views` passes do not hold."""
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"Expected views to be an int of at least 1. Received: views={views!r}.")
    if own := live.own_layers(extractor):
        raise ValueError(
            "Expected layers of which it is known what they do while training. Received: "
            f"{_named(own)}, which may act by code of their own. Let them "
            f"{live.OWN_LAYERS_MAY} a keras_xfer Backbone."
        )
    acting = live.live_layers(extractor)
    random = {id(layer) for layer in live.random_layers(extractor)}
    moving = [layer for layer in acting if id(layer) not in random]
    if views == 1 and acting:
        raise ValueError(
            "Expected an extractor that does the same while training as in inference. Received: "
            f"{_named(acting)}. views=K stores K random passes of augmentation; take other layers "
            "out of the extractor, or freeze them inside a keras_xfer Backbone."
        )
    if views > 1 and moving:
        raise ValueError(
            "Expected that no weights move while the extractor runs. Received: "
            f"{_named(moving)}. Freeze them: layer.trainable = False, or inside a keras_xfer "
            "Backbone."
        )
    if views > 1 and not acting:
        raise ValueError(
            "Expected a random layer (augmentation) in the extractor, of which views are stored. "
            f"Received: views={views}, which would all be equal. Pass views=1."
        )


def _versions() -> list[str]:
    """Of what computes: its layers go by their names, and in another may give other features."""
    backend = keras.backend.backend()
    library = getattr(sys.modules.get(backend), "__version__", "")
    minor = [".".join(version.split(".")[:2]) for version in (keras.__version__, library)]
    return [*minor, backend, __version__]


def _named(layers: list[keras.Layer]) -> str:
    return ", ".join(f"{layer.name!r} of type {type(layer).__name__}" for layer in layers)


def _input_names(extractor: keras.Layer, source: Source) -> Any:
    """Which input is called as which part of the data, where a dict is matched to a model's inputs
    by their names."""
    structure = source.x_structure
    if not (isinstance(structure, dict) and "dict" in structure):
        return None
    keys = {key for key, _ in structure["dict"]}
    graphs = [graph for graph in map(freezing.graph_of, freezing.walk(extractor)) if graph]
    names = [[tensor.name for tensor in graph.inputs] for graph in graphs]
    return [[name if name in keys else None for name in inputs] for inputs in names]


def _info(store: Store) -> CacheInfo:
    columns = ("key", "what", "rows", "views", "shape", "dtype", "bytes", "last used", "complete")
    rows = []
    entries = sorted(store.stored(), key=lambda each: -each.last_used)
    for each in entries:
        manifest = each.manifest
        used = datetime.datetime.fromtimestamp(each.last_used).strftime("%Y-%m-%d %H:%M")
        if manifest is None:
            rows.append((each.key[:12], "damaged", 0, 0, "-", "-", each.num_bytes, used, "no"))
            continue
        rows.append(
            (
                each.key[:12],
                manifest.what,
                manifest.rows_written,
                manifest.views,
                " ".join(str(leaf.shape) for leaf in manifest.feature_leaves),
                " ".join(leaf.stored for leaf in manifest.feature_leaves),
                each.num_bytes,
                used,
                "see float32" if manifest.replaced_by else "yes" if manifest.complete else "no",
            )
        )
    return CacheInfo(tables.Table(columns, rows), sum(each.num_bytes for each in entries))
