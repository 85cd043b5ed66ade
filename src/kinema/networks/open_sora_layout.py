"""The forms in which an Open-Sora network's weights come: queries, keys and values in one layer or in several, and
channels of a head that turn in pairs (j, j + D/2) or (2 j, 2 j + 1). All ways between them are exact: rows are cut,
joined and put in another order.

The original Flux has the first form of both ("fused", "interleaved"), the published Open-Sora the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_FUSED = re.compile(r"(.*)\.(?:(qkv)|(linear1))\.(weight|bias)")
_QUERY = re.compile(r"(.*)\.q_proj\.(weight|bias)")
_TURNED = re.compile(r"(.*\.)(?:(qkv|linear1)|[qk]_proj)\.(?:weight|bias)|.*\.norm\.(?:query|key)_norm\.scale")


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """Weights of a network with ``fused_qkv`` as those of one without: ``qkv`` to ``q_proj``, ``k_proj`` and
    ``v_proj``; ``linear1`` of single blocks to ``q_proj``, ``k_proj`` and ``v_mlp``."""
    result: State = {}
    for name, value in state.items():
        if (match := _FUSED.fullmatch(name)) is None:
            result[name] = value
            continue
        width = len(value) // 3 if match[2] else _width(state, match[1])
        last = "v_proj" if match[2] else "v_mlp"
        parts = value.split([width, width, len(value) - 2 * width])
        result |= {
            f"{match[1]}.{own}.{match[4]}": part for own, part in zip(("q_proj", "k_proj", last), parts, strict=True)
        }
    return result


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """The inverse of `split_qkv`."""
    result: State = {}
    for name, value in state.items():
        if match := _QUERY.fullmatch(name):
            prefix, kind = match.groups()
            whole, last = ("linear1", "v_mlp") if f"{prefix}.v_mlp.{kind}" in state else ("qkv", "v_proj")
            parts = [state[f"{prefix}.{own}.{kind}"] for own in ("q_proj", "k_proj", last)]
            result[f"{prefix}.{whole}.{kind}"] = torch.cat(parts)
        elif not re.fullmatch(r".*\.(k_proj|v_proj|v_mlp)\.(weight|bias)", name):
            result[name] = value
    return result


def to_interleaved(state: Mapping[str, Tensor]) -> State:
    """Weights of a network with ``rope = "rotate_half"`` as those of one with "interleaved": in each head of queries
    and keys, rows j and j + D/2 become rows 2 j and 2 j + 1; the scales of their norms likewise. Fused or not."""
    return _turned(state, lambda heads: heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def to_rotate_half(state: Mapping[str, Tensor]) -> State:
    """The inverse of `to_interleaved`."""
    return _turned(state, lambda heads: heads.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))


def _turned(state: Mapping[str, Tensor], order: Callable[[Tensor], Tensor]) -> State:
    """``order`` puts the channels of heads [heads, D, ...] in their new order."""
    result: State = {}
    for name, value in state.items():
        if (match := _TURNED.fullmatch(name)) is None:
            result[name] = value
        elif match[1] is None:  # the scale of a norm: one head
            result[name] = order(value[None]).flatten(0, 1)
        else:
            dim = len(state[f"{match[1]}norm.query_norm.scale"])
            rows = 2 * _width(state, match[1][:-1]) if match[2] else len(value)  # queries and keys lie first
            heads = order(value[:rows].unflatten(0, (-1, dim))).flatten(0, 1)
            result[name] = torch.cat([heads, value[rows:]])
    return result


def _width(state: Mapping[str, Tensor], prefix: str) -> int:
    """Columns of a block's input: rows of its queries."""
    return next(state[name].shape[1] for name in (f"{prefix}.qkv.weight", f"{prefix}.linear1.weight") if name in state)
