"""Small HiDream models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import (
    autoencoder_kl,
    clip_text,
    clip_tokenizer,
    llama,
    llama_tokenizer,
    spread,
    t5_encoder,
    t5_tokenizer,
    tiny_seed,
    write_directory,
)

CLIP_L_DIM, CLIP_G_DIM, T5_DIM, LLAMA_DIM = 12, 16, 24, 32
POSITIONS = 248
"""Of the stretched CLIP encoders."""


def write_tiny(directory: Path, variant: str, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer(), llama_tokenizer()]
    modules: dict[str, Any] = {"scheduler": _scheduler(variant)}
    modules |= {f"tokenizer{end}": one for end, one in zip(("", "_2", "_3", "_4"), tokenizers, strict=True)}
    with tiny_seed(seed):
        clip_l, clip_g, t5, decoder = tokenizers
        modules["text_encoder"] = clip_text(clip_l, CLIP_L_DIM, with_projection=True, positions=POSITIONS)
        modules["text_encoder_2"] = clip_text(
            clip_g, CLIP_G_DIM, with_projection=True, hidden_act="gelu", positions=POSITIONS
        )
        modules["text_encoder_3"] = t5_encoder(t5, T5_DIM)
        modules["text_encoder_4"] = llama(decoder, LLAMA_DIM, layers=3, causal=True)
        modules["vae"] = autoencoder_kl()
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[T5_DIM, LLAMA_DIM],
            text_emb_dim=CLIP_L_DIM + CLIP_G_DIM,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 2, 2],  # the last is seen by all further blocks
        )
        modules["transformer"] = spread(transformer.eval())
    return write_directory(directory, HiDreamImagePipeline(**modules))


def _scheduler(variant: str) -> Any:
    from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler

    if variant == "full":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return FlowMatchLCMScheduler(shift=6.0 if variant == "dev" else 3.0)
