"""Buckets: the (frames, height, width) that a batch shares, and which stretch of a file fills one.

Aspect ratios are width / height. A resolution r stands for an area of r x r pixels, kept for every aspect
ratio; sides are rounded to the family's grid. Frame counts are those that its autoencoder takes (`ClipLengths`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.errors import UserError

from .lengths import ClipLengths

if TYPE_CHECKING:
    from kinema.config.data import BucketConfig


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that all clips of a batch share, in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Clip:
    """The stretch of a file that fills a bucket: frames start .. start + frames - 1 of the file at ``fps``.

    Frame k of the file at that rate is what is shown k / fps seconds after its first frame. ``fps`` 0: a
    picture.
    """

    start: int = 0
    frames: int = 1
    fps: float = 0.0

    @property
    def start_seconds(self) -> float:
        return self.start / self.fps if self.fps else 0.0


@dataclass(frozen=True)
class BucketGroup:
    """Buckets among which a record gets one."""

    name: str
    buckets: tuple[Bucket, ...]


def bucket_groups(config: BucketConfig, grid: int, allowed: ClipLengths) -> tuple[BucketGroup, ...]:
    """The buckets of a configuration: a group for each resolution, or a single one of explicit sizes or of
    Open-Sora's table.

    ``grid`` is what both sides must be multiples of (spatial compression x patch). With ``clip = "full"`` the lengths
    are all ``allowed`` ones from the shortest to the longest of the configuration. With ``upscale = false`` records
    may get buckets of their own size, which are not among these.

    Raises UserError, naming the key and the nearest valid values, for what no such model takes.
    """
    if config.table is not None:
        from .bucket_table import table_levels

        levels = table_levels(config, grid, allowed)
        all_of_them = (Bucket(f, h, w) for level in levels for f in level.lengths for h, w in level.sizes)
        return (BucketGroup("table", tuple(dict.fromkeys(all_of_them))),)
    if config.sizes is not None:
        return (BucketGroup("sizes", _explicit(config, grid, allowed)),)
    lengths = _lengths(config.frames, config, allowed, "frames")
    ratios = aspect_ratios(config)
    groups = []
    for resolution in config.resolutions:
        check_resolution(resolution, grid, "data.buckets.resolutions")
        sizes = dict.fromkeys(size_for(ratio, resolution**2, grid) for ratio in ratios)
        buckets = tuple(Bucket(f, h, w) for f in lengths for h, w in sizes)
        groups.append(BucketGroup(str(resolution), buckets))
    return tuple(groups)


def check_frames(count: int, allowed: ClipLengths, key: str = "data.buckets.frames") -> None:
    """Raise UserError, naming the nearest valid counts, unless a clip may have so many frames."""
    if count not in allowed:
        nearest = " or ".join(map(str, allowed.nearest(count)))
        raise UserError(f"{key}: {count} frames do not fit this model, which takes {allowed}; nearest: {nearest}")


def check_resolution(side: int, grid: int, key: str) -> None:
    """Raise UserError where a square of this side is smaller than one cell of the grid."""
    if side < grid:
        raise UserError(f"{key}: {side} is smaller than the {grid} pixel grid of this model; nearest: {grid}")


def size_for(ratio: float, area: float, grid: int) -> tuple[int, int]:
    """(height, width) of about this area and width / height ratio, on the grid."""
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    return max(1, round(height / grid)) * grid, max(1, round(width / grid)) * grid


def aspect_ratios(config: BucketConfig) -> list[float]:
    """The aspect ratios, width / height, that a configuration lists or spaces evenly in their logarithm."""
    if config.aspects is not None:
        return list(config.aspects)
    low, high, count = config.min_aspect, config.max_aspect, config.aspect_buckets
    if count == 1:
        return [math.sqrt(low * high)]
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(step * i) for i in range(count)]


def _explicit(config: BucketConfig, grid: int, allowed: ClipLengths) -> tuple[Bucket, ...]:
    assert config.sizes is not None
    buckets: list[Bucket] = []
    for size in config.sizes:
        height, width = size[0], size[1]
        for name, side in (("height", height), ("width", width)):
            if side < grid or side % grid:
                below = side // grid * grid
                nearest = f"{below} or {below + grid}" if below else f"{grid}"
                raise UserError(
                    f"data.buckets.sizes: {list(size)}: {name} must be a multiple of {grid} for this model; "
                    f"nearest: {nearest}"
                )
        key, lengths = ("sizes", (size[2],)) if len(size) == 3 else ("frames", config.frames)
        buckets += [Bucket(frames, height, width) for frames in _lengths(lengths, config, allowed, key)]
    if config.clip == "full":  # several triples of a shape: every length between them
        shapes: dict[tuple[int, int], list[int]] = {}
        for bucket in buckets:
            shapes.setdefault((bucket.height, bucket.width), []).append(bucket.frames)
        buckets = [
            Bucket(frames, height, width)
            for (height, width), found in shapes.items()
            for frames in allowed.between(min(found), max(found))
        ]
    return tuple(dict.fromkeys(buckets))


def _lengths(frames: Sequence[int], config: BucketConfig, allowed: ClipLengths, key: str) -> Sequence[int]:
    for count in frames:
        check_frames(count, allowed, f"data.buckets.{key}")
    return allowed.between(min(frames), max(frames)) if config.clip == "full" else frames
