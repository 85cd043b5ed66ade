"""Calls of a network's blocks, seen from outside: of hooks, and of compiled code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Around(Protocol):
    def __call__(self, number: int, call: Callable[[], Any], inputs: Any) -> Any:
        """What ``call`` returns, which runs block ``number`` on ``inputs``."""


def blocks_here(blocks: Mapping[str, nn.ModuleList]) -> list[nn.Module]:
    """The blocks in the order of execution. Those without parameters stand for blocks of other stages of a pipeline,
    and are left out."""
    return [block for group in blocks.values() for block in group if next(block.parameters(), None) is not None]


def around_calls(blocks: Mapping[str, nn.ModuleList], around: Around) -> None:
    """Every call of one of `blocks_here` goes through ``around``.

    Call it after all else that changes blocks (adapters, checkpointing, compilation, stages, FSDP2); what comes last is
    outermost.
    """
    for number, block in enumerate(blocks_here(blocks)):
        inner = block._compiled_call_impl or block._call_impl  # torch calls the first of them that there is
        block._compiled_call_impl = _passing(number, inner, around)


def _passing(number: int, inner: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(number, lambda: inner(*args, **kwargs), (args, kwargs))

    return call


def before_backward(output: Any, inputs: Any, then: Callable[[], None]) -> None:
    """Call ``then`` when a backward pass comes to what made ``output`` of ``inputs``, before any of it is computed.

    autograd works off what was made last first: whatever was made later is done by then.
    """
    passed = {id(value.grad_fn) for value in tree_leaves(inputs) if isinstance(value, Tensor)}
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and value.grad_fn is not None and id(value.grad_fn) not in passed:
            value.register_hook(lambda _: then())
