"""Masks of samples in the loss: from pixels to the grid of the latents, and the mean over what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kinema.data.lengths import CAUSAL, ClipLengths

if TYPE_CHECKING:
    from torch import Tensor

WHITE = 255


def kept_latents(
    masks: Sequence[Tensor | None], latents: Tensor, given: Tensor | None = None, lengths: ClipLengths = CAUSAL
) -> Tensor | None:
    """How much each position of ``latents`` [B, C, T, H, W] counts in the loss, 0 to 1: broadcasts to [B, 1, T, H, W].

    ``masks`` are those of `kinema.data.batch.Batch`, uint8 [1, 1 or frames, height, width] in pixels; ``given`` is 1
    where the network is told the latents (`kinema.families.base.Prepared`). ``lengths``: those of the family. None:
    everything counts.
    """
    import torch

    learnt = None if given is None else 1 - given.float()
    if all(mask is None for mask in masks):
        return learnt
    frames, height, width = latents.shape[2:]
    whole = torch.ones(1, frames, height, width, device=latents.device)
    kept = torch.stack([whole if mask is None else on_latent_grid(mask, latents.shape[2:], lengths) for mask in masks])
    return kept if learnt is None else kept * learnt


def on_latent_grid(mask: Tensor, size: Sequence[int], lengths: ClipLengths) -> Tensor:
    """A mask uint8 [1, 1 or T, H, W] at the size of latents (frames, height, width), float32 [1, *size] from 0 to 1.

    Each latent gets the mean of the pixels that it stands for. A causal video autoencoder makes its first latent of
    the first frame alone and the k-th of frames (k - 1) s + 1 .. k s; a mask of one frame holds for all.
    """
    import torch

    given, (frames, height, width) = mask.shape[1], size
    if given == 1:
        return _area_mean(mask, height, width).expand(1, frames, height, width)
    assert given in lengths and lengths.latents(given) == frames, f"a mask of {given} frames for {frames} latent frames"
    return torch.cat([_area_mean(mask[:, behind], height, width) for behind in lengths.behind(given)], dim=1)


def _area_mean(mask: Tensor, height: int, width: int) -> Tensor:
    """[1, n, H, W] -> [1, 1, height, width]; few frames at a time, so that a long mask is never held as floats."""
    _, count, rows, columns = mask.shape
    assert rows % height == 0 and columns % width == 0, f"a mask of {columns}x{rows} for latents of {width}x{height}"
    cells = mask.float().reshape(1, count, height, rows // height, width, columns // width)
    return cells.mean((1, 3, 5))[None] / WHITE


def masked_mean(values: Tensor, kept: Tensor | None) -> Tensor:
    """sum(w e) / sum(w) of each sample [B, ...], with weights w that broadcast to it; 0 where nothing is kept."""
    import torch

    if kept is None:
        return values.flatten(1).mean(1)
    kept = kept.expand_as(values)
    total = kept.flatten(1).sum(1)
    return (values * kept).flatten(1).sum(1) / torch.where(total > 0, total, 1)
