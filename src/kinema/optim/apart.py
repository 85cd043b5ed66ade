"""Steps of an optimiser that take some of its parameters alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.optimizers import build_optimizers

SAME = 1e-3
"""Up to which share of the way that weights have come two optimisers count as one: more than rounding differs by."""


@dataclass(frozen=True)
class Part:
    """Some parameters of one group of an optimiser."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    parameters: list[torch.Tensor]
    names: list[str] | None

    def step(self) -> None:
        """Update these parameters by their gradients."""
        optimizer, group = self.optimizer, self.group
        groups, kept = optimizer.param_groups, (group["params"], group.get("param_names"))
        optimizer.param_groups = [group]
        group["params"] = self.parameters
        if self.names is not None:
            group["param_names"] = self.names
        try:
            optimizer.step()
        finally:
            group["params"] = kept[0]
            if self.names is not None:
                group["param_names"] = kept[1]
            optimizer.param_groups = groups


def parts(optimizer: torch.optim.Optimizer, group: dict[str, Any], limit: int = 0) -> Iterator[Part]:
    """A group in parts of neighbours of at most ``limit`` bytes together, or of one parameter."""
    members = group["params"]
    names = group.get("param_names")
    start = filled = 0
    for i, parameter in enumerate(members):
        if i > start and filled + parameter.nbytes > limit:
            yield Part(optimizer, group, members[start:i], names and names[start:i])
            start, filled = i, 0
        filled += parameter.nbytes
    if members:
        yield Part(optimizer, group, members[start:], names and names[start:])


def steps_apart(config: OptimizerConfig) -> bool:
    """Whether parameters that take their steps one after the other come to the same weights as all together: tried on
    a few small ones. Optimisers that estimate or count something over all of them do not, and it shows in their
    groups, if not yet in the weights."""
    plain = config.model_copy(update={"groups": (), "part_lr": {}, "lora_plus": None})
    start, _ = _few_steps(plain, 0, apart=False)
    together, counted = _few_steps(plain, 3, apart=False)
    alone, recounted = _few_steps(plain, 3, apart=True)
    return counted == recounted and all(
        (one - other).norm() <= SAME * (one - begin).norm()
        for begin, one, other in zip(start, together, alone, strict=True)
    )


def _few_steps(config: OptimizerConfig, count: int, apart: bool) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The weights after so many steps, and the numbers in the optimisers' groups."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((8, 12), (8, 12), (8, 8), (8,))
    weights = {f"network.blocks.{i}.weight": nn.Parameter(torch.randn(s, generator=draw)) for i, s in enumerate(shapes)}
    matrices = {name for name, weight in weights.items() if weight.ndim == 2}
    optimizers = build_optimizers(weights, matrices, config)
    for _ in range(count):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=draw)
        for optimizer in optimizers:
            if not apart:
                optimizer.step()
                continue
            for group in optimizer.param_groups:
                for part in parts(optimizer, group):
                    part.step()
    numbers = [
        {key: float(value) for key, value in group.items() if isinstance(value, int | float | torch.Tensor)}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return [weight.detach().clone() for weight in weights.values()], numbers
