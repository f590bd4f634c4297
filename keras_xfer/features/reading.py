"""Rows on their way to the extractor: cut into blocks, hashed, and read ahead in the background."""

import hashlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_xfer.features import digests
from keras_xfer.features.manifest import Manifest
from keras_xfer.features.source import Leaves, Source

_AHEAD = 4  # blocks


class Block(NamedTuple):
    """Rows that are computed at once."""

    shard: int
    first_row: int
    leaves: Leaves


class ShardEnd(NamedTuple):
    """All rows of a shard have been read."""

    shard: int
    rows: int
    source: str | None  # digest of its rows, where another pass may bring others


class OrderChangedError(Exception):
    """Rows of a shard that is there already are not those that it was computed of."""


def blocks(source: Source, manifest: Manifest) -> Iterator[Block | ShardEnd]:
    """The rows whose shards are incomplete, in order; every shard in blocks that begin at its
    first row, so that what is computed again is computed alike.

    Raises:
        OrderChangedError: see there.
        ValueError: the data are not what they were.
    """
    if source.seeks:
        yield from _sought(source, manifest)
    else:
        yield from _streamed(source, manifest)


def _sought(source: Source, manifest: Manifest) -> Iterator[Block | ShardEnd]:
    total, per_shard = source.num_rows or 0, manifest.rows_per_shard
    rows_at = -1
    for shard in range(-(-total // per_shard)):
        if not manifest.missing(shard):
            continue
        first = shard * per_shard
        if rows_at != first:
            regrouped = _Regrouped(source.read(first))
        rows_at = min(first + per_shard, total)
        for row in range(first, rows_at, manifest.rows_per_batch):
            leaves = regrouped.take(min(manifest.rows_per_batch, rows_at - row))
            if leaves is None:
                raise ValueError(f"Expected {total:,} rows of data. Received: {row:,}.")
            yield Block(shard, row, leaves)
        yield ShardEnd(shard, rows_at - first, None)
    source.check(digests.RowsDigest(ordered=True))


def _streamed(source: Source, manifest: Manifest) -> Iterator[Block | ShardEnd]:
    whole = digests.RowsDigest(ordered=source.ordered)
    regrouped = _Regrouped(source.read())
    shard, ended = 0, False
    while not ended:
        first, rows, own = shard * manifest.rows_per_shard, 0, hashlib.sha256()
        while rows < manifest.rows_per_shard:
            asked = min(manifest.rows_per_batch, manifest.rows_per_shard - rows)
            leaves = regrouped.take(asked)
            if leaves is None:
                break
            of_rows = digests.of_rows(leaves)
            whole.update(of_rows)
            own.update(b"".join(of_rows))
            if manifest.missing(shard):
                yield Block(shard, first + rows, leaves)
            rows += len(of_rows)
        ended = rows < manifest.rows_per_shard
        kept = manifest.shards.get(shard)
        if kept is not None and (kept.rows, kept.source) != (rows, own.hexdigest()):
            raise OrderChangedError
        if rows:
            yield ShardEnd(shard, rows, own.hexdigest())
        shard += 1
    if any(index >= shard for index in list(manifest.shards)):
        raise OrderChangedError
    source.check(whole)


class _Regrouped:
    """Batches cut anew."""

    def __init__(self, batches: Iterator[Leaves]) -> None:
        self._batches = batches
        self._left: Leaves | None = None

    def take(self, rows: int) -> Leaves | None:
        """The next `rows` rows, fewer at the end, None after it."""
        parts: list[Leaves] = []
        while rows:
            if self._left is None:
                self._left = next(self._batches, None)
                if self._left is None:
                    break
            batch = self._left
            count = min(rows, len(batch[0]))
            parts.append([leaf[:count] for leaf in batch])
            self._left = [leaf[count:] for leaf in batch] if count < len(batch[0]) else None
            rows -= count
        if len(parts) < 2:
            return parts[0] if parts else None
        return [np.concatenate(column) for column in zip(*parts, strict=True)]


class Ahead:
    """Another iterator, read ahead in a thread; its errors are raised where it is read.

    Args:
        iterator: what is read.
    """

    _END = object()

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(iterator,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is self._END:
                return
            yield item

    def stop(self) -> None:
        """Read no further."""
        self._stopped.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.05)

    def _read(self, iterator: Iterator[Any]) -> None:
        try:
            for item in iterator:
                self._put((item, None))
                if self._stopped.is_set():
                    return
            self._put((self._END, None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None
