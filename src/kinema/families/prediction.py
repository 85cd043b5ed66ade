"""What networks predict, and the way from each kind of prediction to every other.

On the flow path x_t = (1 - t) x_0 + t eps the four kinds are linear in each other, given x_t and t:
velocity v = eps - x_0, so x_0 = x_t - t v and eps = x_t + (1 - t) v. (Rectified flow: Liu et al. 2023; the
table of conversions: Salimans and Ho 2022, there for the variance-preserving path.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kinema.families.base import NoisePath

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["velocity", "negative_velocity", "x0", "eps"]

SMALLEST_DIVISOR = 1e-4
"""x_0 says nothing about the noise at t = 0, nor eps about the data at t = 1: nearer to those ends than this,
a tenth of the finest published time step, the division is by this, and the result stays finite."""


def convert(value: Tensor, source: Kind, target: Kind, x_t: Tensor, t: Tensor) -> Tensor:
    """A prediction of one kind as another kind.

    ``value`` and ``x_t``: [B, ...]. ``t``: [B], or per latent position, broadcastable to ``x_t``. Half
    precision is raised to float32, in which the result is returned (float64 stays): x_t - t v cancels near
    the ends. Nothing is done when the kinds are the same.
    """
    import torch

    if source == target:
        return value
    dtype = torch.promote_types(value.dtype, torch.promote_types(x_t.dtype, torch.float32))
    value, x_t, t = value.to(dtype), x_t.to(dtype), t.to(dtype)
    if t.ndim == 1:
        t = t.view(-1, *[1] * (x_t.ndim - 1))

    if source == "velocity":
        velocity = value
    elif source == "negative_velocity":
        velocity = -value
    elif source == "x0":
        velocity = (x_t - value) / t.clamp(min=SMALLEST_DIVISOR)
    else:
        velocity = (value - x_t) / (1 - t).clamp(min=SMALLEST_DIVISOR)

    if target == "velocity":
        return velocity
    if target == "negative_velocity":
        return -velocity
    if target == "x0":
        return x_t - t * velocity
    return x_t + (1 - t) * velocity


def native_target(path: NoisePath, x_0: Tensor, eps: Tensor) -> Tensor:
    """What the network should have predicted, in the kind that it predicts natively."""
    if path.native == "x0":
        return x_0
    if path.native == "eps":
        return eps
    return eps - x_0 if path.native == "velocity" else x_0 - eps
