"""Laws of the time t in [0, 1] (1 is noise), by their quantile functions.

A draw is Q(u) with u uniform, so evaluation at fixed quantiles and training share one definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """t <- s t / (1 + (s - 1) t): more noise for s > 1 (Esser et al. 2024, "Scaling Rectified Flow Transformers",
    eq. 23, with s = sqrt(m / n))."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int) -> float:
    """The shift for a sequence of this many tokens: exp(mu), mu linear from 0.5 at 256 tokens to 1.15 at 4096
    (Flux's schedule)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (tokens - 256))


@dataclass(frozen=True)
class TimeLaw:
    """Uniform or logit-normal t, shifted, restricted to [t_min, t_max] by conditioning on that range."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    scale: float = 1.0
    shift: float | Literal["resolution"] = 1.0
    t_min: float = 0.0
    t_max: float = 1.0

    def shift_for(self, tokens: int) -> float:
        """The shift for samples of this many tokens."""
        return resolution_shift(tokens) if self.shift == "resolution" else self.shift

    def quantile(self, u: Tensor, tokens: int) -> Tensor:
        """Q(u) for u in [0, 1], float64: the inverse of the law's distribution function."""
        shift = self.shift_for(tokens)
        low, high = (self._cumulative(bound, shift) for bound in (self.t_min, self.t_max))
        u = low + (high - low) * u.double()
        if self.distribution == "logit_normal":
            import torch

            u = torch.special.expit(self.scale * torch.special.ndtri(u))
        return shifted(u, shift).clamp(self.t_min, self.t_max)

    def _cumulative(self, t: float, shift: float) -> float:
        if t in (0.0, 1.0):
            return t
        t = t / (shift + (1 - shift) * t)  # the inverse shift
        if self.distribution == "uniform":
            return t
        return 0.5 * math.erfc(-math.log(t / (1 - t)) / (self.scale * math.sqrt(2)))
