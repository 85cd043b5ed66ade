"""Tokens of a sequence over processes, and attention over those of all (DeepSpeed Ulysses, Jacobs et al. 2023).

Outside attention every process holds some of the tokens of each stream. An all-to-all turns tokens of all heads into
all tokens of some heads, and a second one turns the result back. Any length and any number of heads will do: the first
processes take one more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kinema.families.sequence_plans import First, Tokens

LAYOUT = "_sequence_layout"
"""The argument by which a block is told the layout of its tokens."""


@dataclass(frozen=True)
class Peers:
    """The processes that share a sequence, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def shares(self, count: int) -> list[int]:
        """How many of ``count`` things each process takes: the first ones one more where they do not divide."""
        each, more = divmod(count, self.size)
        return [each + (rank < more) for rank in range(self.size)]


@dataclass(frozen=True)
class Layout:
    """How the tokens of each stream of a forward pass lie over the processes.

    A process without a token of a stream holds a copy of its last one, which no other process sees: no tensor is
    empty, which not every block and kernel would stand.
    """

    peers: Peers
    lengths: Mapping[str, int]
    """Tokens of each stream, in all."""

    def real(self, stream: str) -> list[int]:
        """The tokens that each process takes."""
        return self.peers.shares(self.lengths[stream])

    def held(self, stream: str) -> int:
        """The tokens that this process holds, of which one may be a copy."""
        return max(self.real(stream)[self.peers.rank], min(1, self.lengths[stream]))

    def start(self, stream: str) -> int:
        """Where in the stream this process's tokens begin."""
        return min(sum(self.real(stream)[: self.peers.rank]), self.lengths[stream] - self.held(stream))

    def slice(self, value: Any, rule: Tokens | tuple[Tokens, ...] | First) -> Any:
        """This process's part of an argument that goes with the tokens: views where it is of one stream."""
        if value is None:
            return None
        if isinstance(rule, First):
            return min(max(value - self.start(rule.stream), 0), self.held(rule.stream))
        if isinstance(value, (tuple, list)):
            rules = rule if isinstance(rule, tuple) else (rule,) * len(value)
            return type(value)(self.slice(one, its) for one, its in zip(value, rules, strict=True))
        assert isinstance(rule, Tokens), "a tuple of rules is for a tuple of tensors"
        if (rule.ndim is not None and value.ndim != rule.ndim) or value.shape[rule.dim] == 1:
            return value
        total = sum(self.lengths[stream] for stream in rule.streams)
        assert value.shape[rule.dim] == total, f"{tuple(value.shape)} does not have {total} tokens at {rule.dim}"
        parts, offset = [], 0
        for stream in rule.streams:
            parts.append(value.narrow(rule.dim, offset + self.start(stream), self.held(stream)))
            offset += self.lengths[stream]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=rule.dim)

    def split(self, whole: Tensor, stream: str) -> Tensor:
        """This process's tokens of [B, L, ...]. The gradient of the others is zero here: they have it."""
        # A copy: a view would keep the whole stream in memory for as long as the first block's input is needed.
        return whole.narrow(1, self.start(stream), self.held(stream)).clone()

    def gather(self, part: Tensor, stream: str) -> Tensor:
        """The tokens of all processes, [B, L, ...], on each of them. Each token's gradient is the sum, in the order of
        the processes, of what they have found for it."""
        counts, size = self.real(stream), self.peers.size
        if self.lengths[stream] == 0:
            return part
        mine = part[:, : counts[self.peers.rank]].reshape(-1)
        rest = part[:, :1].numel()
        copies = mine.expand(size, -1).reshape(-1)
        received = _exchange(copies, [count * rest for count in counts], [mine.numel()] * size, self.peers)
        pieces = received.split([count * rest for count in counts])
        return torch.cat([p.view(part.shape[0], -1, *part.shape[2:]) for p in pieces if len(p)], dim=1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, received: list[int], sent: list[int], peers: Peers) -> Tensor:
        ctx.sizes = received, sent, peers
        output = flat.new_empty(sum(received))
        dist.all_to_all_single(output, flat.contiguous(), received, sent, group=peers.group)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, peers = ctx.sizes
        return _exchange(gradients[0], sent, received, peers), None, None, None


def _exchange(flat: Tensor, received: list[int], sent: list[int], peers: Peers) -> Tensor:
    """An all-to-all of one-dimensional tensors: ``sent[r]`` numbers go to process r, ``received[r]`` come from it. Its
    adjoint sends each back to where it came from."""
    output: Tensor = _Exchange.apply(flat, received, sent, peers)  # type: ignore[no-untyped-call]
    return output


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def over_heads(
    layout: Layout,
    streams: Sequence[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attention [B, H, l, D] of this process's tokens of these streams, one behind the other, to those of all:
    tokens of all heads become all tokens of some heads, and back."""
    held = [layout.held(stream) for stream in streams]
    real, rank = [layout.real(stream) for stream in streams], layout.peers.rank
    mine = [counts[rank] for counts in real]
    parts = [without_copies(one, held, mine) for one in (query, key, value)]
    whole = _tokens_to_heads(parts, real, layout.peers)
    heads = [query.shape[1] // key.shape[1] * count for count in layout.peers.shares(key.shape[1])]
    if heads[rank] == 0:  # more processes than heads: nothing to do, but the exchanges take part in the backward pass
        output = whole[0][..., :1].expand(-1, -1, -1, value.shape[-1])
    else:
        if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.narrow(1, sum(heads[:rank]), heads[rank])
        output = scaled_dot_product_attention(whole[0], whole[1], whole[2], attn_mask, **options)
    return with_copies(_heads_to_tokens(output, heads, real, layout.peers), held, mine)


def without_copies(tensor: Tensor, held: list[int], real: list[int]) -> Tensor:
    """[B, H, l, D] without the copies of tokens that other processes have. ``held`` and ``real``: this process's
    tokens of each stream, with and without them."""
    if held == real:
        return tensor
    parts = zip(tensor.split(held, dim=2), real, strict=True)
    return torch.cat([part[:, :, :count] for part, count in parts], dim=2)


def with_copies(tensor: Tensor, held: list[int], real: list[int]) -> Tensor:
    """The way back: zeros in the place of copies."""
    if held == real:
        return tensor
    parts = zip(tensor.split(real, dim=2), held, strict=True)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, count - part.shape[2])) for part, count in parts], dim=2)


def _tokens_to_heads(parts: list[Tensor], real: list[list[int]], peers: Peers) -> list[Tensor]:
    """Queries, keys and values [B, H, l, D] of this process's tokens -> [B, h, L, D] of its heads, in the streams'
    order. ``real``: the tokens of each stream that each process has."""
    groups = peers.shares(parts[1].shape[1])  # heads of keys, each with the queries that share it
    heads = [[part.shape[1] // parts[1].shape[1] * count for count in groups] for part in parts]
    outgoing = [part.split(counts, dim=1) for part, counts in zip(parts, heads, strict=True)]
    tokens = [sum(counts) for counts in zip(*real, strict=True)]
    # Of each part: the numbers that one token has for the heads of one process.
    per_token = [
        [part.shape[0] * count * part.shape[3] for count in counts] for part, counts in zip(parts, heads, strict=True)
    ]
    sent = [tokens[peers.rank] * sum(of_part[to] for of_part in per_token) for to in range(peers.size)]
    sizes = [[tokens[of] * of_part[peers.rank] for of_part in per_token] for of in range(peers.size)]
    flat = _flat([pieces[to] for to in range(peers.size) for pieces in outgoing])
    received = _exchange(flat, [sum(one) for one in sizes], sent, peers)

    pieces = iter(received.split([size for one in sizes for size in one]))
    arrived: list[list[list[Tensor]]] = [[[] for _ in real] for _ in parts]  # of each part, of each stream
    for of in range(peers.size):
        for part, counts, streams in zip(parts, heads, arrived, strict=True):
            piece = next(pieces).view(part.shape[0], counts[peers.rank], tokens[of], part.shape[3])
            for one, of_stream in zip(piece.split([counts_[of] for counts_ in real], dim=2), streams, strict=True):
                of_stream.append(one)
    return [torch.cat([one for stream in streams for one in stream], dim=2) for streams in arrived]


def _heads_to_tokens(output: Tensor, heads: list[int], real: list[list[int]], peers: Peers) -> Tensor:
    """[B, h, L, D] of this process's heads -> [B, H, l, D] of its tokens: the way back."""
    batch, _, _, dim = output.shape
    streams = [
        part.split(counts, dim=2)
        for part, counts in zip(output.split([sum(counts) for counts in real], dim=2), real, strict=True)
    ]
    tokens = [sum(counts) for counts in zip(*real, strict=True)]
    flat = _flat([torch.cat([stream[to] for stream in streams], dim=2) for to in range(peers.size)])
    sent = [batch * heads[peers.rank] * count * dim for count in tokens]
    received_sizes = [batch * count * tokens[peers.rank] * dim for count in heads]
    received = _exchange(flat, received_sizes, sent, peers)
    pieces = [
        piece.view(batch, count, tokens[peers.rank], dim)
        for piece, count in zip(received.split(received_sizes), heads, strict=True)
    ]
    return torch.cat(pieces, dim=1)
