"""Open-Sora's bucket table: for each resolution and clip length, how likely a record is taken and how many make a
batch.

A record walks the resolutions from the highest to the lowest, past those whose area it does not reach to 80%. A
picture, or a video of one frame, is taken with the probability of length 1. A longer video takes the longest length
that it fills; where that has a second probability, it goes on to the next shorter one with it; then it is taken with
the first. What is not taken goes on to the next resolution. The shape is the one with the nearest ratio of height to
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.errors import UserError

from .buckets import Bucket, check_frames, check_resolution
from .lengths import ClipLengths

if TYPE_CHECKING:
    import numpy as np

    from kinema.config.data import BucketConfig

RATIOS = ((2.39, 1), (2, 1), (16, 9), (1.85, 1), (9, 16), (5, 8), (3, 2), (4, 3), (1, 1))
"""Width : height. Each also counts turned on its side."""
ENOUGH = 0.8
"""Share of a resolution's area that a record must have."""


@dataclass(frozen=True)
class Length:
    """What a table says of one length at one resolution."""

    taken: float
    """Probability of being taken."""
    shorter: float | None
    """Probability of going on to a shorter length; None: the table gives none, and nothing is drawn."""
    batch_size: int
    """Of one device."""


@dataclass(frozen=True)
class Level:
    """One resolution of a table."""

    name: str
    area: int
    """Pixels."""
    lengths: dict[int, Length]
    """By frames, the longest first."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of its shapes."""
    ratios: tuple[float, ...]
    """height / width by which each shape is chosen: that of its name, not that of its rounded size."""


def table_levels(config: BucketConfig, grid: int, allowed: ClipLengths) -> tuple[Level, ...]:
    """The resolutions of ``config.table``, the highest first, with their shapes on a grid.

    Raises UserError for what no model of that grid and those lengths takes.
    """
    assert config.table is not None
    if config.clip == "full":
        raise UserError(
            'data.buckets.clip = "full": the bucket table says how long clips are; use another clip, such as "middle"'
        )
    levels = []
    for name, entries in config.table.items():
        side, key = int(name.removesuffix("px")), f'data.buckets.table."{name}"'
        check_resolution(side, grid, key)
        lengths: dict[int, Length] = {}
        for frames, (chance, batch_size) in sorted(((int(n), entry) for n, entry in entries.items()), reverse=True):
            check_frames(frames, allowed, key)
            if frames in lengths:
                raise UserError(f"{key}: length {frames} is given twice")
            taken, shorter = chance if isinstance(chance, tuple) else (chance, None)
            if frames == 1 and shorter is not None:
                raise UserError(f"{key}.1: pictures have no shorter length to go on to; give one probability: {taken}")
            lengths[frames] = Length(taken, shorter, batch_size)
        shapes = table_sizes(side * side, grid)
        levels.append(Level(name, side * side, lengths, tuple(shapes.values()), tuple(shapes)))
    return tuple(sorted(levels, key=lambda level: -level.area))


def table_sizes(area: int, grid: int) -> dict[float, tuple[int, int]]:
    """(height, width) of every aspect ratio, by height / width, in the order in which equally near ones are chosen.

    Sides are rounded down to the grid, the width first and the height to what is left of the area; then one side moves
    by one cell where that comes nearer to the area. A size that an earlier ratio already has is not listed again.
    """
    upright: dict[float, tuple[int, int]] = {}
    turned: dict[float, tuple[int, int]] = {}
    for x, y in RATIOS:
        width = max(1, int(math.sqrt(area * (x / y)) // grid)) * grid
        height = max(1, int(area / width // grid)) * grid
        moved = ((height - grid, width), (height + grid, width), (height, width - grid), (height, width + grid))
        size = min(((height, width), *moved), key=lambda size: (min(size) < grid, abs(size[0] * size[1] - area)))
        if size not in upright.values():
            upright[y / x] = size
            turned[x / y] = size[::-1]
    return upright | turned


def table_batch_size(config: BucketConfig, bucket: Bucket, grid: int) -> int | None:
    """How many samples of a bucket make a batch on one device; None where no table says it.

    Where two resolutions share a size on this grid, it is the smaller of their batch sizes.
    """
    if config.table is None:
        return None
    found = [
        level.lengths[bucket.frames].batch_size
        for level in table_levels(config, grid, ClipLengths(1))
        if bucket.frames in level.lengths and (bucket.height, bucket.width) in level.sizes
    ]
    return min(found, default=None)


Draw = Callable[["np.ndarray", "np.ndarray"], "np.ndarray"]
"""(positions [K], which draw of each [K]) -> numbers in [0, 1) [K]."""


def walk_table(
    levels: Sequence[Level], available: np.ndarray, height: np.ndarray, width: np.ndarray, draw: Draw
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a table makes of N records: (level, frames, shape), int32 [N] each, all -1 where it takes none.

    ``available``: the frames of each record; 1 is a picture. ``draw``: the random numbers, each taken only where a
    record's fate depends on it, and counted for each record from 0.
    """
    import numpy as np

    found = np.full((3, len(available)), -1, np.int32)
    draws = np.zeros(len(available), np.int32)
    area = height.astype(np.int64) * width
    for number, level in enumerate(levels):
        near = np.flatnonzero((found[0] < 0) & (area >= ENOUGH * level.area))

        def at_random(some: np.ndarray, near: np.ndarray = near) -> np.ndarray:
            positions = near[some]
            draws[positions] += 1
            return draw(positions, draws[positions] - 1)

        chosen = _lengths_at(level, available[near], at_random)
        taken = chosen > 0
        found[0, near[taken]] = number
        found[1, near[taken]] = chosen[taken]
    for number, level in enumerate(levels):
        here = np.flatnonzero(found[0] == number)
        found[2, here] = _nearest_ratio(level, height[here] / width[here])
    return found[0], found[1], found[2]


def _lengths_at(level: Level, available: np.ndarray, at_random: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The length at which one resolution takes each record, int32; 0 where it does not."""
    import numpy as np

    chosen = np.zeros(len(available), np.int32)
    left = available > 1
    for frames, length in level.lengths.items():
        if frames == 1:
            pictures = np.flatnonzero(available == 1)
            chosen[pictures[at_random(pictures) < length.taken]] = 1
            continue
        here = np.flatnonzero(left & (available >= frames))
        if length.shorter is not None:
            goes_on = np.ones(len(here), np.bool_) if length.shorter >= 1 else at_random(here) <= length.shorter
            here = here[~goes_on]
        left[here] = False
        if length.taken < 1:
            here = here[at_random(here) <= length.taken]
        chosen[here] = frames
    return chosen


def _nearest_ratio(level: Level, ratio: np.ndarray) -> np.ndarray:
    """The first of the level's shapes whose height / width is nearest."""
    import numpy as np

    nearest = np.full(len(ratio), np.inf)
    shape = np.zeros(len(ratio), np.int32)
    for number, named in enumerate(level.ratios):
        distance = np.abs(ratio - named)
        better = distance < nearest
        shape[better] = number
        np.minimum(nearest, distance, out=nearest)
    return shape
