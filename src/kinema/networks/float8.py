"""Linear layers whose frozen weights are stored in float8 (e4m3) and used in the type of their input.

A base that does not train needs its weights only inside one matrix product at a time. Each output row has a scale of
its own, its largest magnitude over 448, the largest number of the format: w = scale q (e4m3 of Micikevicius et al.
2022, arXiv 2209.05433). What is kept for the backward pass is q, not w.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinema.networks.mapped import settle

STORAGE = torch.float8_e4m3fn
LARGEST = torch.finfo(STORAGE).max


class Float8Linear(nn.Linear):
    """A frozen linear layer with weight ``scale * quantized``; ``weight`` is made on every access."""

    quantized: nn.Parameter
    scale: nn.Parameter
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> Float8Linear:
        """The same layer, stored in float8; the weight of ``layer`` is not copied before it is rounded."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.dtype = layer.weight.dtype
        weight = layer.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        rounded = (weight.float() / scale).clamp(-LARGEST, LARGEST).to(STORAGE)
        new.register_parameter("quantized", nn.Parameter(rounded, requires_grad=False))
        new.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        new.register_parameter("bias", bias)
        return new.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], in the type that the layer had."""
        return _whole(self.quantized, self.scale, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        with torch.autocast(kind, enabled=False):
            return _Product.apply(input, self.quantized, self.scale, bias)

    def plain(self) -> nn.Linear:
        """An ordinary layer with these weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        return layer.train(self.training)


def _whole(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (quantized.to(torch.float32) * scale).to(dtype)


class _Product(torch.autograd.Function):
    """x w^T + b; only x's gradient exists, w and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(quantized, scale)
        return functional.linear(x, _whole(quantized, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        quantized, scale = ctx.saved_tensors
        return gradient @ _whole(quantized, scale, gradient.dtype), None, None, None


def store_float8(roots: Iterable[nn.Module], keep: Iterable[str] = ()) -> int:
    """Store every linear layer below ``roots`` in float8, in place; returns how many.

    Layers with one of the words ``keep`` in their path, and those in a wider type than float32's neighbours by the
    library's choice, should be left out by the caller. Low-rank layers of adapters must not be there yet.
    """
    words, count = set(keep), 0
    for root in roots:
        for name, parent in list(root.named_modules()):
            for child, layer in list(parent.named_children()):
                path = f"{name}.{child}".split(".")
                if type(layer) is nn.Linear and not words & set(path):
                    settle(layer)
                    setattr(parent, child, Float8Linear.of(layer))
                    count += 1
    return count


def restore_float8(root: nn.Module) -> None:
    """Ordinary layers again, in place, with the rounded weights: to merge an adapter into them."""
    for parent in list(root.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, Float8Linear):
                setattr(parent, child, layer.plain())
