"""HunyuanVideo (Kong et al. 2024, arXiv 2412.03603): text-to-video, and image-to-video in its two versions.

A transformer of double-stream and single-stream blocks on 16-channel latents of a causal video autoencoder
(4 x 8 x 8). It is told the text by LLaVA-Llama-3 in a template, refined by two blocks of its own, and by CLIP-L, and
the guidance scale that it was distilled at. Image-to-video shows LLaVA the first frame; its latents take the place of
the first of x_t, at time 0 ("token replace"), or lie in 17 channels beside x_t (the first version, "latent concat").
Inputs equal those of diffusers' HunyuanVideoPipeline and HunyuanVideoImageToVideoPipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared
from kinema.families.hunyuan_video_parts import LLAVA, NETWORK, PARTS, VARIANTS
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.loading import Found, PartSpec
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 256
"""Tokens of text, without the template, that the published networks were trained with."""
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
GUIDANCE_SCALE = 1000.0
"""And guidance in thousands."""
CHANNELS = 16
DROPPED_FRAMES = 4
PICTURE_TOKENS = 576
"""Tokens that LLaVA makes of a picture. The network sees every second or every fourth."""
ASSISTANT_TOKENS = 4
"""The pipeline cuts these out of the text of image-to-video: the header of the answer."""


class HunyuanVideo(StandardFamily):
    """The HunyuanVideo models of 13 billion parameters."""

    name = "hunyuan_video"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("context_embedder.token_refiner.refiner_blocks", "transformer_blocks", "single_transformer_blocks")
    encoding_version = "hunyuan-video-1"
    encoded_text = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    options = ("guidance",)

    def spec(self, part: str) -> PartSpec:
        if part == "text_encoder" and self.from_image:
            return LLAVA
        return super().spec(part)

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if described:
            kind = described.get("image_condition_type")
            return {None: "t2v", "token_replace": "i2v", "latent_concat": "i2v-33ch"}.get(kind)
        shapes = tensor_shapes(found.files)
        first = next((shape for name, shape in shapes.items() if name.endswith("img_in.proj.weight")), None)
        if first is not None and first[1] > CHANNELS:
            return "i2v-33ch"
        # The other two have the same shapes; published files say in their names which one they are.
        path = f"{found.place.parent}/{found.place.name}".lower()
        return "i2v" if "i2v" in path or "image_to_video" in path else "t2v"

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees, besides those of the picture."""
        return self.config.text_length or TEXT_LENGTH

    @property
    def _token_replace(self) -> bool:
        return self.variant.name == "i2v"

    @property
    def _every(self) -> int:
        """The network sees every so many-th of the picture's tokens: the pipeline's default for its kind."""
        return 4 if self._token_replace else 2

    def encodings(self) -> tuple[Encoding, ...]:
        length = f"length {self.text_length}"
        pooled = Encoding("pooled", "caption", ("text_encoder_2", "tokenizer_2"))
        if not self.from_image:
            return Encoding("text", "caption", ("text_encoder", "tokenizer"), length), pooled, LATENTS
        parts = ("text_encoder", "tokenizer", "image_processor")
        text = Encoding("text", "both", parts, f"{length}, every {self._every}")
        return text, pooled, LATENTS, Encoding("first_frame", "media", ("autoencoder",))

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._encode_text(parts, sample)} for sample in samples]
            if encoding.name == "pooled":
                pipeline, device = self.text_pipeline(parts), parts["text_encoder_2"].device
                rows = [pipeline._get_clip_prompt_embeds(sample.caption, device=device) for sample in samples]
                return [{"pooled": row[0].cpu()} for row in rows]
            if encoding.name == "first_frame":
                mean, _ = encode_pixels(parts["autoencoder"], pixels_of(samples)[:, :, :1])
                return [{"first_frame": row} for row in mean]
            return self.encode_latents(parts["autoencoder"], samples)

    def _encode_text(self, parts: Parts, sample: Sample) -> Tensor:
        """[tokens, C]: every so many-th token of the first frame, and the caption's."""
        import importlib

        pipeline = self.text_pipeline(parts)
        template = importlib.import_module(type(pipeline).__module__).DEFAULT_PROMPT_TEMPLATE
        text = template["template"].format(sample.caption)
        warn_if_cut(parts["tokenizer"], sample.caption, self.text_length + template["crop_start"], text)
        settings = {"max_sequence_length": self.text_length, "device": parts["text_encoder"].device}
        if self.from_image:
            settings |= {"image": _first_picture(sample), "image_embed_interleave": self._every}
        rows, mask = pipeline._get_llama_prompt_embeds(prompt=sample.caption, prompt_template=template, **settings)
        return rows[0, mask[0].bool()].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        length = self.text_length
        if self.from_image:
            length += -(-PICTURE_TOKENS // self._every) - ASSISTANT_TOKENS
        text, mask = padded(batch.tensors["text"], length)
        conditioning = {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "pooled_projections": torch.stack(batch.tensors["pooled"]),
        }
        if not self.from_image:
            return Prepared(latents, conditioning)
        first = torch.stack(batch.tensors["first_frame"])
        told = latents.new_zeros(len(latents), 1, *latents.shape[2:])
        told[:, :, 0] = 1
        if self._token_replace:
            # What is given is the mean of the posterior, as at sampling.
            return Prepared(torch.cat([first, latents[:, :, 1:]], dim=2), conditioning, told)
        conditioning["channels"] = torch.cat([first * told, told], dim=1)
        return Prepared(latents, conditioning)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        inputs = dict(conditioning)
        if (channels := inputs.pop("channels", None)) is not None:
            x_t = torch.cat([x_t, channels.to(x_t.dtype)], dim=1)
        if t.ndim == 5:  # the network itself sees the first frame at time 0
            t = t.flatten(1).amax(1)
        dtype = network.get_parameter("x_embedder.proj.weight").dtype
        guidance = None
        if network.config.guidance_embeds:  # type: ignore[union-attr]
            told = 1.0 if self.config.guidance is None else self.config.guidance
            guidance = torch.full((len(x_t),), told, dtype=dtype, device=x_t.device) * GUIDANCE_SCALE
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in inputs.items()},
            guidance=guidance,
            return_dict=False,
        )[0]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks of both kinds."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
            r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if config.model.guidance is not None and self.variant.name == "i2v-33ch":
            raise ConfigError("model.guidance: i2v-33ch has no guidance embedding; leave the key out.")

    # -- sampling --------------------------------------------------------------------------------------------------

    @property
    def batched_sampling(self) -> bool:  # type: ignore[override]
        """With a picture the pipeline takes one prompt."""
        return not self.from_image

    def pipeline(self, parts: Parts) -> Any:
        kind = self.pipeline_class
        if self.variant.name == "i2v-33ch":
            kind = _with_dropped_frames(kind)
        return kind(**self.pipeline_modules(parts))

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.hunyuan_video_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant], seed)


def _first_picture(sample: Sample) -> Any:
    from PIL import Image

    assert sample.pixels is not None
    return Image.fromarray(sample.pixels[:, 0].permute(1, 2, 0).cpu().numpy())


def _with_dropped_frames(kind: Any) -> Any:
    """The pipeline of the first image-to-video model, which drops the first four frames that it makes: its call makes
    four more than it is asked for."""

    class WithDroppedFrames(kind):  # type: ignore[misc]
        @functools.wraps(kind.__call__)
        def __call__(self, *arguments: Any, num_frames: int, **others: Any) -> Any:
            return super().__call__(*arguments, num_frames=num_frames + DROPPED_FRAMES, **others)

    return WithDroppedFrames
