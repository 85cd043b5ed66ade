"""Z-Image (Z-Image Team 2025, arXiv 2511.22699): text-to-image.

One sequence of 2 x 2 latents of Flux's autoencoder and of text, which Qwen3-4B has read as a user's message: each
passes two blocks of its own (refiners), then all blocks together. The network takes 1 - t and predicts x_0 - eps. Both
kinds of tokens are filled up to multiples of 32 by the network itself, so it is given them one by one, unpadded. Inputs
equal those of diffusers' ZImagePipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.data.batch import Batch, Encoding, Sample
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Fused, Layout, LoraFactors
from kinema.families.loading import Found, PartSpec, read_json
from kinema.families.noise_path import NoisePath
from kinema.families.parts import FLUX_VAE, QWEN3, QWEN3_TOKENIZER, SCHEDULER
from kinema.families.standard import StandardFamily
from kinema.families.text import warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text, the message's frame included, that the pipeline cuts at."""
_BLOCKS = ("noise_refiner", "context_refiner", "layers")


class _ZImageLayout(Layout):
    """The layout of ComfyUI's files, which fuse the projections of attention.

    Adapters are passed around with the authors' layers, which are diffusers' (``diffusion_model.layers.0.attention.
    to_q``): so they are written; those on fused layers are read too.
    """

    def adapter_to_original(self, layers: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        return dict(layers)


NETWORK = _ZImageLayout(
    [
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        ("t_embedder", "t_embedder"),
        ("cap_embedder", "cap_embedder"),
        ("x_pad_token", "x_pad_token"),
        ("cap_pad_token", "cap_pad_token"),
        *(
            (f"{blocks}.{{}}.{ours}", f"{blocks}.{{}}.{theirs}")
            for blocks in _BLOCKS
            for ours, theirs in (
                ("attention.to_out.0", "attention.out"),
                ("attention.norm_q", "attention.q_norm"),
                ("attention.norm_k", "attention.k_norm"),
                ("attention_norm1", "attention_norm1"),
                ("attention_norm2", "attention_norm2"),
                ("ffn_norm1", "ffn_norm1"),
                ("ffn_norm2", "ffn_norm2"),
                ("feed_forward", "feed_forward"),
                ("adaLN_modulation.0", "adaLN_modulation.0"),
            )
        ),
    ],
    fused=[
        Fused(f"{blocks}.{{}}.attention.qkv", tuple(f"{blocks}.{{}}.attention.to_{x}" for x in "qkv"))
        for blocks in _BLOCKS
    ],
    dropped=["norm_final.weight"],  # of the class that ComfyUI shares with Lumina 2; nothing reads it
)

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:ZImageTransformer2DModel",
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": FLUX_VAE,
    "text_encoder": QWEN3,
    "tokenizer": QWEN3_TOKENIZER,
    "scheduler": SCHEDULER,
}


def _variant(name: str, hub: str, steps: int, guidance: float) -> Variant:
    return Variant(
        name,
        "image",
        6_154_908_736,
        tuple(PARTS),
        hub,
        SamplingDefaults(height=1024, width=1024, frames=1, steps=steps, guidance=guidance),
        pipeline="ZImagePipeline",
        # Trained with Flux's shift by resolution (section 4.3), though its schedulers sample with a fixed one.
        shift="resolution",
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("base", "Tongyi-MAI/Z-Image", 50, 5.0),
        _variant("turbo", "Tongyi-MAI/Z-Image-Turbo", 9, 1.0),  # nine steps call the network eight times
    )
}
_TURBO_SHIFT, _BASE_SHIFT = 3.0, 6.0
"""The published schedulers differ where the networks' configurations do not."""


class ZImage(StandardFamily):
    """The Z-Image models: the base, and Turbo, which is distilled to eight steps without guidance."""

    name = "z_image"
    low_guidance = 0.0  # of a pipeline whose scale is what is added
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = _BLOCKS
    encoding_version = "z-image-1"

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        scheduler = self._find("scheduler", weights=False)
        shift = read_json(scheduler.config).get("shift") if scheduler and scheduler.config else None
        by_shift = {_TURBO_SHIFT: "turbo", _BASE_SHIFT: "base"}
        if shift in by_shift:
            return by_shift[shift]
        return "turbo" if "turbo" in found.place.name.lower() else super().detect(fitting, described, found)

    @property
    def path(self) -> NoisePath:
        return NoisePath("negative_velocity")

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees at most."""
        return self.config.text_length or TEXT_LENGTH

    def encodings(self) -> tuple[Encoding, ...]:
        return (Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}"), LATENTS)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """Embeddings [tokens, C] of one caption."""
        tokenizer = parts["tokenizer"]
        message = tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        warn_if_cut(tokenizer, caption, self.text_length, message)
        (rows,), _ = self.text_pipeline(parts).encode_prompt(
            caption,
            device=parts["text_encoder"].get_input_embeddings().weight.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return rows.cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        return Prepared(torch.stack(batch.tensors["latents"]), {"cap_feats": list(batch.tensors["text"])})

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        import torch

        dtype = network.get_submodule("all_x_embedder.2-1").weight.dtype
        pictures = network(
            list(x_t.to(dtype).unbind(0)),
            1 - t.float(),
            [rows.to(dtype) for rows in conditioning["cap_feats"]],
            return_dict=False,
        )[0]
        return torch.stack(pictures)

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks, those of the refiners included."""
        blocks = rf"({'|'.join(_BLOCKS)})\.\d+"
        return (
            rf"{blocks}\.attention\.(to_[qkv]|to_out\.0)",
            rf"{blocks}\.feed_forward\.w[123]",
            r"(noise_refiner|layers)\.\d+\.adaLN_modulation\.0",
        )

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        # The pipeline's scale is what is added to the prediction for the prompt: 0, not 1, turns it off.
        return super().sampling_arguments(max(guidance - 1, 0), pictures, text_length)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.z_image_tiny import write_tiny

        return write_tiny(directory, _TURBO_SHIFT if variant == "turbo" else _BASE_SHIFT, seed)
