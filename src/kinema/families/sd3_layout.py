"""Names of Stable Diffusion 3's weights: diffusers' layout against the original one.

The original names are those of the files that Stability AI publishes (``sd3_medium.safetensors``,
``sd3.5_large.safetensors``) and ComfyUI reads (``joint_blocks.0.x_block.attn.qkv.weight``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from kinema.families.layout import Fused, Layout, swapped_halves

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = "transformer_blocks.{}"
_ORIGINAL = "joint_blocks.{}"
_STREAMS = (
    # of pictures, of text: (theirs, then ours: attention's output, norms of queries and keys, modulation, feed-forward)
    ("x_block", "to_out.0", "norm_q", "norm_k", "norm1", "ff"),
    ("context_block", "to_add_out", "norm_added_q", "norm_added_k", "norm1_context", "ff_context"),
)
_FUSED = (
    ("x_block.attn", "attn", ("to_q", "to_k", "to_v")),
    ("x_block.attn2", "attn2", ("to_q", "to_k", "to_v")),
    ("context_block.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
)


@cache
def network_layout(blocks: int) -> Layout:
    """The layout of a network with so many blocks: in the last one, text ends with a modulation of two parts, which the
    original stores as (shift, scale), as it does that of the output."""
    return Layout(
        [
            ("pos_embed.pos_embed", "pos_embed"),
            ("pos_embed.proj", "x_embedder.proj"),
            ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
            ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
            ("context_embedder", "context_embedder"),
            *(
                (f"{_BLOCK}.{ours}", f"{_ORIGINAL}.{stream}.{theirs}")
                for stream, out, norm_q, norm_k, modulation, forward in _STREAMS
                for ours, theirs in (
                    (f"attn.{out}", "attn.proj"),
                    (f"attn.{norm_q}", "attn.ln_q"),
                    (f"attn.{norm_k}", "attn.ln_k"),
                    (f"{modulation}.linear", "adaLN_modulation.1"),
                    (f"{forward}.net.0.proj", "mlp.fc1"),
                    (f"{forward}.net.2", "mlp.fc2"),
                )
            ),
            (f"{_BLOCK}.attn2.to_out.0", f"{_ORIGINAL}.x_block.attn2.proj"),
            (f"{_BLOCK}.attn2.norm_q", f"{_ORIGINAL}.x_block.attn2.ln_q"),
            (f"{_BLOCK}.attn2.norm_k", f"{_ORIGINAL}.x_block.attn2.ln_k"),
            ("proj_out", "final_layer.linear"),
        ],
        fused=[
            Fused(f"{_ORIGINAL}.{theirs}.qkv", tuple(f"{_BLOCK}.{attention}.{part}" for part in parts))
            for theirs, attention, parts in _FUSED
        ],
        changed=[
            swapped_halves(
                f"transformer_blocks.{blocks - 1}.norm1_context.linear",
                f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1",
            ),
            swapped_halves("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ],
    )


def network_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a whole network of any size to diffusers'; its own pass through."""
    indices = [int(name.split(".")[1]) for name in state if name.startswith("joint_blocks.")]
    return network_layout(max(indices, default=0) + 1).from_original(state)
