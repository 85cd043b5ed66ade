"""Placing: which bucket and which clips every record gets, for columns of ten million records.

Of the buckets that a record fills: nearest in the logarithm of the aspect ratio, then most frames, then the largest
that need not be scaled up. A record is used once in every group of buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bucket_table import ENOUGH, table_levels
from .buckets import Bucket, bucket_groups
from .choice import (
    CODES,
    NO_BUCKET,
    NOT_DRAWN,
    PICTURE,
    SMALL,
    UNKNOWN,
    WRONG,
    Block,
    ByShape,
    FromTable,
    Numbers,
    Shapes,
    look,
)
from .clips import take_clips
from .lengths import ClipLengths

if TYPE_CHECKING:
    from kinema.config.data import BucketConfig

    from .sources.base import MediaColumns

BLOCK = 1 << 15
"""Records that are placed at once: their columns stay in the processor's cache."""


@dataclass(frozen=True)
class Placement:
    """Items and misfits. N items, ordered by position, group and first frame; M misfits, by position. Positions are
    those of a record in ``columns``."""

    columns: MediaColumns
    config: BucketConfig
    grid: int
    buckets: tuple[Bucket, ...]
    """Those that occur, sorted."""
    index: np.ndarray
    """uint32 [N]: position of the record."""
    group: np.ndarray
    """uint8 [N]: which of `bucket_groups`; a bucket of the record's own size counts for the first that asks for it."""
    bucket: np.ndarray
    """uint32 [N]: number of the bucket."""
    start: np.ndarray
    """int32 [N]: first frame of the clip, at ``fps``, counted from the file's first frame."""
    fps: np.ndarray
    """float64 [N]: rate at which the clip is taken; 0 for pictures."""
    spare: np.ndarray
    """int32 [N]: how many later first frames a clip drawn anew for every use may take; 0 otherwise."""
    missed: np.ndarray
    """uint32 [M]: position of the record."""
    missed_code: np.ndarray
    """uint8 [M]: number of the cause in `CODES`."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def frames(self) -> np.ndarray:
        """int32 [N]: of the item's bucket."""
        return self._of_bucket("frames")

    @property
    def height(self) -> np.ndarray:
        """int32 [N]: of the item's bucket."""
        return self._of_bucket("height")

    @property
    def width(self) -> np.ndarray:
        """int32 [N]: of the item's bucket."""
        return self._of_bucket("width")

    def _of_bucket(self, name: str) -> np.ndarray:
        return np.array([getattr(bucket, name) for bucket in self.buckets], np.int32)[self.bucket]

    def reason(self, position: int) -> tuple[str, str]:
        """(sentence for the user, short name of the cause) of a misfit at this position."""
        at = int(np.searchsorted(self.missed, np.uint32(position)))  # an int would have the whole column cast
        assert at < len(self.missed) and self.missed[at] == position, f"record {position} is no misfit"
        code = int(self.missed_code[at])
        return _explain(code, self, position), CODES[code]


def place(
    columns: MediaColumns,
    rows: np.ndarray,
    config: BucketConfig,
    grid: int,
    lengths: ClipLengths,
    *,
    seed: int,
    online: bool,
) -> Placement:
    """Place N records in buckets and choose their clips.

    ``rows``: uint32 [N], the records' numbers in their source, by which random choices are made. ``grid`` and
    ``lengths`` as in `bucket_groups`, whose errors are raised. ``online``: clips are encoded when they are used, so
    that random ones can be drawn anew.
    """
    assert len(rows) == len(columns)
    numbers = Numbers()
    groups = bucket_groups(config, grid, lengths)
    assert len(groups) < 256
    longer = any(bucket.frames > 1 for group in groups for bucket in group.buckets)
    if config.table is not None:
        chooser: FromTable | ByShape = FromTable(table_levels(config, grid, lengths), numbers, seed)
    else:
        chooser = ByShape([Shapes.of(group, numbers) for group in groups], numbers, 0 if config.upscale else grid)
    parts: list[list[np.ndarray]] = [[] for _ in range(8)]
    step = max(1, BLOCK // config.clips)
    for begin in range(0, max(1, len(rows)), step):
        block = look(columns, rows[begin : begin + step], slice(begin, begin + step), config.fps)
        chosen = chooser.choose(block)
        found = _items(block, chosen, numbers, config, longer, seed, online)
        left = np.flatnonzero(block.code)
        for pieces, new in zip(parts, (*found, left, block.code[left]), strict=True):
            pieces.append(new)
        for pieces in (parts[0], parts[6]):
            pieces[-1] = pieces[-1].astype(np.uint32) + np.uint32(begin)
    index, group, bucket, start, fps, spare, missed, code = (_joined(pieces) for pieces in parts)
    occurring, bucket = _sorted_buckets(numbers.buckets, bucket)
    return Placement(columns, config, grid, occurring, index, group, bucket, start, fps, spare, missed, code)


def _items(
    block: Block,
    chosen: np.ndarray,
    numbers: Numbers,
    config: BucketConfig,
    longer: bool,
    seed: int,
    online: bool,
) -> tuple[np.ndarray, ...]:
    """The columns of a block's items. ``longer``: some buckets have more than one frame, so that a video in a bucket of
    one was too short for them and gives one picture."""
    frames_of = numbers.sizes()[0]
    parts = []
    for group, buckets in enumerate(chosen):
        at = np.flatnonzero(buckets != NO_BUCKET)
        frames, available = frames_of[buckets[at]], block.available[at]
        single = (frames == 1) & longer
        owner, start, spare = take_clips(config, frames, available, single, block.rows[at], seed=seed, online=online)
        index = at[owner]
        number = np.full(len(index), group, np.uint8)
        parts.append(
            (index, number, buckets[index].astype(np.uint32), start + block.first[index], block.rate[index], spare)
        )
    if len(parts) == 1:
        return parts[0]
    joined = tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    order = np.argsort(joined[0].astype(np.uint16), kind="stable")
    return tuple(column[order] for column in joined)


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """One array of the pieces, which are given up: ten million records have little room for two of each."""
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole


def _sorted_buckets(buckets: list[Bucket], number: np.ndarray) -> tuple[tuple[Bucket, ...], np.ndarray]:
    """The buckets that occur, sorted, and their new numbers."""
    occurring = sorted(np.flatnonzero(np.bincount(number, minlength=len(buckets))).tolist(), key=buckets.__getitem__)
    renumbered = np.zeros(len(buckets), np.uint32)
    renumbered[occurring] = np.arange(len(occurring))
    return tuple(buckets[n] for n in occurring), renumbered[number]


def _explain(code: int, placement: Placement, position: int) -> str:
    columns, config = placement.columns, placement.config
    height, width = int(columns.height[position]), int(columns.width[position])
    frames, fps = int(columns.frames[position]), float(columns.fps[position])
    mend = 'mend its row, or set data.examine = "headers"'
    if code == UNKNOWN:
        return f"nothing is known of its size: give height and width, and for videos num_frames and fps; {mend}"
    if code == WRONG:
        moving = f", {frames} frames at {fps:g} fps in {columns.duration[position]:g} s" * bool(columns.video[position])
        return f"is said to have {width}x{height} pixels{moving}, which no file has: {mend}"
    if code == NOT_DRAWN:
        return (
            "the probabilities of data.buckets.table passed over it: with 1 for all lengths of its lowest resolution, "
            "every record that fits one is used"
        )
    if code == SMALL and config.table is None:
        return (
            f"has {width}x{height} pixels, less than one cell of the {placement.grid} pixel grid of this model: set "
            f"data.buckets.upscale = true, or take it out"
        )
    if code == SMALL:
        assert config.table is not None
        name, side = min(((name, int(name.removesuffix("px"))) for name in config.table), key=lambda pair: pair[1])
        return (
            f"has {width}x{height} pixels, and {name}, the smallest resolution of data.buckets.table, asks for "
            f"{math.ceil(ENOUGH * side * side)}: add a smaller one, or take it out"
        )
    shortest = _shortest(config, height * width)
    if code == PICTURE:
        return f"is a picture, and the smallest frame count is {shortest}: add 1 to frames, or take it out"
    block = look(columns, np.zeros(1, np.uint32), slice(position, position + 1), config.fps)
    available = int(block.available[0])
    at = f"at {config.fps:g} fps (it has {frames} at {fps:g})" if config.fps else f"at its own {fps:g} fps"
    has = f"has {available} frame{'s' * (available != 1)} {at}"
    if shortest is None:
        return f"{has}, and data.buckets.table has no length for videos: add one, or take it out"
    return f"{has}, and the smallest bucket asks for {shortest}: add a smaller frame count, or take it out"


def _shortest(config: BucketConfig, area: int) -> int | None:
    """The shortest clip that there is a bucket for; of a table, the shortest for a video of this area."""
    if config.table is not None:
        sides = {name: int(name.removesuffix("px")) for name in config.table}
        fitting = [lengths for name, lengths in config.table.items() if area >= ENOUGH * sides[name] ** 2]
        return min((int(length) for lengths in fitting for length in lengths if int(length) > 1), default=None)
    if config.sizes is not None:
        return min(frames for size in config.sizes for frames in (size[2:] or config.frames))
    return min(config.frames)
