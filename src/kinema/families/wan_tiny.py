"""Small Wan models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import spread, t5_tokenizer, tiny_seed, write_directory

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
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_DIM,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        # The widths of the published one divided by 24: the same shortcuts, resamplers and attention.
        modules["vae"] = AutoencoderKLWan(base_dim=4)
        modules["transformer"] = WanTransformer3DModel(
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
        if from_image:
            modules["image_encoder"] = CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=IMAGE_DIM,
                    intermediate_size=28,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=8,
                    hidden_act="gelu",
                    projection_dim=16,
                )
            )
            modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        for name in ("text_encoder", "vae", "transformer", "image_encoder"):
            if name in modules:
                spread(modules[name].eval())
    pipeline = (WanImageToVideoPipeline if from_image else WanPipeline)(**modules)
    return write_directory(directory, pipeline)
