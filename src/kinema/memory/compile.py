"""Compilation of the repeated blocks, one by one: they are alike, so one compilation serves all of a list."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def compile_blocks(blocks: Mapping[str, nn.ModuleList], backend: str = "inductor") -> None:
    """Compile every block of a family's lists, in place; names of modules and parameters stay as they are.

    Call it after adapters and activation checkpointing, before ``parallel.data.shard``. Sizes that change from bucket
    to bucket become dynamic at their first change, so that not every bucket compiles anew.
    """
    import torch._dynamo

    # Layers that tensor-parallel peers share remember what they have read last, until the end of the block: nothing
    # that a second run of a checkpointed block would have to repeat.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for group in blocks.values():
        for block in group:
            block.compile(backend=backend)
