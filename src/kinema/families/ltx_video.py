"""LTX-Video (HaCohen et al. 2024, arXiv 2501.00103): text-to-video and image-to-video by one network.

A transformer on 128-channel latents of an autoencoder that compresses 8 frames and 32 x 32 pixels to one, told the
text by cross-attention to T5-XXL. Positions are in seconds and pixels. Time is given for each token, so that a given
first frame is simply clean. Inputs equal those of diffusers' LTXPipeline, LTXImageToVideoPipeline and, from version
0.9.5 on, LTXConditionPipeline.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared
from kinema.families.latents import LATENTS
from kinema.families.loading import Found, read_json
from kinema.families.ltx_video_parts import NETWORK, OF_091, OF_095, PARTS, VARIANTS
from kinema.families.noise_path import ResolutionShift
from kinema.families.standard import StandardFamily
from kinema.families.steering import ABOVE_ONE
from kinema.families.tensors import is_inside, tensor_shapes
from kinema.families.text import padded, warn_if_cut
from kinema.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
FRAMES_PER_LATENT = 8
PIXELS_PER_LATENT = 32


class LTXVideo(StandardFamily):
    """The LTX-Video models up to 0.9.7."""

    name = "ltx_video"
    low_guidance = ABOVE_ONE
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("transformer_blocks",)
    encoding_version = "ltx-video-1"
    encoded_text = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    options = ("first_frame_p",)
    resolution_shift = ResolutionShift(1024, 0.95, 4096, 2.05)
    """Of the authors' trainer (its shifted logit-normal law) and of their schedule for sampling."""

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if described:
            width = described["num_attention_heads"] * described["attention_head_dim"]
        else:
            width = tensor_shapes(found.files).get("patchify_proj.weight", (0,))[0]
        version = "13b-0.9.7" if width >= 4096 else self._version(found)
        kind = "i2v" if fitting and all(name.startswith("i2v") for name in fitting) else "t2v"
        return f"{kind}-{version}" if version else None

    def _version(self, found: Found) -> str | None:
        """Which of the small models, by its autoencoder; None if there is none beside the network."""
        if found.place.is_file():
            if not is_inside(found.place, ("vae.",)):
                return None
            if is_inside(found.place, (f"vae.{OF_095}",)):
                return "2b-0.9.5"
            return "2b-0.9.1" if is_inside(found.place, (f"vae.{OF_091}",)) else "2b-0.9"
        place = self._config_file("autoencoder", self._find("autoencoder", weights=False))
        if place is None:
            return None
        described = read_json(place)
        if "LTXVideo095DownBlock3D" in described.get("down_block_types", ()):
            return "2b-0.9.5"
        return "2b-0.9.1" if described.get("timestep_conditioning") else "2b-0.9"

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees: those of the variant's pipeline."""
        return self.config.text_length or (256 if self._positions_are_given else 128)

    @property
    def _positions_are_given(self) -> bool:
        """From 0.9.5 on the pipeline computes positions: the first latent stands for one frame, not for eight."""
        return self.variant.pipeline == "LTXConditionPipeline"

    @property
    def first_frame_p(self) -> float:
        """Share of the clips whose first frame is given."""
        p = self.config.first_frame_p
        return p if p is not None else float(self.from_image)

    def encodings(self) -> tuple[Encoding, ...]:
        return Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}"), LATENTS

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._encode_text(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _encode_text(self, parts: Parts, caption: str) -> Tensor:
        """[tokens, C]: padding is seen by the encoder, but hidden from the network."""
        warn_if_cut(parts["tokenizer"], caption, self.text_length)
        rows, mask = self.text_pipeline(parts)._get_t5_prompt_embeds(
            caption, max_sequence_length=self.text_length, device=parts["text_encoder"].device
        )
        return rows[0, mask[0]].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        text, mask = padded(batch.tensors["text"], self.text_length)
        conditioning = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        if self.first_frame_p == 0 or latents.shape[2] == 1:
            return Prepared(latents, conditioning)
        given = latents.new_zeros(len(latents), 1, *latents.shape[2:])
        for row, index in enumerate(batch.indices):
            draw = torch.rand((), generator=generator(self.seed, batch.step, index, "first_frame"))
            given[row, :, 0] = float(draw < self.first_frame_p)
        return Prepared(latents, conditioning, given)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = network.get_parameter("proj_in.weight").dtype
        sizes = x_t.shape[2:]
        if t.ndim == 5:  # one time for each token
            time = t[:, 0].flatten(1).expand(-1, sizes.numel())
        else:
            time = t[:, None] if self._positions_are_given else t
        prediction = network(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            timestep=time.float() * TIME_SCALE,
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            **self._positions(x_t),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, sizes)

    def _positions(self, x_t: Tensor) -> dict[str, Any]:
        """Where latents [B, C, T, H, W] lie, in seconds and pixels, as the variant's pipeline says it."""
        import torch

        frames, rows, columns = x_t.shape[2:]
        fps = self.variant.sampling.fps
        if not self._positions_are_given:
            scale = (FRAMES_PER_LATENT / fps, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
            return {
                "num_frames": frames,
                "height": rows,
                "width": columns,
                "rope_interpolation_scale": scale,
            }
        seconds = (torch.arange(frames, device=x_t.device) * FRAMES_PER_LATENT + 1 - FRAMES_PER_LATENT).clamp(min=0)
        y, x = (torch.arange(size, device=x_t.device) * PIXELS_PER_LATENT for size in (rows, columns))
        grid = torch.meshgrid(seconds.float() * (1.0 / fps), y.float(), x.float(), indexing="ij")
        coordinates = torch.stack(grid).flatten(1)[None]
        return {"video_coords": coordinates.expand(len(x_t), -1, -1)}

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
            r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        p = config.model.first_frame_p
        if self.from_image and p == 0:
            raise ConfigError(
                f"model.first_frame_p: {self.variant.name} makes videos from their first frame, and 0 never gives it. "
                f"Leave the key out, or take the variant {self.variant.name.replace('i2v', 't2v')}."
            )
        told = self.variant.sampling.fps
        for buckets in config.bucket_settings:
            if max(buckets.lengths) == 1 or buckets.fps == told:
                continue
            speed = "at their own rates" if buckets.fps is None else f"at {buckets.fps:g} frames a second"
            log.warning(
                "data.buckets.fps: clips are taken %s, and the network is told %g: set it to %g, or motion will be "
                "learnt at another speed.",
                speed,
                told,
                told,
            )

    # -- sampling --------------------------------------------------------------------------------------------------

    @property
    def batched_sampling(self) -> bool:  # type: ignore[override]
        """With a picture the pipelines take one prompt."""
        return not self.from_image

    def pipeline(self, parts: Parts) -> Any:
        kind = self.pipeline_class
        if self.variant.pipeline == "LTXImageToVideoPipeline":
            kind = _one_generator(kind)
        return kind(**self.pipeline_modules(parts))

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        """From 0.9.1 on the autoencoder takes the last steps of denoising; how is its authors' advice."""
        arguments = super().sampling_arguments(guidance, pictures, text_length)
        if not self.variant.name.endswith("-0.9"):
            arguments |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
        if self._positions_are_given and pictures:
            arguments["image_cond_noise_scale"] = 0.025
        return arguments

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.ltx_video_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant], seed)


def _one_generator(kind: Any) -> Any:
    """The pipeline, but its call takes a list of one generator for that generator: where its autoencoder is told the
    time, the original draws noise in a way that knows no lists."""

    class OneGenerator(kind):  # type: ignore[misc]
        @functools.wraps(kind.__call__)
        def __call__(self, *arguments: Any, generator: Any = None, **others: Any) -> Any:
            if isinstance(generator, list) and len(generator) == 1:
                (generator,) = generator
            return super().__call__(*arguments, generator=generator, **others)

    return OneGenerator
