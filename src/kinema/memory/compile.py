"""Compilation of the repeated blocks, one by one: they are alike, so one compilation serves all of a list."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def compile_blocks(blocks: Mapping[str, nn.ModuleList], backend: str = "inductor") -> None:
    """Compile every block of a family's lists, in place; names of modules and parameters stay as they are.

    Call it after adapters and activation checkpointing, before ``parallel.data.shard``. Sizes that change from bucket
    to bucket become dynamic at their first change, so that not every bucket compiles anew.
    """
    for group in blocks.values():
        for block in group:
            block.compile(backend=backend)
