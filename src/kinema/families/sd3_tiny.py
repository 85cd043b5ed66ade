"""Small Stable Diffusion 3 models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import (
    autoencoder_kl,
    clip_text,
    clip_tokenizer,
    spread,
    t5_encoder,
    t5_tokenizer,
    tiny_seed,
    write_directory,
)

LAYERS = 3
DUAL = {"sd3.5-medium": (0, 1)}
CLIP_L_DIM, CLIP_G_DIM, T5_DIM = 16, 20, 48


def write_tiny(directory: Path, variant: str, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()]
    modules: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    modules |= dict(zip(("tokenizer", "tokenizer_2", "tokenizer_3"), tokenizers, strict=True))
    with tiny_seed(seed):
        modules["text_encoder"] = clip_text(tokenizers[0], CLIP_L_DIM, with_projection=True)
        modules["text_encoder_2"] = clip_text(tokenizers[1], CLIP_G_DIM, with_projection=True, hidden_act="gelu")
        modules["text_encoder_3"] = t5_encoder(tokenizers[2], T5_DIM)
        modules["vae"] = autoencoder_kl(scaling_factor=1.5305, shift_factor=0.0609)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            num_layers=LAYERS,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_DIM,
            caption_projection_dim=32,
            pooled_projection_dim=CLIP_L_DIM + CLIP_G_DIM,
            pos_embed_max_size=16,
            dual_attention_layers=DUAL.get(variant, ()),
            qk_norm=None if variant == "sd3-medium" else "rms_norm",
        )
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, StableDiffusion3Pipeline(**modules))
