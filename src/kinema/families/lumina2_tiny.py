"""A small Lumina-Image 2.0 with random weights and every structural feature of the published one, for tests."""

from __future__ import annotations

from pathlib import Path

from kinema.families.tiny import autoencoder_kl, gemma2, gemma_tokenizer, spread, tiny_seed, write_directory

TEXT_DIM = 32


def write_tiny(directory: Path, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    template = Lumina2Pipeline(None, None, None, None, None).system_prompt
    tokenizer = gemma_tokenizer([f"{template} <Prompt Start> "])
    with tiny_seed(seed):
        text_encoder = gemma2(tokenizer, TEXT_DIM)
        vae = autoencoder_kl()
        transformer = Lumina2Transformer2DModel(
            sample_size=16,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=2,
            num_attention_heads=6,  # three heads of queries share one of keys and values, as in the published one
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=TEXT_DIM,
        )
        spread(transformer.eval())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return write_directory(directory, Lumina2Pipeline(transformer, scheduler, vae, text_encoder, tokenizer))
