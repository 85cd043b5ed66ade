"""Networks with a table of positions take pictures up to its sides."""

from __future__ import annotations

from kinema.config.schema import Config
from kinema.data.buckets import bucket_groups
from kinema.errors import ConfigError
from kinema.families.base import Variant


def longest_sides(config: Config, variant: Variant) -> list[tuple[str, int]]:
    """(key that names the sizes, longest side of any bucket in pixels) of each source's buckets."""
    found = []
    for settings in config.bucket_settings:
        groups = bucket_groups(settings, variant.grid, variant.lengths)
        longest = max(max(bucket.height, bucket.width) for group in groups for bucket in group.buckets)
        found.append((f"data.buckets.{settings.shapes_key}", longest))
    return found


def check_sides(config: Config, variant: Variant, most: int) -> None:
    """ConfigError for buckets and previews with sides longer than ``most`` pixels."""
    preview = config.preview
    sides = longest_sides(config, variant)
    sides += [(f"preview.{name}", side) for name in ("height", "width") if (side := getattr(preview, name))]
    for key, side in sides:
        if side > most:
            raise ConfigError(
                f"{key}: a side of {side} pixels is longer than {variant.name} has positions for, which is {most}. "
                "Make it smaller."
            )
