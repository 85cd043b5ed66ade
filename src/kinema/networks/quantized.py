"""Linear layers whose frozen weights are stored in 8 or 4 bits and used in the type of their input.

A base that does not train needs its weights only inside one matrix product at a time: they are made there and let go
of. What is kept for the backward pass is what is stored. Of each row, or of each ``BLOCK`` weights of one, the largest
magnitude sets the scale. The formats:

- ``fp8``: e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), a scale a row: w = scale q.
- ``fp8_block``: the same with a scale a block, so that one large weight does not push its whole row towards zero.
- ``int8``: whole numbers from -127 to 127, a scale a row. ``int8_block``: a scale a block.
- ``nf4``: sixteen levels that normal weights fill alike (Dettmers et al. 2023, arXiv 2305.14314), a scale a block.

Layers of norms, modulation and embeddings inside the blocks are few numbers that act on every token. They are stored as
``int8_block``, the closest of these formats, whatever the others are in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinema.networks.mapped import settle

Kind = Literal["fp8", "fp8_block", "int8", "int8_block", "nf4"]
BLOCK = 64
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Of ``nf4``: means of neighbouring quantiles of the normal distribution, over the largest."""
TABLE_BYTES = 256 * 2 * 4
"""Of the levels that each value of a byte stands for."""
_SENSITIVE = re.compile(r"norm|(^|_)mod$|modulat|adaln|emb", re.IGNORECASE)
_TOPS = tuple(float(top) for top in (448, 416, 384, 352, 320, 288, 256, 240))
"""The largest number of a row may be any of these in e4m3, up to a power of 2."""
_ROUNDED = 2**-6
"""More than bfloat16 can have changed a number of e4m3, relatively, and less than lies between two."""
_COLUMNS = 128


class QuantizedLinear(nn.Linear):
    """A frozen linear layer; ``weight`` [out, in] is made on every access, in the type that the layer had."""

    quantized: nn.Parameter
    scale: nn.Parameter
    """[out, 1], or [out, blocks]."""
    pairs: Tensor | None
    """Of ``nf4``: the two levels that each value of a byte stands for, [256, 2]."""
    kind: Kind
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear, kind: Kind) -> QuantizedLinear:
        """The same layer, stored in this format."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.kind, new.dtype = kind, layer.weight.dtype
        quantized, scale = encode(layer.weight.detach(), kind)
        new.register_parameter("quantized", nn.Parameter(quantized, requires_grad=False))
        new.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        new.register_parameter("bias", bias)
        new.register_buffer("pairs", _pairs(scale.device) if kind == "nf4" else None, persistent=False)
        return new.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], in the type that the layer had."""
        return decode(self.quantized, self.scale, self.pairs, self.in_features, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # which no meta device has
            return _Product.apply(input, self.quantized, self.scale, self.pairs, self.in_features, bias)

    def plain(self) -> nn.Linear:
        """An ordinary layer with these weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return layer.train(self.training)


class _Product(torch.autograd.Function):
    """x w^T + b; only x's gradient exists, w and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: Tensor, scale: Tensor, pairs: Tensor | None, width: int, bias: Tensor | None
    ) -> Tensor:
        ctx.width = width
        ctx.save_for_backward(quantized, scale, pairs)
        return functional.linear(x, decode(quantized, scale, pairs, width, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        quantized, scale, pairs = ctx.saved_tensors
        return gradient @ decode(quantized, scale, pairs, ctx.width, gradient.dtype), None, None, None, None, None


# -- formats ---------------------------------------------------------------------------------------------------------


def encode(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(quantized, scale) of a matrix [out, in]; on the meta device, what they would be."""
    if weight.is_meta:
        return _on_paper(kind, *weight.shape)
    weight = weight.float()
    if kind == "nf4":
        return _four_bits(weight)
    top = LARGEST if kind in ("fp8", "fp8_block") else 127.0
    size = BLOCK if kind.endswith("_block") else weight.shape[1]
    scale = _largest(weight, size) / top
    if kind == "fp8":
        scale = _kept_scales(weight) if _is_float8(weight) else scale
    scaled = weight / _spread(scale, weight.shape[1])
    if kind in ("fp8", "fp8_block"):
        return scaled.clamp(-top, top).to(FLOAT8), scale
    return scaled.round().to(torch.int8), scale


def decode(quantized: Tensor, scale: Tensor, pairs: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [out, width] of what `encode` made. Nothing of its size in float32 is made, but of `nf4`."""
    if pairs is not None:
        levels = pairs.index_select(0, quantized.flatten().int())
        blocks = levels.view(*scale.shape, BLOCK).mul_(scale[..., None])
        return blocks.flatten(1)[:, :width].to(dtype)
    # Numbers of e4m3 and of 8 bits are numbers of any wider type, so only the product rounds: from fp32, once.
    whole = quantized.to(dtype)
    if scale.shape[1] == 1 or width % BLOCK:
        return torch.mul(whole, _spread(scale, width), out=torch.empty_like(whole))
    blocks = whole.view(*scale.shape, BLOCK)
    return torch.mul(blocks, scale[..., None], out=torch.empty_like(blocks)).flatten(1)


def stored_bytes(kind: Kind, rows: int, width: int) -> int:
    """What a matrix takes in this format, its scales too."""
    return sum(tensor.nbytes for tensor in _on_paper(kind, rows, width))


def _on_paper(kind: Kind, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """(quantized, scale) of a matrix [rows, width] without values."""
    blocks = -(-width // BLOCK)
    if kind == "nf4":
        shape, stored, scales = (rows, blocks * BLOCK // 2), torch.uint8, (blocks, torch.bfloat16)
    else:
        shape, stored = (rows, width), FLOAT8 if kind in ("fp8", "fp8_block") else torch.int8
        scales = (blocks if kind.endswith("_block") else 1, torch.float32)
    scale = torch.empty(rows, scales[0], dtype=scales[1], device="meta")
    return torch.empty(shape, dtype=stored, device="meta"), scale


def _largest(weight: Tensor, size: int) -> Tensor:
    """The largest magnitude of each ``size`` weights of a row, [out, blocks]; never 0."""
    padded = functional.pad(weight, (0, -weight.shape[1] % size))
    return padded.view(len(weight), -1, size).abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny * 2**10)


def _spread(scale: Tensor, width: int) -> Tensor:
    """A scale for each weight, from one for each block; one for each row is left to broadcasting."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, 1)[:, :width]


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights a byte, blocks padded with zeros; bfloat16 scales, with which weights are rounded."""
    scale = _largest(weight, BLOCK).to(torch.bfloat16)
    padded = functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    levels = torch.tensor(LEVELS, device=weight.device)
    nearest = torch.bucketize(padded / _spread(scale.float(), padded.shape[1]), (levels[1:] + levels[:-1]) / 2)
    nearest = nearest.to(torch.uint8)
    return nearest[:, ::2] * 16 + nearest[:, 1::2], scale


def _pairs(device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS, device=device)
    return torch.cartesian_prod(levels, levels)


def _is_float8(weight: Tensor) -> bool:
    """Whether these weights are numbers of e4m3 times a scale, as those of files that are stored so, whatever part of
    the matrix has a scale of its own. (They may have been rounded to bfloat16 since.)"""
    rows = weight[:: max(1, len(weight) // 8)]
    rows = rows[rows.abs().amax(1) > 0]
    return len(rows) > 0 and bool((_errors(rows, _largest(rows, rows.shape[1])).amin(0) < _ROUNDED).all())


def _errors(weight: Tensor, largest: Tensor) -> Tensor:
    """The largest relative error of each row for each of `_TOPS`, [tops, out]."""
    found = []
    for top in _TOPS:
        scale = largest / top
        rounded = (weight / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).float() * scale
        found.append(((rounded - weight).abs() / weight.abs().clamp(min=1e-30)).amax(1))
    return torch.stack(found)


def _kept_scales(weight: Tensor) -> Tensor:
    """The scale of each row with which its weights are numbers of e4m3, [out, 1]: one that the largest weight suggests,
    fitted to all of them by least squares, which evens out what bfloat16 has rounded."""
    largest = _largest(weight, weight.shape[1])
    errors = _errors(weight[:, :: max(1, weight.shape[1] // _COLUMNS)], largest)  # of so many, one top alone fits all
    unclear = (errors < _ROUNDED).sum(0) != 1
    if unclear.any():
        errors[:, unclear] = _errors(weight[unclear], largest[unclear])
    scale = largest / torch.tensor(_TOPS, device=weight.device)[errors.argmin(0)][:, None]
    numbers = (weight / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).float()
    norms = numbers.square().sum(1, keepdim=True)
    return torch.where(norms > 0, (weight * numbers).sum(1, keepdim=True) / norms, scale)


# -- networks --------------------------------------------------------------------------------------------------------


def chosen(
    roots: Iterable[nn.Module], kind: Kind, keep: Iterable[str] = ()
) -> Iterator[tuple[nn.Module, str, nn.Linear, Kind]]:
    """(parent, its name for the layer, the layer, the format) of every linear layer below ``roots``, but for those with
    one of the words ``keep`` in their path."""
    words = set(keep)
    for root in roots:
        # By name: a list of the layers would keep them all while one after the other is replaced.
        for name, parent in [found for found in root.named_modules() if found[1]._modules]:
            for child in list(parent._modules):
                layer, path = parent._modules[child], f"{name}.{child}".split(".")
                if type(layer) is nn.Linear and not words & set(path):
                    yield parent, child, layer, "int8_block" if is_sensitive(*path, type(parent).__name__) else kind


def is_sensitive(*words: str) -> bool:
    """Whether a layer with these words in its path (or its path in one) is one of norms, modulation or embeddings."""
    return any(_SENSITIVE.search(word) for path in words for word in path.split("."))


def quantize(roots: Iterable[nn.Module], kind: Kind, keep: Iterable[str] = ()) -> int:
    """Store the layers that are `chosen`, in place; returns how many. Low-rank layers of adapters must not be there
    yet. Weights that wait in their files are read layer by layer."""
    count = 0
    for parent, child, layer, own in chosen(roots, kind, keep):
        settle(layer)
        setattr(parent, child, QuantizedLinear.of(layer, own))
        count += 1
    return count


def restore(root: nn.Module) -> None:
    """Ordinary layers again, in place, with the rounded weights."""
    for parent in [module for module in root.modules() if module._modules]:
        for child in list(parent._modules):
            layer = parent._modules[child]
            if isinstance(layer, QuantizedLinear):
                setattr(parent, child, layer.plain())
