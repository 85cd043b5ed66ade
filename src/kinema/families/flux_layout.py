"""Names of Flux's weights: diffusers' layout against the original one, which Chroma shares where it has the layers.

The original names are those of the files that Black Forest Labs publish and ComfyUI reads
(``double_blocks.0.img_attn.qkv``). There the projections of queries, keys and values are one layer, in single blocks
together with the first layer of the feed-forward network, which is four times as wide.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kinema.families.layout import Fused, Layout, swapped_halves

if TYPE_CHECKING:
    from torch import Tensor

ENDS = [("context_embedder", "txt_in"), ("x_embedder", "img_in"), ("proj_out", "final_layer.linear")]
"""What Flux and Chroma have before and after their blocks."""

BLOCKS = [
    *(
        (f"transformer_blocks.{{}}.{ours}", f"double_blocks.{{}}.{theirs}")
        for ours, theirs in (
            ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
            ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
            ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
            ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
            ("attn.to_out.0", "img_attn.proj"),
            ("attn.to_add_out", "txt_attn.proj"),
            ("ff.net.0.proj", "img_mlp.0"),
            ("ff.net.2", "img_mlp.2"),
            ("ff_context.net.0.proj", "txt_mlp.0"),
            ("ff_context.net.2", "txt_mlp.2"),
        )
    ),
    ("single_transformer_blocks.{}.attn.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"),
    ("single_transformer_blocks.{}.attn.norm_k.weight", "single_blocks.{}.norm.key_norm.scale"),
    ("single_transformer_blocks.{}.proj_out", "single_blocks.{}.linear2"),
]
"""Layers of the blocks that have a name of their own in both layouts, but for Flux's modulation."""

FUSED = [
    Fused("double_blocks.{}.img_attn.qkv", tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
    Fused("double_blocks.{}.txt_attn.qkv", tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
    Fused(
        "single_blocks.{}.linear1",
        (*(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.{}.proj_mlp"),
        (1, 1, 1, 4),
    ),
]

MODULATION = [
    ("transformer_blocks.{}.norm1.linear", "double_blocks.{}.img_mod.lin"),
    ("transformer_blocks.{}.norm1_context.linear", "double_blocks.{}.txt_mod.lin"),
    ("single_transformer_blocks.{}.norm.linear", "single_blocks.{}.modulation.lin"),
]

NETWORK = Layout(
    [
        *ENDS,
        *(
            (f"time_text_embed.{ours}.linear_{number}", f"{theirs}.{layer}")
            for ours, theirs in (
                ("timestep_embedder", "time_in"),
                ("text_embedder", "vector_in"),
                ("guidance_embedder", "guidance_in"),
            )
            for number, layer in ((1, "in_layer"), (2, "out_layer"))
        ),
        *BLOCKS,
        *MODULATION,
    ],
    fused=FUSED,
    changed=[swapped_halves("norm_out.linear", "final_layer.adaLN_modulation.1")],
)
"""diffusers' FluxTransformer2DModel against the original."""

_NORM = re.compile(r"((?:query|key)_norm|distilled_guidance_layer\.norms\.\d+)\.weight")


def with_published_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of the original layout that newer versions of ComfyUI save call the scales of norms ``weight``."""
    if not any(name.startswith("double_blocks.") for name in state):
        return state
    return {_NORM.sub(r"\1.scale", name): value for name, value in state.items()}


def network_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a Flux network in any layout to diffusers'."""
    return NETWORK.from_original(with_published_norms(state))
