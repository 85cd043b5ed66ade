"""The published models of Wan 2.1, and where their parts lie in each layout."""

from __future__ import annotations

from kinema.families.base import SamplingDefaults, Variant
from kinema.families.loading import PartSpec
from kinema.families.parts import WAN_VAE
from kinema.families.wan_names import (
    NETWORK,
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
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": WAN_VAE,
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
    name: str,
    parameters: int,
    hub: str,
    *,
    from_image: bool = False,
    sampling: SamplingDefaults = SMALL,
    shift: float,
) -> Variant:
    return Variant(
        name,
        "video",
        parameters,
        _I2V if from_image else _T2V,
        f"Wan-AI/Wan2.1-{hub}-Diffusers",
        sampling,
        pipeline="WanImageToVideoPipeline" if from_image else "WanPipeline",
        conditions=("text", "first_frame") if from_image else ("text",),
        shift=shift,
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        # The shift is the authors' for sampling (3 at 480p, 5 at 720p and for the large text-to-video model), so that
        # training spends its steps on the times that sampling visits.
        _variant("t2v-1.3b", 1_418_996_800, "T2V-1.3B", shift=3.0),
        _variant("t2v-14b", 14_288_491_584, "T2V-14B", shift=5.0),
        _variant("i2v-14b-480p", 16_394_878_784, "I2V-14B-480P", from_image=True, shift=3.0),
        _variant("i2v-14b-720p", 16_394_878_784, "I2V-14B-720P", from_image=True, sampling=LARGE, shift=5.0),
    )
}
