"""OmniGen2 (Wu et al. 2025, arXiv 2506.18871): pictures from text, and from text and up to five reference pictures.

A transformer over text, the latents of reference pictures and the noisy ones, each refined apart before they are one
sequence. Text is what Qwen2.5-VL 3B makes of a chat in which the caption is the user's part; it does not see the
references. Inputs equal those of `kinema.networks.omnigen2_pipeline`, which computes what its authors' pipeline does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec, Source
from kinema.families.noise_path import NoisePath
from kinema.families.parts import FLUX_VAE, QWEN25_TOKENIZER, QWEN25_VL_3B, SCHEDULER
from kinema.families.positions import longest_sides
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 888
"""Tokens of text, with the template around it, that its authors train with at most."""
POSITIONS = 1024
"""Positions of the text, and behind it of every reference picture one for each token of its longer side."""
MOST_PICTURES = 5
REFERENCE_SIDE = 1024
"""Longest side of reference pictures in pixels: larger ones are encoded smaller."""
GRID = 16
WIDTH = 2520

_BLOCKS = ("context_refiner", "noise_refiner", "ref_image_refiner", "layers")
_MODULATED = ("noise_refiner", "ref_image_refiner", "layers")

NETWORK = Layout([], same=True)
"""The class has the names of the published file, which ComfyUI reads too."""


def _load_scheduler(source: Source) -> Any:
    """The published configuration is of a class of the authors', named as diffusers' and with a key of its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    settings = {key: value for key, value in source.config.items() if key != "dynamic_time_shift"}
    settings.setdefault("use_dynamic_shifting", source.config.get("dynamic_time_shift", True))
    return FlowMatchEulerDiscreteScheduler.from_config(settings)


PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "kinema.networks.omnigen2:OmniGen2Transformer2DModel",
        ("omnigen2*.safetensors",),
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": FLUX_VAE,
    "text_encoder": QWEN25_VL_3B,
    "tokenizer": replace(QWEN25_TOKENIZER, folder="processor", hub="Qwen/Qwen2.5-VL-3B-Instruct"),
    "scheduler": replace(SCHEDULER, load=_load_scheduler),
}

VARIANTS = {
    "omnigen2": Variant(
        "omnigen2",
        "image",
        3_967_161_400,
        tuple(PARTS),
        "OmniGen2/OmniGen2",
        SamplingDefaults(height=1024, width=1024, frames=1, steps=50, guidance=5.0, image_guidance=2.0),
        pipeline="OmniGen2Pipeline",
        conditions=("text", "controls"),
        # Its authors train on a logit-normal law with Flux's shift, from 0.5 at 256 tokens to 1.15 at 4096.
        shift="resolution",
        least_pictures=0,
        most_pictures=MOST_PICTURES,
    )
}


class OmniGen2(StandardFamily):
    """OmniGen2."""

    name = "omnigen2"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = _BLOCKS
    encoding_version = "omnigen2-1"

    @property
    def path(self) -> NoisePath:
        return NoisePath("negative_velocity")

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        index = () if described else tensor_shapes(found.files).get("image_index_embedding", ())
        return "omnigen2" if described or index == (MOST_PICTURES, WIDTH) else None

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees, those of the template with them."""
        return self.config.text_length or TEXT_LENGTH

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
        return (text, LATENTS, Encoding("controls", "controls", ("autoencoder",), controls=True))

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            if encoding.name == "controls":
                return [{"controls": self._controls(parts, sample)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """Embeddings [tokens, C] of the caption in its template."""
        from kinema.networks.omnigen2_pipeline import TEMPLATE

        warn_if_cut(parts["tokenizer"], caption, self.text_length, TEMPLATE.format(caption))
        device = parts["text_encoder"].get_input_embeddings().weight.device
        embeds, _ = self.text_pipeline(parts).encode_prompt(
            caption, False, device=device, max_sequence_length=self.text_length
        )
        return embeds[0].cpu()

    def _controls(self, parts: Parts, sample: Sample) -> Tensor:
        """Latents [pictures, C, h, w] of the control pictures, which all have one size; there may be none."""
        import torch
        from PIL import Image

        if not sample.controls:
            return torch.zeros(0, parts["autoencoder"].config.latent_channels, 1, 1)
        pictures = [Image.fromarray(one[:, 0].permute(1, 2, 0).cpu().numpy()) for one in sample.controls]
        return torch.stack(self.text_pipeline(parts).encode_references(pictures)).float().cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        text, mask = padded(batch.tensors["text"], max(len(one) for one in batch.tensors["text"]))
        references = [list(own) for own in batch.tensors["controls"]]
        conditioning = {
            "text_hidden_states": text,
            "text_attention_mask": None if bool(mask.all()) else mask,
            "ref_image_hidden_states": references if any(references) else None,
        }
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(p.dtype for name, p in network.named_parameters() if "x_embedder" in name)
        references = conditioning["ref_image_hidden_states"]
        output = network(
            hidden_states=x_t[:, :, 0].to(dtype),
            timestep=1 - t.float(),
            text_hidden_states=conditioning["text_hidden_states"].to(dtype),
            text_attention_mask=conditioning["text_attention_mask"],
            ref_image_hidden_states=references and [[one.to(dtype) for one in own] for own in references],
            return_dict=False,
        )[0]
        return output[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks; its authors' LoRA has those of attention."""
        block = rf"({'|'.join(_BLOCKS)})\.\d+"
        return (
            rf"{block}\.attn\.(to_[qkv]|to_out\.0)",
            rf"{block}\.feed_forward\.linear_[123]",
            rf"({'|'.join(_MODULATED)})\.\d+\.norm1\.linear",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        pictures = max(len(source.controls) for source in config.all_sources)
        longest = max(side for _, side in longest_sides(config, self.variant))
        taken = pictures * min(math.ceil(longest / GRID), REFERENCE_SIDE // GRID)
        room = POSITIONS - 1 - taken
        if self.text_length > room:
            of_them = f", of which {pictures} control pictures take {taken}" if pictures else ""
            raise ConfigError(
                f"model.text_length: {self.text_length} tokens of text (the default is {TEXT_LENGTH}) do not fit: "
                f"{self.variant.name} knows {POSITIONS} positions{of_them}, and the picture needs one. Give at most "
                f"{room}, or use smaller or fewer control pictures."
            )

    # -- other tools -----------------------------------------------------------------------------------------------

    @property
    def pipeline_class(self) -> Any:
        from kinema.networks.omnigen2_pipeline import OmniGen2Pipeline

        return OmniGen2Pipeline

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.omnigen2_tiny import write_tiny

        return write_tiny(directory, seed)
