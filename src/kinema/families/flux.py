"""Flux.1 (Black Forest Labs 2024; Kontext: 2025, arXiv 2506.15742): text-to-image, and editing after a picture.

A transformer on packed 2 x 2 latents of a picture autoencoder (8 x 8, 16 channels): first blocks with weights of their
own for text and picture, then blocks that see both as one sequence. Text is T5's embedding of all tokens, padding
included, and CLIP's pooled embedding, which modulates with the time. Dev and Kontext are distilled from
classifier-free guidance, whose scale the network is told. Kontext sees the latents of the picture to edit as further
tokens. Inputs equal those of diffusers' FluxPipeline and FluxKontextPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.flux_layout import NETWORK, network_from_original
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.loading import Found, PartSpec
from kinema.families.packing import pack, positions, unpack
from kinema.families.parts import CLIP_L, CLIP_L_TOKENIZER, FLUX_VAE, SCHEDULER, T5_XXL, tokenizer
from kinema.families.standard import StandardFamily
from kinema.families.tensors import looks_like, tensor_shapes
from kinema.families.text import quietly, warn_if_cut

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LONGEST_TEXT = 512
"""Tokens of text that the pipelines take at most; dev and Kontext were trained with as many, padding included."""
SCHNELL_TEXT = 256
"""Tokens of text that schnell was distilled with."""
TRAINING_GUIDANCE = 1.0
"""The guidance scale that training tells: 1, at which the network shows the data, not a guided version of it. So do
Kohya's tools and diffusion-pipe."""

PARTS = {
    "network": PartSpec(
        "diffusion network", "transformer", "diffusers:FluxTransformer2DModel", to_ours=network_from_original
    ),
    "autoencoder": FLUX_VAE,
    "text_encoder": CLIP_L,
    "tokenizer": CLIP_L_TOKENIZER,
    "text_encoder_2": replace(T5_XXL, folder="text_encoder_2"),
    "tokenizer_2": tokenizer("T5", "google/t5-v1_1-xxl", 2),
    "scheduler": SCHEDULER,
}
_SAMPLING = SamplingDefaults(height=1024, width=1024, frames=1, steps=50, guidance=3.5)

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "dev",
            "image",
            11_901_408_320,
            tuple(PARTS),
            "black-forest-labs/FLUX.1-dev",
            _SAMPLING,
            pipeline="FluxPipeline",
            # Sampled with a shift that grows with the picture; training spends its steps on the same times.
            shift="resolution",
            gated=True,
        ),
        Variant(
            "schnell",
            "image",
            11_891_178_560,
            tuple(PARTS),
            "black-forest-labs/FLUX.1-schnell",
            replace(_SAMPLING, steps=4, guidance=1.0),
            pipeline="FluxPipeline",
            shift=1.0,
            gated=True,
        ),
        Variant(
            "kontext-dev",
            "image",
            11_901_408_320,
            tuple(PARTS),
            "black-forest-labs/FLUX.1-Kontext-dev",
            replace(_SAMPLING, steps=30, guidance=2.5),
            pipeline="FluxKontextPipeline",
            conditions=("text", "controls"),
            shift="resolution",
            gated=True,
        ),
    )
}


class Flux(StandardFamily):
    """The Flux.1 models."""

    name = "flux"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    encoding_version = "flux-1"
    encoded_text = ("prompt_embeds", "pooled_prompt_embeds", "")  # the last one: the ids of its tokens
    options = ("guidance", "bypass_guidance")

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if "guidance_embeds" in described:
            distilled = described["guidance_embeds"]
        else:
            shapes = tensor_shapes(found.files)
            if not any(name.startswith(("double_blocks.", "transformer_blocks.")) for name in shapes):
                raise UserError(
                    f"{found.key}: {found.place} looks like {looks_like(shapes)}, not a Flux network. Name "
                    "model.variant, or give model.path = a diffusers directory that describes it."
                )
            distilled = any("guidance_in." in name or "guidance_embedder." in name for name in shapes)
        if not distilled:
            return "schnell"
        if len(fitting) == 1:  # the index of the directory names the pipeline
            return fitting[0]
        named = f"{found.place.parent.name}/{found.place.name}".lower()
        return "kontext-dev" if "kontext" in named else "dev" if "dev" in named else None

    @property
    def edits(self) -> bool:
        """Whether the variant works from a control picture."""
        return "controls" in self.variant.conditions

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or (SCHNELL_TEXT if self.variant.name == "schnell" else LONGEST_TEXT)

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder_2", "tokenizer_2"), f"length {self.text_length}")
        pooled = Encoding("pooled", "caption", ("text_encoder", "tokenizer"))
        control = (Encoding("control", "controls", ("autoencoder",), controls=True),) if self.edits else ()
        return (text, pooled, LATENTS, *control)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            if encoding.name == "pooled":
                return [{"pooled": self._pooled(parts, sample.caption)} for sample in samples]
            if encoding.name == "control":
                return [{"control": _control(parts["autoencoder"], sample)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """T5's embeddings [text_length, C] of a caption. Padding stays: T5 and the network attend to it."""
        encoder = parts["text_encoder_2"]
        warn_if_cut(parts["tokenizer_2"], caption, self.text_length)
        place = {"device": encoder.shared.weight.device, "dtype": encoder.dtype}
        with quietly():
            pipeline = self.text_pipeline(parts)
            return pipeline._get_t5_prompt_embeds(caption, max_sequence_length=self.text_length, **place)[0].cpu()

    def _pooled(self, parts: Parts, caption: str) -> Tensor:
        """CLIP's pooled embedding [C] of the caption's first 77 tokens; T5 sees the rest."""
        with quietly():
            pipeline = self.text_pipeline(parts)
            return pipeline._get_clip_prompt_embeds(caption, device=parts["text_encoder"].device)[0].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        conditioning = {
            "encoder_hidden_states": torch.stack(batch.tensors["text"]),
            "pooled_projections": torch.stack(batch.tensors["pooled"]),
        }
        if self.edits:
            conditioning["control"] = torch.stack(batch.tensors["control"])
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        dtype = next(p.dtype for name, p in network.named_parameters() if "x_embedder" in name)
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        text = conditioning["encoder_hidden_states"]
        tokens, places = pack(x_t[:, :, 0]), positions(rows, columns, device=x_t.device)
        if (control := conditioning.get("control")) is not None:
            shown = pack(control[:, :, 0]).to(tokens.dtype)
            tokens = torch.cat([tokens, shown], dim=1)
            size = control.shape[-2] // 2, control.shape[-1] // 2
            places = torch.cat([places, positions(*size, image=1, device=x_t.device)])
        predicted = network(
            hidden_states=tokens.to(dtype),
            timestep=t.float(),
            guidance=self._guidance(network, t),
            pooled_projections=conditioning["pooled_projections"].to(dtype),
            encoder_hidden_states=text.to(dtype),
            txt_ids=places.new_zeros(text.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack(predicted[:, : rows * columns], rows, columns)[:, :, None]

    def _guidance(self, network: nn.Module, t: Tensor) -> Tensor | None:
        if not network.config["guidance_embeds"]:  # type: ignore[index]
            return None
        guidance = TRAINING_GUIDANCE if self.config.guidance is None else self.config.guidance
        return t.new_full(t.shape, guidance).float()

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        loaded = super().load(part, device, dtype)
        if part == "network" and self.config.bypass_guidance:
            embedder = loaded.get_submodule("time_text_embed.guidance_embedder")
            embedder.register_forward_hook(_nothing)
        return loaded

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks, modulation included."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
            r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        check_text_length(self.text_length)
        for key in ("guidance", "bypass_guidance"):
            if self.variant.name == "schnell" and getattr(config.model, key):
                raise ConfigError(f"model.{key}: schnell has no guidance embedding that would read it. Leave it out.")
        if config.model.bypass_guidance and config.model.guidance is not None:
            raise ConfigError("model.guidance: model.bypass_guidance leaves out what would read it. Give one of them.")

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        arguments = super().sampling_arguments(guidance, pictures, text_length)
        if self.config.bypass_guidance:  # nothing tells the network a scale: guide it as it was before distillation
            arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        if pictures:  # else what is made is as large as 1024 x 1024, from a picture of a preferred size
            arguments |= {"max_area": pictures[0].width * pictures[0].height, "_auto_resize": False}
        return arguments

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.flux_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant].pipeline, variant != "schnell", seed)


def _nothing(_embedder: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: what the module gives is left out."""
    import torch

    return torch.zeros_like(output)


def check_text_length(length: int) -> None:
    """ConfigError for more text than the pipelines take."""
    if length > LONGEST_TEXT:
        raise ConfigError(
            f"model.text_length: {length} is more than the {LONGEST_TEXT} tokens that the network was trained with. "
            f"Give {LONGEST_TEXT} or less, or leave the key out."
        )


def _control(autoencoder: Any, sample: Sample) -> Tensor:
    """Latents [C, 1, h, w] of the picture to edit; UserError unless there is one."""
    if len(sample.controls) != 1:
        raise UserError(
            f"flux kontext-dev edits one control picture, and a record has {len(sample.controls)} (its caption: "
            f"{sample.caption[:60]!r}). Give each record one."
        )
    mean, _ = encode_pixels(autoencoder, pixels_of([Sample("", sample.controls[0])]))
    return mean[0]
