"""`pipeline_cases` with more samples, counting what replicas of shards add up: the bytes of all-reduces of gradients in
each case, beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_cases
import torch
import torch.distributed as dist
from pipeline_cases import Plan, train
from ranks import run_cases

from kinema.parallel.mesh import World

SAMPLES = 8


def counted(world: World, name: str, root: Path) -> Any:
    """The training, with the bytes that it gave to all-reduce."""
    reduced, inner = 0, dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal reduced
        reduced += tensor.nbytes if tensor.numel() > 64 else 0
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        return train(world, Plan.of(name), root) | {"reduced": reduced}
    finally:
        dist.all_reduce = inner


def main(root: Path, cases: list[str]) -> None:
    pipeline_cases.SAMPLES = SAMPLES
    run_cases(root, cases, lambda name, _: Plan.of(name).mesh(), counted)
