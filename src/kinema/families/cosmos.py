"""What both generations of Cosmos share: text from the first T5-11B, one class of network, NVIDIA's guardrail."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec
from kinema.families.parts import SCHEDULER, T5_11B, T5_11B_TOKENIZER
from kinema.families.standard import StandardFamily
from kinema.families.tensors import SUFFIXES, tensor_shapes
from kinema.families.text import padded, warn_if_cut
from kinema.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TEXT_LENGTH = 512
"""Tokens of text that the network sees; what lies behind the caption is zero, and attended to."""
PIXELS_A_LATENT = 8
GUARDRAIL = "cosmos_guardrail"


def network_spec(layout: Layout) -> PartSpec:
    """The network of one generation; NVIDIA's own files begin each name with ``net.``."""

    def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return layout.from_original({name.removeprefix("net."): value for name, value in state.items()})

    return PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:CosmosTransformer3DModel",
        ("model.pt", "model-*.pt"),
        to_ours=to_ours,
    )


PARTS = {"text_encoder": T5_11B, "tokenizer": T5_11B_TOKENIZER, "scheduler": SCHEDULER}


def size_and_task(described: Mapping[str, Any], found: Found) -> tuple[int, bool] | None:
    """(width, whether a first frame is given) of a network, from its configuration or the shapes of its weights."""
    if "num_attention_heads" in described:
        width = described["num_attention_heads"] * described["attention_head_dim"]
        return width, described["in_channels"] > described["out_channels"]
    if not all(file.suffix in SUFFIXES for file in found.files):
        return None
    shapes = {name.removeprefix("net."): shape for name, shape in tensor_shapes(found.files).items()}
    width, inputs = shapes.get("x_embedder.proj.1.weight", (0, 0))
    given = {4 * (16 + 1): False, 4 * (16 + 1 + 1): True}.get(inputs)  # of patches, with the padding mask
    return None if given is None else (width, given)


class CosmosFamily(StandardFamily):
    """A generation of Cosmos. Where a first frame is given, it stands in the place of the first latent frame, and a
    mask beside x_t says so."""

    block_lists = ("transformer_blocks",)
    options = ("first_frame_p",)
    low_guidance = 1.0  # the pipelines ask for each branch by itself, and for one where the scale is 1

    # -- parts -----------------------------------------------------------------------------------------------------

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        stand_in_for_torchvision()
        return super().load(part, device, dtype)

    def empty(self, part: str) -> nn.Module:
        stand_in_for_torchvision()
        return super().empty(part)

    @property
    def batched_sampling(self) -> bool:  # type: ignore[override]
        """With a picture the pipelines take one prompt."""
        return not self.from_image

    def pipeline_modules(self, parts: Parts) -> dict[str, Any]:
        stand_in_for_torchvision()
        return super().pipeline_modules(parts) | {"safety_checker": parts.get("safety_checker") or _guardrail()}

    def validate(self, config: Config) -> None:
        super().validate(config)
        if config.preview.prompts and importlib.util.find_spec(GUARDRAIL) is None:
            raise ConfigError(f"preview.prompts: {_NEEDS_GUARDRAIL} Or leave the prompts out.")
        p = config.model.first_frame_p
        if p is not None and (not self.from_image or p == 0):
            told = "always" if self.from_image else "never"
            raise ConfigError(f"model.first_frame_p: {self.variant.name} is {told} given a frame. Leave the key out.")
        told_fps = self.variant.sampling.fps
        for buckets in config.bucket_settings if self.variant.modality == "video" else ():
            if max(buckets.lengths) == 1 or buckets.fps == told_fps:
                continue
            speed = "at their own rates" if buckets.fps is None else f"at {buckets.fps:g} frames a second"
            raise ConfigError(
                f"data.buckets.fps: videos are read {speed}, and the network is told {told_fps:g}. "
                f"Set data.buckets.fps = {told_fps:g}."
            )

    # -- data ------------------------------------------------------------------------------------------------------

    @property
    def text_length(self) -> int:
        """Tokens of text that the network sees."""
        return self.config.text_length or TEXT_LENGTH

    @property
    def first_frame_p(self) -> float:
        """Share of the clips whose first frame is given."""
        p = self.config.first_frame_p
        return float(self.from_image) if p is None else p

    def encodings(self) -> tuple[Encoding, ...]:
        return Encoding("text", "caption", ("text_encoder", "tokenizer"), f"length {self.text_length}"), LATENTS

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._encode_text(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _encode_text(self, parts: Parts, caption: str) -> Tensor:
        """[tokens, C]: the pipeline sets to zero what lies behind them."""
        encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
        warn_if_cut(tokenizer, caption, self.text_length)
        # The pipeline itself cannot be made without its guardrail.
        row = self.pipeline_class._get_t5_prompt_embeds(
            SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder),
            caption,
            max_sequence_length=self.text_length,
            device=encoder.device,
        )[0]
        count = min(len(tokenizer(caption).input_ids), self.text_length)
        return row[:count].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        text, _ = padded(batch.tensors["text"], self.text_length)
        conditioning: dict[str, Any] = {"encoder_hidden_states": text}
        if not self.from_image:
            return Prepared(latents, conditioning)
        given = torch.zeros_like(latents[:, :1])
        for row, index in enumerate(batch.indices):
            draw = torch.rand((), generator=generator(self.seed, batch.step, index, "first_frame"))
            given[row, :, 0] = float(draw < self.first_frame_p)
        return Prepared(latents, conditioning | {"condition_mask": given}, given)

    # -- the network -----------------------------------------------------------------------------------------------

    def call(self, network: nn.Module, inputs: Tensor, time: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The network's output for its own input [B, C, T, H, W] and its own time, with what the pipelines add."""
        dtype = network.get_parameter("patch_embed.proj.weight").dtype
        height, width = (PIXELS_A_LATENT * side for side in inputs.shape[3:])
        further: dict[str, Any] = {"fps": int(self.variant.sampling.fps)} if self.variant.modality == "video" else {}
        return network(
            hidden_states=inputs.to(dtype),
            timestep=time,
            padding_mask=inputs.new_zeros(1, 1, height, width, dtype=dtype),
            **{name: value.to(dtype) for name, value in conditioning.items()},
            **further,
            return_dict=False,
        )[0]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Attention and feed-forward layers, as NVIDIA's own LoRA (``lora_target_modules`` of cosmos-predict2)."""
        return (
            r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
            r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        )


_NEEDS_GUARDRAIL = (
    "the licence of Cosmos asks for NVIDIA's guardrail on what is sampled, and diffusers' pipelines refuse to work "
    f"without it. Install it: pip install {GUARDRAIL}."
)


def _guardrail() -> Any:
    if importlib.util.find_spec(GUARDRAIL) is None:
        raise UserError(f"Samples of Cosmos: {_NEEDS_GUARDRAIL}")
    from diffusers.pipelines.cosmos.pipeline_cosmos_text2world import CosmosSafetyChecker

    return CosmosSafetyChecker()


def stand_in_for_torchvision() -> None:
    """diffusers' network resizes its padding mask with torchvision, and where that is not installed leaves the name
    undefined; torch's own nearest-neighbour resizing, which torchvision calls, fills it."""
    from diffusers.models.transformers import transformer_cosmos
    from torch.nn import functional

    def resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
        return functional.interpolate(image, size=size, mode=interpolation)

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
