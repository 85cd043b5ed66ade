"""Names of Chroma's weights: diffusers' layout against the original one (``Chroma1-HD.safetensors``).

Flux's without the layers that embed the time and modulate the blocks, and with the network that stands in for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.families.flux_layout import BLOCKS, ENDS, FUSED, with_published_norms
from kinema.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = Layout(
    [
        *ENDS,
        *((f"distilled_guidance_layer.{name}", f"distilled_guidance_layer.{name}") for name in ("in_proj", "out_proj")),
        ("distilled_guidance_layer.layers.{}.linear_1", "distilled_guidance_layer.layers.{}.in_layer"),
        ("distilled_guidance_layer.layers.{}.linear_2", "distilled_guidance_layer.layers.{}.out_layer"),
        ("distilled_guidance_layer.norms.{}.weight", "distilled_guidance_layer.norms.{}.scale"),
        *BLOCKS,
    ],
    fused=FUSED,
)
"""diffusers' ChromaTransformer2DModel against the original."""


def network_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a Chroma network in any layout to diffusers'."""
    return NETWORK.from_original(with_published_norms(state))
