"""Networks that were trained on the steps of a variance-preserving schedule (Ho et al. 2020, arXiv 2006.11239): the way
between their steps k = 0 ... K - 1 and the time t of the flow path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TERMINAL_SIGMA = 4096.0
"""Noise level that samplers give a step without signal, where it would be infinite (diffusers: a_k^2 = 2^-24)."""
NEAR = 1e-2
"""A time in float32 gives its step to about 2e-4: nearer than this to a whole step, it is that step."""


@dataclass(frozen=True)
class StepSchedule:
    """The signal and the noise of each step: x_k = a_k x_0 + s_k eps with a_k^2 + s_k^2 = 1.

    On the flow path that is t_k = s_k / (a_k + s_k), with the noise level sigma_k = s_k / a_k = t_k / (1 - t_k).
    """

    signal: tuple[float, ...]
    """a_k, the square roots of the cumulative products of alpha."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> StepSchedule:
        """From the configuration of a diffusers scheduler: its betas, and ``rescale_betas_zero_snr`` (Lin et al. 2023,
        arXiv 2305.08891, algorithm 1: a_k is shifted so that the last is 0, and scaled so that the first stays)."""
        steps, kind = int(config["num_train_timesteps"]), config["beta_schedule"]
        first, last = float(config["beta_start"]), float(config["beta_end"])
        power = {"linear": 1, "scaled_linear": 2}.get(kind)
        if power is None or config.get("trained_betas") is not None:
            found = "trained_betas" if config.get("trained_betas") is not None else f'beta_schedule "{kind}"'
            raise UserError(
                f"The scheduler's configuration has {found}, expected scaled_linear or linear betas. Give the "
                "scheduler_config.json that the model was published with."
            )
        low, high = first ** (1 / power), last ** (1 / power)
        betas = ((low + (high - low) * k / (steps - 1)) ** power for k in range(steps))
        signal = [math.sqrt(product) for product in accumulate((1 - beta for beta in betas), mul)]
        if config.get("rescale_betas_zero_snr"):
            start, end = signal[0], signal[-1]
            signal = [(a - end) * start / (start - end) for a in signal]
        return cls(tuple(signal))

    @cached_property
    def times(self) -> list[float]:
        """t_k, rising."""
        noise = (math.sqrt(1 - a * a) for a in self.signal)
        return [s / (a + s) for a, s in zip(self.signal, noise, strict=True)]

    @cached_property
    def _times(self) -> Tensor:
        import torch

        return torch.tensor(self.times, dtype=torch.float64)

    def time_of(self, u: Tensor) -> Tensor:
        """Quantile function of the t of a step drawn uniformly from all: t_k with k = floor(K u), in float64."""
        count = len(self.signal)
        return self.time_at((u.double() * count).floor().clamp(max=count - 1))

    def time_at(self, step: Tensor) -> Tensor:
        """t of whole steps (any shape), in float64."""
        return self._times.to(step.device)[step.long()]

    def step_at(self, t: Tensor) -> Tensor:
        """The step of a time (any shape), in float64; between two steps interpolated linearly in the noise level, as
        samplers do; beyond the ends the first or the last."""
        import torch

        times = self._times.to(t.device)
        sigma = (times / (1 - times).clamp(min=1e-12)).clamp(max=TERMINAL_SIGMA)
        t = t.double()
        level = (t / (1 - t).clamp(min=1e-12)).clamp(float(sigma[0]), float(sigma[-1]))
        above = torch.searchsorted(sigma, level.contiguous()).clamp(1, len(sigma) - 1)
        low, high = sigma[above - 1], sigma[above]
        step = above - 1 + (level - low) / (high - low)
        whole = step.round()
        return torch.where((step - whole).abs() < NEAR, whole, step)
