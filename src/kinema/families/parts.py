"""Parts that many families share: autoencoders, text encoders, tokenizers, schedulers.

A family takes them into its table, with its own folders:
``dataclasses.replace(T5_XXL, folder="text_encoder_2")``. Their published configurations ship under
``configs/common/<shipped>``.
"""

from __future__ import annotations

from typing import Any

from kinema.families.loading import PartSpec, Source
from kinema.families.part_names import (
    autoencoder_kl,
    causal_decoder,
    clip_text,
    clip_text_projected,
    decoder,
    qwen_vl,
    t5,
    wan_autoencoder,
)

# -- autoencoders ----------------------------------------------------------------------------------------------------

_VAE_INSIDE = ("first_stage_model.", "vae.")

FLUX_VAE = PartSpec(
    "autoencoder (Flux)",
    "vae",
    "diffusers:AutoencoderKL",
    ("ae.safetensors", "ae.sft"),
    to_ours=autoencoder_kl,
    inside=_VAE_INSIDE,
    shipped="flux_vae",
    hub="black-forest-labs/FLUX.1-schnell",
)
"""16 channels, no convolutions around the latents. Flux, Chroma, Lumina-2, HiDream, Z-Image, OmniGen2."""
SDXL_VAE = PartSpec(
    "autoencoder (SDXL)",
    "vae",
    "diffusers:AutoencoderKL",
    to_ours=autoencoder_kl,
    inside=_VAE_INSIDE,
    shipped="sdxl_vae",
    hub="madebyollin/sdxl-vae-fp16-fix",
)
"""4 channels, convolutions around the latents. SDXL, AuraFlow."""
WAN_VAE = PartSpec(
    "autoencoder (Wan)",
    "vae",
    "diffusers:AutoencoderKLWan",
    ("Wan2.1_VAE.*",),
    to_ours=wan_autoencoder,
    inside=("vae.",),
    shipped="wan_vae",
    hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
)
"""The causal video autoencoder of Wan 2.1. Wan, Cosmos-Predict2."""
QWEN_VAE = PartSpec(
    "autoencoder (Qwen-Image)",
    "vae",
    "diffusers:AutoencoderKLQwenImage",
    to_ours=wan_autoencoder,
    inside=("vae.",),
    shipped="qwen_vae",
    hub="Qwen/Qwen-Image",
)
"""Wan's with other weights, in a class of its own."""

# -- text encoders ---------------------------------------------------------------------------------------------------

_CLIP_L_INSIDE = ("conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.")
_CLIP_G_INSIDE = ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.")

CLIP_L = PartSpec(
    "text encoder (CLIP-L)",
    "text_encoder",
    "transformers:CLIPTextModel",
    to_ours=clip_text,
    inside=_CLIP_L_INSIDE,
    shipped="clip_l",
    hub="openai/clip-vit-large-patch14",
)
"""SDXL, Flux, HunyuanVideo."""
CLIP_L_PROJECTED = PartSpec(
    "text encoder (CLIP-L)",
    "text_encoder",
    "transformers:CLIPTextModelWithProjection",
    to_ours=clip_text_projected,
    inside=_CLIP_L_INSIDE,
    shipped="clip_l",
    hub="openai/clip-vit-large-patch14",
)
"""SD3, HiDream."""
CLIP_G = PartSpec(
    "text encoder (CLIP-G)",
    "text_encoder_2",
    "transformers:CLIPTextModelWithProjection",
    to_ours=clip_text_projected,
    inside=_CLIP_G_INSIDE,
    shipped="clip_g",
    hub="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
)
"""SDXL, SD3, HiDream."""
T5_XXL = PartSpec(
    "text encoder (T5-XXL)",
    "text_encoder",
    "transformers:T5EncoderModel",
    to_ours=t5,
    inside=("text_encoders.t5xxl.transformer.",),
    shipped="t5_xxl",
    hub="google/t5-v1_1-xxl",
)
"""Version 1.1. Flux, SD3, Chroma, HiDream, LTX-Video."""
T5_11B = PartSpec(
    "text encoder (T5-11B)",
    "text_encoder",
    "transformers:T5EncoderModel",
    to_ours=t5,
    shipped="t5_11b",
    hub="google-t5/t5-11b",
)
"""The first version: narrow, with wide attention. Cosmos, Cosmos-Predict2."""
BYT5 = PartSpec(
    "text encoder (ByT5)",
    "text_encoder_2",
    "transformers:T5EncoderModel",
    to_ours=t5,
    shipped="byt5",
    hub="hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
)
"""ByT5-small as Glyph extends it, for text to be drawn. HunyuanImage-2.1, HunyuanVideo-1.5."""
QWEN25_VL = PartSpec(
    "text encoder (Qwen2.5-VL 7B)",
    "text_encoder",
    "transformers:Qwen2_5_VLForConditionalGeneration",
    to_ours=qwen_vl,
    inside=("text_encoders.qwen25_7b.transformer.",),
    shipped="qwen2.5_vl_7b",
    hub="Qwen/Qwen2.5-VL-7B-Instruct",
)
"""Qwen-Image, Qwen-Image-Edit, HunyuanImage-2.1."""
QWEN25_VL_TEXT = PartSpec(
    "text encoder (the language model of Qwen2.5-VL 7B)",
    "text_encoder",
    "transformers:Qwen2_5_VLTextModel",
    to_ours=decoder,
    shipped="qwen2.5_vl_7b_text",
    hub="Qwen/Qwen2.5-VL-7B-Instruct",
)
"""HunyuanVideo-1.5."""
QWEN25_VL_3B = PartSpec(
    "text encoder (Qwen2.5-VL 3B)",
    "mllm",
    "transformers:Qwen2_5_VLForConditionalGeneration",
    to_ours=qwen_vl,
    shipped="qwen2.5_vl_3b",
    hub="Qwen/Qwen2.5-VL-3B-Instruct",
)
"""OmniGen2."""
QWEN3 = PartSpec(
    "text encoder (Qwen3 4B)",
    "text_encoder",
    "transformers:Qwen3Model",
    to_ours=decoder,
    inside=("text_encoders.qwen3_4b.transformer.",),
    shipped="qwen3_4b",
    hub="Qwen/Qwen3-4B",
)
"""Z-Image."""
LLAMA31_8B = PartSpec(
    "text encoder (Llama 3.1 8B)",
    "text_encoder_4",
    "transformers:LlamaForCausalLM",
    to_ours=causal_decoder,
    inside=("text_encoders.llama.transformer.",),
    shipped="llama_3.1_8b",
    hub="meta-llama/Llama-3.1-8B-Instruct",
)
"""HiDream."""
LLAVA_LLAMA3 = PartSpec(
    "text encoder (LLaVA-Llama-3 8B)",
    "text_encoder",
    "transformers:LlamaModel",
    to_ours=decoder,
    inside=("text_encoders.llama.transformer.",),
    shipped="llava_llama_3",
    hub="hunyuanvideo-community/HunyuanVideo",
)
"""Its language model alone. HunyuanVideo."""
GEMMA2_2B = PartSpec(
    "text encoder (Gemma 2 2B)",
    "text_encoder",
    "transformers:Gemma2Model",
    to_ours=decoder,
    inside=("text_encoders.gemma2_2b.transformer.",),
    shipped="gemma_2_2b",
    hub="google/gemma-2-2b",
)
"""Lumina-2."""

# -- small parts -----------------------------------------------------------------------------------------------------


def tokenizer(kind: str, hub: str, number: int = 1, shipped: str = "") -> PartSpec:
    """The tokenizer of the ``number``-th text encoder, looked for beside it too; ``kind`` names it in messages."""
    end = "" if number == 1 else f"_{number}"
    return PartSpec(
        f"tokenizer ({kind})",
        f"tokenizer{end}",
        config_file="tokenizer_config.json",
        beside=f"text_encoder{end}",
        shipped=shipped,
        hub=hub,
    )


CLIP_L_TOKENIZER = tokenizer("CLIP-L", "openai/clip-vit-large-patch14")
CLIP_G_TOKENIZER = tokenizer("CLIP-G", "stabilityai/stable-diffusion-xl-base-1.0", 2)
T5_TOKENIZER = tokenizer("T5", "google/t5-v1_1-xxl")
T5_11B_TOKENIZER = tokenizer("T5", "google-t5/t5-11b")
BYT5_TOKENIZER = tokenizer("ByT5", "google/byt5-small", 2, shipped="byt5_tokenizer")
QWEN25_TOKENIZER = tokenizer("Qwen2.5", "Qwen/Qwen2.5-VL-7B-Instruct")
QWEN3_TOKENIZER = tokenizer("Qwen3", "Qwen/Qwen3-4B")
LLAMA31_TOKENIZER = tokenizer("Llama 3.1", "meta-llama/Llama-3.1-8B-Instruct", 4)
LLAVA_TOKENIZER = tokenizer("LLaVA-Llama-3", "hunyuanvideo-community/HunyuanVideo")
GEMMA_TOKENIZER = tokenizer("Gemma", "google/gemma-2-2b")
"""Tokenizers in the places where their first family has them. ByT5's has no vocabulary, so that it ships whole."""


def _load_qwen_processor(source: Source) -> Any:
    from kinema.families.qwen_processor import load_qwen_processor

    assert source.found is not None
    return load_qwen_processor(source.found.place)


QWEN_PROCESSOR = PartSpec(
    "processor (Qwen2.5-VL)",
    "processor",
    config_file="preprocessor_config.json",
    beside="text_encoder",
    load=_load_qwen_processor,
    hub="Qwen/Qwen2.5-VL-7B-Instruct",
)
"""For text that is read together with pictures. Qwen-Image-Edit, OmniGen2."""
SCHEDULER = PartSpec("scheduler", "scheduler", config_file="scheduler_config.json")
