"""Items: records with their place in a bucket. Held in columns, so that ten million fit into a few hundred megabytes;
read one at a time, as an `Item`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .buckets import Bucket, Clip
from .records import Record

if TYPE_CHECKING:
    import numpy as np

    from .placement import Placement
    from .sources.base import Source


@dataclass(frozen=True)
class Item:
    """A record in a bucket, with the clip that fills it."""

    record: Record
    bucket: Bucket
    clip: Clip
    """For clips that are drawn anew for every use: the first of those that it can be."""
    source: int = 0
    """Number of its source."""
    spare: int = 0
    """How many frames later a clip that is drawn anew for every use may begin; 0: it is always ``clip``."""


@dataclass(frozen=True)
class Items:
    """All items of a data set, in the order of their sources and rows. N items."""

    sources: Sequence[Source]
    buckets: tuple[Bucket, ...]
    """Those that occur, sorted."""
    source: np.ndarray
    """uint16 [N]: number of the source."""
    row: np.ndarray
    """uint32 [N]: row of the record in its source."""
    bucket: np.ndarray
    """uint32 [N]: number of the bucket."""
    start: np.ndarray
    """int32 [N]: first frame of the clip, at ``fps``, counted from the file's first frame."""
    fps: np.ndarray
    """float64 [N]: rate at which the clip is taken; 0 for pictures."""
    spare: np.ndarray
    """int32 [N]: see `Item`."""

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def none(cls) -> Items:
        """No items, of no source."""
        import numpy as np

        kinds = (np.uint16, np.uint32, np.uint32, np.int32, np.float64, np.int32)
        return cls((), (), *(np.empty(0, kind) for kind in kinds))

    @classmethod
    def of(cls, source: Source, rows: np.ndarray, placement: Placement) -> Items:
        """The items of one source; ``rows`` are those of the positions in the placement."""
        import numpy as np

        return cls(
            (source,), placement.buckets, np.zeros(len(placement), np.uint16), rows[placement.index], placement.bucket,
            placement.start, placement.fps, placement.spare,
        )  # fmt: skip

    def joined(self, other: Items) -> Items:
        """These items and after them those of other sources."""
        import numpy as np

        buckets = tuple(sorted({*self.buckets, *other.buckets}))
        place = {bucket: number for number, bucket in enumerate(buckets)}
        numbers = [
            np.array([place[bucket] for bucket in one.buckets], np.uint32)[one.bucket] if len(one) else one.bucket
            for one in (self, other)
        ]
        source = np.concatenate([self.source, (other.source + len(self.sources)).astype(np.uint16)])
        columns = (
            np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("row", "start", "fps", "spare")
        )
        row, start, fps, spare = columns
        return Items((*self.sources, *other.sources), buckets, source, row, np.concatenate(numbers), start, fps, spare)

    def only(self, kept: np.ndarray) -> Items:
        """The items at these positions (or where this mask is true)."""
        import numpy as np

        columns = {name: getattr(self, name)[kept] for name in ("source", "row", "bucket", "start", "fps", "spare")}
        used, number = np.unique(columns["bucket"], return_inverse=True)
        columns["bucket"] = number.astype(np.uint32)
        return Items(self.sources, tuple(self.buckets[n] for n in used), **columns)

    @property
    def record_keys(self) -> np.ndarray:
        """uint64 [N]: a number for each record, the same for all of its items."""
        import numpy as np

        return self.source.astype(np.uint64) << np.uint64(32) | self.row.astype(np.uint64)

    @property
    def records(self) -> int:
        """How many records they are of."""
        import numpy as np

        same = (self.row[1:] == self.row[:-1]) & (self.source[1:] == self.source[:-1])
        return len(self) - int(np.count_nonzero(same))

    def bucket_counts(self) -> dict[Bucket, int]:
        """How many items each bucket has."""
        import numpy as np

        counts = np.bincount(self.bucket, minlength=len(self.buckets))
        return {bucket: int(count) for bucket, count in zip(self.buckets, counts, strict=True)}

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Item:
        number = int(self.source[index])
        bucket = self.buckets[self.bucket[index]]
        clip = Clip(int(self.start[index]), bucket.frames, float(self.fps[index]))
        record = self.sources[number].record(int(self.row[index]))
        return Item(record, bucket, clip, number, int(self.spare[index]))
