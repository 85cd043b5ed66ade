"""Latents as tokens: 2 x 2 latents beside each other make one, as Flux packs them, and those who follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H/2 W/2, 4 C]: tokens row by row, in each its channels, of each channel its 2 x 2."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: [B, rows columns, 4 C] to [B, C, 2 rows, 2 columns]."""
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(rows: int, columns: int, image: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Where each token is, float32 [rows columns, 3]: which picture (0 is the one that is made), row, column."""
    import torch

    where = torch.zeros(rows, columns, 3, device=device)
    where[..., 0] = image
    where[..., 1] = torch.arange(rows, device=device)[:, None]
    where[..., 2] = torch.arange(columns, device=device)
    return where.flatten(0, 1)
