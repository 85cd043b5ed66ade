"""Sequence parallel: the processes of a sequence share the tokens of each sample.

Streams of tokens are split at a list's first block and put together after its last; inside, everything but attention
works on each token by itself. Attention exchanges tokens for heads (`kinema.parallel.ulysses`), or sends keys and
values round (`kinema.parallel.ring`).

Weights are whole on every process. Splitting is slicing and putting together is an all-gather, both with their true
adjoints: if each of P processes backpropagates 1 / P of the loss, which they all know, then the sum of the gradients
over the processes is the gradient, for weights inside the blocks and outside alike.

Attention is taken hold of where every network's ends: at ``torch.nn.functional.scaled_dot_product_attention``, by a
mode that is in force while a block runs, in the second run of activation checkpointing too.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kinema.config.schema import SequenceAttention
from kinema.errors import ConfigError, UserError
from kinema.families.sequence_plans import REFUSED, Attention, BlockPlan, Tokens, sequence_plans
from kinema.parallel.ring import around_ring
from kinema.parallel.ulysses import LAYOUT, Layout, Peers, over_heads

if TYPE_CHECKING:
    from kinema.families.base import Family
    from kinema.parallel.mesh import World

_WAYS: Mapping[SequenceAttention, Callable[..., Tensor]] = {"ulysses": over_heads, "ring": around_ring}

_OTHER_KERNELS = (
    "Sequence parallel takes hold of attention where torch's own kernels are called, which {what}. Leave "
    'DIFFUSERS_ATTN_BACKEND unset (or "native").'
)


def check_sequence_parallel(size: int, key: str, family: Family, parts: Sequence[str]) -> None:
    """ConfigError if so many processes cannot share the sequences of these parts' networks; ``key`` is what the user
    calls that number. Reads no weights."""
    if size == 1:
        return
    for part in parts:
        if not part.startswith("network"):
            continue  # texts are short: every process reads them whole
        reason = REFUSED.get(family.name)
        if reason is None and sequence_plans(family.load(part, "meta", None)) is None:
            reason = "no plan says how its blocks are split"
        if reason is not None:
            raise ConfigError(f"{key} = {size}: {family.name} cannot be sequence parallel: {reason}. Set {key} to 1.")
    backend = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    if "native" not in backend:
        raise ConfigError(_OTHER_KERNELS.format(what=f'DIFFUSERS_ATTN_BACKEND = "{backend}" does not use'))


def split_sequences(
    network: nn.Module, blocks: Mapping[str, nn.ModuleList], world: World, attention: SequenceAttention = "ulysses"
) -> None:
    """Let the processes of a sequence share the tokens in a network's blocks, in place.

    ``blocks`` are the family's lists, ``attention`` is how tokens of one process attend to those of all. The network is
    called as before, on every process with the same arguments, and returns the whole output on each. Call it before
    activation checkpointing. Blocks get a ``forward`` of their own and hooks; names of modules and parameters stay as
    they are. Networks that refine short texts alone stay whole.
    """
    if world.sizes.sp == 1:
        return
    peers = Peers(world.group("sp"), world.place["sp"], world.sizes.sp)
    for name, plan in (sequence_plans(network) or {}).items():
        _SplitList(blocks[name], plan, peers, _WAYS[attention]).install()


class _SplitList:
    """A list of blocks whose streams are split while a forward pass is inside."""

    def __init__(self, blocks: nn.ModuleList, plan: BlockPlan, peers: Peers, way: Callable[..., Tensor]) -> None:
        self.blocks, self.plan, self.peers, self.way = blocks, plan, peers, way
        self.signature = inspect.signature(blocks[0].forward) if len(blocks) else inspect.Signature()
        self.lengths: dict[str, int] = {}
        self.sliced: dict[str, tuple[Any, Any]] = {}
        """Arguments of the pass that is inside and this process's part of them: most are the same for all blocks."""

    def install(self) -> None:
        for index, block in enumerate(self.blocks):
            block.forward = MethodType(_in_parts(block.forward.__func__, self.plan, self.way), block)  # type: ignore[union-attr]
            first, last = index == 0, index == len(self.blocks) - 1
            block.register_forward_pre_hook(self._entering(first), with_kwargs=True)
            block.register_forward_hook(self._leaving(last), with_kwargs=True)

    def _entering(self, first: bool) -> Callable[..., Any]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = self.signature.bind(*args, **kwargs)
            arguments = bound.arguments
            starting = self.plan.streams if first else self.plan.regrouped
            if first:
                self.lengths, self.sliced = {}, {}
            for stream in starting:
                self.lengths[stream] = arguments[stream].shape[1]
            layout = Layout(self.peers, dict(self.lengths))
            mask = self.plan.mask(arguments, layout.lengths) if self.plan.mask is not None else None
            for stream in starting:
                arguments[stream] = layout.split(arguments[stream], stream)
            for name, rule in self.plan.arguments.items():
                if name in arguments:
                    arguments[name] = self._slice(layout, name, arguments[name], rule)
            return bound.args, bound.kwargs | {LAYOUT: (layout, mask)}

        return enter

    def _slice(self, layout: Layout, name: str, value: Any, rule: Any) -> Any:
        if name not in self.sliced or self.sliced[name][0] is not value:
            self.sliced[name] = (value, layout.slice(value, rule))
        return self.sliced[name][1]

    def _leaving(self, last: bool) -> Callable[..., Any]:
        def leave(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            ending = self.plan.streams if last else self.plan.regrouped
            if last:
                self.sliced = {}
            if not ending:
                return None
            layout = Layout(self.peers, dict(self.lengths))
            values = output if isinstance(output, tuple) else (output,)
            whole = tuple(
                layout.gather(value, stream) if stream in ending and value is not None else value
                for value, stream in zip(values, self.plan.streams, strict=True)
            )
            return whole if isinstance(output, tuple) else whole[0]

        return leave


def _in_parts(forward: Callable[..., Any], plan: BlockPlan, way: Callable[..., Tensor]) -> Callable[..., Any]:
    """A block's forward pass over this process's tokens, with attention over those of all."""

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layout, mask = kwargs.pop(LAYOUT)
        attention = _AttentionOfAll(plan, layout, mask, way)
        with attention:
            output = forward(block, *args, **kwargs)
        attention.check(block)
        return output

    return run


class _AttentionOfAll(TorchFunctionMode):
    """While it is in force, attention sees the tokens of all processes."""

    def __init__(self, plan: BlockPlan, layout: Layout, mask: Tensor | None, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.plan, self.layout, self.mask, self.way = plan, layout, mask, way
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = self.plan.attention[min(self.calls, len(self.plan.attention) - 1)]
        self.calls += 1
        return self._attend(call, *args, **kwargs)

    def _attend(
        self,
        call: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if self.plan.mask is not None:
            attn_mask = self.mask
        options |= {"dropout_p": dropout_p, "is_causal": is_causal}
        return attend(self.layout, call, query, key, value, attn_mask, self.way, **options)

    def again(self) -> _AttentionOfAll:
        """For a part of the block that runs again: its calls are the next ones from here."""
        return copy.copy(self)

    def check(self, block: nn.Module) -> None:
        """UserError if attention has gone another way: each process would have seen its own tokens alone."""
        if self.calls < len(self.plan.attention) - self.plan.optional_calls:
            raise UserError(_OTHER_KERNELS.format(what=f"{type(block).__name__} has not done"))


def attend(
    layout: Layout,
    call: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    way: Callable[..., Tensor] = over_heads,
    **options: Any,
) -> Tensor:
    """Attention [B, H, l, D] of this process's tokens, which are those of the call's streams one behind the other."""
    tokens = sum(layout.held(stream) for stream in call.streams)
    assert query.shape[2] == tokens, f"attention over {query.shape[2]} tokens, but {call.streams} have {tokens}"
    device = query.device.type
    if torch.is_autocast_enabled(device):  # what attention would do, and what is sent is half as much
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    if call.whole_keys:
        if attn_mask is not None and attn_mask.shape[-2] > 1:
            attn_mask = layout.slice(attn_mask, Tokens(call.streams, dim=-2))
        return scaled_dot_product_attention(query, key, value, attn_mask, **options)
    assert key.shape[2] == query.shape[2], "keys and queries are of the same tokens"
    return way(layout, call.streams, query, key, value, attn_mask, **options)
