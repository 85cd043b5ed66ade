"""An adapter in memory: the weights that it has for one part of a model, whatever layout they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kinema.config.layouts import AdapterType
from kinema.families.layout import LoraFactors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
IA3 = "ia3_l"
ENDINGS = (LORA_A, LORA_B, MAGNITUDE, *LOKR, IA3)
"""What follows the layer in the name of an adapter's tensor; PEFT's words."""


@dataclass(frozen=True)
class Adapter:
    """Weights of an adapter, by diffusers layer name and PEFT's ending: ``blocks.0.attn1.to_q.lora_A.weight``.

    A layer's update is multiplied by alpha / rank. ``ranks`` and ``alphas`` have every layer (none of IA3). LoKr whose
    matrices are both whole has no rank of its own: there they are a pair with the right ratio.
    """

    kind: AdapterType
    state: dict[str, Tensor]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    part: str = "network"
    """The part of the model that it changes."""
    on_input: frozenset[str] = frozenset()
    """Layers whose inputs IA3 multiplies, instead of their outputs."""
    shifts: dict[str, Tensor] = field(default_factory=dict)
    """What some tools add to whole parameters besides (norms, biases), by name. They are folded in, not trained."""

    @property
    def layers(self) -> list[str]:
        """Its layers, in the order of the state."""
        return list(layers_of(self.state))

    def scale(self, layer: str) -> float:
        """alpha / rank; 1 for IA3."""
        return self.alphas[layer] / self.ranks[layer] if layer in self.ranks else 1.0

    def factors(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a layer by ending."""
        return {ending: self.state[f"{layer}.{ending}"] for ending in ENDINGS if f"{layer}.{ending}" in self.state}

    def to(self, dtype: torch.dtype | None) -> Adapter:
        """With tensors of this type (None: as they are)."""
        return replace(self, state={name: value.to(dtype) for name, value in self.state.items()})

    def lora(self) -> dict[str, LoraFactors]:
        """LoRA and DoRA by layer, as a family's `Layout` takes them."""
        return {
            layer: LoraFactors(
                self.state[f"{layer}.{LORA_A}"],
                self.state[f"{layer}.{LORA_B}"],
                self.alphas[layer],
                self.state.get(f"{layer}.{MAGNITUDE}"),
            )
            for layer in self.layers
        }


def lora_adapter(layers: Mapping[str, LoraFactors], part: str = "network") -> Adapter:
    """LoRA or DoRA of these layers. All must have a magnitude, or none."""
    state: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        state |= {f"{layer}.{LORA_A}": factors.A, f"{layer}.{LORA_B}": factors.B}
        if factors.magnitude is not None:
            state[f"{layer}.{MAGNITUDE}"] = factors.magnitude
    with_magnitude = sum(factors.magnitude is not None for factors in layers.values())
    assert with_magnitude in (0, len(layers)), "DoRA on some layers only"
    ranks = {layer: factors.rank for layer, factors in layers.items()}
    alphas = {layer: factors.alpha for layer, factors in layers.items()}
    return Adapter("dora" if with_magnitude else "lora", state, ranks, alphas, part)


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> the endings of its tensors, of names that all end in one of `ENDINGS`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layer, ending = split_name(name)
        layers.setdefault(layer, []).append(ending)
    return layers


def split_name(name: str) -> tuple[str, str]:
    """``x.lora_A.weight`` -> (``x``, ``lora_A.weight``)."""
    for ending in ENDINGS:
        if name.endswith(f".{ending}"):
            return name[: -len(ending) - 1], ending
    raise ValueError(f"{name} is no name of an adapter's tensor")
