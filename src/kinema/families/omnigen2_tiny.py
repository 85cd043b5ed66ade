"""A small OmniGen2 with random weights and every structural feature of the published one, for tests."""

from __future__ import annotations

from pathlib import Path

from kinema.families.tiny import autoencoder_kl, qwen25_vl, qwen25_vl_processor, spread, tiny_seed, write_directory

TEXT_DIM = 32


def write_tiny(directory: Path, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from kinema.networks.omnigen2 import OmniGen2Transformer2DModel
    from kinema.networks.omnigen2_pipeline import TEMPLATE, OmniGen2Pipeline

    processor = qwen25_vl_processor([TEMPLATE])
    with tiny_seed(seed):
        text_encoder = qwen25_vl(processor.tokenizer, TEXT_DIM)
        text_encoder.config.tie_word_embeddings = True  # as in the 3B model
        text_encoder.tie_weights()
        vae = autoencoder_kl()
        transformer = OmniGen2Transformer2DModel(
            hidden_size=48,
            num_layers=2,
            num_attention_heads=6,  # three heads of queries share one of keys and values, as in the published one
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(1024, 64, 64),
            text_feat_dim=TEXT_DIM,
        )
        spread(transformer.eval())
        for parameter in transformer.parameters():  # its own initial weights close all gates and predict zero
            if parameter.ndim == 2:
                parameter.data = torch.randn_like(parameter) / parameter.shape[1] ** 0.5
        transformer.image_index_embedding.data.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return write_directory(directory, OmniGen2Pipeline(transformer, vae, scheduler, text_encoder, processor))
