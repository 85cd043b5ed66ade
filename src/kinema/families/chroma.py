"""Chroma 1 (Lodestone Rock 2025): text-to-image, made from Flux.1 schnell.

Flux's blocks on packed 2 x 2 latents of its autoencoder; one small network computes the modulation of all blocks from
the time. Text is T5's embedding alone, of which the network sees the caption's tokens and one of padding. Inputs equal
those of diffusers' ChromaPipeline, but for text that is masked, which is left out instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.chroma_layout import NETWORK, network_from_original
from kinema.families.flux import LONGEST_TEXT, check_text_length
from kinema.families.latents import LATENTS
from kinema.families.loading import Found, PartSpec
from kinema.families.packing import pack, positions, unpack
from kinema.families.parts import FLUX_VAE, SCHEDULER, T5_TOKENIZER, T5_XXL
from kinema.families.standard import StandardFamily
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

PEAK, BEND = 2.0, 7.7
"""The density of times in its training is 2 - 7.7 (t - 1/2)^2, up to a factor (``create_distribution`` of the authors'
trainer)."""

PARTS = {
    "network": PartSpec(
        "diffusion network", "transformer", "diffusers:ChromaTransformer2DModel", to_ours=network_from_original
    ),
    "autoencoder": FLUX_VAE,
    "text_encoder": T5_XXL,
    "tokenizer": T5_TOKENIZER,
    "scheduler": SCHEDULER,
}


def _variant(name: str, hub: str, side: int) -> Variant:
    return Variant(
        name,
        "image",
        8_899_983_424,
        tuple(PARTS),
        f"lodestones/{hub}",
        SamplingDefaults(height=side, width=side, frames=1, steps=40, guidance=3.0),
        pipeline="ChromaPipeline",
        shift=1.0,
    )


VARIANTS = {"hd": _variant("hd", "Chroma1-HD", 1024), "base": _variant("base", "Chroma1-Base", 512)}


class Chroma(StandardFamily):
    """The Chroma 1 models: ``base``, trained at 512 x 512, and ``hd``, trained on at up to 1152 x 1152."""

    name = "chroma"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    encoding_version = "chroma-1"
    encoded_text = (
        "prompt_embeds",
        "",  # the ids of its tokens
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "",
        "negative_prompt_attention_mask",
    )
    default_time = "native"

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        # They differ in nothing but the weights and the size that is sampled by default.
        return "base" if "base" in f"{found.place.parent.name}/{found.place.name}".lower() else "hd"

    def native_time(self, u: Tensor) -> Tensor:
        """The quantile function of its training: the middle root of a cubic. With s = t - 1/2 and area Z the
        distribution is (2 s - 7.7 s^3 / 3) / Z + 1/2, so s^3 - 3 r^2 s + 3 Z (u - 1/2) / 7.7 = 0 with r^2 = 2 / 7.7;
        s = 2 r sin(a) makes that 2 r^3 sin(3 a) = 3 Z (u - 1/2) / 7.7."""
        area = PEAK - BEND / 12
        r = math.sqrt(PEAK / BEND)
        sine = 3 * area * (u.double() - 0.5) / (2 * BEND * r**3)
        return 0.5 + 2 * r * (sine.asin() / 3).sin()

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or LONGEST_TEXT

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
        return (text, LATENTS)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """Embeddings [tokens, C] of a caption and of one token of padding behind it, where there is room."""
        encoder = parts["text_encoder"]
        warn_if_cut(parts["tokenizer"], caption, self.text_length)
        embeddings, mask = self.text_pipeline(parts)._get_t5_prompt_embeds(
            caption, max_sequence_length=self.text_length, device=encoder.shared.weight.device, dtype=encoder.dtype
        )
        return embeddings[0, mask[0].bool()].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        text, mask = padded(batch.tensors["text"], max(len(one) for one in batch.tensors["text"]))
        conditioning = {"encoder_hidden_states": text, "text_mask": None if bool(mask.all()) else mask}
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        dtype = next(p.dtype for name, p in network.named_parameters() if "x_embedder" in name)
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        text, mask = conditioning["encoder_hidden_states"], conditioning["text_mask"]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), rows * columns)], dim=1)
        places = positions(rows, columns, device=x_t.device)
        predicted = network(
            hidden_states=pack(x_t[:, :, 0]).to(dtype),
            timestep=t.float(),
            encoder_hidden_states=text.to(dtype),
            txt_ids=places.new_zeros(text.shape[1], 3),
            img_ids=places,
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpack(predicted, rows, columns)[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
            r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        check_text_length(self.text_length)

    def pipeline(self, parts: Parts) -> Any:
        from kinema.families.chroma_pipeline import ChromaPipeline

        return ChromaPipeline(**self.pipeline_modules(parts))

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.chroma_tiny import write_tiny

        return write_tiny(directory, seed)
