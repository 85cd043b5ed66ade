"""What sequence parallel saves and what it sends, on a small Wan network.

    python bench/sequence_parallel.py [--ranks 4]

Counted on gloo processes: bytes that a forward pass keeps for the backward pass, over those of one process; bytes that
a process sends in one step, over the formula of docs/guides/parallel.md: for every block and pass (forward, backward)
four times its tokens, less its own share of them; and, of the stream as a whole, putting it together and back.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import World, start, stop
from kinema.parallel.sequence import split_sequences

LAYERS, HEADS, DIM = 6, 8, 32
LATENTS = (5, 24, 40)
"""Frames, rows and columns: 1200 tokens."""


def network() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=4 * HEADS * DIM,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )


def step(world: World) -> tuple[int, int]:
    """Bytes kept by the forward pass beside weights, and bytes sent in forward and backward."""
    wan = network()
    split_sequences(wan, {"blocks": wan.blocks}, world)
    weights = {parameter.untyped_storage().data_ptr() for parameter in wan.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sent, exchange = [0], dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, to: list[int], of: list[int], group: Any = None) -> Any:
        others = sum(size for rank, size in enumerate(of) if rank != world.place["sp"])
        sent[0] += others * given.element_size()
        return exchange(output, given, to, of, group=group)

    dist.all_to_all_single = counting
    generator = torch.Generator().manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = wan(
            hidden_states=torch.randn(1, 4, *LATENTS, generator=generator),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 32, 16, generator=generator),
            return_dict=False,
        )[0]
    (output.square().mean() / world.sizes.sp).backward()
    dist.all_to_all_single = exchange
    return sum(kept.values()), sent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    ranks = parser.parse_args().ranks
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.call([*command, __file__, "--ranks", str(ranks)], env=environment))
    torch.set_num_threads(1)
    world = start(ParallelConfig(sp=ranks), "cpu")
    kept, sent = step(world)
    alone, _ = step(World.alone())
    tokens = LATENTS[0] * LATENTS[1] * LATENTS[2] // 4
    stream = tokens * HEADS * DIM * 4
    formula = 2 * (LAYERS * 4 * stream / ranks * (ranks - 1) / ranks + stream / ranks * (ranks - 1))
    results = world.gather_objects((kept, sent))
    if world.is_main:
        most, each = max(kept for kept, _ in results), sum(sent for _, sent in results) / ranks
        share = f"{most / alone:.3f} of one process's; 1 / sp = {1 / ranks:.3f}"
        print(f"{tokens} tokens, {LAYERS} blocks, {ranks} processes")
        print(f"kept for the backward pass: {most / 2**20:.1f} MiB ({share})")
        print(f"sent in a step: {each / 2**20:.2f} MiB a process ({each / formula:.3f} of the formula)")
    stop()


if __name__ == "__main__":
    main()
