"""Networks with a table of positions take pictures up to its sides."""

from __future__ import annotations

import math

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.base import Variant


def check_sides(config: Config, variant: Variant, most: int) -> None:
    """ConfigError for buckets and previews with sides longer than ``most`` pixels.

    Of ``resolutions``, the longest side is that of the widest or the highest aspect ratio.
    """
    buckets, preview = config.data.buckets, config.preview
    widest = math.sqrt(max(buckets.max_aspect, 1 / buckets.min_aspect))
    sides = [("data.buckets.resolutions", math.floor(side * widest)) for side in buckets.resolutions]
    if buckets.sizes:
        sides = [("data.buckets.sizes", side) for size in buckets.sizes for side in size]
    sides += [(f"preview.{name}", side) for name in ("height", "width") if (side := getattr(preview, name))]
    for key, side in sides:
        if side > most:
            raise ConfigError(
                f"{key}: a side of {side} pixels is longer than {variant.name} has positions for, which is {most}. "
                "Make it smaller."
            )
