"""What an adapter makes of a layer's weight.

- LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A, with s = alpha / rank;
- DoRA (Liu et al. 2024, arXiv 2402.09353): m (W + s B A) / ||W + s B A||, norms over each output's inputs;
- LoKr (Yeh et al. 2023, arXiv 2309.14859): W + s (w1 kron w2), each possibly a product of two factors;
- IA3 (Liu et al. 2022, arXiv 2205.05638): W with its outputs (and the bias) or its inputs multiplied by l.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.adapters.state import IA3, LORA_A, LORA_B, MAGNITUDE, Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in with values of this one: fp32 or better. (torch promotes no float8.)"""
    import torch

    return dtype if dtype == torch.float64 else torch.float32


def merged_weight(weight: Tensor, bias: Tensor | None, adapter: Adapter, layer: str, factor: float) -> list[Tensor]:
    """[weight, bias] (or [weight]) of a layer with the adapter folded in, ``factor`` of the way from the base to the
    adapted layer; in the types given, computed in fp32 or better.

    ``weight``: [out, in, ...].
    """
    exact = exact_type(weight.dtype)
    base = weight.to(exact)
    tensors = [base] if bias is None else [base, bias.to(exact)]
    if adapter.kind == "ia3":
        adapted = _multiplied(tensors, adapter, layer)
        moved = [old + factor * (new - old) for old, new in zip(tensors, adapted, strict=True)]
    elif adapter.kind == "dora":
        whole = base + update(adapter, layer, base)
        size = whole.flatten(1).norm(dim=1)
        magnitude = adapter.state[f"{layer}.{MAGNITUDE}"].to(base).flatten()
        adapted_weight = whole * _by_output(magnitude / size, base)
        moved = [base + factor * (adapted_weight - base), *tensors[1:]]
    else:
        moved = [base + factor * update(adapter, layer, base), *tensors[1:]]
    given = [weight] if bias is None else [weight, bias]
    return [value.to(old.dtype) for value, old in zip(moved, given, strict=True)]


def update(adapter: Adapter, layer: str, weight: Tensor) -> Tensor:
    """What LoRA, DoRA (before its norms) or LoKr adds to the weight, in the weight's type and shape."""
    factors = {ending: value.to(weight) for ending, value in adapter.factors(layer).items()}
    delta = kronecker(factors) if adapter.kind == "lokr" else factors[LORA_B].flatten(1) @ factors[LORA_A].flatten(1)
    return adapter.scale(layer) * delta.reshape(weight.shape)


def kronecker(factors: dict[str, Tensor]) -> Tensor:
    """w1 [a, c] kron w2 [b, d, ...] of LoKr's factors; a factor may come as a product, w2 also as Tucker's
    (t2 [r, r, ...], w2_a [r, b], w2_b [r, d])."""
    import torch

    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        second = factors["lokr_w2"]
    elif "lokr_t2" in factors:
        product = torch.einsum("ij...,ip->pj...", factors["lokr_t2"], factors["lokr_w2_a"])
        second = torch.einsum("pj...,jr->pr...", product, factors["lokr_w2_b"])
    else:
        second = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _multiplied(tensors: list[Tensor], adapter: Adapter, layer: str) -> list[Tensor]:
    weight = tensors[0]
    vector = adapter.state[f"{layer}.{IA3}"].to(weight).flatten()
    if layer in adapter.on_input:
        shape = (1, -1, *[1] * (weight.ndim - 2))
        return [weight * vector.view(shape), *tensors[1:]]
    return [weight * _by_output(vector, weight), *(bias * vector for bias in tensors[1:])]


def _by_output(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (weight.ndim - 1))
