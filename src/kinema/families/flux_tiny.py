"""Small Flux models with random weights and every structural feature of the published ones, for tests."""

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

TEXT_DIM = 32
POOLED_DIM = 24


def write_tiny(directory: Path, pipeline: str, distilled: bool, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; ``distilled`` ones have a guidance embedding."""
    import diffusers

    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if distilled else {"shift": 1.0}
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**shift),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = clip_text(tokenizer, POOLED_DIM)
        modules["text_encoder_2"] = t5_encoder(tokenizer_2, TEXT_DIM)
        modules["vae"] = autoencoder_kl()
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 6, 6),
        )
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, getattr(diffusers, pipeline)(**modules))
