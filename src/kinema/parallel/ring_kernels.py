"""Attention to some of the keys, with the log-sum-exp of its scores, by which pieces are put together.

A row of the whole attention is sum_i exp(lse_i - lse) output_i over the pieces i of its keys, where lse is the
log-sum-exp of all lse_i. A kernel's backward pass takes the whole attention's output and lse, and gives what one piece
adds to the gradients.

Keys that a mask hides have a finite and very low bias in place of minus infinity, so that a piece that is hidden as a
whole has numbers, whose weight exp(lse_i - lse) is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_SCORES = 2**25
"""Numbers that the plain kernel's scores have at once."""

Extra = tuple[Tensor, ...]
"""What a kernel's backward pass wants besides: the state of its random numbers, which nothing is drawn from."""


class Piece(NamedTuple):
    """What one call attends to. Queries [B, H, L, D], keys and values [B, H, K, D]; ``bias`` broadcasts to
    [B, H, L, K] and is of the queries' type."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float


@dataclass(frozen=True)
class Kernel:
    """``forward(piece)`` -> output [B, H, L, D], lse [B, H, L] (in float32 at least), extra.

    ``backward(piece, gradient, output, lse, extra)`` -> the gradients of queries, keys and values.
    """

    forward: Callable[[Piece], tuple[Tensor, Tensor, Extra]]
    backward: Callable[[Piece, Tensor, Tensor, Tensor, Extra], tuple[Tensor, Tensor, Tensor]]


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Kernel:
    """The fastest that takes these; torch's own choice, and its switches, on a GPU."""
    if query.dtype == torch.float64 or value.shape[-1] != query.shape[-1]:
        return PLAIN
    if query.device.type in ("cpu", "meta"):
        return CPU_FLASH
    if query.device.type == "cuda":
        given = torch.backends.cuda.SDPAParams(query, key, value, bias, 0.0, False, False)
        if bias is None and query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(given):
            return FLASH
        if query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_efficient_attention(given):
            return EFFICIENT
    return PLAIN


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, bool (True: seen) or added to the scores, as a finite bias of this type."""
    lowest = hidden(dtype)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def hidden(dtype: torch.dtype) -> float:
    """The bias of keys that are not seen: half the lowest number, which scores cannot make infinite."""
    return torch.finfo(dtype).min / 2


def merge(total: tuple[Tensor, Tensor] | None, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to one piece more: output [B, H, L, D] and lse [B, H, L], of lse's type."""
    if total is None:
        return output.to(lse.dtype), lse
    before, lse_before = total
    both = torch.logaddexp(lse_before, lse)
    old, new = (torch.exp(one - both)[..., None] for one in (lse_before, lse))
    return before * old + output * new, both


# -- in plain torch --------------------------------------------------------------------------------------------------


def _plain_forward(piece: Piece) -> tuple[Tensor, Tensor, Extra]:
    outputs, lses = [], []
    for rows, key, value in _in_rows(piece):
        scores = _scores(rows, key)
        lse = scores.logsumexp(dim=-1)
        outputs.append((scores - lse[..., None]).exp() @ value)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2), ()


def _plain_backward(
    piece: Piece, gradient: Tensor, output: Tensor, lse: Tensor, extra: Extra
) -> tuple[Tensor, Tensor, Tensor]:
    of_query = []
    first = 0
    of_key, of_value = (torch.zeros_like(one, dtype=lse.dtype) for one in (piece.key, piece.value))
    for rows, key, value in _in_rows(piece):
        count = rows.query.shape[2]
        given, done = (one.narrow(2, first, count).to(lse.dtype) for one in (gradient, output))
        weights = (_scores(rows, key) - lse.narrow(2, first, count)[..., None]).exp()
        of_value += weights.transpose(-1, -2) @ given
        of_weights = given @ value.transpose(-1, -2)
        of_scores = weights * (of_weights - (given * done).sum(dim=-1, keepdim=True)) * piece.scale
        of_query.append(of_scores @ key)
        of_key += of_scores.transpose(-1, -2) @ rows.query
        first += count
    return torch.cat(of_query, dim=2), of_key, of_value


def _in_rows(piece: Piece) -> list[tuple[Piece, Tensor, Tensor]]:
    """Some queries at a time, with all keys and values; in float32 at least."""
    dtype = torch.promote_types(piece.query.dtype, torch.float32)
    key, value = piece.key.to(dtype), piece.value.to(dtype)
    batch, heads, length, _ = piece.query.shape
    step = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    found = []
    for first in range(0, length, step):
        rows = piece.query.narrow(2, first, min(step, length - first)).to(dtype)
        bias = piece.bias
        if bias is not None:
            bias = (bias if bias.shape[2] == 1 else bias.narrow(2, first, rows.shape[2])).to(dtype)
        found.append((Piece(rows, key, value, bias, piece.scale), key, value))
    return found


def _scores(rows: Piece, key: Tensor) -> Tensor:
    scores = rows.query @ key.transpose(-1, -2) * rows.scale
    return scores if rows.bias is None else scores + rows.bias


PLAIN = Kernel(_plain_forward, _plain_backward)

# -- torch's own -----------------------------------------------------------------------------------------------------


def _cpu_forward(piece: Piece) -> tuple[Tensor, Tensor, Extra]:
    query, key, value, _, scale = piece
    output, lse = _aten("_scaled_dot_product_flash_attention_for_cpu")(
        query, key, value, attn_mask=_expanded(piece), scale=scale
    )
    return output, lse, ()


def _cpu_backward(
    piece: Piece, gradient: Tensor, output: Tensor, lse: Tensor, extra: Extra
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, scale = piece
    found: tuple[Tensor, Tensor, Tensor] = _aten("_scaled_dot_product_flash_attention_for_cpu_backward")(
        gradient, query, key, value, output, lse, 0.0, False, attn_mask=_expanded(piece), scale=scale
    )
    return found


CPU_FLASH = Kernel(_cpu_forward, _cpu_backward)


def _flash_forward(piece: Piece) -> tuple[Tensor, Tensor, Extra]:
    query, key, value, _, scale = piece
    output, lse, _, _, _, _, seed, offset, _ = _aten("_scaled_dot_product_flash_attention")(
        query, key, value, 0.0, False, False, scale=scale
    )
    return output, lse, (seed, offset)


def _flash_backward(
    piece: Piece, gradient: Tensor, output: Tensor, lse: Tensor, extra: Extra
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, scale = piece
    lengths = (None, None, query.shape[2], key.shape[2])
    found: tuple[Tensor, Tensor, Tensor] = _aten("_scaled_dot_product_flash_attention_backward")(
        gradient, query, key, value, output, lse, *lengths, 0.0, False, *extra, scale=scale
    )
    return found


FLASH = Kernel(_flash_forward, _flash_backward)


def _efficient_forward(piece: Piece) -> tuple[Tensor, Tensor, Extra]:
    query, key, value, _, scale = piece
    output, lse, seed, offset = _aten("_scaled_dot_product_efficient_attention")(
        query, key, value, _expanded(piece, 16), True, 0.0, False, scale=scale
    )
    return output, lse[..., : query.shape[2]], (seed, offset)


def _efficient_backward(
    piece: Piece, gradient: Tensor, output: Tensor, lse: Tensor, extra: Extra
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, scale = piece
    lse = pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # as the forward pass gives it: whole rows of 32
    wanted = [True, True, True, False]
    of_query, of_key, of_value, _ = _aten("_scaled_dot_product_efficient_attention_backward")(
        gradient, query, key, value, _expanded(piece, 16), output, lse, *extra, 0.0, wanted, False, scale=scale
    )
    return of_query, of_key, of_value


EFFICIENT = Kernel(_efficient_forward, _efficient_backward)


def _aten(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


def _expanded(piece: Piece, multiple: int = 1) -> Tensor | None:
    """The bias as [B, H, L, K], rows of which begin at multiples of so many numbers in memory."""
    if piece.bias is None:
        return None
    count = piece.key.shape[2]
    bias = piece.bias.expand(*piece.bias.shape[:-1], count)
    if missing := -count % multiple:
        bias = pad(bias, (0, missing))[..., :count]
    return bias.expand(*piece.query.shape[:3], count)
