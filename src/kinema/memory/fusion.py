"""Queries, keys and values of one input by one matrix product.

Layers stay three, with names, weights and gradients of their own: checkpoints, exports and optimisers know nothing of
it. Where attention can ask for all of them at once, it gets a `Fused` of the three, which puts their weights together
while it computes. That copy is small beside a long sequence's products, and pays where sequences are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kinema.errors import ConfigError

if TYPE_CHECKING:
    from kinema.families.base import Family

_LAYERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""What the attention of diffusers calls the fused layers, and of what they are made."""
_JOINT = "JointAttnProcessor2_0"


class Fused(nn.Module):
    """What several linear layers make of one input, side by side. It has no weights of its own."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        object.__setattr__(self, "layers", tuple(layers))  # past nn.Module: these have names already

    def forward(self, input: Tensor) -> Tensor:
        layers: tuple[nn.Linear, ...] = self.layers  # type: ignore[assignment]
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        biases = [layer.bias for layer in layers if layer.bias is not None]
        with torch.autocast(kind, enabled=False):
            product = _Product.apply(input.to(dtype), *(layer.weight for layer in layers))
            return product if not biases else product + torch.cat(biases).to(dtype)


class _Product(torch.autograd.Function):
    """x times the transposes of several matrices; what is kept for the backward pass are they, not their copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return functional.linear(x, torch.cat(weights).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *weights = ctx.saved_tensors
        of_x = gradient @ torch.cat(weights).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return of_x, *[None] * len(weights)
        whole = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        pieces = whole.split([len(weight) for weight in weights])
        return of_x, *(piece.to(weight.dtype) for piece, weight in zip(pieces, weights, strict=True))


def fuse_projections(network: nn.Module) -> int:
    """Let every attention of a network that can do so compute its queries, keys and values at once, in place; returns
    how many do. Call it on whole weights, before activation checkpointing and compilation."""
    fusable = [(module, parts) for module, parts in _attentions(network) if parts]
    for module, (processor, parts) in fusable:
        for name, layers in parts.items():
            setattr(module, name, Fused(layers))
        if processor is not None:
            module.set_processor(processor)  # type: ignore[operator]
        module.fused_projections = True  # type: ignore[assignment]
    return len(fusable)


def check_fusion(family: Family, key: str, parts: Sequence[str]) -> None:
    """ConfigError unless most attention of these parts' networks takes fused layers. Reads no weights."""
    for part in parts:
        if not part.startswith("network"):
            continue
        network = family.empty(part)
        every = [one for one in network.modules() if hasattr(one, "fusable") or hasattr(one, "processor")]
        if 2 * len(list(_attentions(network))) <= len(every):  # HunyuanVideo's refiner of texts alone could
            raise ConfigError(
                f"{key}: no attention of {family.name} can be told to take queries, keys and values from one layer, "
                "or they are one already. Leave it out."
            )


def _attentions(network: nn.Module) -> Iterator[tuple[nn.Module, tuple[Any, dict[str, list[nn.Linear]]]]]:
    """Attentions that can be fused: (module, (the processor that it needs, None for its own, layers by fused name))."""
    processors = _processors()
    for module in network.modules():
        named = getattr(module, "fusable", None)
        if named is not None:  # of kinema's own networks
            found, processor = _plain(module, named), None
        elif (kind := type(getattr(module, "processor", None)).__name__) in processors:
            found, processor = _plain(module, _wanted(module)), processors[kind]
            if kind == _JOINT and (module.norm_q is not None or "to_added_qkv" not in found):
                continue  # its twin knows neither norms nor attention to one stream
        else:
            continue
        if found:
            yield module, (processor() if processor is not None else None, found)


def _wanted(module: Any) -> dict[str, tuple[str, ...]]:
    """Which of the fused layers an attention of diffusers asks for."""
    crosses = bool(getattr(module, "is_cross_attention", False))
    names = ["to_kv" if crosses else "to_qkv"]
    if getattr(module, "add_k_proj", None) is not None:
        names.append("to_added_qkv" if getattr(module, "add_q_proj", None) is not None else "to_added_kv")
    return {name: _LAYERS[name] for name in names}


def _plain(module: nn.Module, named: dict[str, tuple[str, ...]]) -> dict[str, list[nn.Linear]]:
    """The layers; {} where they are not plain and of one width, of adapters or rounded weights for instance."""
    found = {}
    for name, names in named.items():
        layers = [getattr(module, one, None) for one in names]
        if any(type(one) is not nn.Linear for one in layers):
            return {}
        if len({(one.in_features, one.bias is None) for one in layers if one is not None}) > 1:
            return {}
        found[name] = layers
    return found  # type: ignore[return-value]


def _processors() -> dict[str, Any]:
    """Processors of diffusers that take fused layers, or have a twin that does, which is named here."""
    from diffusers.models import attention_processor as theirs

    return {
        "FluxAttnProcessor": None,
        "WanAttnProcessor": None,
        "AttnProcessor2_0": theirs.FusedAttnProcessor2_0,
        _JOINT: theirs.FusedJointAttnProcessor2_0,
        "AuraFlowAttnProcessor2_0": theirs.FusedAuraFlowAttnProcessor2_0,
    }
