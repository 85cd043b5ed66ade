"""The published models of HunyuanVideo-1.5."""

from __future__ import annotations

from typing import Any

from kinema.families.base import SamplingDefaults, Variant
from kinema.families.hunyuan_video15_layout import AUTOENCODER, image_encoder, network
from kinema.families.loading import PartSpec, Source
from kinema.families.parts import BYT5, BYT5_TOKENIZER, QWEN25_TOKENIZER, QWEN25_VL_TEXT, SCHEDULER
from kinema.families.tensors import NETWORK_INSIDE


def _load_processor(source: Source) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**{k: v for k, v in source.config.items() if not k.endswith("_type")})


PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:HunyuanVideo15Transformer3DModel",
        to_ours=network,
        inside=(*NETWORK_INSIDE, "model.model."),
    ),
    "autoencoder": PartSpec(
        "autoencoder (HunyuanVideo-1.5)",
        "vae",
        "diffusers:AutoencoderKLHunyuanVideo15",
        to_ours=AUTOENCODER.from_original,
        inside=("vae.",),
    ),
    "text_encoder": QWEN25_VL_TEXT,
    "tokenizer": QWEN25_TOKENIZER,
    "text_encoder_2": BYT5,
    "tokenizer_2": BYT5_TOKENIZER,
    "scheduler": SCHEDULER,
    "image_encoder": PartSpec(
        "image encoder (SigLIP)",
        "image_encoder",
        "transformers:SiglipVisionModel",
        to_ours=image_encoder,
        hub="google/siglip-so400m-patch14-384",
    ),
    "image_processor": PartSpec(
        "image processor (SigLIP)",
        "feature_extractor",
        config_file="preprocessor_config.json",
        beside="image_encoder",
        load=_load_processor,
    ),
}
_I2V = tuple(PARTS)
_T2V = tuple(part for part in _I2V if not part.startswith("image"))

TRAINING_SHIFT = 3.0
"""``train_timestep_shift`` of the authors' train.py, after its logit-normal law."""
SIZES = {"480p": (480, 848), "720p": (720, 1280)}


def _variant(name: str) -> Variant:
    """By the name of the hub's repository: size, task, and what it was distilled from."""
    size, kind = name.split("-")[:2]
    height, width = SIZES[size]
    distilled, few_steps = "distilled" in name, "step" in name
    return Variant(
        name,
        "video",
        8_331_330_848 if few_steps else 8_326_608_160,
        _I2V if kind == "i2v" else _T2V,
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name.replace('-', '_')}",
        SamplingDefaults(
            height=height,
            width=width,
            frames=121,
            fps=24.0,
            steps=12 if few_steps else 50,
            guidance=1.0 if distilled else 6.0,
        ),
        pipeline="HunyuanVideo15Pipeline" if kind == "t2v" else "HunyuanVideo15ImageToVideoPipeline",
        conditions=("text",) if kind == "t2v" else ("text", "first_frame"),
        patch=(1, 1, 1),
        shift=TRAINING_SHIFT,
    )


VARIANTS = {
    name: _variant(name)
    for name in (
        "480p-t2v",
        "480p-i2v",
        "720p-t2v",
        "720p-i2v",
        "480p-t2v-distilled",
        "480p-i2v-distilled",
        "720p-i2v-distilled",
        "480p-i2v-step-distilled",
    )
}
