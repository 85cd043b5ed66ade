"""Small Wan models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import clip_vision, spread, t5_tokenizer, tiny_seed, umt5_encoder, write_directory

TEXT_DIM = 32
IMAGE_DIM = 20


def write_tiny(directory: Path, from_image: bool, seed: int) -> Path:
    """Write the diffusers directory of a tiny text-to-video or image-to-video model; returns the directory."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessorPil

    tokenizer = t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = umt5_encoder(tokenizer, TEXT_DIM)
        # The widths of the published one divided by 24: the same shortcuts, resamplers and attention.
        modules["vae"] = spread(AutoencoderKLWan(base_dim=4).eval())
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36 if from_image else 16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=40,
            num_layers=3,
            image_dim=IMAGE_DIM if from_image else None,
            added_kv_proj_dim=24 if from_image else None,
            rope_max_seq_len=64,
        )
        modules["transformer"] = spread(transformer.eval())
        if from_image:
            modules["image_encoder"] = clip_vision(IMAGE_DIM)
            modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    pipeline = (WanImageToVideoPipeline if from_image else WanPipeline)(**modules)
    return write_directory(directory, pipeline)
