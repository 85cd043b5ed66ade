"""Names of Wan's weights: diffusers' and transformers' layouts against the original one.

The original names are those of the files that Wan-AI publishes and ComfyUI reads
(``blocks.0.self_attn.q.weight``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kinema.families.layout import Layout
from kinema.families.names import NameMap
from kinema.families.part_names import wan_autoencoder

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = Layout(
    [
        ("patch_embedding", "patch_embedding"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
        *(
            (f"blocks.{{}}.{ours}.{layer}", f"blocks.{{}}.{theirs}.{original}")
            for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for layer, original in (
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "o"),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ),
        ("blocks.{}.attn2.add_k_proj", "blocks.{}.cross_attn.k_img"),
        ("blocks.{}.attn2.add_v_proj", "blocks.{}.cross_attn.v_img"),
        ("blocks.{}.attn2.norm_added_k", "blocks.{}.cross_attn.norm_k_img"),
        # The norm before cross-attention is the second that runs, and the original calls it norm3.
        ("blocks.{}.norm2", "blocks.{}.norm3"),
        ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
        ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
        ("blocks.{}.scale_shift_table", "blocks.{}.modulation"),
        ("proj_out", "head.head"),
        ("scale_shift_table", "head.modulation"),
    ]
)
"""diffusers' WanTransformer3DModel against the original."""

AUTOENCODER_22 = NameMap(
    [
        ("quant_conv", "conv1"),
        ("post_quant_conv", "conv2"),
        *(
            pair
            for end, level, lists, resampler in (
                ("encoder", "downsamples", "down_blocks", ("downsampler", "downsamples.2")),
                ("decoder", "upsamples", "up_blocks", ("upsampler", "upsamples.3")),
            )
            for pair in (
                (f"{end}.conv_in", f"{end}.conv1"),
                (f"{end}.norm_out", f"{end}.head.0"),
                (f"{end}.conv_out", f"{end}.head.2"),
                (f"{end}.mid_block.attentions.0", f"{end}.middle.1"),
                # Each level ends with its resampler, after two residual blocks or three.
                (f"{end}.{lists}.{{}}.{resampler[0]}", f"{end}.{level}.{{}}.{resampler[1]}"),
                (f"{end}.{lists}.{{}}.resnets.{{}}.conv_shortcut", f"{end}.{level}.{{}}.{level}.{{}}.shortcut"),
                *(
                    (f"{ours}.{layer}", f"{theirs}.residual.{number}")
                    for ours, theirs in (
                        (f"{end}.mid_block.resnets.0", f"{end}.middle.0"),
                        (f"{end}.mid_block.resnets.1", f"{end}.middle.2"),
                        (f"{end}.{lists}.{{}}.resnets.{{}}", f"{end}.{level}.{{}}.{level}.{{}}"),
                    )
                    for layer, number in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6))
                ),
            )
        ),
    ]
)
"""diffusers' AutoencoderKLWan against ``Wan2.2_VAE.pth``."""

TEXT_ENCODER = NameMap(
    [
        ("shared", "token_embedding"),
        *((f"encoder.block.{{}}.layer.0.SelfAttention.{x}", f"blocks.{{}}.attn.{x}") for x in "qkvo"),
        (
            "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
            "blocks.{}.pos_embedding.embedding",
        ),
        ("encoder.block.{}.layer.0.layer_norm", "blocks.{}.norm1"),
        ("encoder.block.{}.layer.1.layer_norm", "blocks.{}.norm2"),
        ("encoder.block.{}.layer.1.DenseReluDense.wi_0", "blocks.{}.ffn.gate.0"),
        ("encoder.block.{}.layer.1.DenseReluDense.wi_1", "blocks.{}.ffn.fc1"),
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "blocks.{}.ffn.fc2"),
        ("encoder.final_layer_norm", "norm"),
    ]
)
"""transformers' UMT5EncoderModel against ``models_t5_umt5-xxl-enc-bf16.pth``."""

_IMAGE_ENCODER = NameMap(
    [
        ("embeddings.patch_embedding", "visual.patch_embedding"),
        ("embeddings.class_embedding", "visual.cls_embedding"),
        ("embeddings.position_embedding.weight", "visual.pos_embedding"),
        ("pre_layrnorm", "visual.pre_norm"),
        ("encoder.layers.{}.layer_norm1", "visual.transformer.{}.norm1"),
        ("encoder.layers.{}.layer_norm2", "visual.transformer.{}.norm2"),
        ("encoder.layers.{}.self_attn.qkv_proj", "visual.transformer.{}.attn.to_qkv"),
        ("encoder.layers.{}.self_attn.out_proj", "visual.transformer.{}.attn.proj"),
        ("encoder.layers.{}.mlp.fc1", "visual.transformer.{}.mlp.0"),
        ("encoder.layers.{}.mlp.fc2", "visual.transformer.{}.mlp.2"),
        ("post_layernorm", "visual.post_norm"),
    ]
)
"""transformers' CLIPVisionModel, its three projections as one, against
``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``."""


def autoencoder_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of ``Wan2.1_VAE.pth`` or ``Wan2.2_VAE.pth``, or diffusers' own, to diffusers'."""
    if "encoder.downsamples.0.downsamples.0.residual.0.gamma" in state:
        return AUTOENCODER_22.restore_all(state)
    return wan_autoencoder(state)


def text_encoder_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names, or transformers' own (ComfyUI's files, which carry the tokenizer too), to transformers'."""
    if "token_embedding.weight" in state:
        return TEXT_ENCODER.restore_all(state)
    return {name: value for name, value in state.items() if name != "spiece_model"}


def image_encoder_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The visual tower of an XLM-RoBERTa CLIP file (its textual one is left out), or transformers' own names
    with or without the ``vision_model.`` prefix that older versions wrote, to transformers' names."""
    if "visual.cls_embedding" not in state:
        return {name.removeprefix("vision_model."): value for name, value in state.items()}
    visual = {name: value for name, value in state.items() if name.startswith("visual.") and name != "visual.head"}
    result: dict[str, Tensor] = {}
    for name, value in _IMAGE_ENCODER.restore_all(visual).items():
        if ".qkv_proj." in name:
            for projection, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                result[name.replace("qkv_proj", projection)] = third
        elif name.endswith("class_embedding"):
            result[name] = value.flatten()
        elif name.endswith("position_embedding.weight"):
            result[name] = value.squeeze(0)
        else:
            result[name] = value
    return result
