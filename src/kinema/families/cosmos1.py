"""Cosmos 1 (NVIDIA 2025, arXiv 2501.03575): videos from text, or from text and a first frame.

A transformer on the latents of NVIDIA's own causal autoencoder (16 channels, 8 x 8 x 8), told the text by
cross-attention to the first T5-11B. It is an EDM model (Karras et al. 2022, arXiv 2206.00364, table 1): the noisy data
is x = x_0 + sigma eps with data of deviation sd = 0.5, and around the network F

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise),   c_skip = sd^2 / (sigma^2 + sd^2),
    c_out = sigma sd / sqrt(sigma^2 + sd^2),   c_in = 1 / sqrt(sigma^2 + sd^2),   c_noise = ln(sigma) / 4.

With sigma = t / (1 - t) and x = x_t / (1 - t), these are, for n = sqrt(t^2 + sd^2 (1 - t)^2),

    c_in x = x_t / n,   c_skip x = sd^2 (1 - t) x_t / n^2,   c_out = sd t / n,

which stay finite at both ends. Given frames (t = 0) so enter as x_0 / sd: as in diffusers' pipeline, but for the
noise of 0.001 that it adds to them. Inputs equal those of CosmosTextToWorldPipeline and CosmosVideoToWorldPipeline.

Time in training: sigma = m exp(z) with z normal (``EDMSDE`` and ``DiffusionModel.draw_training_sigma_and_epsilon`` of
cosmos-predict1), m = sqrt(16) for videos of 16 latent frames (section 5.1 of the paper). The odds of t are sigma: t
is logit-normal, shifted by m. The weight is EDM's, (sigma^2 + sd^2) / (sigma sd)^2 on the error in x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Sample
from kinema.data.lengths import ClipLengths
from kinema.errors import ConfigError
from kinema.families.base import SamplingDefaults, Variant
from kinema.families.cosmos import PARTS, CosmosFamily, network_spec, size_and_task
from kinema.families.cosmos_layout import COSMOS1, autoencoder_from_original
from kinema.families.latents import pixels_of
from kinema.families.loading import Found, PartSpec
from kinema.families.noise_path import NoisePath

if TYPE_CHECKING:
    from torch import Tensor, nn

SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX = 0.0002, 1000.0
"""The range of noise levels: from the least of ``EDMSDE``, and what is left out above is one in 10^7 of those drawn in
training. Samplers visit 0.002 to 80."""
LATENT_FRAMES = 16
"""Of its videos in training; the statistics of its latents are known for as many."""

_VIDEO = SamplingDefaults(height=704, width=1280, frames=121, fps=30.0, steps=36, guidance=7.0)


def _variant(name: str, parameters: int, hub: str) -> Variant:
    from_image = name.startswith("video2world")
    return Variant(
        name,
        "video",
        parameters,
        ("network", "autoencoder", "text_encoder", "tokenizer", "scheduler"),
        f"nvidia/Cosmos-1.0-Diffusion-{hub}",
        _VIDEO,
        pipeline="CosmosVideoToWorldPipeline" if from_image else "CosmosTextToWorldPipeline",
        conditions=("text", "first_frame") if from_image else ("text",),
        lengths=ClipLengths(8),
        shift=LATENT_FRAMES**0.5,
        gated=True,
        sampling_needs="cosmos_guardrail",
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("text2world-7b", 7_236_192_256, "7B-Text2World"),
        _variant("text2world-14b", 14_267_149_312, "14B-Text2World"),
        _variant("video2world-7b", 7_236_208_640, "7B-Video2World"),
        _variant("video2world-14b", 14_267_169_792, "14B-Video2World"),
    )
}
_PARTS = {
    "network": network_spec(COSMOS1),
    "autoencoder": PartSpec(
        "autoencoder (Cosmos)",
        "vae",
        "diffusers:AutoencoderKLCosmos",
        ("cosmos_cv8x8x8_1.0.safetensors",),
        to_ours=autoencoder_from_original,
        inside=("vae.",),
    ),
    **PARTS,
}


class Cosmos1(CosmosFamily):
    """The Cosmos 1 diffusion models."""

    name = "cosmos1"
    variants = VARIANTS
    parts = _PARTS
    network_layout = COSMOS1
    encoding_version = "cosmos1-1"
    default_time = "native"
    default_weighting = "edm"

    @property
    def path(self) -> NoisePath:
        return NoisePath("x0", SIGMA_MIN / (1 + SIGMA_MIN), SIGMA_MAX / (1 + SIGMA_MAX))

    def native_time(self, u: Tensor) -> Tensor:
        """sigma = exp(z), z standard normal: t = sigma / (1 + sigma) = expit(z)."""
        import torch

        t = torch.special.expit(torch.special.ndtri(u.double()))
        return t.clamp(self.path.t_min, self.path.t_max)

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if (traits := size_and_task(described, found)) is None:
            return None
        width, given = traits
        return f"{'video2world' if given else 'text2world'}-{'14b' if width >= 5120 else '7b'}"

    def validate(self, config: Config) -> None:
        super().validate(config)
        longest = self.lengths.stride * (LATENT_FRAMES - 1) + 1
        asked = max(length for buckets in config.bucket_settings for length in buckets.lengths)
        lengths = {"data.buckets.frames": asked, "preview.frames": config.preview.frames or 1}
        for key, frames in lengths.items():
            if frames > longest:
                raise ConfigError(
                    f"{key}: {self.variant.name} takes clips of up to {longest} frames, as long as the statistics of "
                    f"its latents are known, not {frames}."
                )

    # -- latents ---------------------------------------------------------------------------------------------------

    def latent_statistics(self, autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation are known for each channel and latent frame; the deviation of latents is to be 0.5."""
        config = autoencoder.config
        shape = (1, config.latent_channels, -1, 1, 1)
        frames = like.shape[2]
        offset, scale = (like.new_tensor(values).view(shape) for values in (config.latents_mean, config.latents_std))
        return offset[:, :, :frames], scale[:, :, :frames] / SIGMA_DATA

    def encode_latents(self, autoencoder: Any, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """The autoencoder has no posterior: one point for each clip."""
        pixels = pixels_of(samples).to(autoencoder.device, autoencoder.dtype)
        raw = autoencoder.encode(pixels).latent_dist.mode().float().cpu()
        offset, scale = self.latent_statistics(autoencoder, raw)
        return [{"latents": row} for row in (raw - offset) / scale]

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        at = t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t
        whole = t if t.ndim == 1 else t.flatten(1).amax(1)  # the network is told one time; given frames are at 0
        if (given := conditioning.get("condition_mask")) is not None and t.ndim == 1:
            at = at * (1 - given.to(at))
        x_t = x_t.float()
        at = at.float()
        n = (at.square() + (SIGMA_DATA * (1 - at)).square()).sqrt()
        log_sigma = (whole.double() / (1 - whole.double())).log().float()
        output = self.call(network, x_t / n, log_sigma / 4, conditioning)
        return SIGMA_DATA**2 * (1 - at) / n.square() * x_t + SIGMA_DATA * at / n * output.float()

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.cosmos_tiny import write_cosmos1

        return write_cosmos1(directory, cls.variants[variant], seed)
