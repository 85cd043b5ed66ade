"""Activation checkpointing: a block keeps its inputs alone and runs again in the backward pass (Chen et al. 2016).

Which blocks do, and what they keep besides, is the kind, as ``training.activation_checkpointing`` says it: every block;
every block but for the results of attention and of matrix products ("selective": what is left to compute again is
cheap); every n-th block; or a share of each list of blocks. Of a share the first blocks are taken: when they run again,
what the later ones kept is gone already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kinema.config.memory import Checkpointing
from kinema.errors import ConfigError
from kinema.suggest import did_you_mean

_NAME = "checkpointed_forward"
_PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_grouped_mm", "convolution"])
"""Operators whose results "selective" keeps, besides those with attention in their name."""


def checkpoint_blocks(blocks: Mapping[str, nn.ModuleList], kind: Checkpointing = True) -> None:
    """Checkpoint blocks of a family's lists, in place. Call it after adapters and sequence parallel, before
    ``parallel.data.shard``.

    Each block's ``forward`` is overridden on the instance: no wrapper module, so parameter names stay as they are.
    FSDP2's hooks run around ``forward``, so a block is gathered once for its second run and its backward. The state of
    the random generators is put back for the second run, so dropout falls on the same elements.
    """
    chosen = iter(chosen_blocks({name: len(group) for name, group in blocks.items()}, kind))
    contexts = selective_contexts if kind == "selective" else None
    for group in blocks.values():
        for block in group:
            if not next(chosen):
                continue
            assert block.forward.__name__ != _NAME, f"forward of {type(block).__name__} is already overridden"
            # A bound method: a deep copy of the network gets one that is bound to the copy.
            block.forward = MethodType(_checkpointed(block.forward.__func__, contexts), block)  # type: ignore[union-attr]


def chosen_blocks(lengths: Mapping[str, int], kind: Checkpointing) -> list[bool]:
    """Whether each block runs again, in the order of execution; ``lengths``: of the lists of blocks, by name."""
    count = sum(lengths.values())
    if isinstance(kind, Mapping):
        shares = [(length, round(kind.get(name, 0.0) * length)) for name, length in lengths.items()]
        return [place < again for length, again in shares for place in range(length)]
    if kind == "selective" or isinstance(kind, bool):
        return [bool(kind)] * count
    return [place % int(kind) == 0 for place in range(count)]


def check_lists(kind: Checkpointing, names: Sequence[str]) -> None:
    """ConfigError for shares of lists that no trained network has; ``names``: those of all lists."""
    for name in kind if isinstance(kind, Mapping) else ():
        if name not in names:
            raise ConfigError(
                f"training.activation_checkpointing: no list of blocks is called '{name}'{did_you_mean(name, names)} "
                f"This model has {', '.join(names)}."
            )


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    """A block's forward pass, run again in the backward pass."""
    extra: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    def checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(block, *args, **kwargs)
        names, count = tuple(kwargs), len(args)

        def run(*values: Any) -> Any:
            return forward(block, *values[:count], **dict(zip(names, values[count:], strict=True)))

        # Torch saves arguments by position as autograd saves tensors, which can be moved; others it holds itself.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, **extra)

    return checkpointed_forward


@cache
def _keeps(operator: Any) -> bool:
    """Whether "selective" keeps the results of an operator."""
    name = str(operator).split("::")[-1]
    words = name.split(".")  # such as aten.addmm.default
    return any(word in _PRODUCTS for word in words) or "attention" in name or "flash" in name


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _keeps(operator) else CheckpointPolicy.PREFER_RECOMPUTE


selective_contexts = partial(create_selective_checkpoint_contexts, _policy)
"""The contexts of the first and of the second run of a block that keeps what "selective" keeps. A partial of this very
function is what torch.compile knows."""
