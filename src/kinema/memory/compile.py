"""Compilation of the repeated blocks, one by one: they are alike, so one compilation serves all of a list."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

    from kinema.config.schema import Config

PAYS_FROM = 500
"""Steps from which on ``training.compile = "auto"`` compiles: a block takes Inductor about a minute, forward and
backward, and saves some tenths of each step."""
VERSIONS = 64
"""Kinds of a block's inputs that may be compiled, before torch would run it without a word as it is. Sizes that change
are one kind; blocks with text or without, pictures, a batch of one and other precisions are more."""


def compile_blocks(blocks: Mapping[str, nn.ModuleList], backend: str = "inductor") -> None:
    """Compile every block of a family's lists, in place; names of modules and parameters stay as they are.

    Call it after adapters and activation checkpointing, before ``parallel.data.shard``. Sizes that change from bucket
    to bucket become dynamic at their first change, so that not every bucket compiles anew.
    """
    import torch._dynamo
    import torch._functorch.config

    # Or what a quantised layer makes of its weights in the forward pass, and makes again in the backward one, would be
    # made once and kept in between: the whole network in 16 bits.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # Layers that tensor-parallel peers share remember what they have read last, until the end of the block: nothing
    # that a second run of a checkpointed block would have to repeat.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    for group in blocks.values():
        for block in group:
            block.compile(backend=backend)


@contextmanager
def telling_when(compiles: Callable[[bool], None], wanted: bool) -> Iterator[None]:
    """Inside, ``compiles(True)`` is called whenever torch begins to compile something and ``compiles(False)`` when that
    is done, if it is ``wanted``."""
    if not wanted:
        yield
        return
    from torch._dynamo.callback import callback_handler

    def begins(*_: Any) -> None:
        compiles(True)

    def ends(*_: Any) -> None:
        compiles(False)

    callback_handler.register_start_callback(begins)
    callback_handler.register_end_callback(ends)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)


def settled(config: Config, device: torch.device, earlier: bool | None) -> bool:
    """``training.compile`` for this run. ``auto`` compiles on GPUs where it pays; a run that goes on does as
    ``earlier`` (None: it begins), for compiled blocks round in other places."""
    if config.training.compile != "auto":
        return config.training.compile
    can = device.type == "cuda" and importlib.util.find_spec("triton") is not None and _c_compiler()
    if earlier is not None:
        return earlier and can
    steps, parallel = config.training.steps, config.parallel
    parts = (getattr(config.model, name) for name in type(config.model).model_fields if name.startswith("network"))
    if _without_float8(device) and any(part.dtype in ("fp8", "fp8_block") for part in parts):
        return False
    zero_bubble = parallel.pp > 1 and parallel.schedule == "zero_bubble"  # cannot take a compiled block apart
    return can and not zero_bubble and (steps is None or steps >= PAYS_FROM)


def _without_float8(device: torch.device) -> bool:
    """Whether Triton knows no float8 for this GPU: on those before Ada torch 2.13 works around it."""
    import torch

    older = torch.__version__.startswith(("2.11", "2.12"))
    return device.type == "cuda" and older and torch.cuda.get_device_capability(device) < (8, 9)


def _c_compiler() -> bool:
    """Triton builds what starts its kernels with one."""
    return any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))
