"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): text-to-image.

A transformer with one stream of pictures and one of text on 16-channel latents. Text is CLIP-L beside CLIP-G, with
zeros up to the width of T5-XXL, then T5; the pooled outputs of both CLIPs join the time. Inputs equal those of
diffusers' StableDiffusion3Pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec
from kinema.families.parts import (
    CLIP_G,
    CLIP_G_TOKENIZER,
    CLIP_L_PROJECTED,
    CLIP_L_TOKENIZER,
    FLUX_VAE,
    SCHEDULER,
    T5_TOKENIZER,
    T5_XXL,
)
from kinema.families.positions import check_sides
from kinema.families.sd3_layout import network_from_original, network_layout
from kinema.families.standard import StandardFamily
from kinema.families.steering import ABOVE_ONE
from kinema.families.tensors import tensor_shapes
from kinema.families.text import quietly, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

T5_LENGTH = 256
"""Tokens of T5 that the pipeline hands over by default; the pipeline takes up to 512."""
MOST_TEXT = 512
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
PIXELS_A_TOKEN = 16

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:SD3Transformer2DModel",
        ("sd3*.safetensors",),
        to_ours=network_from_original,
    ),
    "autoencoder": replace(
        FLUX_VAE,
        what="autoencoder (SD3)",
        originals=("sd3*.safetensors",),
        shipped="",
        hub="stabilityai/stable-diffusion-3.5-medium",
    ),
    "text_encoder": replace(CLIP_L_PROJECTED, originals=("text_encoders/clip_l.safetensors",)),
    "text_encoder_2": replace(CLIP_G, originals=("text_encoders/clip_g.safetensors",)),
    "text_encoder_3": replace(T5_XXL, folder="text_encoder_3", originals=("text_encoders/t5xxl*.safetensors",)),
    "tokenizer": CLIP_L_TOKENIZER,
    "tokenizer_2": CLIP_G_TOKENIZER,
    "tokenizer_3": replace(T5_TOKENIZER, folder="tokenizer_3", beside="text_encoder_3"),
    "scheduler": SCHEDULER,
}


def _variant(name: str, parameters: int, hub: str, steps: int, guidance: float) -> Variant:
    return Variant(
        name,
        "image",
        parameters,
        tuple(PARTS),
        f"stabilityai/stable-diffusion-{hub}",
        SamplingDefaults(height=1024, width=1024, frames=1, steps=steps, guidance=guidance),
        pipeline="StableDiffusion3Pipeline",
        shift=3.0,  # of the paper for 1024 x 1024 pixels, and of the published schedule
        gated=True,
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("sd3-medium", 2_028_328_000, "3-medium-diffusers", steps=28, guidance=7.0),
        _variant("sd3.5-medium", 2_243_171_520, "3.5-medium", steps=40, guidance=4.5),
        _variant("sd3.5-large", 8_056_627_520, "3.5-large", steps=28, guidance=3.5),
    )
}


class SD3(StandardFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large."""

    name = "sd3"
    low_guidance = ABOVE_ONE
    variants = VARIANTS
    parts = PARTS
    block_lists = ("transformer_blocks",)
    encoding_version = "sd3-1"
    encoded_text = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def layout(self, part: str = "network") -> Layout:
        return network_layout(self._blocks) if part == "network" else super().layout(part)

    @cached_property
    def _blocks(self) -> int:
        return int(self.source("network").config["num_layers"])

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        """By structure: 3.5 medium has a second attention, both 3.5 have norms in it."""
        if described:
            dual, normed = bool(described.get("dual_attention_layers")), described.get("qk_norm") is not None
        else:
            names = tensor_shapes(found.files)
            if not any(name.startswith("joint_blocks.") for name in names):
                return None
            dual, normed = (any(part in name for name in names) for part in (".attn2.", ".ln_q."))
        return "sd3.5-medium" if dual else "sd3.5-large" if normed else "sd3-medium"

    @property
    def text_length(self) -> int:
        """Tokens of T5 that the network sees; those of CLIP are 77."""
        return self.config.text_length or T5_LENGTH

    def encodings(self) -> tuple[Encoding, ...]:
        return (
            Encoding("clip_l", "caption", ("text_encoder", "tokenizer")),
            Encoding("clip_g", "caption", ("text_encoder_2", "tokenizer_2")),
            Encoding("t5", "caption", ("text_encoder_3", "tokenizer_3"), f"length {self.text_length}"),
            LATENTS,
        )

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad(), quietly():
            if encoding.name == "latents":
                return self.encode_latents(parts["autoencoder"], samples)
            if encoding.name == "t5":
                return [self._encode_t5(parts, sample.caption) for sample in samples]
            return [self._encode_clip(encoding, parts, sample.caption) for sample in samples]

    def _encode_clip(self, encoding: Encoding, parts: Parts, caption: str) -> dict[str, Tensor]:
        """The last hidden states but one of one CLIP [77, C], and what it pools [C']."""
        encoder, tokenizer = (parts[part] for part in encoding.parts)
        # The pipeline reads both alike, but the type of its result from the first: so either is its first here.
        pipeline = self.text_pipeline({"text_encoder": encoder, "tokenizer": tokenizer})
        hidden, pooled = pipeline._get_clip_prompt_embeds(caption, device=encoder.device)
        return {encoding.name: hidden[0].cpu(), encoding.name.replace("clip", "pooled"): pooled[0].cpu()}

    def _encode_t5(self, parts: Parts, caption: str) -> dict[str, Tensor]:
        """[length, C] with its padding: T5 and the network see it as they do text."""
        warn_if_cut(parts["tokenizer_3"], caption, self.text_length)
        encoder = parts["text_encoder_3"]
        embeddings = self.text_pipeline(parts)._get_t5_prompt_embeds(
            caption, max_sequence_length=self.text_length, device=encoder.device, dtype=encoder.dtype
        )
        return {"t5": embeddings[0].cpu()}

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        def stacked(*names: str) -> Tensor:
            """Side by side."""
            return torch.cat([torch.stack(batch.tensors[name]) for name in names], dim=-1)

        clip, t5, pooled = stacked("clip_l", "clip_g"), stacked("t5"), stacked("pooled_l", "pooled_g")
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        conditioning = {"encoder_hidden_states": torch.cat([clip, t5], dim=1), "pooled_projections": pooled}
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(p.dtype for name, p in network.named_parameters() if "pos_embed" in name)
        output = network(
            hidden_states=x_t[:, :, 0].to(dtype),
            timestep=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in conditioning.items()},
            return_dict=False,
        )[0]
        return output[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of attention and feed-forward in both streams."""
        return (
            r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)",
            r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.text_length > MOST_TEXT:
            raise ConfigError(
                f"model.text_length: {self.variant.name} takes at most {MOST_TEXT} tokens of T5, not "
                f"{self.text_length}. Give fewer, or leave the key out for {T5_LENGTH}."
            )
        check_sides(config, self.variant, int(self.known_config("network")["pos_embed_max_size"]) * PIXELS_A_TOKEN)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.sd3_tiny import write_tiny

        return write_tiny(directory, variant, seed)
