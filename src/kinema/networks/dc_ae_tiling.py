"""Tiles of a clip, run one by one and blended where they overlap.

The tiles, and the order in which they are blended, are Open-Sora's: a tile meets the finished one above it, then the
finished one on its left, each with a linear ramp over the overlap, which begins at the earlier tile alone. The weights
of a position sum to one. Two things differ: the sizes in pixels and in latents always agree, and a last tile of one
latent frame, which would decode to one frame in place of four, is left out: the tile before it covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.errors import UserError

Run = Callable[[Tensor], Tensor]
T_DIM, H_DIM, W_DIM = 2, 3, 4


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles and of their overlap, in latents; ``space`` or ``time`` None: not tiled that way."""

    space: int | None
    space_overlap: int
    time: int | None
    time_overlap: int


def tiling_of(pixels: int | None, frames: int | None, overlap: float, space_ratio: int, time_ratio: int) -> Tiling:
    """Tiles of ``pixels`` in height and width and of ``frames``, of which the share ``overlap`` lies on the next.

    ``space_ratio`` and ``time_ratio``: pixels and frames that make one latent. UserError for sizes that are no
    multiples of them, or below two of them, and for overlaps outside 0 < overlap <= 0.5.
    """
    if not 0 < overlap <= 0.5:
        raise UserError(f"tiles overlap by a share above 0 and at most 0.5, not {overlap}.")
    sizes = []
    for size, ratio, unit in ((pixels, space_ratio, "pixels"), (frames, time_ratio, "frames")):
        if size is not None and (size % ratio or size < 2 * ratio):
            nearest = max(2, round(size / ratio)) * ratio
            raise UserError(
                f"tiles of {size} {unit}: their size is a multiple of {ratio}, from {2 * ratio} on. "
                f"The nearest is {nearest}."
            )
        sizes.append(None if size is None else size // ratio)
    space, time = sizes
    # One latent at least: without an overlap, a tile left out would leave a gap.
    return Tiling(space, max(1, int((space or 0) * overlap)), time, max(1, int((time or 0) * overlap)))


def run_tiled(run: Run, x: Tensor, tiling: Tiling, unit: tuple[int, int], unit_out: tuple[int, int]) -> Tensor:
    """``run`` on the tiles of x [B, C, T, H, W], blended. ``unit``: frames and pixels of x that make one latent;
    ``unit_out``: those of its result."""
    in_space = tiling.space is not None and max(x.shape[H_DIM:]) > tiling.space * unit[1]

    def frame_run(clip: Tensor) -> Tensor:
        return _run_tiled_in_space(run, clip, tiling, unit[1], unit_out[1]) if in_space else run(clip)

    if tiling.time is None or x.shape[T_DIM] <= tiling.time * unit[0]:
        return frame_run(x)
    return _run_tiled_in_time(frame_run, x, tiling.time, tiling.time_overlap, unit[0], unit_out[0])


def _run_tiled_in_time(run: Run, x: Tensor, size: int, overlap: int, unit: int, unit_out: int) -> Tensor:
    begins = list(range(0, x.shape[T_DIM], (size - overlap) * unit))
    if x.shape[T_DIM] - begins[-1] == unit:
        del begins[-1]
    done: list[Tensor] = []
    behind: Tensor | None = None
    for begin in begins:
        tile = _blend(behind, run(x.narrow(T_DIM, begin, min(size * unit, x.shape[T_DIM] - begin))), T_DIM)
        if begin == begins[-1]:
            done.append(tile)
        else:
            kept, behind = _cut(tile, T_DIM, (size - overlap) * unit_out)
            done.append(kept)
    return torch.cat(done, dim=T_DIM)


def _run_tiled_in_space(run: Run, x: Tensor, tiling: Tiling, unit: int, unit_out: int) -> Tensor:
    assert tiling.space is not None
    size, stride = tiling.space * unit, (tiling.space - tiling.space_overlap) * unit
    stride_out = (tiling.space - tiling.space_overlap) * unit_out
    rows: list[Tensor] = []
    above: list[Tensor] = []  # what the finished tiles of the row before reach into this one
    for top in range(0, x.shape[H_DIM], stride):
        row, below = [], []
        aside: Tensor | None = None
        for column, left in enumerate(range(0, x.shape[W_DIM], stride)):
            tile = run(x[..., top : top + size, left : left + size])
            tile = _blend(above[column] if above else None, tile, H_DIM)
            tile = _blend(aside, tile, W_DIM)
            kept, beyond = _cut(tile, H_DIM, stride_out)
            below.append(beyond)
            row.append(_cut(kept, W_DIM, stride_out)[0])
            aside = _cut(tile, W_DIM, stride_out)[1]
        rows.append(torch.cat(row, dim=W_DIM))
        above = below
    return torch.cat(rows, dim=H_DIM)


def _blend(earlier: Tensor | None, tile: Tensor, dim: int) -> Tensor:
    """The tile, whose beginning fades in over ``earlier``: what lies in the same place and is finished."""
    if earlier is None or earlier.shape[dim] == 0:
        return tile
    count = earlier.shape[dim]
    shape = [count if axis == dim else 1 for axis in range(tile.ndim)]
    ramp = (torch.arange(count, device=tile.device, dtype=torch.float32) / count).to(tile.dtype).view(shape)
    met, rest = _cut(tile, dim, count)
    return torch.cat([earlier * (1 - ramp) + met * ramp, rest], dim=dim)


def _cut(x: Tensor, dim: int, at: int) -> tuple[Tensor, Tensor]:
    """Before and from ``at``, which may lie beyond the end."""
    at = min(at, x.shape[dim])
    return x.narrow(dim, 0, at), x.narrow(dim, at, x.shape[dim] - at)
