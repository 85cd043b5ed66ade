"""Cosmos-Predict2 (NVIDIA 2025, github.com/nvidia-cosmos/cosmos-predict2): pictures from text, videos from a picture.

A transformer on the latents of Wan 2.1's autoencoder, told the text by cross-attention to the first T5-11B. Its authors
write it with EDM's noise levels, sigma = t / (1 - t), and the preconditioning (``RectifiedFlowScaling``)

    c_in = 1 - t,   c_skip = 1 - t,   c_out = -t,   c_noise = t.

The noisy data is x_0 + sigma eps = x_t / (1 - t), so the network's input c_in x is x_t itself, and of its output F the
data is x_0 = x_t - t F: F is the velocity. Inputs equal those of diffusers' Cosmos2TextToImagePipeline and
Cosmos2VideoToWorldPipeline.

Time in training: sigma = m exp(z) with z normal (``sample_sigma`` of its scheduler, ``draw_training_sigma_and_epsilon``
of its models); m = 1 for pictures and sqrt(24) for videos, which have 24 latent frames in its training. The odds of t
are sigma: t is logit-normal, shifted by m. The weight (1 + sigma)^2 / sigma^2 of the error in x_0 is 1 / t^2, that is
none on the error of the velocity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.families.base import SamplingDefaults, Variant
from kinema.families.cosmos import PARTS, CosmosFamily, network_spec, size_and_task
from kinema.families.cosmos_layout import PREDICT2
from kinema.families.loading import Found, Source
from kinema.families.parts import SCHEDULER, WAN_VAE

if TYPE_CHECKING:
    from torch import Tensor, nn

GIVEN_SIGMA = 0.0001
"""The noise level that the network is told of given frames (``sigma_conditional`` of its configurations)."""
LATENT_FRAMES = 24
"""Of the videos in its training (``state_t``)."""

_PICTURE = SamplingDefaults(height=768, width=1360, frames=1, fps=16.0, steps=35, guidance=7.0)
_VIDEO = SamplingDefaults(height=704, width=1280, frames=93, fps=16.0, steps=35, guidance=7.0)


def _variant(name: str, parameters: int, hub: str) -> Variant:
    video = name.startswith("video2world")
    return Variant(
        name,
        "video" if video else "image",
        parameters,
        ("network", "autoencoder", "text_encoder", "tokenizer", "scheduler"),
        f"nvidia/Cosmos-Predict2-{hub}",
        _VIDEO if video else _PICTURE,
        pipeline="Cosmos2VideoToWorldPipeline" if video else "Cosmos2TextToImagePipeline",
        conditions=("text", "first_frame") if video else ("text",),
        shift=LATENT_FRAMES**0.5 if video else 1.0,
        gated=True,
        sampling_needs="cosmos_guardrail",
    )


def _load_scheduler(source: Source) -> Any:
    """Without the settings that the pipelines themselves add to it, which its class does not know."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    added = ("sigma_max", "sigma_min", "sigma_data", "final_sigmas_type")
    return FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in source.config.items() if k not in added})


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("text2image-2b", 1_956_405_248, "2B-Text2Image"),
        _variant("text2image-14b", 14_265_265_152, "14B-Text2Image"),
        _variant("video2world-2b", 1_956_413_440, "2B-Video2World"),
        _variant("video2world-14b", 14_265_285_632, "14B-Video2World"),
    )
}
_PARTS = {
    **PARTS,
    "network": network_spec(PREDICT2),
    "autoencoder": replace(WAN_VAE, originals=("tokenizer.pth",)),
    "scheduler": replace(SCHEDULER, load=_load_scheduler),
}


class CosmosPredict2(CosmosFamily):
    """The Cosmos-Predict2 models."""

    name = "cosmos_predict2"
    variants = VARIANTS
    parts = _PARTS
    network_layout = PREDICT2
    encoding_version = "cosmos_predict2-1"

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if (traits := size_and_task(described, found)) is None:
            return None
        width, given = traits
        return f"{'video2world' if given else 'text2image'}-{'14b' if width >= 5120 else '2b'}"

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        time = t
        if self.from_image:  # one time for each frame
            time = t[:, :, :, :1, :1] if t.ndim == 5 else t.view(-1, 1, 1, 1, 1).expand(-1, 1, x_t.shape[2], 1, 1)
            given = conditioning["condition_mask"][:, :, :, :1, :1].to(time)
            time = time * (1 - given) + GIVEN_SIGMA / (1 + GIVEN_SIGMA) * given
        return self.call(network, x_t, time.float(), conditioning)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.cosmos_tiny import write_predict2

        return write_predict2(directory, cls.variants[variant], seed)
