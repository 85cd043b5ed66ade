"""Laws of the time t in [0, 1] (1 is noise), by their quantile functions.

A draw is Q(u) with u uniform, so evaluation at fixed quantiles and training share one definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kinema.families.noise_path import ResolutionShift

if TYPE_CHECKING:
    from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """t <- s t / (1 + (s - 1) t): more noise for s > 1 (Esser et al. 2024, "Scaling Rectified Flow Transformers",
    eq. 23, with s = sqrt(m / n))."""
    return shift * t / (1 + (shift - 1) * t)


def uniform_time(u: Tensor) -> Tensor:
    """Quantile function of the uniform law."""
    return u


@dataclass(frozen=True)
class TimeLaw:
    """A law of t, shifted, restricted to [t_min, t_max] by conditioning on that range.

    ``distribution``: uniform; logit-normal, with ``scale`` the standard deviation of the logit; or "native", the
    family's own law, by its quantile function ``native``.
    """

    distribution: Literal["uniform", "logit_normal", "native"] = "uniform"
    scale: float = 1.0
    shift: float | ResolutionShift = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    native: Callable[[Tensor], Tensor] = uniform_time

    def within(self, t_min: float, t_max: float) -> TimeLaw:
        """This law conditioned on [t_min, t_max] too."""
        return replace(self, t_min=max(self.t_min, t_min), t_max=min(self.t_max, t_max))

    def shift_for(self, tokens: int, frames: int = 1) -> float:
        """The shift for samples of this many tokens in this many latent frames."""
        return self.shift(tokens, frames) if isinstance(self.shift, ResolutionShift) else self.shift

    def quantile(self, u: Tensor, tokens: int, frames: int = 1) -> Tensor:
        """Q(u) for u in [0, 1], float64: the inverse of the law's distribution function, for samples of this many
        tokens in this many latent frames."""
        shift = self.shift_for(tokens, frames)
        low, high = self._cumulative(self.t_min, shift), self._cumulative(self.t_max, shift, inclusive=True)
        u = low + (high - low) * u.double()
        return shifted(self._unshifted(u), shift).clamp(self.t_min, self.t_max)

    def _unshifted(self, u: Tensor) -> Tensor:
        import torch

        if self.distribution == "native":
            return self.native(u)
        return torch.special.expit(self.scale * torch.special.ndtri(u)) if self.distribution == "logit_normal" else u

    def _cumulative(self, t: float, shift: float, inclusive: bool = False) -> float:
        """The probability of times below t; ``inclusive``: of t itself too, which a law of discrete steps draws."""
        if t in (0.0, 1.0):
            return t
        t = t / (shift + (1 - shift) * t)  # the inverse shift
        if self.distribution == "uniform":
            return t
        if self.distribution == "logit_normal":
            return 0.5 * math.erfc(-math.log(t / (1 - t)) / (self.scale * math.sqrt(2)))
        return self._bisected(t, inclusive)

    def _bisected(self, t: float, inclusive: bool) -> float:
        """The u at which the family's quantile function reaches t, or ``inclusive``, passes it."""
        import torch

        first, last = self.native(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        if t >= last if inclusive else t <= first:  # most often the range is the whole one
            return float(inclusive)
        low, high = 0.0, 1.0
        for _ in range(52):
            middle = (low + high) / 2
            time = float(self.native(torch.tensor(middle, dtype=torch.float64)))
            below = time <= t if inclusive else time < t
            low, high = (middle, high) if below else (low, middle)
        return high
