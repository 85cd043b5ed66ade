"""The published models of Wan 2.1 and 2.2, and where their parts lie in each layout."""

from __future__ import annotations

from dataclasses import replace

from kinema.families.base import Condition, SamplingDefaults, Variant
from kinema.families.loading import PartSpec
from kinema.families.parts import SCHEDULER, WAN_VAE
from kinema.families.wan_names import (
    NETWORK,
    autoencoder_from_original,
    image_encoder_from_original,
    text_encoder_from_original,
)

_NETWORK = PartSpec(
    "diffusion network",
    "transformer",
    "diffusers:WanTransformer3DModel",
    ("diffusion_pytorch_model*.safetensors", "high_noise_model"),
    to_ours=NETWORK.from_original,
)
PARTS = {
    "network": _NETWORK,
    "network_2": replace(
        _NETWORK, what="diffusion network for low noise", folder="transformer_2", originals=("low_noise_model",)
    ),
    "autoencoder": replace(
        WAN_VAE, originals=("Wan2.1_VAE.*", "Wan2.2_VAE.*"), to_ours=autoencoder_from_original, hub=""
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
    "scheduler": SCHEDULER,
}

BOUNDARY = {"t2v-a14b": 0.875, "i2v-a14b": 0.9}
"""The time from which on the expert for high noise works (``boundary`` in wan/configs of Wan2.2)."""
TIME_PER_TOKEN = ("ti2v-5b", "ti2v-5b-i2v")
"""Variants whose network is told a time for every token (``expand_timesteps`` of diffusers' pipelines)."""

SMALL = SamplingDefaults(height=480, width=832, frames=81, fps=16.0, steps=50, guidance=5.0)
LARGE = SamplingDefaults(height=720, width=1280, frames=81, fps=16.0, steps=50, guidance=5.0)
"""The authors' settings at 480p and at 720p."""

_TEXT: tuple[Condition, ...] = ("text",)
_IMAGE: tuple[Condition, ...] = ("text", "first_frame")
_ENDS: tuple[Condition, ...] = ("text", "first_frame", "last_frame")


def _variant(
    name: str,
    parameters: int,
    hub: str,
    *,
    shift: float,
    conditions: tuple[Condition, ...] = _TEXT,
    further: tuple[str, ...] = (),
    sampling: SamplingDefaults = SMALL,
    grid: int = 16,
) -> Variant:
    """``further``: parts besides those that all variants have."""
    return Variant(
        name,
        "video",
        parameters,
        ("network", "autoencoder", "text_encoder", "tokenizer", "scheduler", *further),
        f"Wan-AI/Wan{hub}-Diffusers",
        sampling,
        pipeline="WanPipeline" if conditions == _TEXT else "WanImageToVideoPipeline",
        conditions=conditions,
        grid=grid,
        shift=shift,
    )


_CLIP = ("image_encoder", "image_processor")
_EXPERT = ("network_2",)
_5B = SamplingDefaults(height=704, width=1280, frames=121, fps=24.0, steps=50, guidance=5.0)

VARIANTS = {
    variant.name: variant
    for variant in (
        # The shift is the authors' for sampling (sample_shift in wan/configs of Wan2.1 and Wan2.2; 3 for the 2.1
        # models at 480p), so that training spends its steps on the times that sampling visits.
        _variant("t2v-1.3b", 1_418_996_800, "2.1-T2V-1.3B", shift=3.0),
        _variant("t2v-14b", 14_288_491_584, "2.1-T2V-14B", shift=5.0),
        _variant("i2v-14b-480p", 16_394_878_784, "2.1-I2V-14B-480P", shift=3.0, conditions=_IMAGE, further=_CLIP),
        _variant(
            "i2v-14b-720p",
            16_394_878_784,
            "2.1-I2V-14B-720P",
            shift=5.0,
            conditions=_IMAGE,
            further=_CLIP,
            sampling=LARGE,
        ),
        _variant(
            "flf2v-14b-720p",
            16_395_536_704,
            "2.1-FLF2V-14B-720P",
            shift=16.0,
            conditions=_ENDS,
            further=_CLIP,
            sampling=LARGE,
        ),
        # The authors guide the two experts by (low 3, high 4).
        _variant(
            "t2v-a14b",
            14_288_491_584,
            "2.2-T2V-A14B",
            shift=12.0,
            further=_EXPERT,
            sampling=replace(LARGE, steps=40, guidance=4.0),
        ),
        _variant(
            "i2v-a14b",
            14_288_901_184,
            "2.2-I2V-A14B",
            shift=5.0,
            conditions=_IMAGE,
            further=_EXPERT,
            sampling=replace(LARGE, steps=40, guidance=3.5),
        ),
        # One network for both: with a picture its first latent frame is given.
        _variant("ti2v-5b", 4_999_787_712, "2.2-TI2V-5B", shift=5.0, sampling=_5B, grid=32),
        _variant("ti2v-5b-i2v", 4_999_787_712, "2.2-TI2V-5B", shift=5.0, conditions=_IMAGE, sampling=_5B, grid=32),
    )
}
