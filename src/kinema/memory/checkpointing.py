"""Activation checkpointing: a block keeps its inputs alone and runs again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_NAME = "checkpointed_forward"


def checkpoint_blocks(blocks: Mapping[str, nn.ModuleList]) -> None:
    """Checkpoint every block of a family's lists, in place. Call it after adapters and sequence parallel, before
    ``parallel.data.shard``.

    Each block's ``forward`` is overridden on the instance: no wrapper module, so parameter names stay as they are.
    FSDP2's hooks run around ``forward``, so a block is gathered once for its second run and its backward. The state of
    the random generators is put back for the second run, so dropout falls on the same elements.
    """
    for group in blocks.values():
        for block in group:
            assert block.forward.__name__ != _NAME, f"forward of {type(block).__name__} is already overridden"
            # A bound method: a deep copy of the network gets one that is bound to the copy.
            block.forward = MethodType(_checkpointed(block.forward.__func__), block)  # type: ignore[union-attr]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward pass, run again in the backward pass."""

    def checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = MethodType(forward, block)
        if not torch.is_grad_enabled():
            return bound(*args, **kwargs)
        return checkpoint(bound, *args, use_reentrant=False, **kwargs)

    return checkpointed_forward
