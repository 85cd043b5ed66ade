"""Rotary positions on several axes, for channels of a head that turn in pairs (j, j + D/2) or (2 j, 2 j + 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Rope = Literal["rotate_half", "interleaved"]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each float32 [B or 1, S, 1, D / 2] for heads of D channels."""


def rotary_angles(places: Tensor, axes_dim: Sequence[int], theta: float, rope: Rope = "rotate_half") -> Rotary:
    """Cosines and sines at positions [S, axes] or [B, S, axes].

    On an axis of d channels pair i turns by position * theta^(-2 i / d) (RoFormer, Su et al. 2021, section 3.2.2). The
    authors compute the angles of "rotate_half" in float32 and those of "interleaved" in float64.
    """
    exact = rope == "interleaved" and places.device.type != "mps"
    real = torch.float64 if exact else torch.float32
    angles = []
    for axis, dim in enumerate(axes_dim):
        steps = torch.arange(0, dim, 2, dtype=real, device=places.device) / dim
        angles.append(places[..., axis, None].to(real) * (1.0 / theta**steps))
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)
    angle = angle if angle.ndim == 4 else angle[None]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotary: Rotary, rope: Rope) -> Tensor:
    """Turn the channels of ``x`` [B, S, heads, D] in pairs, in float32."""
    cos, sin = rotary
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    if rope == "rotate_half":
        first, second = wide.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)
