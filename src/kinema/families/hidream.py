"""HiDream-I1 (Cai et al. 2025, arXiv 2505.22705): text-to-image.

A transformer with two streams, then one, whose feed-forward layers for pictures are mixtures of experts, on the latents
of Flux's autoencoder. Text comes four ways: both CLIPs pooled, beside the time; T5-XXL; and the hidden states of
Llama 3.1, each block seeing those of a layer of its own. The network predicts x_0 - eps. Inputs equal those of
diffusers' HiDreamImagePipeline.

The experts of diffusers' network pass gradients in training mode only, in which the trainer has it; its output has
another shape then, which `predict` undoes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec, read_json
from kinema.families.noise_path import NoisePath
from kinema.families.parts import (
    CLIP_G,
    CLIP_G_TOKENIZER,
    CLIP_L_PROJECTED,
    CLIP_L_TOKENIZER,
    FLUX_VAE,
    LLAMA31_8B,
    LLAMA31_TOKENIZER,
    SCHEDULER,
    T5_TOKENIZER,
    T5_XXL,
)
from kinema.families.standard import StandardFamily
from kinema.families.steering import ABOVE_ONE
from kinema.families.text import quietly, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 128
"""Tokens of each encoder that the pipeline hands over by default."""
TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""

NETWORK = Layout([], same=True)
"""ComfyUI's files and the authors' have the names of diffusers."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:HiDreamImageTransformer2DModel",
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": FLUX_VAE,
    # Both CLIPs are stretched to 248 positions: those of other models do not fit.
    "text_encoder": replace(CLIP_L_PROJECTED, what="text encoder (Long-CLIP-L)", hub="HiDream-ai/HiDream-I1-Full"),
    "text_encoder_2": replace(CLIP_G, what="text encoder (Long-CLIP-G)", hub="HiDream-ai/HiDream-I1-Full"),
    "text_encoder_3": replace(T5_XXL, folder="text_encoder_3"),
    "text_encoder_4": LLAMA31_8B,
    "tokenizer": CLIP_L_TOKENIZER,
    "tokenizer_2": CLIP_G_TOKENIZER,
    "tokenizer_3": replace(T5_TOKENIZER, folder="tokenizer_3", beside="text_encoder_3"),
    "tokenizer_4": LLAMA31_TOKENIZER,
    "scheduler": SCHEDULER,
}


def _variant(name: str, steps: int, guidance: float, shift: float) -> Variant:
    return Variant(
        name,
        "image",
        17_105_733_184,
        tuple(PARTS),
        f"HiDream-ai/HiDream-I1-{name.title()}",
        SamplingDefaults(height=1024, width=1024, frames=1, steps=steps, guidance=guidance),
        pipeline="HiDreamImagePipeline",
        shift=shift,  # of the authors' sampler (inference.py)
        elsewhere=(("text_encoder_4", "meta-llama/Llama-3.1-8B-Instruct"),),
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("full", steps=50, guidance=5.0, shift=3.0),
        _variant("dev", steps=28, guidance=1.0, shift=6.0),
        _variant("fast", steps=16, guidance=1.0, shift=3.0),
    )
}


class HiDream(StandardFamily):
    """HiDream-I1 full, and its distilled variants dev and fast."""

    name = "hidream"
    low_guidance = ABOVE_ONE
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("double_stream_blocks", "single_stream_blocks")
    encoding_version = "hidream-1"
    encoded_text = (
        "prompt_embeds_t5",
        "negative_prompt_embeds_t5",
        "prompt_embeds_llama3",
        "negative_prompt_embeds_llama3",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    @property
    def path(self) -> NoisePath:
        return NoisePath("negative_velocity")

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        """The networks are alike: the scheduler beside them tells, else the name of the place."""
        scheduler = self._find("scheduler", weights=False)
        if scheduler is not None and scheduler.config is not None:
            settings = read_json(scheduler.config)
            if "UniPC" in settings.get("_class_name", ""):
                return "full"
            return "dev" if settings.get("shift", 0) > 4 else "fast"
        place = f"{found.hub} {found.place.parent.name}/{found.place.name}".lower()
        named = [name for name in self.variants if name in place]
        return named[0] if len(named) == 1 else None

    @property
    def text_length(self) -> int:
        """Tokens of each encoder that the network sees; CLIP is pooled."""
        return self.config.text_length or TEXT_LENGTH

    @cached_property
    def _llama_layers(self) -> int:
        """How many of Llama's layers the network sees, from the first."""
        return 1 + max(self.source("network").config["llama_layers"])

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        length = f"length {self.text_length}"
        layers = f"{length}, {self._llama_layers} layers"
        return (
            Encoding("clip_l", "caption", ("text_encoder", "tokenizer"), length),
            Encoding("clip_g", "caption", ("text_encoder_2", "tokenizer_2"), length),
            Encoding("t5", "caption", ("text_encoder_3", "tokenizer_3"), length),
            Encoding("llama", "caption", ("text_encoder_4", "tokenizer_4"), layers),
            LATENTS,
        )

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad(), quietly():
            if encoding.name == "latents":
                return self.encode_latents(parts["autoencoder"], samples)
            encoders = {"t5": self._encode_t5, "llama": self._encode_llama}
            read = encoders.get(encoding.name, self._encode_clip)
            return [read(encoding, parts, sample.caption) for sample in samples]

    def _encode_clip(self, encoding: Encoding, parts: Parts, caption: str) -> dict[str, Tensor]:
        """What one CLIP pools [C]."""
        encoder, tokenizer = (parts[part] for part in encoding.parts)
        pipeline = self.text_pipeline(parts)
        pooled = pipeline._get_clip_prompt_embeds(tokenizer, encoder, caption, self.text_length, encoder.device)
        return {encoding.name.replace("clip", "pooled"): pooled[0].cpu()}

    def _encode_t5(self, encoding: Encoding, parts: Parts, caption: str) -> dict[str, Tensor]:
        """[length, C] with its padding, which the network sees."""
        warn_if_cut(parts["tokenizer_3"], caption, self.text_length)
        pipeline, device = self.text_pipeline(parts), parts["text_encoder_3"].device
        return {"t5": pipeline._get_t5_prompt_embeds(caption, self.text_length, device)[0].cpu()}

    def _encode_llama(self, encoding: Encoding, parts: Parts, caption: str) -> dict[str, Tensor]:
        """[layers, length, C] with its padding, which the network sees. Each layer once, though many blocks see the
        last: of the published variants 32 layers, 32 MiB in bf16 at 128 tokens."""
        warn_if_cut(parts["tokenizer_4"], caption, self.text_length)
        pipeline, device = self.text_pipeline(parts), parts["text_encoder_4"].device
        layers = pipeline._get_llama3_prompt_embeds(caption, self.text_length, device)
        return {"llama": layers[: self._llama_layers, 0].cpu()}

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        pooled = [torch.stack(batch.tensors[name]) for name in ("pooled_l", "pooled_g")]
        conditioning = {
            "encoder_hidden_states_t5": torch.stack(batch.tensors["t5"]),
            "encoder_hidden_states_llama3": torch.stack(batch.tensors["llama"], dim=1),
            "pooled_embeds": torch.cat(pooled, dim=-1),
        }
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(p.dtype for name, p in network.named_parameters() if "x_embedder" in name)
        height, width = x_t.shape[-2:]
        inputs: dict[str, Any] = {"hidden_states": x_t[:, :, 0].to(dtype)}
        if height != width and self.tokens(x_t) > network.max_seq:  # type: ignore[operator]
            inputs = unpadded(inputs["hidden_states"])
        output = network(
            **inputs,
            timesteps=t.float() * TIME_SCALE,
            **{name: value.to(dtype) for name, value in conditioning.items()},
            return_dict=False,
        )[0]
        if output.shape[-2:] != (height, width):  # in training mode: [B, C, tokens, 4]
            output = output[:, :, : height * width // 4].unflatten(3, (2, 2)).unflatten(2, (height // 2, width // 2))
            output = output.transpose(3, 4).reshape(*output.shape[:2], height, width)
        return output[:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of attention and feed-forward, of all experts too."""
        block = r"(double|single)_stream_blocks\.\d+\.block"
        return (
            rf"{block}\.attn1\.to_(q|k|v|out)(_t)?",
            rf"{block}\.ff_i\.(shared_experts|experts\.\d+)\.w[123]",
            r"double_stream_blocks\.\d+\.block\.ff_t\.w[123]",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if config.model.text_encoder_4.path is None and (config.model.path or "").startswith("HiDream-ai/"):
            raise ConfigError(self._nowhere("text_encoder_4"))  # it is not published with the others

    @property
    def pipeline_class(self) -> Any:
        from kinema.families.hidream_pipeline import SizedHiDreamPipeline

        return SizedHiDreamPipeline

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.hidream_tiny import write_tiny

        return write_tiny(directory, variant, seed)


def unpadded(latents: Tensor) -> dict[str, Tensor]:
    """Arguments that hand over latents [B, C, H, W] as tokens: by itself the network pads pictures that are not square
    to a fixed length, and takes none that are longer."""
    import torch

    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
    ids = torch.zeros(rows, columns, 3, device=latents.device)
    ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=latents.device)
    return {
        "hidden_states": tokens.reshape(batch, rows * columns, 4 * channels),
        "hidden_states_masks": latents.new_ones(batch, rows * columns),
        "img_ids": ids.reshape(1, -1, 3).repeat(batch, 1, 1),
        "img_sizes": torch.tensor([[rows, columns]], device=latents.device).repeat(batch, 1),
    }
