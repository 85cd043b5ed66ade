"""A small Chroma model with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import autoencoder_kl, spread, t5_encoder, t5_tokenizer, tiny_seed, write_directory

TEXT_DIM = 32


def write_tiny(directory: Path, seed: int) -> Path:
    """Write its diffusers directory; returns the directory."""
    import diffusers

    tokenizer = t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = t5_encoder(tokenizer, TEXT_DIM)
        modules["vae"] = autoencoder_kl()
        transformer = diffusers.ChromaTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=24,
            approximator_layers=2,
        )
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, diffusers.ChromaPipeline(**modules))
