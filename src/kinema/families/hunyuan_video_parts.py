"""The published models of HunyuanVideo, and the names of their weights in the original layout.

Sources: Tencent's checkpoints as diffusers' converters read them; ComfyUI's files rename them once more.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from kinema.families.base import SamplingDefaults, Variant
from kinema.families.layout import Fused, Layout, swapped_halves
from kinema.families.loading import PartSpec
from kinema.families.part_names import AUTOENCODER_KL, decoder
from kinema.families.parts import CLIP_L, LLAVA_LLAMA3, LLAVA_TOKENIZER, SCHEDULER, tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

REFINER = [
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
    *(
        (
            f"context_embedder.token_refiner.refiner_blocks.{{}}.{ours}",
            f"txt_in.individual_token_refiner.blocks.{{}}.{theirs}",
        )
        for ours, theirs in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attn.to_out.0", "self_attn_proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
            ("norm_out.linear", "adaLN_modulation.1"),
        )
    ),
]
REFINER_FUSED = Fused(
    "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv",
    tuple(f"context_embedder.token_refiner.refiner_blocks.{{}}.attn.to_{x}" for x in "qkv"),
)
"""The refiner of text tokens, which HunyuanVideo-1.5 has too."""

DOUBLE_BLOCKS = [
    (f"transformer_blocks.{{}}.{ours}", f"double_blocks.{{}}.{theirs}")
    for ours, theirs in (
        ("norm1.linear", "img_mod.linear"),
        ("norm1_context.linear", "txt_mod.linear"),
        ("attn.norm_q", "img_attn_q_norm"),
        ("attn.norm_k", "img_attn_k_norm"),
        ("attn.norm_added_q", "txt_attn_q_norm"),
        ("attn.norm_added_k", "txt_attn_k_norm"),
        ("attn.to_out.0", "img_attn_proj"),
        ("attn.to_add_out", "txt_attn_proj"),
        ("ff.net.0.proj", "img_mlp.fc1"),
        ("ff.net.2", "img_mlp.fc2"),
        ("ff_context.net.0.proj", "txt_mlp.fc1"),
        ("ff_context.net.2", "txt_mlp.fc2"),
    )
]
"""The blocks of both streams, but for their queries, keys and values."""

NETWORK = Layout(
    [
        ("x_embedder", "img_in"),
        *REFINER,
        ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
        ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        *DOUBLE_BLOCKS,
        ("single_transformer_blocks.{}.norm.linear", "single_blocks.{}.modulation.linear"),
        ("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.q_norm"),
        ("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.k_norm"),
        ("single_transformer_blocks.{}.proj_out", "single_blocks.{}.linear2"),
        ("proj_out", "final_layer.linear"),
    ],
    fused=[
        REFINER_FUSED,
        Fused("double_blocks.{}.img_attn_qkv", tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv")),
        Fused("double_blocks.{}.txt_attn_qkv", tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv")),
        Fused(
            "single_blocks.{}.linear1",
            (
                *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
                "single_transformer_blocks.{}.proj_mlp",
            ),
            shares=(1, 1, 1, 4),
        ),
    ],
    changed=[swapped_halves("norm_out.linear", "final_layer.adaLN_modulation.1")],
)
"""diffusers' HunyuanVideoTransformer3DModel against Tencent's."""

_COMFYUI = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
        (r"^txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
        (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
        (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
        (r"^(time|guidance)_in\.in_layer\.", r"\1_in.mlp.0."),
        (r"^(time|guidance)_in\.out_layer\.", r"\1_in.mlp.2."),
        (r"_mod\.lin\.", "_mod.linear."),
        (r"\.modulation\.lin\.", ".modulation.linear."),
        (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
        (r"_attn\.norm\.(query|key)_norm\.(scale|weight)$", r"_attn_\1_norm.weight"),
        (r"(blocks\.\d+)\.norm\.(query|key)_norm\.(scale|weight)$", r"\1.\2_norm.weight"),
        (r"(^|[._])(query|key)_norm\.weight$", lambda match: f"{match[1]}{match[2][0]}_norm.weight"),
        (r"(blocks\.\d+\.(?:img_|txt_)?mlp)\.0\.", r"\1.fc1."),
        (r"(blocks\.\d+\.(?:img_|txt_)?mlp)\.2\.", r"\1.fc2."),
    )
)


def comfyui_to_original(name: str) -> str:
    """The original name of a tensor in ComfyUI's files, which follow Flux; other names are kept."""
    for pattern, new in _COMFYUI:
        name = pattern.sub(new, name)
    return name


def network(state: State) -> State:
    """Names of Tencent's files, ComfyUI's, or diffusers' own, to diffusers'."""
    return NETWORK.from_original({comfyui_to_original(name): value for name, value in state.items()})


def autoencoder(state: State) -> State:
    """Names of the autoencoder to diffusers', which are Tencent's too; ComfyUI's may follow latent diffusion."""
    result = AUTOENCODER_KL.from_original(state)
    return {
        name: value.flatten(1) if ".attentions.0.to_" in name and value.ndim > 2 else value
        for name, value in result.items()
    }


def llava(state: State) -> State:
    """Names of LLaVA in any version of transformers to those of version 5."""
    result = {f"model.language_model.{name}": value for name, value in decoder(state).items()}
    for name, value in state.items():
        if match := re.match(r"(?:.*\.)?vision_tower\.(?:vision_model\.)?(.*)", name):
            result[f"model.vision_tower.{match[1]}"] = value
        elif match := re.match(r"(?:.*\.)?(multi_modal_projector\..*)", name):
            result[f"model.{match[1]}"] = value
        elif name.endswith("lm_head.weight"):
            result["lm_head.weight"] = value
    return {name: value for name, value in result.items() if not name.endswith("position_ids")}


PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:HunyuanVideoTransformer3DModel",
        ("hunyuan-video-*-720p/transformers/mp_rank_00_model_states.*",),
        to_ours=network,
        inside=("model.diffusion_model.", "diffusion_model.", "model.model."),
    ),
    "autoencoder": PartSpec(
        "autoencoder (HunyuanVideo)",
        "vae",
        "diffusers:AutoencoderKLHunyuanVideo",
        ("hunyuan-video-*-720p/vae/pytorch_model.pt",),
        to_ours=autoencoder,
        inside=("vae.",),
    ),
    "text_encoder": LLAVA_LLAMA3,
    "tokenizer": LLAVA_TOKENIZER,
    "text_encoder_2": replace(CLIP_L, folder="text_encoder_2"),
    "tokenizer_2": tokenizer("CLIP-L", "openai/clip-vit-large-patch14", 2),
    "image_processor": PartSpec(
        "image processor (LLaVA)", "image_processor", config_file="preprocessor_config.json", beside="text_encoder"
    ),
    "scheduler": SCHEDULER,
}
LLAVA = PartSpec(
    "text encoder (LLaVA-Llama-3 8B)",
    "text_encoder",
    "transformers:LlavaForConditionalGeneration",
    ("text_encoder_i2v",),
    to_ours=llava,
    shipped="llava_llama_3_vision",
    hub="hunyuanvideo-community/HunyuanVideo-I2V",
)
"""With its picture encoder, for image-to-video."""

_I2V = tuple(PARTS)
_T2V = tuple(part for part in _I2V if part != "image_processor")

_SAMPLING = SamplingDefaults(height=720, width=1280, frames=129, fps=24.0, steps=50, guidance=6.0)
VARIANTS = {
    variant.name: variant
    for variant in (
        # The authors train with an unshifted logit-normal law (section 4.5 of the report); the shift of 7 in the
        # schedules is for sampling in few steps.
        Variant(
            "t2v",
            "video",
            12_821_012_544,
            _T2V,
            "hunyuanvideo-community/HunyuanVideo",
            _SAMPLING,
            pipeline="HunyuanVideoPipeline",
        ),
        Variant(
            "i2v",
            "video",
            12_821_012_544,
            _I2V,
            "hunyuanvideo-community/HunyuanVideo-I2V",
            _SAMPLING,
            pipeline="HunyuanVideoImageToVideoPipeline",
            conditions=("text", "first_frame"),
        ),
        Variant(
            "i2v-33ch",
            "video",
            12_810_991_680,
            _I2V,
            "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
            replace(_SAMPLING, guidance=1.0),
            pipeline="HunyuanVideoImageToVideoPipeline",
            conditions=("text", "first_frame"),
        ),
    )
}
