"""The published models of Wan 2.1, and where their parts lie in each layout."""

from __future__ import annotations

from kinema.families.base import SamplingDefaults, Variant
from kinema.families.loading import PartSpec
from kinema.families.wan_names import (
    NETWORK,
    autoencoder_from_original,
    image_encoder_from_original,
    text_encoder_from_original,
)

_T2V = ("network", "autoencoder", "text_encoder", "tokenizer", "scheduler")
_I2V = (*_T2V, "image_encoder", "image_processor")

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:WanTransformer3DModel",
        ("diffusion_pytorch_model*.safetensors",),
        to_ours=NETWORK.restore_all,
    ),
    "autoencoder": PartSpec(
        "autoencoder", "vae", "diffusers:AutoencoderKLWan", ("Wan2.1_VAE.*",), to_ours=autoencoder_from_original
    ),
    "text_encoder": PartSpec(
        "text encoder (UMT5)",
        "text_encoder",
        "transformers:UMT5EncoderModel",
        ("models_t5_umt5-xxl-enc-*",),
        to_ours=text_encoder_from_original,
    ),
    "image_encoder": PartSpec(
        "image encoder (CLIP)",
        "image_encoder",
        "transformers:CLIPVisionModel",
        ("models_clip_open-clip-*",),
        to_ours=image_encoder_from_original,
    ),
    "tokenizer": PartSpec(
        "tokenizer",
        "tokenizer",
        originals=("google/umt5-xxl", "umt5-xxl"),
        config_file="tokenizer_config.json",
        beside="text_encoder",
    ),
    "image_processor": PartSpec(
        "image processor", "image_processor", config_file="preprocessor_config.json", beside="image_encoder"
    ),
    "scheduler": PartSpec("scheduler", "scheduler", config_file="scheduler_config.json"),
}


SMALL = SamplingDefaults(height=480, width=832, frames=81, fps=16.0, steps=50, guidance=5.0)
LARGE = SamplingDefaults(height=720, width=1280, frames=81, fps=16.0, steps=50, guidance=5.0)
"""The authors' settings at 480p and at 720p."""


def _variant(
    name: str, parameters: int, parts: tuple[str, ...], hub: str, sampling: SamplingDefaults = SMALL
) -> Variant:
    return Variant(name, "video", parameters, parts, f"Wan-AI/Wan2.1-{hub}-Diffusers", sampling)


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("t2v-1.3b", 1_418_996_800, _T2V, "T2V-1.3B"),
        _variant("t2v-14b", 14_288_491_584, _T2V, "T2V-14B"),
        _variant("i2v-14b-480p", 16_394_878_784, _I2V, "I2V-14B-480P"),
        _variant("i2v-14b-720p", 16_394_878_784, _I2V, "I2V-14B-720P", LARGE),
    )
}
