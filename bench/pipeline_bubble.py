"""How much of the time the processes of a pipeline wait, measured and as the schedules' theory says.

    python bench/pipeline_bubble.py [--ranks 4] [--micro-batches 8] [--milliseconds 60]

Blocks that sleep (forward once, backward twice as long, half of it for weights) go through kinema's pipeline on gloo
processes; idle is what is left of a step beside the sleeping, of the best of three. What sending takes comes on top of
theory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.schema import ParallelConfig
from kinema.families.pipeline_plans import pipeline_units
from kinema.parallel.mesh import World, start, stop
from kinema.parallel.pipeline import Passes, Pipeline
from kinema.parallel.pipeline_stages import cut, partition
from kinema.parallel.schedule import Schedule, orders

BLOCKS_PER_RANK = 2
SCHEDULES: tuple[tuple[Schedule, int], ...] = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1))
slept: list[float] = []


def sleep(seconds: float) -> None:
    time.sleep(seconds)
    slept.append(seconds)


class Sleep(torch.autograd.Function):
    """The identity, slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, backward: float) -> Tensor:
        sleep(seconds)
        ctx.seconds = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sleep(ctx.seconds)
        return gradients[0], None, None


class Block(nn.Module):
    def __init__(self, seconds: float, split: bool) -> None:
        super().__init__()
        self.linear, self.seconds, self.split = nn.Linear(8, 8), seconds, split

    def forward(self, hidden_states: Tensor) -> Tensor:
        return Sleep.apply(self.linear(hidden_states), self.seconds, self.seconds * (1 if self.split else 2))


class SlowWeights(Passes[Any]):
    """The gradient of each block's linear layer, which is what is deferred, takes as long as a forward."""

    seconds = 0.0

    def weights(self, stage: int, micro: int) -> None:
        sleep(self.seconds * len(self.later[stage, micro]))
        super().weights(stage, micro)


class Network(nn.Module):
    def __init__(self, blocks: int, seconds: float, split: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(seconds, split) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Loss:
    def __init__(self, total: Tensor) -> None:
        self.total = total


def measure(world: World, schedule: Schedule, per_rank: int, micro_batches: int, seconds: float) -> float:
    """The share of a step that the mean process waits."""
    ranks, split = world.size, schedule == "zero_bubble"
    network = Network(ranks * BLOCKS_PER_RANK, seconds, split)
    units = pipeline_units(network, {"blocks": network.blocks})
    starts = partition([unit.name for unit in units], [1] * len(units), ranks * per_rank, "uniform")
    cut(network, units, starts, world.rank, ranks)
    pipeline = Pipeline({"network": network}, world, schedule, per_rank)
    pipeline.passes, SlowWeights.seconds = SlowWeights, seconds
    x = torch.ones(2, 8, requires_grad=True)
    waits = []
    for _ in range(3):
        world.barrier()
        slept.clear()
        began = time.perf_counter()
        pipeline.run([lambda: Loss(network(x).sum())] * micro_batches)
        world.barrier()
        waits.append(1 - sum(slept) / (time.perf_counter() - began))
    return world.all_reduce_sum(min(waits)) / ranks


def worker(micro_batches: int, seconds: float) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    world = start(ParallelConfig(pp=ranks), "cpu")
    if world.is_main:
        print(f"{ranks} processes, {micro_batches} micro-batches of {1000 * seconds:.0f} ms a block")
        print("schedule       idle      simulated   idle / simulated   (p-1)/(v m+p-1)")
    for schedule, per_rank in SCHEDULES:
        idle = measure(world, schedule, per_rank, micro_batches, seconds)
        if world.is_main:
            simulated = orders(schedule, ranks, per_rank, micro_batches).bubble
            theory = (ranks - 1) / (per_rank * micro_batches + ranks - 1)
            known = "-" if schedule == "zero_bubble" else f"{theory:.1%}"
            print(f"{schedule:12} {idle:6.1%} {simulated:14.1%} {idle / simulated:18.2f} {known:>17}")
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=60)
    args = parser.parse_args()
    if "RANK" in os.environ:
        worker(args.micro_batches, args.milliseconds / 1000)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    subprocess.run([*command, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
