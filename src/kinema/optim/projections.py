"""Subspaces that momentum is kept in (Nguyen and Nguyen 2024, "Subset-Norm and Subspace-Momentum").

Each is R [rank, n] with orthonormal rows, acting on one side of a gradient: ``R X`` is kept, ``R^T R X`` is the part of
X that lies in the subspace.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["svd", "topk", "uniform", "srht"]
"""``svd``: the gradient's first singular vectors; ``topk``: its lines of the largest norm; ``uniform``: lines drawn at
random; ``srht``: a subsampled randomised Hadamard transform, random directions that mix all lines."""


def side(kind: Kind, shape: tuple[int, ...]) -> int:
    """The dimension of a matrix that is projected: the shorter one is enough for directions, and of lines there are
    more along the longer."""
    longer = 0 if shape[0] >= shape[1] else 1
    return longer if kind in ("topk", "uniform") else 1 - longer


def choose(kind: Kind, gradient: Tensor, rank: int, key: torch.Generator) -> dict[str, Tensor]:
    """A subspace for a gradient [rows, columns], as tensors that a checkpoint can hold."""
    x = _turned(gradient, side(kind, gradient.shape))
    if kind == "svd":  # the singular vectors are the eigenvectors of X X^T, which are found several times faster
        vectors = torch.linalg.eigh((x @ x.mT).float())[1]
        return {"basis": vectors[:, -rank:].mT.flip(0).to(gradient.dtype).contiguous()}
    if kind == "topk":
        return {"lines": x.float().norm(dim=1).topk(rank).indices}
    lines = torch.randperm(len(x), generator=key)[:rank].to(x.device)
    if kind == "uniform":
        return {"lines": lines}
    signs = torch.randint(0, 2, (len(x),), generator=key, dtype=torch.int8) * 2 - 1
    return {"lines": lines, "signs": signs.to(x.device)}


def down(kind: Kind, subspace: dict[str, Tensor], matrix: Tensor) -> Tensor:
    """R X [rank, other side]."""
    x = _turned(matrix, side(kind, matrix.shape))
    if kind == "svd":
        return subspace["basis"] @ x
    if kind == "srht":
        x = _mixed(x * subspace["signs"].to(x.dtype)[:, None])
    return x.index_select(0, subspace["lines"])


def up(kind: Kind, subspace: dict[str, Tensor], low: Tensor, shape: tuple[int, ...]) -> Tensor:
    """R^T ``low`` as a matrix of this shape."""
    dim = side(kind, shape)
    if kind == "svd":
        x = subspace["basis"].mT @ low
    else:
        x = low.new_zeros(shape[dim], low.shape[1]).index_copy_(0, subspace["lines"], low)
        if kind == "srht":
            x = _mixed(x, back=True) * subspace["signs"].to(low.dtype)[:, None]
    return _turned(x, dim)


def _turned(matrix: Tensor, dim: int) -> Tensor:
    return matrix if dim == 0 else matrix.mT


def _mixed(x: Tensor, back: bool = False) -> Tensor:
    """An orthonormal transform along the first dimension, n = 2^a m with m odd: Hadamard's for 2^a, and a cosine
    transform for m, which is small for widths of networks. ``back``: its inverse."""
    n = len(x)
    odd = n // (n & -n)
    x = x.reshape(odd, n // odd, -1)
    if odd > 1:
        cosine = _cosine(odd).to(x)
        x = torch.einsum("ij,jkl->ikl", cosine.mT if back else cosine, x)
    half = 1
    while half < x.shape[1]:  # the fast Walsh-Hadamard transform, which is its own inverse
        a, b = x.reshape(odd, -1, 2, half, x.shape[-1]).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).reshape(x.shape)
        half *= 2
    return (x / math.sqrt(n // odd)).reshape(n, -1)


@lru_cache(maxsize=16)
def _cosine(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [n, n], float64."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (j + 0.5) * k / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
