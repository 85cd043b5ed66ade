"""Attention over the tokens of all processes while they stay where they are (ring attention, Liu et al. 2023).

Keys and values go round the processes, the next ones on their way while the present ones are computed with. Each
process merges what its queries find in each piece (`kinema.parallel.ring_kernels`). In the backward pass keys and
values go round once more, and behind them the gradients that every process adds to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinema.parallel.ring_kernels import Extra, Kernel, Piece, additive, choose_kernel, hidden, merge
from kinema.parallel.ulysses import Layout, Peers, with_copies, without_copies


def around_ring(
    layout: Layout,
    streams: Sequence[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention [B, H, l, D] of this process's tokens of these streams, one behind the other, to those of all.

    Keys and values may have fewer heads, each for as many queries. A mask gets no gradient.
    """
    assert dropout_p == 0 and (attn_mask is None or not attn_mask.requires_grad), "no family's attention needs them"
    peers = layout.peers
    held, real = [layout.held(stream) for stream in streams], [layout.real(stream) for stream in streams]
    mine = [counts[peers.rank] for counts in real]
    parts = [without_copies(one, held, mine) for one in (query, key, value)]
    biases = _biases(real, peers, query, attn_mask, is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = [sum(counts) for counts in zip(*real, strict=True)]
    output: Tensor = _Ring.apply(*parts, _Call(peers, tokens, biases, scale))  # type: ignore[no-untyped-call]
    return with_copies(output, held, mine)


@dataclass(frozen=True)
class _Call:
    """One attention: the tokens of each process, and the bias of this one's queries to the keys of each."""

    peers: Peers
    tokens: list[int]
    biases: list[Tensor | None]
    scale: float

    def piece(self, query: Tensor, key: Tensor, value: Tensor, owner: int) -> Piece:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        return Piece(query, key, value, self.biases[owner], self.scale)


def _biases(
    real: list[list[int]], peers: Peers, query: Tensor, mask: Tensor | None, is_causal: bool
) -> list[Tensor | None]:
    """What is added to the scores of this process's queries with the keys of each. ``real``: the tokens of each stream
    that each process has."""
    if mask is None and not is_causal:
        return [None] * peers.size
    places = _places(real, peers, query.device)
    mine = places[peers.rank]
    if is_causal:
        assert mask is None, "a mask and is_causal do not go together"
        return [additive(mine[:, None] >= keys, query.dtype)[None, None] for keys in places]
    assert mask is not None
    mask = mask[(None,) * (4 - mask.ndim)]
    rows = mask if mask.shape[2] == 1 else mask.index_select(2, mine)
    bias = additive(rows, query.dtype)
    return [bias if bias.shape[3] == 1 else bias.index_select(3, keys) for keys in places]


def _places(real: list[list[int]], peers: Peers, device: torch.device) -> list[Tensor]:
    """Where in the whole sequence each process's tokens are."""
    begins = [0, *accumulate(sum(counts) for counts in real)]
    found = []
    for rank in range(peers.size):
        firsts = [begin + sum(counts[:rank]) for begin, counts in zip(begins, real, strict=False)]
        spans = [
            torch.arange(first, first + counts[rank], device=device) for first, counts in zip(firsts, real, strict=True)
        ]
        found.append(torch.cat(spans))
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
        total: tuple[Tensor, Tensor] | None = None
        extra: Extra = ()
        kernel: Kernel | None = None
        with _exactly(query.device):
            for owner, keys, values in _travelling(key, value, call):
                if query.shape[2] == 0 or keys.shape[2] == 0:
                    continue
                piece = call.piece(query, keys, values, owner)
                kernel = kernel or choose_kernel(*piece[:4])
                output, lse, extra = kernel.forward(piece)
                total = merge(total, output, lse)
        if total is None:  # no tokens here
            total = value.new_zeros(*query.shape[:3], value.shape[3]), query.new_zeros(query.shape[:3])
        output, lse = total
        if call.biases[0] is not None:  # queries that see no key at all find zeros, and give no gradients
            blind = lse < hidden(query.dtype) / 2
            output = output.masked_fill(blind[..., None], 0)
            lse = lse.masked_fill(blind, float("inf"))
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse.contiguous(), *extra)
        ctx.call, ctx.kernel = call, kernel
        return output

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *extra = ctx.saved_tensors
        call, kernel = ctx.call, ctx.kernel
        gradient = gradient.contiguous()
        of_query = torch.zeros_like(query, dtype=lse.dtype)
        here: Tensor | None = None  # of this process's own keys and values; those of others are passed on
        passed: _Sent | None = None
        with _exactly(query.device):
            for owner, keys, values in _travelling(key, value, call):
                found = torch.zeros(keys.numel() + values.numel(), dtype=lse.dtype, device=query.device)
                if query.shape[2] and keys.shape[2]:
                    piece = call.piece(query, keys, values, owner)
                    more, *others = kernel.backward(piece, gradient, output, lse, tuple(extra))
                    of_query += more
                    found = _flat([_summed(one, keys.shape[1], lse.dtype) for one in others])
                if passed is not None:
                    found += passed.wait()
                if here is None:
                    here = found
                else:
                    count = _numbers(key, value, call.tokens[(owner - 1) % call.peers.size])
                    passed = _send(found, count, call.peers)
        assert here is not None and passed is not None
        of_key, of_value = _apart(here + passed.wait(), key, value, key.shape[2])
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None


def _exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, types are as they are given."""
    # torch has no autocast for tensors without values
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _travelling(key: Tensor, value: Tensor, call: _Call) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(whose they are, keys, values): this process's own, then those of the one before it, and so on round."""
    peers = call.peers
    here = _flat([key, value])
    for step in range(peers.size):
        owner = (peers.rank - step) % peers.size
        next_one: _Sent | None = None
        if step + 1 < peers.size:
            next_one = _send(here, _numbers(key, value, call.tokens[owner - 1]), peers)
        yield owner, *_apart(here, key, value, call.tokens[owner])
        if next_one is not None:
            here = next_one.wait()


@dataclass(frozen=True)
class _Sent:
    """Numbers on their way round."""

    arriving: Tensor
    leaving: Tensor
    """Held until it has left."""
    work: Any

    def wait(self) -> Tensor:
        if self.work is not None:  # on paper nothing is on its way (`kinema.parallel.paper`)
            self.work.wait()
        return self.arriving


def _send(flat: Tensor, count: int, peers: Peers) -> _Sent:
    """Numbers to the next process, while ``count`` come from the one before."""
    to, of = [0] * peers.size, [0] * peers.size
    to[(peers.rank + 1) % peers.size] = flat.numel()
    of[(peers.rank - 1) % peers.size] = count
    arriving = flat.new_empty(count)
    # An all-to-all of which all but one part is empty: a send and a receive at once, in the group's own order.
    work = dist.all_to_all_single(arriving, flat, of, to, group=peers.group, async_op=True)
    return _Sent(arriving, flat, work)


def _numbers(key: Tensor, value: Tensor, tokens: int) -> int:
    """How many numbers the keys and values of so many tokens are."""
    return key.shape[0] * key.shape[1] * tokens * (key.shape[3] + value.shape[3])


def _apart(flat: Tensor, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, tokens, D] that lie one behind the other."""
    shapes = [(*one.shape[:2], tokens, one.shape[3]) for one in (key, value)]
    sizes = [key.shape[0] * key.shape[1] * tokens * one.shape[3] for one in (key, value)]
    keys, values = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
    return keys, values


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _summed(gradient: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The gradient of keys or values that several queries' heads share."""
    gradient = gradient.to(dtype)
    batch, _, tokens, dim = gradient.shape
    return gradient.view(batch, heads, -1, tokens, dim).sum(dim=2) if gradient.shape[1] > heads else gradient
