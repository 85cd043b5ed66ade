"""The size of a sample: in pixels, or by a resolution and a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.families.base import Family, SamplingDefaults
from kinema.families.resolutions import shape_of, size, with_resolution, with_shape

PIXELS, NAMES = ("height", "width"), ("resolution", "aspect_ratio")
"""The two ways to say a size."""
AUTO = "auto"
"""The shape of the first reference."""


def merged(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The command's options with those of a row before them: where a row says its size in one way, what the command
    says in the other does not hold for it."""
    found = {**options, **own}
    for one, other in ((PIXELS, NAMES), (NAMES, PIXELS)):
        if any(own.get(name) is not None for name in one):
            found |= {name: None for name in other if own.get(name) is None}
    return found


def asked_size(
    family: Family, defaults: SamplingDefaults, options: Mapping[str, Any], images: Sequence[Path | str], prefix: str
) -> tuple[int, int]:
    """(height, width) as the options say them: a resolution alone keeps the shape of the default size, a shape alone
    its area. UserError for what is no resolution or shape, and where the size is said in two ways.

    ``prefix`` comes before the names of options in messages.
    """
    height, width = (options.get(name) or getattr(defaults, name) for name in PIXELS)
    resolution, ratio = (options.get(name) for name in NAMES)
    if resolution is None and ratio is None:
        return height, width
    both = [name for name in PIXELS if options.get(name) is not None]
    if both:
        name = "resolution" if resolution is not None else "aspect_ratio"
        raise UserError(
            f"{_option(name, prefix)} and {_option(both[0], prefix)} both say the size: give a resolution and a shape, "
            "or height and width."
        )
    if ratio == AUTO:
        if not images:
            raise UserError(
                f"{_option('aspect_ratio', prefix)} auto takes the shape of the first picture, and there is none. "
                "Write width:height."
            )
        ratio = _shape_of_file(images[0])
    if resolution is None:
        return with_shape(height, width, str(ratio), family.grid)
    if ratio is None:
        return with_resolution(height, width, resolution, family.grid)
    return size(resolution, ratio, family.grid)


def _option(name: str, prefix: str) -> str:
    return prefix + (name.replace("_", "-") if prefix else name)


def _shape_of_file(image: Path | str) -> str:
    from kinema.data.media import known_info

    info = known_info(image)
    return shape_of(info.height, info.width)
