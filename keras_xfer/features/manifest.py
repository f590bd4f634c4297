"""What an entry of the cache records of itself, `manifest.json`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Self

import numpy as np

from keras_xfer import files
from keras_xfer.features import digests

FORMAT = 1
FILENAME = "manifest.json"

_MOST_ROWS = 2**14  # what a process that is killed loses
_ROWS = 1024  # but more of tiny rows, for with every shard the manifest is written
_BYTES = 4 * 2**20
_MOST_BYTES = 64 * 2**20


class DamagedManifestError(ValueError):
    """A manifest that is not as it was written."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of features, or of what comes with them."""

    shape: tuple[int, ...]  # of a row
    dtype: str  # that is served
    stored: str  # on the disk

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the disk."""
        return np.dtype(self.stored).itemsize * math.prod(self.shape)

    @classmethod
    def of(cls, array: np.ndarray, *, narrow: bool = False) -> Self:
        """The leaf whose rows are those of `array`, floats stored as float16 if `narrow`."""
        dtype = array.dtype
        stored = dtype.name
        if dtype.kind == "V":  # bfloat16 and float8, which NumPy's files do not know
            stored = f"uint{8 * dtype.itemsize}"
        elif narrow and dtype.kind == "f":
            stored = "float16"
        return cls(array.shape[1:], dtype.name, stored)


@dataclasses.dataclass
class Shard:
    """Some rows of all arrays."""

    rows: int
    source: str | None  # digest of the rows that they were computed of, where these may change
    files: dict[str, tuple[int, str]]  # bytes and SHA-256 by name


@dataclasses.dataclass
class Manifest:
    """An entry: what it holds and in which files."""

    key: str
    what: str
    views: int
    rows_per_shard: int
    rows_per_batch: int
    features: Any  # see nesting.describe
    feature_leaves: list[Leaf]
    rest: Any
    rest_leaves: list[Leaf]
    rows: int | None = None
    shards: dict[int, Shard] = dataclasses.field(default_factory=dict)
    complete: bool = False
    replaced_by: str | None = None  # the entry of what does not fit into float16

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The manifest in `folder`, None where there is none.

        Raises:
            DamagedManifestError: it is not what was written there.
        """
        try:
            data = json.loads((folder / FILENAME).read_text("utf-8"))
            digest = data.pop("sha256")
            if digest != digests.of_json(data) or data.pop("format") != FORMAT:
                raise DamagedManifestError
            data["feature_leaves"] = [_leaf(leaf) for leaf in data["feature_leaves"]]
            data["rest_leaves"] = [_leaf(leaf) for leaf in data["rest_leaves"]]
            data["shards"] = {
                int(index): Shard(
                    shard["rows"],
                    shard["source"],
                    {name: (size, sha) for name, (size, sha) in shard["files"].items()},
                )
                for index, shard in data["shards"].items()
            }
            return cls(**data)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedManifestError(str(folder / FILENAME)) from error

    def write(self, folder: Path) -> None:
        """Write it to `folder`, atomically."""
        data = json.loads(files.to_json({"format": FORMAT, **dataclasses.asdict(self)}))
        files.write_json(folder / FILENAME, {**data, "sha256": digests.of_json(data)})

    def names(self, index: int) -> dict[str, tuple[Leaf, int | None]]:
        """The files of shard `index`: the leaf of each, and its view if it holds features."""
        names: dict[str, tuple[Leaf, int | None]] = {}
        for view in range(self.views):
            for i, leaf in enumerate(self.feature_leaves):
                names[f"features-{i}-view-{view}-{index:05d}.npy"] = leaf, view
        for i, leaf in enumerate(self.rest_leaves):
            names[f"rest-{i}-{index:05d}.npy"] = leaf, None
        return names

    def missing(self, index: int) -> set[str]:
        """The files of shard `index` that are still to be written."""
        shard = self.shards.get(index)
        return set(self.names(index)) - set(shard.files if shard else ())

    @property
    def is_usable(self) -> bool:
        """Whether nothing is to be computed: all is there, or another entry takes its place."""
        return self.complete or self.replaced_by is not None

    @property
    def rows_written(self) -> int:
        """How many rows there are."""
        return sum(shard.rows for index, shard in self.shards.items() if not self.missing(index))

    def row_bytes(self) -> int:
        """Bytes of a row on the disk, in all views."""
        features = sum(leaf.row_bytes for leaf in self.feature_leaves)
        return self.views * features + sum(leaf.row_bytes for leaf in self.rest_leaves)

    def num_bytes(self) -> int:
        """Bytes of all files that there are."""
        shards = list(self.shards.values())  # which another thread adds to
        return sum(size for shard in shards for size, _ in list(shard.files.values()))


def rows_per_shard(leaves: list[Leaf], rows_per_batch: int) -> int:
    """How many rows a shard holds: whole batches if that is possible."""
    largest = max(leaf.row_bytes for leaf in leaves)
    wanted = max(_ROWS, _BYTES // max(1, sum(leaf.row_bytes for leaf in leaves)))
    rows = max(1, min(wanted, _MOST_ROWS, _MOST_BYTES // max(1, largest)))
    return max(rows - rows % rows_per_batch, min(rows, rows_per_batch))


def _leaf(data: dict[str, Any]) -> Leaf:
    return Leaf(tuple(data["shape"]), data["dtype"], data["stored"])
