"""The judge: says what a video shows, from its pixels alone.

Every step is plain image processing. The border gives the background, what differs from it gives the shape's colour,
the projection of each pixel on the line between the two colours gives how much of it the shape covers, the path of that
coverage's centroid gives the direction, and the overlap of the coverage, averaged along that path, with each outline of
the same area gives the shape. A label is None where the video does not show that attribute clearly: noise earns no
label by luck of the draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from kinema.shapes.video import read_video
from kinema.shapes.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Combo, coverage

PALETTE_DISTANCE = 75.0
"""Farthest a colour may lie from the named one, in 8-bit RGB (Euclidean)."""
MIN_CONTRAST = 60.0
"""Least distance of a shape's pixels from the background, in 8-bit RGB."""
MIN_UNIFORM = 0.8
"""Least share of border pixels that must agree with the background colour."""
AREA_RANGE = (0.02, 0.35)
"""Share of the picture that a shape covers."""
MIN_TRAVEL = 0.15
"""Least way of the centroid over the clip, in picture widths."""
MIN_OVERLAP = 0.75
"""Least intersection over union of a shape, averaged along its path, with its outline."""
SOFTNESS = (0.0, 0.011, 0.022, 0.033)
"""How soft the edge of an outline may be: standard deviations of its blur, in picture widths."""


@dataclass(frozen=True)
class Verdict:
    """What a video shows; None where an attribute cannot be read."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None


ATTRIBUTES = tuple(field.name for field in fields(Verdict))


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    names = list(palette)
    distances = np.linalg.norm(np.array([palette[n] for n in names], np.float32) - colour, axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= PALETTE_DISTANCE else None


def _background_colour(video: np.ndarray) -> np.ndarray | None:
    """Median colour of the 3-pixel border, or None where the border is not of one colour."""
    border = np.ones(video.shape[1:3], bool)
    border[3:-3, 3:-3] = False
    pixels = video[:, border].reshape(-1, 3)
    colour = np.median(pixels, axis=0)
    near = np.linalg.norm(pixels - colour, axis=1) < MIN_CONTRAST
    return colour if near.mean() >= MIN_UNIFORM else None


def _shape_colour(video: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """Median colour of the pixels that differ most from the background, or None where hardly any do."""
    distance = np.linalg.norm(video - background, axis=-1)
    seen = distance > MIN_CONTRAST
    if not AREA_RANGE[0] <= seen.mean() <= AREA_RANGE[1]:
        return None
    core = distance >= 0.75 * np.percentile(distance[seen], 80)
    return np.median(video[core], axis=0)


def _centroids(cover: np.ndarray) -> np.ndarray | None:
    """Centroid (x, y) of the coverage [T, H, W] in every frame, [T, 2]; None where the shape is not always there."""
    area = cover.sum((1, 2))
    if area.min() <= 0.3 * np.median(area) or area.max() >= 3 * np.median(area):
        return None
    return _centroids_of(cover)


def _centroids_of(cover: np.ndarray) -> np.ndarray:
    height, width = cover.shape[1:]
    area = cover.sum((1, 2))
    x = (cover.sum(1) * (np.arange(width) + 0.5)).sum(1) / area
    y = (cover.sum(2) * (np.arange(height) + 0.5)).sum(1) / area
    return np.stack([x, y], 1)


def _direction(centroids: np.ndarray, width: int) -> str | None:
    """The axis and sign of steady motion along one axis; None for none, a diagonal or a path that turns back."""
    time = np.arange(len(centroids)) - (len(centroids) - 1) / 2
    slope = (time @ centroids) / (time @ time)
    travel = slope * (len(centroids) - 1)
    axis = int(np.abs(travel).argmax())
    if abs(travel[axis]) < MIN_TRAVEL * width or abs(travel[1 - axis]) > 0.5 * abs(travel[axis]):
        return None
    deviation = centroids[:, axis] - centroids[:, axis].mean()
    explained = (slope[axis] ** 2 * (time @ time)) / (deviation @ deviation)
    if explained < 0.85:
        return None
    step = [0, 0]
    step[axis] = int(np.sign(travel[axis]))
    return next(name for name, unit in DIRECTIONS.items() if unit == tuple(step))


def mean_coverage(cover: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The coverage [T, H, W] averaged over the frames, each moved to have its centroid in the middle: what stays of a
    shape while it moves, as an eye that follows it sees it. [H, W]."""
    height, width = cover.shape[1:]
    return np.mean(
        [_moved(frame, width / 2 - x, height / 2 - y) for frame, (x, y) in zip(cover, centroids, strict=True)], axis=0
    )


def shape_overlaps(mean: np.ndarray) -> dict[str, float]:
    """Intersection over union of a coverage [H, W], its centroid in the middle, with each outline of the same area and
    centroid, drawn as sharp or as soft as fits it best."""
    height, width = mean.shape
    size = max(height, width)
    unit = {name: coverage(name, (size / 2, size / 2), size / 4, size, 2).sum() / (size / 4) ** 2 for name in SHAPES}
    overlaps: dict[str, float] = {}
    for name in SHAPES:
        radius = float(np.sqrt(mean.sum() / unit[name]))
        sharp = coverage(name, (width / 2, height / 2), radius, size)[:height, :width]
        scores = []
        for softness in SOFTNESS:
            ideal = _softened(sharp, softness * size)
            ((x, y),) = _centroids_of(ideal[None])
            ideal = _moved(ideal, width / 2 - x, height / 2 - y)
            scores.append(np.minimum(ideal, mean).sum() / np.maximum(ideal, mean).sum())
        overlaps[name] = float(max(scores))
    return overlaps


def _moved(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture moved right by x and down by y pixels, zero where nothing was."""
    from PIL import Image

    picture = Image.fromarray(image.astype(np.float32))
    return np.asarray(
        picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y), Image.Resampling.BILINEAR)
    )


def _softened(image: np.ndarray, deviation: float) -> np.ndarray:
    """The picture blurred by a Gaussian of that standard deviation in pixels."""
    if deviation == 0:
        return image
    reach = int(3 * deviation + 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, kernel, "same")
    return image


def judge(video: np.ndarray | Path | str) -> Verdict:
    """Reads a video, a file or uint8 [T, H, W, 3], back into the four attributes."""
    if not isinstance(video, np.ndarray):
        video = read_video(Path(video))
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(f"a video is uint8 [T, H, W, 3], not {video.dtype} {list(video.shape)}")
    pixels = video.astype(np.float32)
    background = _background_colour(pixels)
    if background is None:
        return Verdict(None, None, None, None)
    background_name = _nearest(background, BACKGROUNDS)
    colour = _shape_colour(pixels, background)
    if colour is None:
        return Verdict(None, None, None, background_name)
    colour_name = _nearest(colour, COLOURS)
    line = colour - background
    cover = np.clip((pixels - background) @ line / (line @ line), 0.0, 1.0)
    cover[cover < 0.15] = 0.0
    centroids = _centroids(cover)
    if centroids is None:
        return Verdict(colour_name, None, None, background_name)
    overlaps = shape_overlaps(mean_coverage(cover, centroids))
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Verdict(
        colour_name,
        shape if overlaps[shape] >= MIN_OVERLAP else None,
        _direction(centroids, video.shape[2]),
        background_name,
    )


def accuracy(verdicts: Sequence[Verdict], combos: Iterable[Combo]) -> dict[str, float]:
    """Share of videos whose label agrees with what was asked for, per attribute and for all four ("all")."""
    pairs = list(zip(verdicts, combos, strict=True))
    if not pairs:
        raise ValueError("no video to judge")
    hits = {name: [getattr(v, name) == getattr(c, name) for v, c in pairs] for name in ATTRIBUTES}
    scores = {name: float(np.mean(hit)) for name, hit in hits.items()}
    scores["all"] = float(np.mean(np.all([hits[name] for name in ATTRIBUTES], axis=0)))
    return scores
