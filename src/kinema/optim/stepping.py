"""What every optimiser of ours has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Stepping(torch.optim.Optimizer):
    """An optimiser whose step is `update`, after the closure that torch's contract allows for."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @abstractmethod
    def update(self) -> None:
        """Update every parameter that has a gradient."""


def with_gradients(group: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a group that have gradients, with their names; their numbers where it has no names."""
    names = group.get("param_names") or range(len(group["params"]))
    return [(str(name), p) for name, p in zip(names, group["params"], strict=True) if p.grad is not None]
