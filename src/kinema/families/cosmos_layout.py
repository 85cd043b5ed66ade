"""Names of Cosmos' weights: diffusers' CosmosTransformer3DModel and autoencoder against NVIDIA's own, which ComfyUI
reads too (without the ``net.`` that NVIDIA's files begin with)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.families.layout import Layout
from kinema.families.names import NameMap

if TYPE_CHECKING:
    from torch import Tensor

_NORMS = (("norm1", "self_attn"), ("norm2", "cross_attn"), ("norm3", "mlp"))

PREDICT2 = Layout(
    [
        ("patch_embed.proj", "x_embedder.proj.1"),
        ("time_embed.t_embedder", "t_embedder.1"),
        ("time_embed.norm", "t_embedding_norm"),
        *(
            (f"transformer_blocks.{{}}.{ours}.linear_{i}", f"blocks.{{}}.adaln_modulation_{theirs}.{i}")
            for ours, theirs in _NORMS
            for i in (1, 2)
        ),
        *(
            (f"transformer_blocks.{{}}.{ours}.{layer}", f"blocks.{{}}.{theirs}.{original}")
            for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for layer, original in (
                ("to_q", "q_proj"),
                ("to_k", "k_proj"),
                ("to_v", "v_proj"),
                ("to_out.0", "output_proj"),
                ("norm_q", "q_norm"),
                ("norm_k", "k_norm"),
            )
        ),
        ("transformer_blocks.{}.ff.net.0.proj", "blocks.{}.mlp.layer1"),
        ("transformer_blocks.{}.ff.net.2", "blocks.{}.mlp.layer2"),
        ("norm_out.linear_1", "final_layer.adaln_modulation.1"),
        ("norm_out.linear_2", "final_layer.adaln_modulation.2"),
        ("proj_out", "final_layer.linear"),
    ],
    dropped=[r"pos_embedder\..*", r"accum_.*", r"(.*\.)?_extra_state"],
)
"""Cosmos-Predict2."""

COSMOS1 = Layout(
    [
        ("patch_embed.proj", "x_embedder.proj.1"),
        ("learnable_pos_embed", "extra_pos_embedder"),
        ("time_embed.t_embedder", "t_embedder.1"),
        ("time_embed.norm", "affline_norm"),
        *(
            (f"transformer_blocks.{{}}.norm{n + 1}.linear_{i}", f"blocks.block{{}}.blocks.{n}.adaLN_modulation.{i}")
            for n in range(3)
            for i in (1, 2)
        ),
        *(
            (f"transformer_blocks.{{}}.attn{n + 1}.{layer}", f"blocks.block{{}}.blocks.{n}.block.attn.{original}")
            for n in range(2)
            for layer, original in (
                ("to_q", "to_q.0"),
                ("norm_q", "to_q.1"),
                ("to_k", "to_k.0"),
                ("norm_k", "to_k.1"),
                ("to_v", "to_v.0"),
                ("to_out.0", "to_out.0"),
            )
        ),
        ("transformer_blocks.{}.ff.net.0.proj", "blocks.block{}.blocks.2.block.layer1"),
        ("transformer_blocks.{}.ff.net.2", "blocks.block{}.blocks.2.block.layer2"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.adaLN_modulation.2"),
        ("proj_out", "final_layer.linear"),
    ],
    dropped=[r"logvar\..*", r"pos_embedder\..*"],
)
"""Cosmos 1. The learnt positions are parameters of the original's module of the same names."""

_LEVELS = 3

AUTOENCODER = NameMap(
    [
        ("quant_conv", "quant_conv.conv3d"),
        ("post_quant_conv", "post_quant_conv.conv3d"),
        *(
            pair
            for end, lists, level in (
                *(("encoder", f"encoder.down_blocks.{i}", f"encoder.down.{i}") for i in range(_LEVELS)),
                *(("decoder", f"decoder.up_blocks.{_LEVELS - 1 - i}", f"decoder.up.{i}") for i in range(_LEVELS)),
            )
            for pair in (
                *(
                    (f"{end}.{place}.{ours}", f"{end}.{place}.{theirs}.conv3d")
                    for place in ("conv_in", "conv_out")
                    for ours, theirs in (("conv_s", "0"), ("conv_t", "1"))
                ),
                (f"{end}.norm_out", f"{end}.norm_out"),
                *(
                    (f"{ours}.{layer}", f"{theirs}.{original}")
                    for ours, theirs in (
                        (f"{lists}.resnets.{{}}", f"{level}.block.{{}}"),
                        (f"{end}.mid_block.resnets.0", f"{end}.mid.block_1"),
                        (f"{end}.mid_block.resnets.1", f"{end}.mid.block_2"),
                    )
                    for layer, original in (
                        ("norm1", "norm1"),
                        ("norm2", "norm2"),
                        ("conv1.conv_s", "conv1.0.conv3d"),
                        ("conv1.conv_t", "conv1.1.conv3d"),
                        ("conv2.conv_s", "conv2.0.conv3d"),
                        ("conv2.conv_t", "conv2.1.conv3d"),
                        ("conv_shortcut", "nin_shortcut.conv3d"),
                    )
                ),
                *(
                    (f"{lists}.{resampler}.0.conv{i}", f"{level}.{resampler.removesuffix('rs')}.conv{i}.conv3d")
                    for resampler in ("downsamplers" if end == "encoder" else "upsamplers",)
                    for i in (1, 2, 3)
                ),
                *(
                    (f"{end}.mid_block.{ours}.0.{layer}", f"{end}.mid.attn_1.{n}.{original}")
                    for n, ours in enumerate(("attentions", "temp_attentions"))
                    for layer, original in (
                        ("norm", "norm"),
                        ("to_q", "q.conv3d"),
                        ("to_k", "k.conv3d"),
                        ("to_v", "v.conv3d"),
                        ("to_out.0", "proj_out.conv3d"),
                    )
                ),
            )
        ),
    ]
)
"""diffusers' AutoencoderKLCosmos against the weights of ``Cosmos-1.0-Tokenizer-CV8x8x8``, as ComfyUI's file
(``cosmos_cv8x8x8_1.0.safetensors``) names them."""

_COMPUTED = ("wavelets", "_arange", "patch_size_buffer", "latent_mean", "latent_std")


def autoencoder_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original names, or diffusers' own, to diffusers'. The latents' statistics are those of the configuration."""
    if "quant_conv.conv3d.weight" not in state:
        return state
    kept = {name: value for name, value in state.items() if name.rpartition(".")[2] not in _COMPUTED}
    return AUTOENCODER.restore_all(kept)
