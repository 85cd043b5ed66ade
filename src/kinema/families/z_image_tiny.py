"""Small Z-Image models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import autoencoder_kl, qwen2_tokenizer, qwen3, spread, tiny_seed, write_directory

TEXT_DIM = 32


def write_tiny(directory: Path, shift: float, seed: int) -> Path:
    """Write the diffusers directory of a tiny model whose scheduler has this shift; returns the directory."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen2_tokenizer()
    modules: dict[str, Any] = {"tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    with tiny_seed(seed):
        modules["text_encoder"] = qwen3(tokenizer, TEXT_DIM)
        modules["vae"] = autoencoder_kl()
        transformer = ZImageTransformer2DModel(
            dim=48,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_DIM,
            axes_dims=[8, 8, 8],
            axes_lens=[1536, 64, 64],
        )
        for name in ("x_pad_token", "cap_pad_token"):  # zeros when made
            parameter = transformer.get_parameter(name)
            parameter.data = parameter.data.normal_()
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, ZImagePipeline(**modules))
