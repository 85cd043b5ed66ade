"""Small HunyuanImage-2.1 models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def write_tiny(directory: Path, distilled: bool, shift: float, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory.

    ``distilled``: its network is told the guidance scale and the end of the step.
    """
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    empty = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    template = HunyuanImagePipeline(**dict.fromkeys(empty)).prompt_template_encode
    modules: dict[str, Any] = {
        "tokenizer": qwen2_tokenizer((template,)),
        "tokenizer_2": byt5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    if not distilled:
        modules["guider"] = AdaptiveProjectedMixGuidance()
        modules["ocr_guider"] = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38)
    with tiny_seed(seed):
        modules["text_encoder"] = qwen25_vl(modules["tokenizer"], TEXT_DIM)
        modules["text_encoder_2"] = t5_encoder(modules["tokenizer_2"], GLYPH_DIM)
        autoencoder = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=64,
            block_out_channels=(32, 32, 32, 64, 128, 128),
            layers_per_block=2,
            spatial_compression_ratio=32,
            sample_size=384,
            scaling_factor=0.75289,
        )
        modules["vae"] = spread(autoencoder.eval())
        transformer = HunyuanImageTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=3,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=GLYPH_DIM,
            rope_axes_dim=(8, 8),
            guidance_embeds=distilled,
            use_meanflow=distilled,
        )
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, HunyuanImagePipeline(**modules))
