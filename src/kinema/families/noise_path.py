"""The paths that networks were trained on: what they predict, at which times, and how times shift with the sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Native = Literal["velocity", "negative_velocity", "x0", "eps", "vp_velocity"]


@dataclass(frozen=True)
class NoisePath:
    """What the network predicts natively, and the times at which it can.

    Objectives mix on the flow path, x_t = (1 - t) x_0 + t eps, whatever path a network was trained on: the
    variance-preserving and the EDM path are the same mixtures up to a factor, x_vp = x_t / sqrt((1 - t)^2 + t^2) and
    x_edm = x_t / (1 - t), with the noise level sigma = t / (1 - t). ``Family.predict`` applies the factor and turns t
    into the network's own time.

    ``native``: "velocity" (eps - x_0), "negative_velocity" (x_0 - eps), "x0", "eps", or "vp_velocity"
    (a eps - s x_0 with (a, s) = (1 - t, t) / sqrt((1 - t)^2 + t^2); Salimans and Ho 2022).
    ``sigma_min``: how much noise is left at t = 0: x_t = (1 - t) x_0 + (1 - (1 - sigma_min)(1 - t)) eps, and
    v = (1 - sigma_min) eps - x_0 (Lipman et al. 2023, eq. 22). This is the path above with x_0 + sigma_min eps in the
    place of x_0.
    """

    native: Native = "velocity"
    t_min: float = 0.0
    t_max: float = 1.0
    sigma_min: float = 0.0


@dataclass(frozen=True)
class ResolutionShift:
    """A shift exp(mu) with mu linear in the number of tokens, through (tokens_low, mu_low), (tokens_high, mu_high).

    The defaults are Flux's (``calculate_shift`` of its published sampler).
    """

    tokens_low: int = 256
    mu_low: float = 0.5
    tokens_high: int = 4096
    mu_high: float = 1.15

    def __call__(self, tokens: int, frames: int = 1) -> float:
        """The shift for samples of ``tokens`` tokens in all, in ``frames`` latent frames (which this law ignores)."""
        slope = (self.mu_high - self.mu_low) / (self.tokens_high - self.tokens_low)
        return math.exp(self.mu_low + slope * (tokens - self.tokens_low))


@dataclass(frozen=True)
class FrameShift(ResolutionShift):
    """A shift that is linear in the tokens of one latent frame, times the square root of the number of frames.

    The defaults are Open-Sora's: 1 at 256 tokens, 3 at 4096; the ``mu`` are the shifts themselves here.
    """

    mu_low: float = 1.0
    mu_high: float = 3.0

    def __call__(self, tokens: int, frames: int = 1) -> float:
        slope = (self.mu_high - self.mu_low) / (self.tokens_high - self.tokens_low)
        return (self.mu_low + slope * (tokens / frames - self.tokens_low)) * math.sqrt(frames)
