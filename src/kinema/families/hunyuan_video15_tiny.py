"""Small HunyuanVideo-1.5 models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from kinema.families.base import Variant
from kinema.families.tiny import (
    byt5_tokenizer,
    qwen2_tokenizer,
    qwen25_vl,
    spread,
    t5_encoder,
    tiny_seed,
    write_directory,
)

TEXT_DIM = 32
GLYPH_DIM = 24
IMAGE_DIM = 16
PICTURE = 54
"""Side of SigLIP's pictures: 27 x 27 patches of 2 pixels, as many tokens as the published one makes."""


def write_tiny(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    import diffusers

    pipeline = getattr(diffusers, variant.pipeline)
    template = inspect.signature(pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    from_image = "first_frame" in variant.conditions
    modules: dict[str, Any] = {
        "tokenizer": qwen2_tokenizer((template,)),
        "tokenizer_2": byt5_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=variant.sampling.guidance),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = qwen25_vl(modules["tokenizer"], TEXT_DIM, layers=4).model.language_model
        modules["text_encoder_2"] = t5_encoder(modules["tokenizer_2"], GLYPH_DIM)
        # The published widths divided by 8 where the latents' 32 channels leave it: their groups are means of widths.
        autoencoder = diffusers.AutoencoderKLHunyuanVideo15(
            block_out_channels=(16, 32, 64, 128, 128), layers_per_block=1
        )
        modules["vae"] = spread(autoencoder.eval())
        transformer = diffusers.HunyuanVideo15Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=GLYPH_DIM,
            image_embed_dim=IMAGE_DIM,
            rope_axes_dim=(4, 4, 4),
            target_size=48,  # sizes of 32 x 48 pixels and alike
            task_type="i2v" if from_image else "t2v",
            use_meanflow="step" in variant.name,
        )
        modules["transformer"] = spread(transformer.eval())
        if from_image:
            modules |= _siglip()
    return write_directory(directory, pipeline(**modules))


def _siglip() -> dict[str, Any]:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=2,
    )
    processor = SiglipImageProcessorPil(size={"height": PICTURE, "width": PICTURE})
    return {"image_encoder": spread(SiglipVisionModel(config).eval()), "feature_extractor": processor}
