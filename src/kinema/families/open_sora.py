"""Open-Sora 2.0 (Peng et al. 2025, arXiv 2503.09642): videos from text, and from frames or stretches that are given.

A Flux-like transformer of 11 thousand million parameters on packed 2 x 2 latents of HunyuanVideo's autoencoder
(16 channels, 4 x 8 x 8), or on those of the video DC-AE (128 channels, 4 x 32 x 32) as they are. Text is T5's embedding
of all tokens, padding included, and CLIP's pooled embedding, which modulates with the time. Frames that are given come
in further channels of every token: a mask, and the latents of the frames, encoded by themselves. The network learns all
frames, given or not, as its authors train it: when it samples, it sees noisy ones there too.

Times are shifted by the tokens of one latent frame and the root of the number of latent frames. The authors count
H W / 4 tokens in training whatever the patch, and the true number in sampling; here it is the true one in both.

Clips have 4 k + 1 frames. The DC-AE is not causal: with it they have 8, 12, 16... (or 1; 4 would come back as one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.loading import CONFIGS, Found, PartSpec, find, is_hub_id
from kinema.families.noise_path import FrameShift, NoisePath
from kinema.families.open_sora_conditions import (
    NOTHING,
    SHIPPED,
    End,
    check_weights,
    choose,
    ends,
    given_of,
    latents_of,
    possible,
)
from kinema.families.open_sora_parts import DC_AE, NETWORK, PARTS, VARIANTS, autoencoder_class, told_of_frames
from kinema.families.open_sora_request import Abilities, check_asked, cuts_of, oscillates, overlap_of
from kinema.families.standard import StandardFamily
from kinema.families.steering import Cut, Steering
from kinema.families.tensors import looks_like, tensor_shapes
from kinema.families.text import warn_if_cut
from kinema.families.wan_parts import PARTS as WAN
from kinema.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text that the published networks were trained with, padding included."""
TRAINING_GUIDANCE = 4.0
"""The scale that the authors tell networks with a guidance embedding in training."""
SIGMA_MIN = 1e-5
_DC_CHANNELS = 128


class OpenSora(StandardFamily):
    """The Open-Sora 2.0 models."""

    name = "open_sora"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("double_blocks", "single_blocks")
    encoding_version = "open-sora-1"
    options = ("cond_embed", "conditions", "guidance")
    resolution_shift = FrameShift()

    @property
    def path(self) -> NoisePath:
        return NoisePath(sigma_min=SIGMA_MIN)

    def spec(self, part: str) -> PartSpec:
        if part == "autoencoder" and not self.causal:
            return DC_AE
        own = super().spec(part)
        if part == "autoencoder" and self._autoencoder_class == "AutoencoderKLWan":
            return WAN["autoencoder"]
        if part == "network" and self.config.cond_embed is not None:
            return told_of_frames(own, self.config.cond_embed, lambda: self.variant.patch[1])
        return own

    @property
    def _autoencoder_class(self) -> str:
        """What the model's files call their autoencoder. A network that is trained from nothing may stand on either of
        the causal ones that are 4 x 8 x 8: HunyuanVideo's, as the published one, or Wan's. Of a hub's it is known when
        its files are fetched."""
        if is_hub_id(self.config.autoencoder.path or self.config.path):
            return self._fetched_class
        return self._local_class

    _fetched_class = ""

    @cached_property
    def _local_class(self) -> str:
        return autoencoder_class(find(self.config, "autoencoder", super().spec("autoencoder"), weights=False))

    def _find(self, part: str, *, weights: bool = True) -> Found | None:
        found = super()._find(part, weights=weights)
        if part == "autoencoder" and found is not None and found.hub is not None:
            self._fetched_class = autoencoder_class(found)
        return found

    def _shipped(self, variant: str, spec: PartSpec) -> Path | None:
        if spec is WAN["autoencoder"]:
            return CONFIGS / "common" / spec.shipped / spec.config_file
        return super()._shipped(variant, spec)

    def configured(self, part: str, described: Mapping[str, Any]) -> Mapping[str, Any]:
        if part == "network" and self.config.cond_embed is not None:
            return {**described, "cond_embed": self.config.cond_embed}
        return described

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if described:
            return "v2-dc" if described.get("patch_size") == 1 else "v2"
        shapes = tensor_shapes(found.files)
        if "img_in.weight" not in shapes or not any(name.startswith("single_blocks.") for name in shapes):
            raise UserError(
                f"{found.key}: {found.place} looks like {looks_like(shapes)}, not an Open-Sora network. Name "
                "model.variant, or give model.path = a directory that describes it."
            )
        channels = shapes["img_in.weight"][1]
        of_mask = shapes.get("cond_in.weight", (0, channels))[1] - channels  # one number for each latent of a token
        return "v2-dc" if of_mask == 1 or (of_mask == 0 and channels == _DC_CHANNELS) else "v2"

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    @property
    def causal(self) -> bool:
        """Whether the first latent frame stands for the first frame alone."""
        return self.variant.name != "v2-dc"

    @cached_property
    def conditions(self) -> Mapping[str, float]:
        """Weights of the conditions that training draws from."""
        if self.config.conditions is not None:
            return self.config.conditions
        return SHIPPED if self.is_told_frames else NOTHING

    @cached_property
    def is_told_frames(self) -> bool:
        """Whether the network has channels for given frames."""
        return bool(self.known_config("network").get("cond_embed", True))

    @cached_property
    def is_distilled(self) -> bool:
        """Whether the network is told its guidance scale, in one pass a step."""
        return bool(self.known_config("network").get("guidance_embed"))

    @property
    def references(self) -> tuple[End, ...]:
        """What has to be encoded by itself for the conditions that training draws from."""
        wanted = [given_of(name, self.causal) for name, weight in self.conditions.items() if weight > 0]
        return tuple(dict.fromkeys(end for given in wanted for end in ends(given, self.causal)))

    # -- parts -----------------------------------------------------------------------------------------------------

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        loaded = super().load(part, device, dtype)
        if part == "autoencoder":
            if hasattr(loaded, "use_framewise_encoding"):  # tiles in space alone, as the authors do: clips are whole
                loaded.use_framewise_encoding = loaded.use_framewise_decoding = False
            loaded.enable_tiling()
        return loaded

    def latent_statistics(self, autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.causal:
            return super().latent_statistics(autoencoder, like)
        return like.new_zeros(1), like.new_ones(1)  # the DC-AE scales by itself

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder_2", "tokenizer_2"), f"length {self.text_length}")
        pooled = Encoding("pooled", "caption", ("text_encoder", "tokenizer"))
        return (text, pooled, LATENTS, *(Encoding(end.name, "media", ("autoencoder",)) for end in self.references))

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            if encoding.name == "pooled":
                return [{"pooled": _pooled(parts, sample.caption)} for sample in samples]
            if encoding.name == "latents":
                return self.encode_latents(parts["autoencoder"], samples)
            (end,) = [end for end in self.references if end.name == encoding.name]
            return [{end.name: row} for row in self._reference(parts["autoencoder"], end, samples)]

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """T5's embeddings [text_length, C] of a caption. Padding stays: T5 and the network attend to it."""
        encoder, tokenizer = parts["text_encoder_2"], parts["tokenizer_2"]
        warn_if_cut(tokenizer, caption, self.text_length)
        return encoder(_tokens(tokenizer, caption, self.text_length).to(encoder.device))[0][0].cpu()

    def encode_latents(self, autoencoder: Any, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        if self.causal:
            return super().encode_latents(autoencoder, samples)
        return [{"latents": row} for row in self._mean(autoencoder, pixels_of(samples))]

    def _reference(self, autoencoder: Any, end: End, samples: Sequence[Sample]) -> Sequence[Tensor]:
        """Latents [C, t, h, w] of one end of each clip by itself; empty where the clip has no more frames than that."""
        pixels = pixels_of(samples)
        if pixels.shape[2] <= end.frames:
            return [pixels.new_zeros(0)] * len(samples)
        own = pixels[:, :, : end.frames] if end.side == "head" else pixels[:, :, -end.frames :]
        return list(self._mean(autoencoder, own))

    def _mean(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w]; the mean where there is a posterior, as at sampling."""
        if self.causal:
            return encode_pixels(autoencoder, pixels)[0]
        return autoencoder.encode(pixels.to(autoencoder.device, autoencoder.dtype)).float().cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        conditioning = {
            "encoder_hidden_states": torch.stack(batch.tensors["text"]),
            "pooled_projections": torch.stack(batch.tensors["pooled"]),
        }
        if self.is_told_frames:
            conditioning["cond"] = self._told(batch, latents)
        return Prepared(latents, conditioning)

    def _told(self, batch: Batch, latents: Tensor) -> Tensor:
        """Mask and masked latents [B, 1 + C, T, H, W] of what each sample is given."""
        import torch

        mask, shown = torch.zeros_like(latents[:, :1]), torch.zeros_like(latents)
        for row, name in enumerate(self.drawn_conditions(batch, latents.shape[2])):
            given = given_of(name, self.causal)
            for end, count in zip(ends(given, self.causal), filter(None, given), strict=True):
                length = latents_of(count, self.causal)
                where = slice(0, length) if end.side == "head" else slice(-length, None)
                mask[row, :, where] = 1
                shown[row, :, where] = batch.tensors[end.name][row].to(shown)
        return torch.cat([mask, shown], dim=1)

    def drawn_conditions(self, batch: Batch, latent_frames: int) -> list[str]:
        """The condition of each sample, by draws of its own."""
        import torch

        weights = possible(self.conditions, latent_frames, self.causal)
        draws = [generator(self.seed, batch.step, index, "condition") for index in batch.indices]
        return [choose(weights, float(torch.rand((), generator=draw, dtype=torch.float64))) for draw in draws]

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        from kinema.networks.open_sora import pack, positions, unpack

        dtype = next(p.dtype for name, p in network.named_parameters() if "img_in" in name)
        patch, size = self.variant.patch[1], x_t.shape[2:]
        cond = conditioning.get("cond")
        tokens = network(
            hidden_states=pack(x_t, patch).to(dtype),
            timestep=t.float(),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            pooled_projections=conditioning["pooled_projections"].to(dtype),
            img_ids=positions(size, patch, x_t.device),
            cond=None if cond is None else pack(cond, patch).to(dtype),
            guidance=self._guidance(network, t),
            return_dict=False,
        )[0]
        return unpack(tokens, size, patch)

    def _guidance(self, network: nn.Module, t: Tensor) -> Tensor | None:
        if not network.config["guidance_embed"]:  # type: ignore[index]
            return None
        guidance = TRAINING_GUIDANCE if self.config.guidance is None else self.config.guidance
        return t.new_full(t.shape, guidance).float()

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks, modulation included."""
        return (
            r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|[qkv]_proj|proj)",
            r"double_blocks\.\d+\.(img|txt)_(mlp\.[02]|mod\.lin)",
            r"single_blocks\.\d+\.([qk]_proj|v_mlp|linear[12]|modulation\.lin)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        check_weights(config.model.conditions, self.is_told_frames, self.causal)
        if config.model.guidance is not None and not self.is_distilled:
            raise ConfigError(
                "model.guidance: this network has no guidance embedding that would read it. Leave it out."
            )

    # -- other tools -----------------------------------------------------------------------------------------------

    @property
    def pipeline_class(self) -> Any:
        from kinema.families.open_sora_pipeline import OpenSoraPipeline

        return OpenSoraPipeline

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        told = {"references": list(pictures)} if pictures else {}
        return {"guidance_scale": guidance, "max_sequence_length": text_length or TEXT_LENGTH, **told}

    @property
    def has_image_guidance(self) -> bool:
        return self.is_told_frames and not self.is_distilled

    @cached_property
    def _abilities(self) -> Abilities:
        return Abilities(self.causal, self.is_told_frames, self.is_distilled)

    def check_steering(self, asked: Steering, frames: int, guidance: float, references: Sequence[int]) -> None:
        check_asked(asked, frames, guidance, references, self._abilities)

    def oscillates(self, asked: Steering, guidance: float, references: int) -> bool:
        return oscillates(asked, guidance, references, self._abilities)

    def reference_cuts(self, condition: str | None, references: int) -> tuple[Cut, ...]:
        return cuts_of(condition, references, self.causal)

    def stretch_overlap(self, frames: int, overlap: int | None) -> int:
        try:
            return overlap_of(overlap, frames, frames, self.causal)
        except UserError as error:
            raise UserError(f"--{error}") from None

    def steering_arguments(self, asked: Steering) -> dict[str, Any]:
        arguments = {
            "condition": asked.condition,
            "text_osci": asked.text_osci,
            "image_osci": asked.image_osci,
            "scale_temporal_osci": asked.temporal_osci,
            "full_steps": asked.full_steps,
        }
        return {name: value for name, value in arguments.items() if value is not None}

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.open_sora_tiny import write_tiny

        return write_tiny(directory, variant, seed)


def _tokens(tokenizer: Any, text: str, length: int) -> Tensor:
    """Ids [1, length] of a text, cut or padded to that length."""
    return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _pooled(parts: Parts, caption: str) -> Tensor:
    """CLIP's pooled embedding [C] of the caption's first 77 tokens; T5 sees the rest."""
    encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    return encoder(_tokens(tokenizer, caption, tokenizer.model_max_length).to(encoder.device)).pooler_output[0].cpu()
