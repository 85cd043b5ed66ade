"""Buckets: the (frames, height, width) that a batch shares, and which stretch of a file fills one.

Aspect ratios are width / height. A resolution r stands for an area of r x r pixels, kept for every aspect
ratio; sides are rounded to the family's grid. Frame counts are stride * k + 1, as video autoencoders want
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kinema.errors import UserError

from .records import MediaInfo

FramesMode = Literal["head", "middle"]


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
class BucketSpec:
    """What the user asks for; `make_buckets` turns it into buckets for a family."""

    resolutions: Sequence[int | tuple[int, int]] = (512,)
    """Square side r, or [width, height], each standing for its area. Every file is used once at each of
    them."""
    frames: Sequence[int] = (1, 33)
    """Frame counts; 1 is for pictures (and for videos shorter than every other count)."""
    min_aspect: float = 0.5
    max_aspect: float = 2.0
    num_aspect_buckets: int = 9
    """How many aspect ratios, evenly spaced in their logarithm; 1 gives squares when the range is
    symmetric."""
    size_buckets: Sequence[tuple[int, int, int]] | None = None
    """Explicit [width, height, frames], used as they are instead of everything above."""
    frames_mode: FramesMode = "head"
    """Where in a longer video the clip is taken: its beginning, or its middle."""


@dataclass(frozen=True)
class BucketGroup:
    """Buckets among which a file gets one. A dataset has one group per resolution."""

    name: str
    buckets: tuple[Bucket, ...]
    frames_mode: FramesMode = "head"


@dataclass(frozen=True)
class Misfit:
    """Why no bucket of a group takes a file; ``code`` as in `LeftOut`."""

    reason: str
    code: str


def make_buckets(spec: BucketSpec, grid: int = 16, stride: int = 4) -> tuple[BucketGroup, ...]:
    """The bucket groups of a specification: one per resolution, or a single one of explicit sizes.

    ``grid`` is what both sides must be multiples of (spatial compression x patch), ``stride`` what frame
    counts are one more than a multiple of (temporal compression). Raises UserError for values that no
    family of that grid takes.
    """
    if spec.frames_mode not in ("head", "middle"):
        raise UserError(f'frames_mode is "{spec.frames_mode}": expected "head" or "middle"')
    if spec.size_buckets is not None:
        explicit = _explicit(spec.size_buckets, grid, stride)
        return (BucketGroup("size_buckets", explicit, spec.frames_mode),)
    if not spec.resolutions:
        raise UserError("resolutions is empty: give at least one, such as [512]")
    if not spec.frames:
        raise UserError("frames is empty: give at least one count, such as [1] for pictures")
    for count in spec.frames:
        check_frames(count, stride)
    frames = sorted(set(spec.frames))
    ratios = _aspect_ratios(spec)
    groups = []
    for resolution in spec.resolutions:
        area = resolution * resolution if isinstance(resolution, int) else resolution[0] * resolution[1]
        if area < grid * grid:
            raise UserError(f"resolution {resolution} is smaller than the {grid} pixel grid of this model")
        sizes = dict.fromkeys(size_for(ratio, area, grid) for ratio in ratios)
        buckets = tuple(Bucket(f, h, w) for f in frames for h, w in sizes)
        name = str(resolution) if isinstance(resolution, int) else f"{resolution[0]}x{resolution[1]}"
        groups.append(BucketGroup(name, buckets, spec.frames_mode))
    return tuple(groups)


def check_frames(count: int, stride: int) -> None:
    """Raise UserError, naming the nearest valid counts, unless count = stride * k + 1."""
    if count >= 1 and (count - 1) % stride == 0:
        return
    below = max(1, (count - 1) // stride * stride + 1)
    nearest = f"{below}" if below >= count else f"{below} or {below + stride}"
    raise UserError(f"{count} frames do not fit this model, which takes {stride} * k + 1; nearest: {nearest}")


def size_for(ratio: float, area: float, grid: int) -> tuple[int, int]:
    """(height, width) of about this area and width / height ratio, on the grid."""
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    return max(1, round(height / grid)) * grid, max(1, round(width / grid)) * grid


def _aspect_ratios(spec: BucketSpec) -> list[float]:
    low, high, count = spec.min_aspect, spec.max_aspect, spec.num_aspect_buckets
    if not 0 < low <= high:
        raise UserError(f"min_aspect {low} and max_aspect {high}: expected 0 < min_aspect <= max_aspect")
    if count < 1:
        raise UserError(f"num_aspect_buckets is {count}: expected at least 1")
    if count == 1:
        return [math.sqrt(low * high)]
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(step * i) for i in range(count)]


def _explicit(sizes: Iterable[tuple[int, int, int]], grid: int, stride: int) -> tuple[Bucket, ...]:
    buckets = []
    for width, height, frames in sizes:
        check_frames(frames, stride)
        for name, side in (("width", width), ("height", height)):
            if side < grid or side % grid:
                below = side // grid * grid
                nearest = f"{below} or {below + grid}" if below else f"{grid}"
                raise UserError(
                    f"size bucket {width}x{height}x{frames}: {name} must be a multiple of {grid} "
                    f"for this model; nearest: {nearest}"
                )
        buckets.append(Bucket(frames, height, width))
    if not buckets:
        raise UserError("size_buckets is empty: give at least one [width, height, frames]")
    return tuple(dict.fromkeys(buckets))


def frames_at(info: MediaInfo, fps: float | None) -> int:
    """How many frames a file has once resampled to ``fps`` (None: its own rate)."""
    if info.kind == "image":
        return 1
    rate = clip_rate(info, fps)
    return info.frames if rate == info.fps else max(1, math.ceil(info.duration * rate - 1e-6))


def clip_rate(info: MediaInfo, fps: float | None) -> float:
    """The rate to take frames at: ``fps``, or the file's own where none is asked for or the two are near.

    29.97 counts as 30: resampling it would only repeat one frame in a thousand.
    """
    if not fps or (not info.variable and abs(fps / info.fps - 1) < 2e-3):
        return info.fps
    return fps


def assign(info: MediaInfo, group: BucketGroup, target_fps: float | None = None) -> tuple[Bucket, Clip] | Misfit:
    """The bucket of a group that suits a file best, and the clip that fills it; or why none does.

    Of the buckets with no more frames than the file has at ``target_fps`` (a picture: 1): nearest in log
    aspect ratio, then most frames, then the largest that need not be scaled up.
    """
    available = frames_at(info, target_fps)
    fitting = [b for b in group.buckets if b.frames <= available]
    if not fitting:
        return _too_short(info, group, available, target_fps)
    aspect = math.log(info.width / info.height)

    def preference(bucket: Bucket) -> tuple[float, int, bool, int]:
        distance = round(abs(math.log(bucket.width / bucket.height) - aspect), 9)
        larger = bucket.width * bucket.height > info.width * info.height
        area = bucket.width * bucket.height
        return distance, -bucket.frames, larger, area if larger else -area

    best = min(fitting, key=preference)
    if info.kind == "image":
        return best, Clip()
    start = (available - best.frames) // 2 if group.frames_mode == "middle" else 0
    return best, Clip(start, best.frames, clip_rate(info, target_fps))


def _too_short(info: MediaInfo, group: BucketGroup, available: int, fps: float | None) -> Misfit:
    smallest = min(b.frames for b in group.buckets)
    if info.kind == "image":
        return Misfit(
            f"is a picture, and the smallest frame count is {smallest}: add 1 to frames, or take it out",
            "picture without bucket",
        )
    at = f"at {fps:g} fps (it has {info.frames} at {info.fps:g})" if fps else f"at its own {info.fps:g} fps"
    damaged = "".join(f"; {note}" for note in info.notes if note.startswith("damaged"))
    return Misfit(
        f"has {available} frame{'s' * (available != 1)} {at}, and the smallest bucket asks for {smallest}: "
        f"add a smaller frame count, or take it out{damaged}",
        "too short",
    )
