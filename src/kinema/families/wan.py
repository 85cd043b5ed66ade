"""Wan 2.1 (Wan Team 2025, arXiv 2503.20314): text-to-video and image-to-video.

A transformer on 16-channel latents of a causal video autoencoder (4 x 8 x 8), told the text by cross-attention to
UMT5-XXL. Image-to-video sees the first frame twice: its CLIP embedding in cross-attention, and its latents, with
a mask, in 20 channels beside x_t. Inputs equal those of diffusers' WanPipeline and WanImageToVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared
from kinema.families.loading import Found, read_json
from kinema.families.standard import LATENTS, StandardFamily, encode_pixels, pixels_of
from kinema.families.tensors import looks_like, tensor_shapes
from kinema.families.wan_encode import encode_image, encode_text, initialise_network
from kinema.families.wan_names import NETWORK
from kinema.families.wan_parts import PARTS, VARIANTS

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text that the published networks were trained with, padding included."""
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
MASK_CHANNELS = 4
"""The mask of image-to-video has one channel for each frame of a latent: 1 where the frame is given."""


class Wan(StandardFamily):
    """The Wan 2.1 models."""

    name = "wan"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    encoding_version = "wan-1"

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if "num_attention_heads" in described:  # the original layout's file calls it num_heads
            width = described["num_attention_heads"] * described["attention_head_dim"]
            from_image = described.get("image_dim") is not None
        else:
            shapes = tensor_shapes(found.files)
            width = shapes.get("patch_embedding.weight", (0,))[0]
            from_image = "img_emb.proj.1.weight" in shapes
            if width not in (1536, 5120):
                raise UserError(
                    f"{found.key}: {found.place} looks like {looks_like(shapes)}, not a Wan 2.1 network of a published "
                    "size. Name model.variant, or give model.path = a diffusers directory that describes it."
                )
        if not from_image:
            return "t2v-14b" if width >= 5120 else "t2v-1.3b"
        # The two have the same shapes: official names tell, and so does the time shift of a diffusers directory.
        scheduler = self._find("scheduler", weights=False)
        shift = read_json(scheduler.config).get("flow_shift") if scheduler and scheduler.config else None
        named = "720p" in f"{found.place.parent.name}/{found.place.name}".lower()
        return "i2v-14b-720p" if named or (shift or 0) >= 5 else "i2v-14b-480p"

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    def encodings(self) -> tuple[Encoding, ...]:
        media = [LATENTS]
        if self.from_image:
            media.append(Encoding("first_frame", "media", ("autoencoder",)))
            media.append(Encoding("image", "media", ("image_encoder", "image_processor")))
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
        return (text, *media)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                captions = [sample.caption for sample in samples]
                rows = encode_text(parts["text_encoder"], parts["tokenizer"], captions, self.text_length)
                return [{"text": row} for row in rows]
            if encoding.name == "image":
                rows = encode_image(parts["image_encoder"], parts["image_processor"], samples)
                return [{"image": row} for row in rows]
            if encoding.name == "first_frame":
                video = pixels_of(samples)
                video[:, :, 1:] = 0  # grey, as at sampling
                mean, _ = encode_pixels(parts["autoencoder"], video)
                return [{"first_frame": row} for row in mean]
            return self.encode_latents(parts["autoencoder"], samples)

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        text = batch.tensors["text"]
        padded = text[0].new_zeros(len(text), self.text_length, text[0].shape[-1])  # attended to, as at sampling
        for row, tokens in zip(padded, text, strict=True):
            row[: len(tokens)] = tokens
        conditioning: dict[str, Any] = {"encoder_hidden_states": padded}
        if self.from_image:
            conditioning["encoder_hidden_states_image"] = torch.stack(batch.tensors["image"])
            first = torch.stack(batch.tensors["first_frame"])
            mask = first.new_zeros(len(first), MASK_CHANNELS, *first.shape[2:])
            mask[:, :, 0] = 1
            conditioning["channels"] = torch.cat([mask, first], dim=1)
        return Prepared(latents, conditioning)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        inputs = dict(conditioning)
        if (channels := inputs.pop("channels", None)) is not None:
            x_t = torch.cat([x_t, channels.to(x_t.dtype)], dim=1)
        if t.ndim == 5:  # one time for each token
            frames, rows, columns = self.variant.patch
            t = t[:, 0, ::frames, ::rows, ::columns].flatten(1)
        dtype = next(p.dtype for name, p in network.named_parameters() if "patch_embedding" in name)
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in inputs.items()},
            return_dict=False,
        )[0]

    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        return {"blocks": network.get_submodule("blocks")}  # type: ignore[dict-item]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
            r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.from_image and self.text_length != TEXT_LENGTH:
            raise ConfigError(
                f"model.text_length: image-to-video networks tell text from image by position, so it must be "
                f"{TEXT_LENGTH}, not {self.text_length}. Leave the key out."
            )

    def initialise(self, network: nn.Module) -> None:
        initialise_network(network)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.wan_tiny import write_tiny

        return write_tiny(directory, "image_encoder" in cls.variants[variant].parts, seed)
