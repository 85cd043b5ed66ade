"""Autoencoders that work in tiles, in space and in time, so that large samples fit: the same settings for all classes.

A tile overlaps the next one by a quarter (by one latent at least) and is blended with it there. Tiles change pixels
near their edges a little, so that they are a setting of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from kinema.errors import UserError
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from kinema.families.base import Family
    from kinema.sampling.pipeline import SampleSettings

Tiling = Literal["auto", "on", "off"]
"""As the family has it; in space; not at all."""


def check_tiling(family: Family, tiling: str, size: int | None, frames: int | None) -> None:
    """UserError, before weights are loaded, for tiles that the family's autoencoder does not have."""
    if tiling not in get_args(Tiling):
        raise UserError(
            f"--tiling {tiling}: expected one of {', '.join(get_args(Tiling))}{did_you_mean(tiling, get_args(Tiling))}"
        )
    if tiling == "off" and (size is not None or frames is not None):
        given = "--tile-size" if size is not None else "--tile-frames"
        raise UserError(f"--tiling off and {given} do not go together: give one of them.")
    if tiling == "on" or size is not None or frames is not None:
        set_tiles(family.empty("autoencoder"), tiling, size, frames)


@contextmanager
def tiles(pipeline: Any, settings: SampleSettings) -> Iterator[None]:
    """The pipeline's autoencoder with the tiles of these settings, for one call."""
    autoencoder = getattr(pipeline, "vae", None)
    if autoencoder is None or (settings.tiling, settings.tile_size, settings.tile_frames) == ("auto", None, None):
        yield
        return
    before = {name: value for name, value in vars(autoencoder).items() if name.startswith(("use_", "til"))}
    try:
        set_tiles(autoencoder, settings.tiling, settings.tile_size, settings.tile_frames)
        yield
    finally:
        for name, value in before.items():
            setattr(autoencoder, name, value)


def set_tiles(autoencoder: Any, tiling: str, size: int | None, frames: int | None) -> None:
    """Have the autoencoder work in tiles of ``size`` pixels in height and width and of ``frames``; None: as it is, or
    with "on" as its class has it. UserError for tiles that it does not have, or not of this size."""
    name = type(autoencoder).__name__
    own = hasattr(autoencoder, "tiling")  # a class of ours: one setting holds all
    in_space = own or hasattr(autoencoder, "tiled_decode")
    in_time = own or hasattr(autoencoder, "_temporal_tiled_decode")
    if not in_space and (tiling == "on" or size is not None):
        what = "--tiling on" if size is None else f"--tile-size {size}"
        raise UserError(f"{what}: the autoencoder of this model ({name}) has no tiles; leave the option away.")
    if not in_time and frames is not None:
        raise UserError(
            f"--tile-frames {frames}: the autoencoder of this model ({name}) has no tiles in time; leave the option "
            "away."
        )
    if own:
        _set_own(autoencoder, tiling, size, frames)
        return
    if tiling == "off":
        autoencoder.disable_tiling()
        if in_time:
            autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    if size is not None:
        _set_size(autoencoder, size)
    if tiling == "on" or size is not None:
        autoencoder.enable_tiling()
    if frames is not None:
        ratio = autoencoder.temporal_compression_ratio
        _check_multiple("--tile-frames", frames, ratio, 2 * ratio)
        autoencoder.tile_sample_min_num_frames = frames
        autoencoder.tile_sample_stride_num_frames = _stride(frames // ratio) * ratio
        autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = True


def _set_size(autoencoder: Any, size: int) -> None:
    """The size of tiles in space; how a class of diffusers names it tells how it counts overlaps."""
    ratio = _space_ratio(autoencoder)
    by_stride = hasattr(autoencoder, "tile_sample_stride_height")
    # an overlap that is given as a share has to be whole in latents
    unit = ratio if by_stride else round(ratio / autoencoder.tile_overlap_factor)
    _check_multiple("--tile-size", size, unit, 2 * ratio)
    latents = size // ratio
    values = {"tile_sample_min": size, "tile_latent_min": latents, "tile_sample_stride": _stride(latents) * ratio}
    for kind, value in values.items():
        for way in ("height", "width", "size"):
            if hasattr(autoencoder, f"{kind}_{way}"):
                setattr(autoencoder, f"{kind}_{way}", value)


def _space_ratio(autoencoder: Any) -> int:
    """Pixels, in height and in width, of one latent."""
    config = autoencoder.config
    name = "spatial_compression_ratio"
    found = config.get(name) or vars(autoencoder).get(name)
    return int(found or 2 ** (len(config.block_out_channels) - 1))


def _set_own(autoencoder: Any, tiling: str, size: int | None, frames: int | None) -> None:
    """Tiles of an autoencoder whose ``enable_tiling`` takes pixels and frames."""
    if tiling == "off":
        autoencoder.disable_tiling()
        return
    now = autoencoder.tiling
    space, time = autoencoder.spatial_compression_ratio, autoencoder.temporal_compression_ratio
    wanted: dict[str, int | None] = {}
    if now is not None:
        wanted = {"pixels": now.space and now.space * space, "frames": now.time and now.time * time}
    elif tiling == "auto":
        wanted = {"pixels": None, "frames": None}
    if size is not None:
        _check_multiple("--tile-size", size, space, 2 * space)
        wanted["pixels"] = size
    if frames is not None:
        _check_multiple("--tile-frames", frames, time, 2 * time)
        wanted["frames"] = frames
    autoencoder.enable_tiling(**wanted)


def _stride(latents: int) -> int:
    """From one tile to the next, in latents."""
    return latents - max(1, latents // 4)


def _check_multiple(option: str, value: int, unit: int, least: int) -> None:
    """UserError unless a tile is a multiple of ``unit``, and has two latents."""
    what = "pixels" if option == "--tile-size" else "frames"
    if value % unit or value < least:
        nearest = max(-(-least // unit), round(value / unit)) * unit
        raise UserError(
            f"{option} {value}: tiles of this autoencoder have multiples of {unit} {what}, from "
            f"{-(-least // unit) * unit} on; nearest: {nearest}."
        )
