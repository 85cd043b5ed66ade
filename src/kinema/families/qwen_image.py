"""Qwen-Image (Qwen Team 2025, arXiv 2508.02324): text-to-image, and editing after one or several pictures.

A two-stream transformer over text tokens and packed 2 x 2 latents of a video autoencoder (8 x 8, 16 channels) on one
frame. Text is what Qwen2.5-VL makes of a prompt template, without the template's beginning; in the edit variants it
sees the control pictures too, whose latents follow the noisy ones as further tokens. Inputs equal those of diffusers'
QwenImagePipeline, QwenImageEditPipeline and QwenImageEditPlusPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec
from kinema.families.noise_path import ResolutionShift
from kinema.families.packing import pack, unpack
from kinema.families.parts import QWEN25_TOKENIZER, QWEN25_VL, QWEN_PROCESSOR, QWEN_VAE, SCHEDULER
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text, without the template, that text-to-image samples with."""
LONGEST_TEXT = 1024
"""Tokens of text that the encoder is asked for at most."""

MARK_2511 = "__index_timestep_zero__"
"""An empty tensor by which ComfyUI's files of the release 2511 say what zero_cond_t says in a configuration."""

NETWORK = Layout([], same=True)
"""ComfyUI reads the published names."""


def _without_mark(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != MARK_2511}


PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:QwenImageTransformer2DModel",
        to_ours=_without_mark,
    ),
    "autoencoder": QWEN_VAE,
    "text_encoder": QWEN25_VL,
    "tokenizer": QWEN25_TOKENIZER,
    "processor": QWEN_PROCESSOR,
    "scheduler": SCHEDULER,
}
_TEXT_TO_IMAGE = ("network", "autoencoder", "text_encoder", "tokenizer", "scheduler")
_EDIT = (*_TEXT_TO_IMAGE, "processor")


def _variant(name: str, hub: str, pipeline: str, steps: int, side: int) -> Variant:
    edits = name != "base"
    return Variant(
        name,
        "image",
        20_430_401_088,
        _EDIT if edits else _TEXT_TO_IMAGE,
        hub,
        SamplingDefaults(height=side, width=side, frames=1, steps=steps, guidance=4.0),
        pipeline=pipeline,
        conditions=("text", "controls") if edits else ("text",),
        most_pictures=3 if pipeline == "QwenImageEditPlusPipeline" else 1,  # up to three work best, say its authors
        # Sampled with a shift that grows with the picture; training spends its steps on the same times.
        shift="resolution",
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("base", "Qwen/Qwen-Image", "QwenImagePipeline", 50, 1328),
        _variant("edit", "Qwen/Qwen-Image-Edit", "QwenImageEditPipeline", 50, 1024),
        _variant("edit-plus", "Qwen/Qwen-Image-Edit-2509", "QwenImageEditPlusPipeline", 40, 1024),
        _variant("edit-2511", "Qwen/Qwen-Image-Edit-2511", "QwenImageEditPlusPipeline", 40, 1024),
    )
}


class QwenImage(StandardFamily):
    """The Qwen-Image models.

    Control pictures are encoded at the size of the bucket. The pipelines bring them to a million pixels, whatever they
    make, so buckets of 1024 are nearest to how edits are sampled.
    """

    name = "qwen_image"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("transformer_blocks",)
    encoding_version = "qwen-image-1"
    encoded_text = ("prompt_embeds", "prompt_embeds_mask")
    guidance_argument = "true_cfg_scale"
    resolution_shift = ResolutionShift(256, 0.5, 8192, 0.9)
    """As its published scheduler shifts."""

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if not described and MARK_2511 in tensor_shapes(found.files):
            return "edit-2511"
        # Configurations from before the release 2511 do not know zero_cond_t, which is false there.
        fitting = [name for name in fitting if (name == "edit-2511") == bool(described.get("zero_cond_t"))]
        return super().detect(fitting, described, found)

    @property
    def edits(self) -> bool:
        """Whether the variant works from control pictures."""
        return "controls" in self.variant.conditions

    @property
    def batched_sampling(self) -> bool:  # type: ignore[override]
        """The edit pipelines take one prompt and its pictures in a call."""
        return not self.edits

    @property
    def text_length(self) -> int | None:
        """Tokens of text that the network sees; None, all of it, in edit variants, where pictures are part of it."""
        return None if self.edits else self.config.text_length or TEXT_LENGTH

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        if not self.edits:
            text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
            return (text, LATENTS)
        reads = ("text_encoder", "tokenizer", "processor")
        text = Encoding("text", "caption", reads, self.variant.pipeline, controls=True)
        return (text, LATENTS, Encoding("controls", "controls", ("autoencoder",), controls=True))

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample)} for sample in samples]
            if encoding.name == "controls":
                return [self._controls(parts["autoencoder"], sample) for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, sample: Sample) -> Tensor:
        """Embeddings [tokens, C] of one caption, with its control pictures in edit variants."""
        pipeline = self.text_pipeline(parts)
        device = parts["text_encoder"].get_input_embeddings().weight.device
        if self.edits:
            pictures = self._pictures(sample)
            shown: Any = [_as_seen(picture) for picture in pictures] if self._several else pictures[0]
            return pipeline.encode_prompt(prompt=sample.caption, image=shown, device=device)[0][0].cpu()
        length = self.text_length or TEXT_LENGTH
        whole = pipeline.prompt_template_encode.format(sample.caption)
        warn_if_cut(parts["tokenizer"], sample.caption, length + pipeline.prompt_template_encode_start_idx, whole)
        return pipeline.encode_prompt(prompt=sample.caption, device=device, max_sequence_length=length)[0][0].cpu()

    @property
    def _several(self) -> bool:
        return self.variant.pipeline == "QwenImageEditPlusPipeline"

    def _pictures(self, sample: Sample) -> list[Any]:
        """The control pictures for the text encoder; UserError if there are too few or too many."""
        from PIL import Image

        expected = "one or more control pictures" if self._several else "one control picture"
        if not sample.controls or (len(sample.controls) > 1 and not self._several):
            raise UserError(
                f"qwen_image {self.variant.name} edits from {expected}, and a record has {len(sample.controls)} (its "
                f"caption: {sample.caption[:60]!r}). Give it {expected}"
                + (", or use the variant edit-plus, which takes several." if sample.controls else ".")
            )
        return [Image.fromarray(one[:, 0].permute(1, 2, 0).cpu().numpy()) for one in sample.controls]

    def _controls(self, autoencoder: Any, sample: Sample) -> dict[str, Tensor]:
        """``controls`` [tokens, 4 C]: the packed latents of all control pictures one after the other, and
        ``control_sizes`` [pictures, 2]: their rows and columns of tokens."""
        import torch

        self._pictures(sample)  # for its complaint
        tokens, sizes = [], []
        for one in sample.controls:
            mean, _ = encode_pixels(autoencoder, pixels_of([Sample("", one)]))
            tokens.append(pack(mean[:, :, 0])[0])
            sizes.append([mean.shape[-2] // 2, mean.shape[-1] // 2])
        return {"controls": torch.cat(tokens), "control_sizes": torch.tensor(sizes)}

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        text, mask = padded(batch.tensors["text"], max(len(one) for one in batch.tensors["text"]))
        conditioning: dict[str, Any] = {
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        }
        if self.edits:
            sizes = [[tuple(size) for size in one.tolist()] for one in batch.tensors["control_sizes"]]
            if any(one != sizes[0] for one in sizes):
                raise UserError(
                    "The network takes control pictures of one number and one size in a batch, and these records have "
                    f"{' and '.join(str(len(one)) for one in sizes)} (in tokens {sizes}). Set "
                    "training.micro_batch_size = 1 (and evaluation.batch_size = 1), or give all as many."
                )
            conditioning["controls"] = torch.stack(batch.tensors["controls"])
            conditioning["control_sizes"] = sizes[0]
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        dtype = network.get_submodule("img_in").weight.dtype
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        tokens = pack(x_t[:, :, 0])
        shapes = [(1, rows, columns)]
        if (controls := conditioning.get("controls")) is not None:
            tokens = torch.cat([tokens, controls.to(tokens.dtype)], dim=1)
            shapes += [(1, *size) for size in conditioning["control_sizes"]]
        predicted = network(
            hidden_states=tokens.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            encoder_hidden_states_mask=conditioning["encoder_hidden_states_mask"],
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(predicted[:, : rows * columns], rows, columns)[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.(img|txt)_mod\.1",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        self._check_numbers_of_pictures(config)
        if self.edits and self.config.text_length is not None:
            raise ConfigError(
                "model.text_length: in edit variants the control pictures are part of the text, so that it cannot be "
                "cut. Leave the key out."
            )
        if (self.text_length or 0) > LONGEST_TEXT:
            raise ConfigError(
                f"model.text_length: {self.text_length} is more than the text encoder is asked for, which is "
                f"{LONGEST_TEXT}. Give at most that; {TEXT_LENGTH} is usual."
            )

    def _check_numbers_of_pictures(self, config: Config) -> None:
        numbers = {len(source.controls) for source in config.data.sources}
        training = config.training
        by_hand = {training.batch_size, *(one.size for one in training.batch_sizes)} - {1}
        if len(numbers) > 1 and training.micro_batch_size != 1 and (by_hand or training.token_budget):
            raise ConfigError(
                f"data.sources.controls: records with {' and '.join(map(str, sorted(numbers)))} control pictures "
                "cannot share a batch. Set training.micro_batch_size = 1, or give all sources as many folders."
            )

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.qwen_image_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant].pipeline, variant == "edit-2511", seed)


def _as_seen(picture: Any) -> Any:
    """A control picture at the size at which the text encoder of several sees it, as the pipeline resizes it."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as theirs

    width, height = theirs.calculate_dimensions(theirs.CONDITION_IMAGE_SIZE, picture.width / picture.height)
    return VaeImageProcessor(vae_scale_factor=16).resize(picture, height, width)
