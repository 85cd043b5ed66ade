"""Sizes by name: a resolution such as 256px or 480p and a shape such as 16:9, on the grid of a model.

The rule is that of Open-Sora 2.0 (Peng et al. 2025, arXiv 2503.09642), on a grid of 16 pixels its tables;
tests/golden/open_sora holds what it gives.
"""

from __future__ import annotations

import math
from itertools import product

from kinema.errors import UserError

RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
"""The shapes (width:height) that Open-Sora has tables for, besides their inverses."""
RESOLUTIONS = ("256px", "512px", "768px", "1024px", "360p", "480p", "720p", "1080p")
"""Usual resolutions, by which a size in pixels is known again."""
NEAR = 0.03
"""A size is of a usual shape where its own differs by no more (as a logarithm): sides are whole cells of the grid."""


def size(resolution: str, ratio: str = "16:9", grid: int = 16) -> tuple[int, int]:
    """(height, width) of samples of a resolution (``256px``: 256 x 256 pixels; ``480p``: 480 lines of 16:9) and a shape
    (width:height, such as ``16:9``), in whole cells of ``grid`` pixels.

    For `RATIOS` and their inverses these are Open-Sora's own; other shapes follow the same rule. UserError for what is
    no resolution or no shape, or too small for the grid.
    """
    pixels = _pixels(resolution)
    wide, high = _sides(ratio)
    turned = inverse(ratio) in RATIOS or (ratio not in RATIOS and wide < high)
    if turned:
        wide, high = high, wide
    width = int(math.sqrt(pixels * (wide / high)) // grid) * grid
    height = int(pixels / width // grid) * grid if width else 0
    if not width or not height:
        raise UserError(f"{resolution} {ratio}: a side would be shorter than {grid} pixels. Take a larger resolution.")
    return (width, height) if turned else (height, width)


def inverse(ratio: str) -> str:
    """The same shape lying down, or standing."""
    wide, _, high = ratio.partition(":")
    return f"{high}:{wide}"


def _pixels(resolution: str) -> int:
    number = resolution.rstrip("px")
    if number.isdecimal() and int(number) and resolution in (f"{number}px", f"{number}p"):
        side = int(number)
        return side * side if resolution.endswith("px") else int(side * side / 9 * 16)
    raise UserError(f"'{resolution}' is no resolution. Write 256px, 768px, 480p or the like.")


def _sides(ratio: str) -> tuple[float, float]:
    try:
        wide, high = (float(side) for side in ratio.split(":"))
    except ValueError:
        wide = high = 0.0
    if not (0 < wide < math.inf and 0 < high < math.inf):
        raise UserError(f"'{ratio}' is no shape. Write width:height, such as 16:9, 1:1 or 2.39:1.")
    return wide, high


# -- from one size to another ----------------------------------------------------------------------------------------


def shape_of(height: int, width: int) -> str:
    """The usual shape nearest to that of a size, or, where none is near, its own."""
    usual = [*RATIOS, *map(inverse, RATIOS)]
    nearest = min(usual, key=lambda ratio: _apart(ratio, height, width))
    return nearest if _apart(nearest, height, width) <= NEAR else f"{width}:{height}"


def _apart(ratio: str, height: int, width: int) -> float:
    wide, high = _sides(ratio)
    return abs(math.log(wide / high * height / width))


def named(height: int, width: int, grid: int) -> tuple[str, str] | None:
    """The usual resolution and shape whose size this is on the grid, if it is one's."""
    shapes = (*RATIOS, *map(inverse, RATIOS))
    pairs = product(RESOLUTIONS, shapes)
    return next((pair for pair in pairs if _fits(*pair, grid) and size(*pair, grid) == (height, width)), None)


def _fits(resolution: str, ratio: str, grid: int) -> bool:
    wide, high = _sides(ratio)
    return _pixels(resolution) * min(wide / high, high / wide) >= grid * grid


def with_resolution(height: int, width: int, resolution: str, grid: int) -> tuple[int, int]:
    """(height, width) of the same shape at another resolution; UserError for what is none.

    ``480p`` of a size that has 480 lines already is that size: models have sizes of their own beside the rule.
    """
    _pixels(resolution)
    if resolution == f"{min(height, width)}p":
        return height, width
    found = named(height, width, grid)
    return size(resolution, found[1] if found else shape_of(height, width), grid)


def with_shape(height: int, width: int, ratio: str, grid: int) -> tuple[int, int]:
    """(height, width) of another shape with as many pixels, as near as the grid allows; UserError for what is none.

    Of the size of a usual resolution it is the one that this resolution has in the other shape.
    """
    wide, high = _sides(ratio)
    found = named(height, width, grid)
    if found is not None:
        return size(found[0], ratio, grid)
    own = shape_of(height, width)
    if ratio in (own, inverse(own)):
        return (height, width) if ratio == own else (width, height)
    area = height * width

    def cells(side: float) -> tuple[int, int]:
        below = max(1, int(side // grid))
        return below * grid, (below + 1) * grid

    def distance(pair: tuple[int, int]) -> tuple[float, float]:
        shape = _apart(ratio, *pair)
        return round(shape + abs(math.log(pair[0] * pair[1] / area)), 9), shape

    return min(product(cells(math.sqrt(area * high / wide)), cells(math.sqrt(area * wide / high))), key=distance)
