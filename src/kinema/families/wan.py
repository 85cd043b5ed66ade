"""Wan 2.1 (Wan Team 2025, arXiv 2503.20314): text-to-video and image-to-video.

A transformer on 16-channel latents of a causal video autoencoder (4 x 8 x 8), told the text by cross-attention to
UMT5-XXL. Image-to-video sees the first frame twice: its CLIP embedding in cross-attention, and its latents, with
a mask, in 20 channels beside x_t. Inputs equal those of diffusers' WanPipeline and WanImageToVideoPipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config, PartConfig
from kinema.data.batch import Batch, Encoding, Sample
from kinema.dtypes import torch_dtype
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family, Parts, Prepared, Variant
from kinema.families.identity import part_identity
from kinema.families.loading import (
    CONFIGS,
    Found,
    Source,
    find,
    is_hub_id,
    load_weights,
    part_config,
    read_json,
    with_config,
)
from kinema.families.tensors import looks_like, tensor_shapes
from kinema.families.wan_encode import check_sizes, encode_image, encode_text, encode_video, random_network
from kinema.families.wan_names import NETWORK
from kinema.families.wan_parts import PARTS, VARIANTS
from kinema.randomness import derive_seed
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ENCODING_VERSION = "wan-1"
"""Part of every fingerprint: it changes when the same weights would be made to encode something else."""
TEXT_LENGTH = 512
"""Tokens of text that the published networks were trained with, padding included."""
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
MASK_CHANNELS = 4
"""The mask of image-to-video has one channel for each frame of a latent: 1 where the frame is given."""


class Wan(Family):
    """The Wan 2.1 models."""

    name = "wan"
    variants = VARIANTS
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    grid = 16
    frame_stride = 4

    @property
    def variant(self) -> Variant:
        return self.variants[self._variant_name]

    @cached_property
    def _variant_name(self) -> str:
        name = self.config.variant or self._detect_variant()
        if name not in self.variants:
            raise ConfigError(
                f"model.variant: wan has no variant '{name}'{did_you_mean(name, self.variants)} "
                f"Known: {', '.join(self.variants)}."
            )
        return name

    @property
    def from_image(self) -> bool:
        """Whether this is an image-to-video variant."""
        return "image_encoder" in self.variant.parts

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    def _detect_variant(self) -> str:
        """From the network's configuration file, else from the shapes in its weights."""
        found = self._find("network", weights=False) or self._find("network")
        if found is None:
            raise ConfigError(
                f"model.variant: name one ({', '.join(self.variants)}), or give model.path to read it from."
            )
        path = self._config_file("network", found)
        described = read_json(path) if path else {}
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

    def _find(self, part: str, *, weights: bool = True) -> Found | None:
        return find(self.config, part, PARTS[part], weights=weights)

    def _config_file(self, part: str, found: Found | None) -> Path | None:
        """The part's configuration file: beside its weights, else (a single file) in the model's directory."""
        if found and found.config:
            return found.config
        if part_config(self.config, part).path is None or self.config.path is None:
            return None
        model = self.config.model_copy(update={part: PartConfig()})
        of_model = find(model, part, PARTS[part], weights=False)
        return of_model.config if of_model else None

    def _source(self, part: str) -> Source:
        assert part in self.variant.parts, f"{self.variant.name} has no part {part}"
        found = self._find(part, weights=not self._is_drawn(part))
        shipped = CONFIGS / self.name / self.variant.name
        return with_config(PARTS[part], found, self._config_file(part, found), shipped, f"wan {self.variant.name}")

    def _is_drawn(self, part: str) -> bool:
        return part == "network" and self.config.random_weights

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        configured = part_config(self.config, part).dtype
        if configured is not None:
            dtype = torch_dtype(configured)
        source = self._source(part)
        if part == "scheduler":
            import diffusers

            return getattr(diffusers, source.config["_class_name"]).from_config(dict(source.config))
        if part == "image_processor":
            from transformers import CLIPImageProcessorPil

            return CLIPImageProcessorPil(**{k: v for k, v in source.config.items() if k != "image_processor_type"})
        if self._is_drawn(part):
            return random_network(source, derive_seed(self.seed, "random_weights", part), device, dtype)
        if source.found is None:
            raise UserError(self._nowhere(part))
        if part == "tokenizer":
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(source.found.place, local_files_only=True)
        return load_weights(source, device, dtype)

    def _nowhere(self, part: str) -> str:
        beside = PARTS[part].beside
        near = f", put it beside model.{beside}.path" if beside else ""
        where = "google/umt5-xxl" if part == "tokenizer" else self.variant.hub
        return (
            f"model.{part}.path: there is nowhere to load the {PARTS[part].what} from. Give its path or a hub id "
            f"(for instance {where}){near}, or give model.path = a whole model."
        )

    def fingerprint(self, parts: Sequence[str]) -> str:
        identities = [ENCODING_VERSION]
        for part in parts:
            source = self._source(part)
            drawn = self._is_drawn(part)
            identity = f"{self.seed} " if drawn else ""
            identity += part_identity(None if drawn else source.found, source.config)
            identities.append(f"{part} {identity} {part_config(self.config, part).dtype}")
        return hashlib.blake2b("\n".join(identities).encode(), digest_size=16).hexdigest()

    def encodings(self) -> tuple[Encoding, ...]:
        media = [Encoding("latents", "media", ("autoencoder",))]
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
            clips = [sample.pixels for sample in samples if sample.pixels is not None]
            assert len(clips) == len(samples), f"the encoding '{encoding.name}' reads pixels"
            pixels = torch.stack(clips)
            if encoding.name == "image":
                rows = encode_image(parts["image_encoder"], parts["image_processor"], pixels)
                return [{"image": row} for row in rows]
            video = pixels.float() / 255 * 2 - 1
            if encoding.name == "first_frame":
                video[:, :, 1:] = 0  # grey, as at sampling
                mean, _ = encode_video(parts["autoencoder"], video)
                return [{"first_frame": row} for row in mean]
            mean, std = encode_video(parts["autoencoder"], video)
            return [{"latents": m, "latents_std": s} for m, s in zip(mean, std, strict=True)]

    def prepare(self, batch: Batch) -> Prepared:
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
            frames, rows, columns = self.patch
            t = t[:, 0, ::frames, ::rows, ::columns].flatten(1)
        dtype = next(p.dtype for name, p in network.named_parameters() if "patch_embedding" in name)
        return network(
            hidden_states=x_t.to(dtype),
            timestep=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in inputs.items()},
            return_dict=False,
        )[0]

    def trainables(self, parts: Parts) -> dict[str, nn.Module]:
        return {"network": parts["network"]}

    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        return {"blocks": network.get_submodule("blocks")}  # type: ignore[dict-item]

    def adapter_targets(self) -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
            r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        )

    def default_shift(self) -> float:
        """The authors' shift for sampling (3 at 480p, 5 at 720p and for the large text-to-video model), so that
        training spends its steps on the times that sampling visits."""
        return 3.0 if self.variant.name in ("t2v-1.3b", "i2v-14b-480p") else 5.0

    def validate(self, config: Config) -> None:
        check_sizes(config, self.grid, self.frame_stride, self.from_image)
        if self.from_image:
            if self.text_length != TEXT_LENGTH:
                raise ConfigError(
                    f"model.text_length: image-to-video networks tell text from image by position, so it must be "
                    f"{TEXT_LENGTH}, not {self.text_length}. Leave the key out."
                )
            if len(config.preview.images) != len(config.preview.prompts):
                raise ConfigError(
                    f"preview.images: {len(config.preview.images)} pictures for {len(config.preview.prompts)} prompts; "
                    f"{self.variant.name} starts each preview from a picture, so give one for each prompt."
                )
        for part in self.variant.parts:
            own, near = (part_config(config.model, name).path for name in (part, PARTS[part].beside or part))
            if is_hub_id(own) or (own is None and (is_hub_id(near) or is_hub_id(config.model.path))):
                continue  # fetched when work starts
            shipped = CONFIGS / self.name / self.variant.name / PARTS[part].folder
            needs_files = PARTS[part].model and not self._is_drawn(part)
            if self._find(part) is None and (needs_files or not shipped.is_dir()):
                raise ConfigError(self._nowhere(part))

    def pipeline(self, parts: Parts) -> Any:
        import diffusers

        modules = {PARTS[part].folder: parts.get(part) for part in self.variant.parts}
        if modules["scheduler"] is None:
            modules["scheduler"] = self.load("scheduler", "cpu", None)
        return (diffusers.WanImageToVideoPipeline if self.from_image else diffusers.WanPipeline)(**modules)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return NETWORK.rename_all(state)

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return NETWORK.restore_all(state)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.wan_tiny import write_tiny

        return write_tiny(directory, "image_encoder" in cls.variants[variant].parts, seed)
