"""Wan 2.1 and 2.2 (Wan Team 2025, arXiv 2503.20314): videos from text, from a first frame, from a first and a last one.

A transformer on the latents of a causal video autoencoder (16 channels, 4 x 8 x 8; 48 channels, 4 x 16 x 16 in the 5B
model), told the text by cross-attention to UMT5-XXL. A given frame comes in one of three ways:

- 2.1: its CLIP embedding in cross-attention, and its latents, with a mask, in 20 channels beside x_t;
- 2.2 A14B: the 20 channels alone; the noise levels are shared by two networks (experts);
- 2.2 5B: in place of the first frame of x_t, with time 0 for its tokens.

Inputs equal those of diffusers' WanPipeline and WanImageToVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.loading import Found
from kinema.families.standard import StandardFamily
from kinema.families.wan_detect import choose, read_traits
from kinema.families.wan_encode import encode_ends, encode_image, encode_text, ends_mask, initialise_network
from kinema.families.wan_names import NETWORK
from kinema.families.wan_parts import BOUNDARY, PARTS, TIME_PER_TOKEN, VARIANTS
from kinema.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text that the published networks were trained with, padding included."""
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""


class Wan(StandardFamily):
    """The Wan models."""

    name = "wan"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("blocks",)
    encoding_version = "wan-1"
    options = ("first_frame_p",)

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        experts = self._find("network_2", weights=False) is not None
        scheduler = self._find("scheduler", weights=False)
        return choose(read_traits(described, found), described, found, scheduler, experts)

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    @property
    def to_last(self) -> bool:
        """Whether the video's last frame is given too."""
        return "last_frame" in self.variant.conditions

    @property
    def reads_clip(self) -> bool:
        """Whether the network reads CLIP's embeddings of the given frames."""
        return "image_encoder" in self.variant.parts

    @property
    def time_per_token(self) -> bool:
        """Whether the network is told a time for every token, which is how it is given a frame."""
        return self.variant.name in TIME_PER_TOKEN

    @property
    def first_frame_p(self) -> float:
        """Share of the clips whose first frame is given."""
        p = self.config.first_frame_p
        return float(self.from_image) if p is None else p

    # -- experts ---------------------------------------------------------------------------------------------------

    def time_range(self, part: str) -> tuple[float, float]:
        low, high = super().time_range(part)
        boundary = BOUNDARY.get(self.variant.name)
        if boundary is None:
            return low, high
        return (boundary, high) if part == "network" else (low, boundary)

    def expert(self, part: str) -> str:
        if self.variant.name not in BOUNDARY:
            return ""
        return "high" if part == "network" else "low"

    def needed_parts(self, config: Config) -> tuple[str, ...]:
        """An expert that neither trains nor samples may be left out."""
        parts = super().needed_parts(config)
        if config.preview.prompts:
            return parts
        return tuple(part for part in parts if not part.startswith("network") or part in self.trained_parts())

    def pipeline_modules(self, parts: Parts) -> dict[str, Any]:
        settings = {"boundary_ratio": BOUNDARY.get(self.variant.name), "expand_timesteps": self.time_per_token}
        return super().pipeline_modules(parts) | settings

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        media = [LATENTS]
        given = "first and last" if self.to_last else ""
        if self.first_frame_p > 0:
            settings = "alone" if self.time_per_token else given
            media.append(Encoding("first_frame", "media", ("autoencoder",), settings))
        if self.reads_clip:
            media.append(Encoding("image", "media", ("image_encoder", "image_processor"), given))
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
        return (text, *media)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "latents":
                return self.encode_latents(parts["autoencoder"], samples)
            if encoding.name == "text":
                captions = [sample.caption for sample in samples]
                rows = encode_text(parts["text_encoder"], parts["tokenizer"], captions, self.text_length)
            elif encoding.name == "image":
                frames = (0, -1) if self.to_last else (0,)
                rows = encode_image(parts["image_encoder"], parts["image_processor"], samples, frames)
            elif self.time_per_token:  # the autoencoder is causal: the first latent sees the first frame alone
                rows = list(encode_pixels(parts["autoencoder"], pixels_of(samples)[:, :, :1])[0])
            else:
                rows = encode_ends(parts["autoencoder"], samples, last=self.to_last)
            return [{encoding.name: row} for row in rows]

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        text = batch.tensors["text"]
        padded = text[0].new_zeros(len(text), self.text_length, text[0].shape[-1])  # attended to, as at sampling
        for row, tokens in zip(padded, text, strict=True):
            row[: len(tokens)] = tokens
        conditioning: dict[str, Any] = {"encoder_hidden_states": padded}
        if self.reads_clip:
            images = torch.stack(batch.tensors["image"])  # both ends as two rows of the batch, as in the pipeline
            conditioning["encoder_hidden_states_image"] = images.flatten(0, 1) if self.to_last else images
        if self.first_frame_p == 0:
            return Prepared(latents, conditioning)
        first = torch.stack(batch.tensors["first_frame"])
        if self.time_per_token:
            return self._with_first_frames(batch, latents, first, conditioning)
        conditioning["channels"] = torch.cat([ends_mask(first, last=self.to_last), first], dim=1)
        return Prepared(latents, conditioning)

    def _with_first_frames(
        self, batch: Batch, latents: Tensor, first: Tensor, conditioning: dict[str, Any]
    ) -> Prepared:
        import torch

        given = torch.zeros_like(latents[:, :1])
        if latents.shape[2] > 1:  # a picture is learnt
            for row, index in enumerate(batch.indices):
                draw = torch.rand((), generator=generator(self.seed, batch.step, index, "first_frame"))
                given[row, :, 0] = float(draw < self.first_frame_p)
        beginning = torch.cat([first, latents[:, :, 1:]], dim=2)
        return Prepared(torch.where(given.bool(), beginning, latents), conditioning, given)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        inputs = dict(conditioning)
        if (channels := inputs.pop("channels", None)) is not None:
            x_t = torch.cat([x_t, channels.to(x_t.dtype)], dim=1)
        if t.ndim == 5:  # one time for each token
            frames, rows, columns = self.variant.patch
            t = t[:, 0, ::frames, ::rows, ::columns].flatten(1)
        elif self.time_per_token:
            t = t[:, None].expand(-1, self.tokens(x_t))
        dtype = next(p.dtype for name, p in network.named_parameters() if "patch_embedding" in name)
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in inputs.items()},
            return_dict=False,
        )[0]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
            r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.reads_clip and self.text_length != TEXT_LENGTH:
            raise ConfigError(
                f"model.text_length: {self.variant.name} tells text from image by position, so it must be "
                f"{TEXT_LENGTH}, not {self.text_length}. Leave the key out."
            )
        self._check_first_frames(config)

    def _check_first_frames(self, config: Config) -> None:
        p = config.model.first_frame_p
        if p is not None and (not self.time_per_token or (self.from_image and p == 0)):
            told = "always" if self.from_image else "never"
            raise ConfigError(f"model.first_frame_p: {self.variant.name} is {told} given a frame. Leave the key out.")

    def initialise(self, network: nn.Module) -> None:
        initialise_network(network)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.wan_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant], seed)
