"""Optimisers over weights that FSDP2 shards, with gradients that are given: what one process must come to as well.

`main` runs them on several processes. After four steps, a checkpoint;
the result is the weights after eight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks import run_cases
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.optimizers import build_optimizers
from kinema.parallel.mesh import Sizes, World
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.state import load_training_state, optimizer_numbers, training_state

CASES: dict[str, dict[str, Any]] = {
    "adamw kahan": {"type": "adamw", "rounding": "kahan"},
    "adamw stochastic": {"type": "adamw", "rounding": "stochastic"},
    "adamw8bit": {"type": "adamw8bit"},
    "adamw8bit kahan": {"type": "adamw8bit", "rounding": "kahan"},
    "automagic": {"type": "automagic", "lr": 1e-4},
    "lion": {"type": "lion"},
    "schedulefree": {"type": "schedulefree"},
    "torch sgd": {"type": "torch.SGD", "options": {"momentum": 0.9}},
}
HALF, STEPS = 4, 8


def network(case: str) -> nn.Module:
    """Matrices whose rows two processes share unevenly, a kernel, vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 35), nn.Linear(35, 7), nn.Conv2d(8, 9, 8))
    return net.bfloat16() if CASES[case].get("rounding") else net


def optimizers_over(net: nn.Module, case: str) -> list[Optimizer]:
    return build_optimizers(named_trainables({"network": net}), set(), OptimizerConfig(**{"lr": 1e-2} | CASES[case]), 5)


def steps(net: nn.Module, optimizers: list[Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(net.parameters()):
            draw = torch.Generator().manual_seed(1000 * step + number)
            gradient = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def whole(net: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in net.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in found.items()}


def save(world: World, root: Path, net: nn.Module, optimizers: list[Optimizer]) -> None:
    checkpointer = Checkpointer(root, 1, False, world)
    meta = {"optimizer_numbers": optimizer_numbers({"network": net}, optimizers)}
    checkpointer.save(HALF, training_state({"network": net}, optimizers), meta)
    checkpointer.close()


def resumed(world: World, root: Path, net: nn.Module, optimizers: list[Optimizer]) -> None:
    checkpointer = Checkpointer(root, 1, False, world)
    found = checkpointer.latest()
    assert found is not None
    load_training_state(checkpointer, found.path, {"network": net}, optimizers)
    checkpointer.close()


def train(world: World, case: str, root: Path) -> dict[str, Tensor]:
    net = network(case)
    if world.mesh is not None:
        fully_shard(net, mesh=world.mesh["dp_shard"])
    optimizers = optimizers_over(net, case)
    steps(net, optimizers, 0, HALF)
    save(world, root / f"{case} of {world.size}", net, optimizers)
    steps(net, optimizers, HALF, STEPS)
    return whole(net)


def main(root: Path, cases: list[str]) -> None:
    run_cases(root, cases, lambda case, count: Sizes(dp_shard=count), train)
