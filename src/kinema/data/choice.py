"""Which bucket suits each record of a block of columns: by shape and length, or by Open-Sora's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .bucket_table import ENOUGH, Level, walk_table
from .buckets import Bucket, BucketGroup
from .draws import uniforms

if TYPE_CHECKING:
    from .sources.base import MediaColumns

NEAR = 1e9
"""Distances of aspect ratios are compared to so many parts of 1, so that equal ones are equal after rounding."""
SAME_RATE = 2e-3
"""Relative difference up to which frame rates count as the same."""
MOST_FRAMES = 2**31 - 1
MOST_PIXELS = 2**20
"""A side that no file has."""
NO_BUCKET = -1
USED, UNKNOWN, WRONG, SHORT, PICTURE, SMALL, NOT_DRAWN = range(7)
CODES = ("", "media unknown", "media unknown", "too short", "picture without bucket", "too small", "not drawn")
"""Short names of the causes, as in `LeftOut.code`."""


@dataclass
class Numbers:
    """Numbers of buckets in the order in which they come up."""

    buckets: list[Bucket] = field(default_factory=list)
    known: dict[Bucket, int] = field(default_factory=dict)
    _sizes: np.ndarray = field(default_factory=lambda: np.empty((3, 0), np.int32))

    def of(self, bucket: Bucket) -> int:
        number = self.known.setdefault(bucket, len(self.buckets))
        if number == len(self.buckets):
            self.buckets.append(bucket)
        return number

    def sizes(self) -> np.ndarray:
        """int32 [3, numbers]: frames, height and width of each."""
        if self._sizes.shape[1] < len(self.buckets):
            self._sizes = np.array([(b.frames, b.height, b.width) for b in self.buckets], np.int32).T
        return self._sizes


@dataclass(frozen=True)
class Block:
    """What placing asks of a block of n records, [n] each."""

    rows: np.ndarray
    video: np.ndarray
    height: np.ndarray
    width: np.ndarray
    available: np.ndarray
    """Frames between the ends of the cut, at ``rate``; a picture: 1."""
    first: np.ndarray
    """First of them, counted from the file's beginning."""
    rate: np.ndarray
    code: np.ndarray
    """Number of the cause for which a record is left out; USED so far."""


def look(columns: MediaColumns, rows: np.ndarray, part: slice, fps: float | None) -> Block:
    """A part of the columns, with the numbers of its ``rows``.

    29.97 frames a second count as 30: resampling would only repeat one frame in a thousand. Unevenly spaced frames are
    always resampled, unless no rate is asked for.
    """
    names = ("video", "fps", "offset", "duration", "frames", "height", "width")
    pieces = (np.asarray(getattr(columns, name)[part]) for name in names)  # arithmetic on memory maps is slow
    video, own, offset, duration, frames, height, width = pieces
    with np.errstate(all="ignore"):
        near = np.abs((fps or 0) / own - 1) < SAME_RATE
        rate = own if fps is None else np.where(near & ~columns.variable[part], own, fps)
        end = np.ceil((offset + duration) * rate - 1e-6)
        right = (own > 0) & (offset >= 0) & (duration >= 0) & (frames > 0) & (end < MOST_FRAMES)
    size = (np.minimum(width, height) > 0) & (np.maximum(width, height) < MOST_PIXELS)
    code = np.where(size & (right | ~video), USED, WRONG).astype(np.uint8)
    code[~columns.known[part]] = UNKNOWN
    moving = video & (code == USED)
    rate = np.where(moving, rate, 0.0)
    offset = np.where(moving, offset, 0.0)
    first = np.ceil(offset * rate - 1e-6)
    available = np.where(moving, end, 1.0) - first
    # At the file's own rate the frames were counted; but those of a later cut depend on where between two it begins.
    available = np.where(moving & (rate == own) & (offset == 0), frames, available)
    first = np.where(available < 1, np.floor(offset * rate + 1e-6), first)  # between two frames: the one that is shown
    return Block(
        rows,
        moving,
        np.where(code == USED, height, 1),
        np.where(code == USED, width, 1),
        np.maximum(available, 1).astype(np.int32),
        first.astype(np.int32),
        rate,
        code,
    )


@dataclass(frozen=True)
class Shapes:
    """The buckets of a group by their shape, and their order of preference among those with equally near shapes."""

    shapes: tuple[tuple[int, int, tuple[int, ...], np.ndarray], ...]
    """(height, width, lengths in ascending order, int64 [1 + number of lengths, 2]: the rank with so many lengths
    filled, without and with scaling up)."""
    by_rank: np.ndarray
    """int32: number of the bucket with a rank."""
    bits: int
    """That ranks take."""

    NONE = 1 << 62
    """More than any distance and rank together."""

    @classmethod
    def of(cls, group: BucketGroup, numbers: Numbers) -> Shapes:
        def preference(entry: tuple[Bucket, bool]) -> tuple[int, bool, int]:
            bucket, enlarged = entry
            area = bucket.height * bucket.width
            return -bucket.frames, enlarged, area if enlarged else -area

        entries = sorted(((bucket, large) for bucket in group.buckets for large in (False, True)), key=preference)
        ranks = {entry: rank for rank, entry in enumerate(entries)}
        lengths: dict[tuple[int, int], list[int]] = {}
        for bucket in group.buckets:
            lengths.setdefault((bucket.height, bucket.width), []).append(bucket.frames)
        shapes = []
        for (height, width), found in lengths.items():
            own = [[ranks[Bucket(n, height, width), large] for large in (False, True)] for n in sorted(found)]
            shapes.append((height, width, tuple(sorted(found)), np.array([[cls.NONE] * 2, *own], np.int64)))
        by_rank = np.array([numbers.of(bucket) for bucket, _ in entries], np.int32)
        return cls(tuple(shapes), by_rank, len(entries).bit_length())

    def best(self, block: Block, aspect: np.ndarray) -> np.ndarray:
        """int32 [n]: number of the bucket that suits each record best, or NO_BUCKET."""
        best = np.full(len(aspect), self.NONE, np.int64)
        filled = {
            lengths: np.searchsorted(np.array(lengths, np.int32), block.available, side="right")
            for lengths in {lengths for _, _, lengths, _ in self.shapes}
        }
        for height, width, lengths, ranks in self.shapes:
            distance = np.rint(np.abs(aspect - math.log(width / height)) * NEAR).astype(np.int64)
            enlarged = (height > block.height) | (width > block.width)
            key = (distance << self.bits) + ranks.ravel()[filled[lengths] * 2 + enlarged]
            np.minimum(best, key, out=best)
        rank = best & ((1 << self.bits) - 1)
        return np.where(best < self.NONE, self.by_rank[np.minimum(rank, len(self.by_rank) - 1)], NO_BUCKET)


@dataclass(frozen=True)
class ByShape:
    groups: Sequence[Shapes]
    numbers: Numbers
    own_grid: int
    """Grid of the buckets of a record's own size, which small records get; 0: they are enlarged."""

    def choose(self, block: Block) -> np.ndarray:
        """int32 [groups, n]: number of the bucket in each group, or NO_BUCKET."""
        aspect = np.log(block.width / block.height)
        chosen = np.stack([group.best(block, aspect) for group in self.groups])
        # Every group has the same lengths, so a record without bucket in one has none in any.
        without = (chosen[0] == NO_BUCKET) & (block.code == USED)
        block.code[without] = np.where(block.video[without], SHORT, PICTURE)
        chosen[:, block.code != USED] = NO_BUCKET
        if self.own_grid:
            self._own_sizes(block, chosen)
        return chosen

    def _own_sizes(self, block: Block, chosen: np.ndarray) -> None:
        """Give each record that its buckets would enlarge one bucket of its own size instead of all of those."""
        frames, height, width = self.numbers.sizes()
        enlarged = (chosen != NO_BUCKET) & ((height[chosen] > block.height) | (width[chosen] > block.width))
        at = np.flatnonzero(enlarged.any(axis=0))
        first = enlarged[:, at].argmax(axis=0)
        cells = np.stack(
            (frames[chosen[first, at]], block.height[at] // self.own_grid, block.width[at] // self.own_grid)
        )
        chosen[enlarged] = NO_BUCKET
        empty = (cells[1:] == 0).any(axis=0)
        block.code[at[empty]] = SMALL
        at, first, cells = at[~empty], first[~empty], cells[:, ~empty].astype(np.int64)
        keys, which = np.unique((cells[0] << 40) + (cells[1] << 20) + cells[2], return_inverse=True)
        side = (1 << 20) - 1
        own = np.array(
            [
                self.numbers.of(Bucket(key >> 40, (key >> 20 & side) * self.own_grid, (key & side) * self.own_grid))
                for key in keys.tolist()
            ],
            np.int32,
        )[which]
        new = ~(chosen[:, at] == own).any(axis=0)  # another resolution may have that very size
        chosen[first[new], at[new]] = own[new]


class FromTable:
    """Buckets by Open-Sora's table."""

    def __init__(self, levels: Sequence[Level], numbers: Numbers, seed: int) -> None:
        self.levels = levels
        self.seed = seed
        self.numbers = [
            {f: np.array([numbers.of(Bucket(f, h, w)) for h, w in level.sizes], np.int32) for f in level.lengths}
            for level in levels
        ]

    def choose(self, block: Block) -> np.ndarray:
        """int32 [1, n]: number of the bucket, or NO_BUCKET."""

        def draw(positions: np.ndarray, count: np.ndarray) -> np.ndarray:
            numbers = np.empty(len(positions))
            for number in np.unique(count):
                some = count == number
                numbers[some] = uniforms(block.rows[positions[some]], self.seed, "bucket table", int(number))
            return numbers

        level, frames, shape = walk_table(self.levels, block.available, block.height, block.width, draw)
        chosen = np.full((1, len(level)), NO_BUCKET, np.int32)
        for number, by_frames in enumerate(self.numbers):
            for length, buckets in by_frames.items():
                at = np.flatnonzero((level == number) & (frames == length))
                chosen[0, at] = buckets[shape[at]]
        without = (level < 0) & (block.code == USED)
        block.code[without] = self._causes(block)[without]
        chosen[:, block.code != USED] = NO_BUCKET
        return chosen

    def _causes(self, block: Block) -> np.ndarray:
        """Why a record has no bucket: it is too small, it is too short, or it was not drawn."""
        area = block.height.astype(np.int64) * block.width
        causes = np.full(len(area), SMALL, np.uint8)
        for level in self.levels:
            large = area >= ENOUGH * level.area
            fits = block.available >= min((n for n in level.lengths if n > 1), default=MOST_FRAMES)
            if 1 in level.lengths:
                fits |= block.available == 1
            causes[large & (causes == SMALL)] = SHORT
            causes[large & fits] = NOT_DRAWN
        causes[(causes == SHORT) & ~block.video] = PICTURE
        return causes
