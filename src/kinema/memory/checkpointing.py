"""Activation checkpointing: a block keeps its inputs alone and runs again in the backward pass (Chen et al. 2016).

Which blocks do, and what they keep besides, is the kind, as ``training.activation_checkpointing`` says it: every block;
every block but for the results of attention and of matrix products ("selective": what is left to compute again is
cheap); every block, whose parts run once more in its second run as the backward pass comes to them ("nested", the
recursion of Chen et al.: what one part keeps is there at a time, instead of what the whole block does); every n-th
block; or a share of each list of blocks. Of a share the first blocks are taken: when they run again, what the later
ones kept is gone already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
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
            for part in parts_of(block) if kind == "nested" else ():
                _run_again(part, in_same_modes)
            _run_again(block, contexts)


def parts_of(block: nn.Module) -> list[nn.Module]:
    """What "nested" runs again by itself within a block: the modules that it calls, but for matrices and convolutions,
    which keep their input alone."""
    children = list(block.children())
    if len(children) == 1:
        return parts_of(children[0])
    called = [one for child in children for one in (child if isinstance(child, nn.ModuleList) else [child])]
    return [part for part in called if not hasattr(part, "in_features") and not hasattr(part, "kernel_size")]


def chosen_blocks(lengths: Mapping[str, int], kind: Checkpointing) -> list[bool]:
    """Whether each block runs again, in the order of execution; ``lengths``: of the lists of blocks, by name."""
    count = sum(lengths.values())
    if isinstance(kind, Mapping):
        shares = [(length, round(kind.get(name, 0.0) * length)) for name, length in lengths.items()]
        return [place < again for length, again in shares for place in range(length)]
    if isinstance(kind, str | bool):
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


def _run_again(module: nn.Module, contexts: Callable[[], Any] | None) -> None:
    assert module.forward.__name__ != _NAME, f"forward of {type(module).__name__} is already overridden"
    # A bound method: a deep copy of the network gets one that is bound to the copy.
    module.forward = MethodType(_checkpointed(module.forward.__func__, contexts), module)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    """A module's forward pass, run again in the backward pass."""

    def checkpointed_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        given = contexts if contexts is not in_same_modes or not torch.compiler.is_compiling() else None
        extra: dict[str, Any] = {} if given is None else {"context_fn": given}
        names, count = tuple(kwargs), len(args)

        def run(*values: Any) -> Any:
            return forward(module, *values[:count], **dict(zip(names, values[count:], strict=True)))

        # Torch saves arguments by position as autograd saves tensors, which can be moved; others it holds itself.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, **extra)

    return checkpointed_forward


def in_same_modes() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of the first and of later runs of a part: what its block has switched on for its own run, such as
    attention over the tokens of several processes, is on again. Compiled code has it inside."""
    modes = [mode.again() if isinstance(mode, Repeatable) else mode for mode in _get_current_function_mode_stack()]
    return nullcontext(), _entered(modes)


@runtime_checkable
class Repeatable(Protocol):
    """A mode with a state."""

    def again(self) -> TorchFunctionMode:
        """One as this is now."""


@contextmanager
def _entered(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    here = _get_current_function_mode_stack()
    with ExitStack() as stack:
        for mode in modes:
            if mode not in here:
                stack.enter_context(mode)
        yield


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
