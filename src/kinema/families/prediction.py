"""What networks predict, and the way from each kind of prediction to every other.

On the flow path x_t = (1 - t) x_0 + t eps all kinds are linear in each other, given x_t and t: velocity v = eps - x_0,
so x_0 = x_t - t v and eps = x_t + (1 - t) v. (Rectified flow: Liu et al. 2023; the table of conversions: Salimans and
Ho 2022, there for the variance-preserving path, whose velocity is a eps - s x_0.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.families.noise_path import Native, NoisePath

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DIVISOR = 1e-4
"""x_0 says nothing about the noise at t = 0, nor eps about the data at t = 1: nearer to those ends than this,
a tenth of the finest published time step, the division is by this, and the result stays finite."""


def variance_preserving(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, s, n) of the variance-preserving mixture with the noise level of t: x_vp = a x_0 + s eps = x_t / n, with
    n = sqrt((1 - t)^2 + t^2), a = (1 - t) / n, s = t / n."""
    n = ((1 - t).square() + t.square()).sqrt()
    return (1 - t) / n, t / n, n


def convert(value: Tensor, source: Native, target: Native, x_t: Tensor, t: Tensor) -> Tensor:
    """A prediction of one kind as another kind.

    ``value`` and ``x_t``: [B, ...]. ``t``: [B], or per latent position, broadcastable to ``x_t``. Half
    precision is raised to float32, in which the result is returned (float64 stays): x_t - t v cancels near
    the ends. Nothing is done when the kinds are the same.
    """
    import torch

    if source == target:
        return value
    dtype = torch.promote_types(value.dtype, torch.promote_types(x_t.dtype, torch.float32))
    value, x_t, t = value.to(dtype), x_t.to(dtype), _spread(t, x_t).to(dtype)

    if source == "velocity":
        velocity = value
    elif source == "negative_velocity":
        velocity = -value
    elif source == "x0":
        velocity = (x_t - value) / t.clamp(min=SMALLEST_DIVISOR)
    elif source == "eps":
        velocity = (value - x_t) / (1 - t).clamp(min=SMALLEST_DIVISOR)
    else:  # x_0 = a x_vp - s v, eps = s x_vp + a v
        a, s, n = variance_preserving(t)
        velocity = (s - a) * x_t / n + (a + s) * value

    if target == "velocity":
        return velocity
    if target == "negative_velocity":
        return -velocity
    x_0, eps = x_t - t * velocity, x_t + (1 - t) * velocity
    if target == "x0":
        return x_0
    return eps if target == "eps" else _vp_velocity(x_0, eps, t)


def native_target(path: NoisePath, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should have predicted at t ([B] or per latent position), in the kind that it predicts
    natively."""
    if path.native == "x0":
        return x_0
    if path.native == "eps":
        return eps
    if path.native == "vp_velocity":
        return _vp_velocity(x_0, eps, _spread(t, x_0))
    return eps - x_0 if path.native == "velocity" else x_0 - eps


def _vp_velocity(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    a, s, _ = variance_preserving(t)
    return a * eps - s * x_0


def _spread(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1)) if t.ndim == 1 else t
