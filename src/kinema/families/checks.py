"""What a configuration asks of a variant, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.base import Variant
from kinema.suggest import did_you_mean

OPTIONS = ("bypass_guidance", "cond_embed", "conditions", "first_frame_p", "guidance")
"""Keys of ``[model]`` that only some families read: their `Family.options` name them."""


def check_options(config: Config, family: str, options: Sequence[str]) -> None:
    """ConfigError for keys that the family does not read, which has these ``options``."""
    for key in OPTIONS:
        if key in config.model.model_fields_set and key not in options:
            raise ConfigError(f"model.{key}: {family} has nothing that reads it; leave the key out.")


def check_dropout(config: Config, variant: Variant) -> None:
    """ConfigError for shares of caption dropout of what is no text encoder of the variant."""
    shares, known = config.training.caption_dropout, [p for p in variant.parts if p.startswith("text_encoder")]
    for part in shares if isinstance(shares, dict) else ():
        if part not in known:
            raise ConfigError(
                f"training.caption_dropout: {variant.name} has no text encoder '{part}'{did_you_mean(part, known)} "
                f"Its text encoders: {', '.join(known)}."
            )


def check_controls(config: Config, variant: Variant) -> None:
    """ConfigError for sources without the control pictures that the variant needs, or with ones that it ignores."""
    least, most = variant.pictures if "controls" in variant.conditions else (0, 0)
    for source in config.all_sources:
        if most == 0 and source.controls:
            raise ConfigError(f"data.sources.controls: {variant.name} is told no control pictures; leave the key out.")
        if not least <= len(source.controls) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ConfigError(
                f"data.sources.controls: {variant.name} edits pictures; name {wanted} folder(s) of control pictures "
                f"for {source.path}, whose files have the names of its own. {len(source.controls)} given."
            )


def check_sizes(config: Config, variant: Variant) -> None:
    """ConfigError for clip lengths, sizes and preview pictures that the variant cannot take."""
    preview, grid = config.preview, variant.grid
    settings = config.bucket_settings
    given = {key for one in settings for key in one.model_fields_set} | preview.model_fields_set
    lengths = [("data.buckets.frames", n) for one in settings for n in one.lengths]
    lengths += [("preview.frames", preview.frames)] if preview.frames else []
    for key, frames in lengths:
        if variant.modality == "image":
            if frames != 1 and given & {"frames", "table"}:
                raise ConfigError(f"{key}: {variant.name} makes pictures, which have 1 frame, not {frames}.")
            continue
        if frames not in variant.lengths:
            raise ConfigError(
                f"{key}: {frames} frames do not fit the autoencoder, which takes {variant.lengths}; the nearest are "
                f"{' and '.join(map(str, variant.lengths.nearest(frames)))}."
            )
        if "first_frame" in variant.conditions and frames == 1:
            raise ConfigError(f"{key}: image-to-video needs clips, and 1 frame is a picture; leave 1 out.")
    sides = [("data.buckets.sizes", side) for one in settings for size in one.sizes or () for side in size[:2]]
    sides += [(f"preview.{name}", side) for name in ("height", "width") if (side := getattr(preview, name))]
    for key, side in sides:
        if side % grid:
            below = max(side // grid, 1) * grid
            raise ConfigError(
                f"{key}: {side} is no multiple of {grid}, which one token of {variant.name} covers; the nearest are "
                f"{below} and {below + grid}."
            )
    least, most = variant.pictures
    if not least * len(preview.prompts) <= len(preview.images) <= most * len(preview.prompts):
        raise ConfigError(
            f"preview.images: {len(preview.images)} pictures for {len(preview.prompts)} prompts; {variant.name} makes "
            f"each preview from {least if least == most else f'{least} to {most}'}."
        )
