"""Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758): text-to-image.

One stream of text and pictures on the latents of Flux's autoencoder, each refined by blocks of its own before. Text is
what Gemma 2 makes of a system prompt and the caption; padding is masked. The network counts time from noise, and
predicts x_0 - eps. Inputs equal those of diffusers' Lumina2Pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Fused, Layout
from kinema.families.loading import Found, PartSpec
from kinema.families.noise_path import NoisePath
from kinema.families.parts import FLUX_VAE, GEMMA2_2B, GEMMA_TOKENIZER, SCHEDULER
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes
from kinema.families.text import padded, quietly, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 256
"""Tokens of text that the pipeline hands over by default, system prompt and padding included."""
CAPTION_MARK = "<Prompt Start>"
"""Between system prompt and caption."""
WIDTH = 2304

_BLOCKS = ("context_refiner", "noise_refiner", "layers")
_MODULATED = ("noise_refiner", "layers")

NETWORK = Layout(
    [
        ("x_embedder", "x_embedder"),
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        *(
            (f"{block}.{{}}.{ours}", f"{block}.{{}}.{theirs}")
            for block in _BLOCKS
            for ours, theirs in (
                ("attn.to_out.0", "attention.out"),
                ("attn.norm_q", "attention.q_norm"),
                ("attn.norm_k", "attention.k_norm"),
                *((f"feed_forward.linear_{i}", f"feed_forward.w{i}") for i in (1, 2, 3)),
                ("norm2", "attention_norm2"),
                ("ffn_norm1", "ffn_norm1"),
                ("ffn_norm2", "ffn_norm2"),
            )
        ),
        *((f"{block}.{{}}.norm1.linear", f"{block}.{{}}.adaLN_modulation.1") for block in _MODULATED),
        *((f"{block}.{{}}.norm1.norm", f"{block}.{{}}.attention_norm1") for block in _MODULATED),
        ("context_refiner.{}.norm1", "context_refiner.{}.attention_norm1"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
    ],
    fused=[
        Fused(
            f"{block}.{{}}.attention.qkv",
            tuple(f"{block}.{{}}.attn.to_{part}" for part in "qkv"),
            shares=(3, 1, 1),
        )
        for block in _BLOCKS
    ],
    dropped=[r"norm_final\.weight"],  # the authors' code never applies it
)
"""diffusers' Lumina2Transformer2DModel against the authors' NextDiT."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:Lumina2Transformer2DModel",
        ("consolidated.00-of-01.pth", "lumina_2*.safetensors"),
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": FLUX_VAE,
    "text_encoder": GEMMA2_2B,
    "tokenizer": GEMMA_TOKENIZER,
    "scheduler": SCHEDULER,
}


VARIANTS = {
    "image-2.0": Variant(
        "image-2.0",
        "image",
        2_609_769_152,
        tuple(PARTS),
        "Alpha-VLLM/Lumina-Image-2.0",
        SamplingDefaults(height=1024, width=1024, frames=1, steps=50, guidance=4.0),
        pipeline="Lumina2Pipeline",
        # Its authors train with the shift of Flux, from 0.5 at 256 tokens to 1.15 at 4096 (transport.py), on a
        # logit-normal law, and sample with a shift of 6.
        shift="resolution",
    )
}


class Lumina2(StandardFamily):
    """Lumina-Image 2.0, and models tuned from it."""

    name = "lumina2"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = _BLOCKS
    encoding_version = "lumina2-1"
    encoded_text = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )

    @property
    def path(self) -> NoisePath:
        return NoisePath("negative_velocity")

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        caption = () if described else tensor_shapes(found.files).get("cap_embedder.1.weight", ())
        return "image-2.0" if described or caption == (WIDTH, WIDTH) else None

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}")
        return (text, LATENTS)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad(), quietly():
            if encoding.name == "text":
                return [{"text": self._encode_text(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _encode_text(self, parts: Parts, caption: str) -> Tensor:
        """[tokens, C] of the system prompt and the caption, without padding, which the network masks.

        A caption that has the mark brings its own system prompt; the empty caption has none, as in the pipeline.
        """
        pipeline = self.text_pipeline(parts)
        text = (
            caption if not caption or CAPTION_MARK in caption else f"{pipeline.system_prompt} {CAPTION_MARK} {caption}"
        )
        warn_if_cut(parts["tokenizer"], caption, self.text_length, text)
        device = parts["text_encoder"].device
        embeddings, mask = pipeline._get_gemma_prompt_embeds(text, device, self.text_length)
        return embeddings[0, mask[0].bool()].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        text, mask = padded(batch.tensors["text"], self.text_length)
        conditioning = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(p.dtype for name, p in network.named_parameters() if "x_embedder" in name)
        output = network(
            hidden_states=x_t[:, :, 0].to(dtype),
            timestep=1 - t.float(),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return output[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks, modulations too: diffusers reads ComfyUI's names where all are there."""
        block = rf"({'|'.join(_BLOCKS)})\.\d+"
        return (
            rf"{block}\.attn\.(to_[qkv]|to_out\.0)",
            rf"{block}\.feed_forward\.linear_[123]",
            rf"({'|'.join(_MODULATED)})\.\d+\.norm1\.linear",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        positions = int(self.known_config("network")["axes_lens"][0])
        if self.text_length >= positions:
            raise ConfigError(
                f"model.text_length: {self.variant.name} knows {positions} positions, and the picture takes the one "
                f"after the text: give at most {positions - 1}, not {self.text_length}."
            )

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.lumina2_tiny import write_tiny

        return write_tiny(directory, seed)
