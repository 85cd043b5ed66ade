"""Small AuraFlow models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path

from kinema.families.tiny import autoencoder_kl, spread, t5_tokenizer, tiny_seed, umt5_encoder, write_directory

TEXT_DIM = 24
SIDE = {"v0.2": 8, "v0.3": 12}


def write_tiny(directory: Path, variant: str, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer = t5_tokenizer()
    with tiny_seed(seed):
        text_encoder = umt5_encoder(tokenizer, TEXT_DIM)
        vae = autoencoder_kl(latent_channels=4, scaling_factor=0.13025, shift_factor=None, quant_convs=True)
        transformer = AuraFlowTransformer2DModel(
            sample_size=16,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=32,
            pos_embed_max_size=SIDE[variant] ** 2,
        )
        spread(transformer.eval())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return write_directory(directory, AuraFlowPipeline(tokenizer, text_encoder, vae, transformer, scheduler))
