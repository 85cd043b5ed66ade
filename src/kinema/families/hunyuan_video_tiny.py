"""Small HunyuanVideo models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kinema.families.base import Variant
from kinema.families.tiny import clip_text, clip_tokenizer, llama, llama_tokenizer, spread, tiny_seed, write_directory

TEXT_DIM = 32
POOLED_DIM = 24
PICTURE = 48
"""Side of LLaVA's pictures: 24 x 24 patches of 2 pixels, as many tokens as the published one makes."""


def write_tiny(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    import diffusers
    from transformers import CLIPImageProcessorPil

    from_image = "first_frame" in variant.conditions
    pipeline = getattr(diffusers, variant.pipeline)
    template = importlib.import_module(pipeline.__module__).DEFAULT_PROMPT_TEMPLATE["template"]
    tokenizer, tokenizer_2 = llama_tokenizer([template], llava=True), clip_tokenizer()
    concat = variant.name == "i2v-33ch"
    kind = "latent_concat" if concat else "token_replace" if from_image else None
    with tiny_seed(seed):
        transformer = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=33 if concat else 16,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            guidance_embeds=not concat,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            rope_axes_dim=(4, 4, 4),
            image_condition_type=kind,
        )
        autoencoder = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 12, 12), norm_num_groups=4)
        modules: dict[str, Any] = {
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            "text_encoder": _llava(tokenizer) if from_image else llama(tokenizer, TEXT_DIM, layers=4),
            "text_encoder_2": clip_text(tokenizer_2, POOLED_DIM),
            "vae": spread(autoencoder.eval()),
            "transformer": spread(transformer.eval()),
        }
    if from_image:
        modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size=PICTURE)
    return write_directory(directory, pipeline(**modules))


def _llava(tokenizer: Any) -> Any:
    """LlavaForConditionalGeneration around the tiny Llama, with a picture encoder of three layers."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=PICTURE,
            patch_size=2,
            projection_dim=16,
        ),
        text_config=llama(tokenizer, TEXT_DIM, layers=4).config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return spread(LlavaForConditionalGeneration(config).eval())
