"""Small LTX-Video models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.base import Variant
from kinema.families.tiny import spread, t5_encoder, t5_tokenizer, tiny_seed, write_directory

TEXT_DIM = 32
_COMMON = {"decoder_causal": False, "encoder_causal": True, "latent_channels": 128, "patch_size": 4}
_OLD_ENCODER = {"block_out_channels": (8, 12, 16, 16), "layers_per_block": (1, 1, 1, 1, 1)}
_NEW_DECODER = {
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "0.9": {
        **_OLD_ENCODER,
        "decoder_block_out_channels": (8, 12, 16, 16),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "0.9.1": {**_OLD_ENCODER, **_NEW_DECODER, "decoder_inject_noise": (True, True, True, False)},
    "0.9.5": {
        **_NEW_DECODER,
        "block_out_channels": (8, 16, 32, 64, 128),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}
"""Settings by the version that brought them: the published blocks, few and narrow, with all of the compression."""


def write_tiny(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    import diffusers
    import torch

    version = variant.name.rsplit("-", 1)[1]
    old = version in ("0.9", "0.9.1")
    scheduler = (
        {"base_image_seq_len": 1024, "base_shift": 0.95, "max_image_seq_len": 4096, "max_shift": 2.05}
        | {"shift_terminal": 0.1, "use_dynamic_shifting": True}
        if old
        else {}
    )
    tokenizer = t5_tokenizer()
    with tiny_seed(seed):
        autoencoder = spread(
            diffusers.AutoencoderKLLTXVideo(**_COMMON, **AUTOENCODERS[version if old else "0.9.5"]).eval()
        )
        # Sharp posteriors, as the published ones: the pipelines draw a given first frame instead of taking the mean.
        last = autoencoder.encoder.conv_out.conv
        last.weight.data[-1], last.bias.data[-1] = 0.0, -24.0
        autoencoder.latents_mean = torch.randn(128) * 0.1
        autoencoder.latents_std = torch.rand(128) + 0.5
        transformer = diffusers.LTXVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,  # a width that six does not divide, as the published ones
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT_DIM,
        )
        modules = {
            "tokenizer": tokenizer,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
            "text_encoder": t5_encoder(tokenizer, TEXT_DIM),
            "vae": autoencoder,
            "transformer": spread(transformer.eval()),
        }
    return write_directory(directory, getattr(diffusers, variant.pipeline)(**modules))
