"""Throughput of several processes against one at equal work for each, on a small Wan network.

    python bench/parallel_throughput.py [--ranks 2] [--steps 8]

A step is forward, backward, the sum of gradients and AdamW. Replicas and shards take a sample each. Processes that
share sequences take as many samples as they are, a part of every sequence each: of linear layers and attention alike
that is as much for each as one process has with one sample. In turns, step by step: one process alone; all of them at
once, each by itself, which is what the machine's memory and cores allow; all of them under the plan. Efficiency is the
time of the first over that of the last (paired medians), what is left of it where the machine does not hinder is the
second over the last. It wants a machine that does nothing else: the load is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kinema.config.schema import ParallelConfig, SequenceAttention
from kinema.parallel.data import accumulate, shard
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop
from kinema.parallel.sequence import split_sequences

LAYERS, HEADS, DIM = 4, 8, 32
LATENTS = (5, 24, 40)
"""Frames, rows and columns: 1200 tokens."""
WARM_UP = 1


def network() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    wan: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * HEADS * DIM,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    return wan


def stepping(world: World, samples: int, attention: SequenceAttention = "ulysses") -> Callable[[], None]:
    """A step of a network of its own under this plan."""
    wan = network()
    blocks = {"blocks": wan.get_submodule("blocks")}
    split_sequences(wan, blocks, world, attention)
    shard(wan, blocks, world)
    optimizer = torch.optim.AdamW(wan.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1 + world.dp_rank)
    x = torch.randn(samples, 4, *LATENTS, generator=generator)
    text = torch.randn(samples, 32, 64, generator=generator)

    def step() -> None:
        with accumulate(wan):
            output: Tensor = wan(
                hidden_states=x, timestep=torch.full((samples,), 500.0), encoder_hidden_states=text, return_dict=False
            )[0]
            ((output - x).square().mean() / world.sizes.sp / world.dp_size).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(world: World, plan: World, samples: int, attention: SequenceAttention, steps: int) -> list[list[float]]:
    """Seconds of each step of one process, of all apart, and of all under the plan."""
    alone = stepping(World.alone(), 1)
    shared = stepping(plan, samples, attention)
    turns: list[Callable[[], None]] = [alone if world.is_main else lambda: None, alone, shared]
    times: list[list[float]] = [[], [], []]
    for step in range(WARM_UP + steps):
        for turn, found in zip(turns, times, strict=True):
            world.barrier()
            began = time.perf_counter()
            turn()
            world.barrier()
            if step >= WARM_UP:
                found.append(time.perf_counter() - began)
    return times


def worker(steps: int) -> None:
    torch.set_num_threads(1)
    world = start(ParallelConfig(), "cpu")
    ranks = world.size
    plans: list[tuple[str, Sizes, SequenceAttention]] = [
        ("replicas", Sizes(dp_replicate=ranks), "ulysses"),
        ("shards", Sizes(dp_shard=ranks), "ulysses"),
        ("sp, ulysses", Sizes(sp=ranks), "ulysses"),
        ("sp, ring", Sizes(sp=ranks), "ring"),
    ]
    if world.is_main:
        weights = sum(parameter.numel() for parameter in network().parameters())
        print(f"{ranks} processes of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
        print(f"{weights / 1e6:.1f} million weights, {LATENTS[0] * LATENTS[1] * LATENTS[2] // 4} tokens a sample")
        print("plan          one alone   all apart     as planned   efficiency   of all apart")
    for name, sizes, attention in plans:
        times = measure(world, lay_out(world, sizes), sizes.sp, attention, steps)
        if world.is_main:
            one, apart, shared = (1000 * statistics.median(found) for found in times)
            against_one, against_apart = (
                statistics.median(a / b for a, b in zip(found, times[2], strict=True)) for found in times[:2]
            )
            row = f"{name:12} {one:7.0f} ms  {apart:7.0f} ms   {shared:9.0f} ms"
            print(f"{row}   {against_one:10.2f}   {against_apart:12.2f}", flush=True)
    if world.is_main:
        print(f"load {os.getloadavg()[0]:.1f} after")
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if "RANK" in os.environ:
        worker(args.steps)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    subprocess.run([*command, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
