"""AuraFlow (fal 2024): text-to-image.

A transformer on the 4-channel latents of SDXL's autoencoder: a few blocks with one stream of pictures and one of text,
then many with both in one. Text is what the encoder of Pile-T5-XL makes of it, with zeros for padding, after eight
learnt register tokens. Inputs equal those of diffusers' AuraFlowPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout, swapped_halves
from kinema.families.loading import Found, PartSpec
from kinema.families.part_names import t5
from kinema.families.parts import SCHEDULER, SDXL_VAE, tokenizer
from kinema.families.positions import check_sides
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes
from kinema.families.text import padded, quietly, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 256
"""Tokens of text that the pipeline hands over by default, padding included."""
PIXELS_A_TOKEN = 16
POSITIONS_V2 = 4096
"""Positions that versions up to 0.2 know (1024 x 1024 pixels); 0.3 knows 9216 (1536 x 1536)."""

_ATTENTION = tuple(zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True))
_ATTENTION_TEXT = tuple(zip("qkvo", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), strict=True))
_FORWARD = (("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"))
_JOINT, _DOUBLE = "joint_transformer_blocks.{}", "double_layers.{}"
_SINGLE = "single_transformer_blocks.{}", "single_layers.{}"

NETWORK = Layout(
    [
        ("register_tokens", "register_tokens"),
        ("pos_embed.pos_embed", "positional_encoding"),
        ("pos_embed.proj", "init_x_linear"),
        ("time_step_proj.linear_1", "t_embedder.mlp.0"),
        ("time_step_proj.linear_2", "t_embedder.mlp.2"),
        ("context_embedder", "cond_seq_linear"),
        # The original counts text as 1 and pictures as 2, and gives single blocks the names of text.
        *((f"{_JOINT}.attn.{ours}", f"{_DOUBLE}.attn.w2{theirs}") for theirs, ours in _ATTENTION),
        *((f"{_JOINT}.attn.{ours}", f"{_DOUBLE}.attn.w1{theirs}") for theirs, ours in _ATTENTION_TEXT),
        *((f"{_SINGLE[0]}.attn.{ours}", f"{_SINGLE[1]}.attn.w1{theirs}") for theirs, ours in _ATTENTION),
        *((f"{_JOINT}.ff.{ours}", f"{_DOUBLE}.mlpX.{theirs}") for ours, theirs in _FORWARD),
        *((f"{_JOINT}.ff_context.{ours}", f"{_DOUBLE}.mlpC.{theirs}") for ours, theirs in _FORWARD),
        *((f"{_SINGLE[0]}.ff.{ours}", f"{_SINGLE[1]}.mlp.{theirs}") for ours, theirs in _FORWARD),
        (f"{_JOINT}.norm1.linear", f"{_DOUBLE}.modX.1"),
        (f"{_JOINT}.norm1_context.linear", f"{_DOUBLE}.modC.1"),
        (f"{_SINGLE[0]}.norm1.linear", f"{_SINGLE[1]}.modCX.1"),
        ("proj_out", "final_linear"),
    ],
    changed=[swapped_halves("norm_out.linear", "modF.1")],
)
"""diffusers' AuraFlowTransformer2DModel against fal's own."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:AuraFlowTransformer2DModel",
        ("aura_flow_*.safetensors", "aura_diffusion_pytorch_model.bin"),
        to_ours=NETWORK.from_original,
        # fal's own files begin every name with "model.".
        inside=("model.diffusion_model.", "diffusion_model.", "model."),
    ),
    "autoencoder": replace(SDXL_VAE, originals=("aura_flow_*.safetensors",)),
    "text_encoder": PartSpec(
        "text encoder (Pile-T5-XL)",
        "text_encoder",
        "transformers:UMT5EncoderModel",
        ("aura_flow_*.safetensors",),
        to_ours=t5,
        inside=("text_encoders.pile_t5xl.transformer.",),
        hub="fal/AuraFlow-v0.3",
    ),
    "tokenizer": tokenizer("Pile-T5", "fal/AuraFlow-v0.3"),
    "scheduler": SCHEDULER,
}

_SAMPLING = SamplingDefaults(height=1024, width=1024, frames=1, steps=50, guidance=3.5)

VARIANTS = {
    name: Variant(
        name,
        "image",
        parameters,
        tuple(PARTS),
        f"fal/AuraFlow-{name}",
        _SAMPLING,
        pipeline="AuraFlowPipeline",
        shift=1.73,  # of the published schedule
        longest_side=side,
    )
    for name, parameters, side in (("v0.2", 6_842_876_928, 1024), ("v0.3", 6_858_605_568, 1536))
}


class AuraFlow(StandardFamily):
    """AuraFlow 0.2 (and 0.1, whose network is of the same size) and 0.3."""

    name = "aura_flow"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    encoding_version = "aura-flow-1"
    encoded_text = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        """By how many positions it knows."""
        positions = described.get("pos_embed_max_size")
        if positions is None:
            shapes = {name.removeprefix("model."): shape for name, shape in tensor_shapes(found.files).items()}
            if "positional_encoding" not in shapes:
                return None
            positions = shapes["positional_encoding"][1]
        return "v0.2" if positions <= POSITIONS_V2 else "v0.3"

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
        """[tokens, C] without padding, which the pipeline sets to zero. The network knows no order of text, so it does
        not matter on which side the tokenizer pads."""
        warn_if_cut(parts["tokenizer"], caption, self.text_length)
        encoder = parts["text_encoder"]
        embeddings, mask, _, _ = self.text_pipeline(parts).encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            device=encoder.device,
            max_sequence_length=self.text_length,
        )
        is_text = mask.view(embeddings.shape)[0, :, 0].bool()
        return embeddings[0, is_text].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        text, _ = padded(batch.tensors["text"], self.text_length)
        return Prepared(torch.stack(batch.tensors["latents"]), {"encoder_hidden_states": text})

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(p.dtype for name, p in network.named_parameters() if "pos_embed" in name)
        output = network(
            hidden_states=x_t[:, :, 0].to(dtype),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            timestep=t.float(),
            return_dict=False,
        )[0]
        return output[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of attention and feed-forward."""
        return (
            r"(joint|single)_transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
            r"joint_transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
            r"(joint|single)_transformer_blocks\.\d+\.ff(_context)?\.(linear_[12]|out_projection)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        side = math.isqrt(int(self.known_config("network")["pos_embed_max_size"]))
        check_sides(config, self.variant, side * PIXELS_A_TOKEN)

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.aura_flow_tiny import write_tiny

        return write_tiny(directory, variant, seed)
