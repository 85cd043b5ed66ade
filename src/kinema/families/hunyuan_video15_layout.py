"""Names of HunyuanVideo-1.5's weights: diffusers' against those of the files that are passed around.

Of the network ComfyUI's names are the original here, which follow Flux, with fused projections; Tencent's own are read
too. Sources: Tencent-Hunyuan/HunyuanVideo-1.5, and diffusers' ``scripts/convert_hunyuan_video1_5_to_diffusers.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.families.hunyuan_image_layout import comfyui_names
from kinema.families.layout import Fused, Layout, swapped_halves

if TYPE_CHECKING:
    from torch import Tensor

_REFINER = ("context_embedder.token_refiner.refiner_blocks.{}", "txt_in.individual_token_refiner.blocks.{}")
_BLOCK = ("transformer_blocks.{}", "double_blocks.{}")


def _within(blocks: tuple[str, str], pairs: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{blocks[0]}.{ours}", f"{blocks[1]}.{theirs}") for ours, theirs in pairs.items()]


def _qkv(blocks: tuple[str, str], theirs: str, ours: str) -> Fused:
    return Fused(f"{blocks[1]}.{theirs}", tuple(f"{blocks[0]}.attn.{ours.format(x)}" for x in "qkv"))


NETWORK = Layout(
    [
        ("x_embedder", "img_in"),
        ("cond_type_embed", "cond_type_embedding"),
        *(
            (f"{ours}.linear_{number}", f"{theirs}.{layer}")
            for ours, theirs in (
                ("time_embed.timestep_embedder", "time_in"),
                ("time_embed.timestep_embedder_r", "time_r_in"),
                ("context_embedder.time_text_embed.timestep_embedder", "txt_in.t_embedder"),
                ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
            )
            for number, layer in ((1, "in_layer"), (2, "out_layer"))
        ),
        ("context_embedder.proj_in", "txt_in.input_embedder"),
        *_within(
            _REFINER,
            {
                "norm1": "norm1",
                "norm2": "norm2",
                "attn.to_out.0": "self_attn.proj",
                "ff.net.0.proj": "mlp.0",
                "ff.net.2": "mlp.2",
                "norm_out.linear": "adaLN_modulation.1",
            },
        ),
        ("context_embedder_2.norm", "byt5_in.layernorm"),
        *((f"context_embedder_2.linear_{i}", f"byt5_in.fc{i}") for i in (1, 2, 3)),
        ("image_embedder.norm_in", "vision_in.proj.0"),
        ("image_embedder.linear_1", "vision_in.proj.1"),
        ("image_embedder.linear_2", "vision_in.proj.3"),
        ("image_embedder.norm_out", "vision_in.proj.4"),
        *_within(
            _BLOCK,
            {
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
                "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
                "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
                "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
        ),
        ("proj_out", "final_layer.linear"),
    ],
    fused=[
        _qkv(_REFINER, "self_attn.qkv", "to_{}"),
        _qkv(_BLOCK, "img_attn.qkv", "to_{}"),
        _qkv(_BLOCK, "txt_attn.qkv", "add_{}_proj"),
    ],
    changed=[swapped_halves("norm_out.linear", "final_layer.adaLN_modulation.1")],
)
"""diffusers' HunyuanVideo15Transformer3DModel against ComfyUI's names."""

AUTOENCODER = Layout(
    [
        *((f"{end}.{name}", f"{end}.{name}") for end in ("encoder", "decoder") for name in ("conv_in", "conv_out")),
        *((f"{end}.norm_out", f"{end}.norm_out") for end in ("encoder", "decoder")),
        ("encoder.down_blocks.{}.resnets.{}", "encoder.down.{}.block.{}"),
        ("encoder.down_blocks.{}.downsamplers.0", "encoder.down.{}.downsample"),
        ("decoder.up_blocks.{}.resnets.{}", "decoder.up.{}.block.{}"),
        ("decoder.up_blocks.{}.upsamplers.0", "decoder.up.{}.upsample"),
        *(
            (f"{end}.mid_block.{ours}", f"{end}.mid.{theirs}")
            for end in ("encoder", "decoder")
            for ours, theirs in (
                ("resnets.0", "block_1"),
                ("resnets.1", "block_2"),
                ("attentions.0.norm", "attn_1.norm"),
                ("attentions.0.to_q", "attn_1.q"),
                ("attentions.0.to_k", "attn_1.k"),
                ("attentions.0.to_v", "attn_1.v"),
                ("attentions.0.proj_out", "attn_1.proj_out"),
            )
        ),
    ]
)
"""diffusers' AutoencoderKLHunyuanVideo15 against Tencent's, whose names ComfyUI's file has too."""


def network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the network in any known layout to diffusers'."""
    if not any(name.startswith("double_blocks.") for name in state):
        return state
    return NETWORK.from_original(comfyui_names(state))


def image_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of SigLIP's picture tower, alone or beside the text tower, with the place that older versions of
    transformers gave it or without, to transformers 5's."""
    prefix = "vision_model."
    if not any(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
