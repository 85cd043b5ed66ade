"""Small Wan models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.base import Variant
from kinema.families.tiny import clip_vision, spread, t5_tokenizer, tiny_seed, umt5_encoder, write_directory
from kinema.families.wan_parts import BOUNDARY, TIME_PER_TOKEN

TEXT_DIM = 32
IMAGE_DIM = 20
IMAGE_TOKENS = 5


def write_tiny(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny model of this kind; returns the directory."""
    import diffusers
    from transformers import CLIPImageProcessorPil

    tokenizer = t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = umt5_encoder(tokenizer, TEXT_DIM)
        modules["vae"] = spread(_autoencoder(variant).eval())
        modules["transformer"] = _network(variant)
        if variant.name in BOUNDARY:
            modules["transformer_2"] = _network(variant)
        if "image_encoder" in variant.parts:
            modules["image_encoder"] = clip_vision(IMAGE_DIM)
            modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    settings = {"boundary_ratio": BOUNDARY.get(variant.name), "expand_timesteps": variant.name in TIME_PER_TOKEN}
    return write_directory(directory, getattr(diffusers, variant.pipeline)(**modules, **settings))


def _autoencoder(variant: Variant) -> Any:
    """The widths of the published ones divided by 24 and by 40: the same shortcuts, resamplers and attention."""
    from diffusers import AutoencoderKLWan

    if variant.name not in TIME_PER_TOKEN:
        return AutoencoderKLWan(base_dim=4)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.05 * (i % 7 - 3) for i in range(48)],
        latents_std=[0.4 + 0.1 * (i % 9) for i in range(48)],
    )


def _network(variant: Variant) -> Any:
    from diffusers import WanTransformer3DModel

    channels = 48 if variant.name in TIME_PER_TOKEN else 16
    beside = 20 if channels == 16 and "first_frame" in variant.conditions else 0
    clip = "image_encoder" in variant.parts
    return spread(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=channels + beside,
            out_channels=channels,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=40,
            num_layers=3,
            image_dim=IMAGE_DIM if clip else None,
            added_kv_proj_dim=24 if clip else None,
            rope_max_seq_len=64,
            pos_embed_seq_len=2 * IMAGE_TOKENS if "last_frame" in variant.conditions else None,
        ).eval()
    )
