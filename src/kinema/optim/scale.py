"""Dynamic loss scale for fp16: keeps small gradients from vanishing, and skips steps in which large ones overflowed.

The rule is that of torch.amp.GradScaler (Micikevicius et al. 2018, section 3.2), with one difference: overflow is read
from the global gradient norm, which is the same number on all ranks however parameters are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kinema.optim.gradients import local_gradients

SMALLEST = torch.finfo(torch.float32).tiny
"""The scale never falls below: its inverse must stay a number."""


class LossScale:
    """Multiply the loss by ``value``, ``unscale`` the gradients, skip the step if their norm is not finite, and
    ``update``."""

    def __init__(
        self,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.value = initial
        self.growth = growth
        self.backoff = backoff
        self.growth_interval = growth_interval
        self.good_steps = 0
        """Steps without overflow since the scale last changed."""

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by ``value``, in place."""
        for gradients in local_gradients(parameters).values():
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, finite: bool) -> None:
        """Adapt ``value``: was the global norm of the gradients finite, so that the step was taken?"""
        if not finite:
            self.value = max(self.value * self.backoff, SMALLEST)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= self.growth
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; goes into JSON."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.value = float(state["value"])
        self.good_steps = int(state["good_steps"])
