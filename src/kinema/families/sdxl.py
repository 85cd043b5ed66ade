"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): text-to-image.

A convolutional network with attention on 4-channel latents, trained on the thousand steps of a variance-preserving
schedule. Text is CLIP-L beside CLIP-G, at the last layer but one; what CLIP-G pools joins the time together with the
picture's original size, its crop and its size. Inputs equal those of diffusers' StableDiffusionXLPipeline. Both text
encoders can train too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.data.transform import crop_offset
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.discrete import StepSchedule
from kinema.families.latents import LATENTS
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec, Source, read_json
from kinema.families.noise_path import Native, NoisePath
from kinema.families.parts import CLIP_G, CLIP_G_TOKENIZER, CLIP_L, CLIP_L_TOKENIZER, SCHEDULER, SDXL_VAE
from kinema.families.prediction import variance_preserving
from kinema.families.sdxl_layout import NETWORK, TEXT_ENCODER, TEXT_ENCODER_2, V_PREDICTION_MARKS, is_sdxl
from kinema.families.standard import StandardFamily
from kinema.families.steering import ABOVE_ONE
from kinema.families.tensors import NETWORK_INSIDE, is_inside, tensor_shapes
from kinema.families.text import warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

LENGTH = 77
"""Tokens of either CLIP, with both ends."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "unet",
        "diffusers:UNet2DConditionModel",
        ("sd_xl_base*.safetensors",),
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": replace(SDXL_VAE, originals=("sdxl_vae*.safetensors", "sd_xl_base*.safetensors")),
    "text_encoder": replace(CLIP_L, originals=("sd_xl_base*.safetensors",)),
    "text_encoder_2": replace(CLIP_G, originals=("sd_xl_base*.safetensors",)),
    "tokenizer": CLIP_L_TOKENIZER,
    "tokenizer_2": CLIP_G_TOKENIZER,
    "scheduler": SCHEDULER,
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
NATIVE: dict[str, tuple[Native, str]] = {
    "base-eps": ("eps", "epsilon"),
    "v-prediction": ("vp_velocity", "v_prediction"),
}
"""By variant: what the network predicts, in our words and in those of a scheduler's configuration."""


def _variant(name: str, hub: str, steps: int, guidance: float) -> Variant:
    return Variant(
        name,
        "image",
        2_567_463_684,
        tuple(PARTS),
        hub,
        SamplingDefaults(height=1024, width=1024, frames=1, steps=steps, guidance=guidance),
        pipeline="StableDiffusionXLPipeline",
        grid=32,  # the network halves the latents twice
        patch=(1, 4, 4),
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("base-eps", "stabilityai/stable-diffusion-xl-base-1.0", steps=40, guidance=5.0),
        _variant("v-prediction", "Laxhar/noobai-XL-Vpred-1.0", steps=28, guidance=5.0),
    )
}


class SDXL(StandardFamily):
    """Stable Diffusion XL and what was fine-tuned from it, with eps or velocity prediction."""

    name = "sdxl"
    low_guidance = ABOVE_ONE
    variants = VARIANTS
    parts = PARTS
    encoding_version = "sdxl-1"
    encoded_text = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    default_time = "native"

    # -- which variant, which path -----------------------------------------------------------------------------------

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        """By the scheduler's configuration beside the network, or by what a single file is marked with."""
        if described:
            scheduler = self._find("scheduler")
            known = read_json(scheduler.config) if scheduler and scheduler.config else {"prediction_type": ""}
            kind = _prediction(known) if described.get("addition_embed_type") == "text_time" else ""
            return next((name for name, (_, word) in NATIVE.items() if word == kind), None)
        if not is_sdxl(tensor_shapes(found.files)):
            return None
        marks = tuple(start + V_PREDICTION_MARKS[0] for start in ("", *NETWORK_INSIDE))
        return "v-prediction" if is_inside(found.place, marks) else "base-eps"

    @cached_property
    def schedule(self) -> StepSchedule:
        """The steps that the network was trained on, from the scheduler's configuration."""
        return StepSchedule.of(self.source("scheduler").config)

    @property
    def path(self) -> NoisePath:
        times = self.schedule.times
        return NoisePath(NATIVE[self.variant.name][0], times[0], times[-1])

    def native_time(self, u: Tensor) -> Tensor:
        return self.schedule.time_of(u)

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        texts = (Encoding(part, "caption", (part, TOKENIZERS[part])) for part in TOKENIZERS)
        return (*(text for text in texts if text.name not in self.trained_parts()), LATENTS)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "latents":
                latents = self.encode_latents(parts["autoencoder"], samples)
                return [{**row, "sizes": _sizes(sample)} for row, sample in zip(latents, samples, strict=True)]
            encoder, tokenizer = (parts[part] for part in encoding.parts)
            return [self._encode_text(encoding.name, encoder, tokenizer, sample.caption) for sample in samples]

    def _encode_text(self, part: str, encoder: Any, tokenizer: Any, caption: str) -> dict[str, Tensor]:
        """``part``: hidden states [77, C]; of CLIP-G also ``pooled`` [C]."""
        warn_if_cut(tokenizer, caption, LENGTH)
        hidden, pooled = _read(encoder, tokenizer, [caption])
        return {part: hidden[0].cpu()} | ({} if pooled is None else {"pooled": pooled[0].cpu()})

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        """Text encoders among ``networks`` read the captions here, with gradients; what the others made is in the
        batch."""
        import torch

        latents = torch.stack(batch.tensors["latents"])
        hidden: list[Tensor] = []
        pooled: Tensor | None = None
        for part in TOKENIZERS:
            if part in batch.tensors:
                states, pool = torch.stack(batch.tensors[part]), None
                if part == "text_encoder_2":
                    pool = torch.stack(batch.tensors["pooled"])
            else:
                assert networks is not None, f"the batch lacks what {part} makes of the captions"
                captions = [batch.caption(row, part) for row in range(len(batch))]
                states, pool = _read(networks[part], self._tokenizers[part], captions)
            hidden.append(states)
            pooled = pool if pool is not None else pooled
        states = torch.cat([one.to(hidden[-1].dtype) for one in hidden], dim=-1)
        added = {"text_embeds": pooled, "time_ids": torch.stack(batch.tensors["sizes"])}
        return Prepared(latents, {"encoder_hidden_states": states, "added_cond_kwargs": added})

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        """For the text encoders that train: loaded when the first of them runs."""
        return {part: self.load(tokenizer, "cpu", None) for part, tokenizer in TOKENIZERS.items()}

    # -- the networks ----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        dtype = next(network.get_submodule("conv_in").parameters()).dtype
        scale = variance_preserving(t)[2].view(-1, 1, 1, 1)
        added = conditioning["added_cond_kwargs"]
        output = network(
            (x_t[:, :, 0] / scale).to(dtype),
            self.schedule.step_at(t).float(),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
            added_cond_kwargs={**added, "text_embeds": added["text_embeds"].to(dtype)},
            return_dict=False,
        )[0]
        return output[:, :, None]

    def trainable_parts(self) -> tuple[str, ...]:
        return ("network", *TOKENIZERS)

    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        """Of the network every residual block, every transformer block and every change of resolution; of a text
        encoder its layers."""
        from torch import nn

        found: dict[str, nn.ModuleList] = {}
        if not hasattr(network, "down_blocks"):
            name = next(name for name, _ in network.named_modules() if name.endswith("encoder.layers"))
            return {name: network.get_submodule(name)}  # type: ignore[dict-item]
        for level in _levels(network):
            block = network.get_submodule(level)
            if not any(True for _ in block.parameters()):  # another stage of a pipeline has it
                continue
            for i, resnet in enumerate(block.resnets):  # type: ignore[arg-type, union-attr]
                attention = i - 1 if level == "mid_block" else i
                read = [(f"{level}.resnets.{i}", nn.ModuleList([resnet]))]
                if 0 <= attention < len(getattr(block, "attentions", ())):
                    name = f"{level}.attentions.{attention}.transformer_blocks"
                    read.insert(level != "mid_block", (name, network.get_submodule(name)))  # type: ignore[arg-type]
                found.update(read)
            for kind in ("downsamplers", "upsamplers"):
                if getattr(block, kind, None) is not None:
                    found[f"{level}.{kind}"] = getattr(block, kind)
        return found

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """All linear layers of attention and feed-forward, and those around them in the network."""
        if part in TOKENIZERS:
            return (r"encoder\.layers\.\d+\.self_attn\.([qkv]|out)_proj", r"encoder\.layers\.\d+\.mlp\.fc[12]")
        block = r"attentions\.\d+\.transformer_blocks\.\d+"
        return (
            rf"{block}\.attn[12]\.(to_[qkv]|to_out\.0)",
            rf"{block}\.ff\.net\.(0\.proj|2)",
            r"attentions\.\d+\.proj_(in|out)",
        )

    # -- checks and other tools --------------------------------------------------------------------------------------

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.config.text_length not in (None, LENGTH):
            raise ConfigError(
                f"model.text_length: {self.name} reads {LENGTH} tokens of text, no more, no fewer; leave the key out."
            )
        found = self._find("scheduler") if self.is_here("scheduler") else None
        asked = NATIVE[self.variant.name][1]
        if found and found.config and (kept := _prediction(read_json(found.config))) != asked:
            log.warning(
                'model.variant = "%s" predicts "%s", and %s is made for "%s": the variant\'s own schedule is used. If '
                "that is wrong, leave model.variant out.",
                *(self.variant.name, asked, found.config, kept),
            )

    def source(self, part: str) -> Source:
        """A scheduler's configuration of another prediction than the variant's gives way to the shipped one."""
        source = super().source(part)
        shipped = self._shipped(self.variant.name, self.spec(part))
        if part != "scheduler" or shipped is None or _prediction(source.config) == NATIVE[self.variant.name][1]:
            return source
        return replace(source, config=read_json(shipped))

    def layout(self, part: str = "network") -> Layout:
        return {"network": NETWORK, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2}[part]

    def to_original(self, state: Mapping[str, Tensor], part: str = "network") -> dict[str, Tensor]:
        import torch

        result = super().to_original(state, part)
        if part == "network" and NATIVE[self.variant.name][0] == "vp_velocity":
            ends_in_noise = self.schedule.signal[-1] == 0
            result |= {mark: torch.zeros(0) for mark in V_PREDICTION_MARKS[: 1 + ends_in_noise]}
        return result

    def kohya_prefix(self, part: str) -> str:
        return {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.get(part, "lora_unet")

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.sdxl_tiny import write_tiny

        return write_tiny(directory, NATIVE[variant][1], seed)


def _prediction(scheduler: Mapping[str, Any]) -> str:
    """What a scheduler's configuration says that the network predicts; diffusers' default is noise."""
    return str(scheduler.get("prediction_type", "epsilon"))


def _levels(network: nn.Module) -> list[str]:
    down, up = (len(getattr(network, name)) for name in ("down_blocks", "up_blocks"))
    return [*(f"down_blocks.{i}" for i in range(down)), "mid_block", *(f"up_blocks.{i}" for i in range(up))]


def _sizes(sample: Sample) -> Tensor:
    """The six numbers that the network is told, float32: height and width of the file before it was scaled, how much
    was cropped above and to the left, height and width of the result (section 2.2 of the paper)."""
    import torch

    assert sample.pixels is not None
    height, width = sample.pixels.shape[-2:]
    size = sample.size or (height, width)
    return torch.tensor([*size, *crop_offset(size, (height, width)), height, width], dtype=torch.float32)


def _read(encoder: Any, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """What a CLIP makes of captions: the hidden states before its last layer [B, 77, C], and what it pools [B, C'] if
    it projects that."""
    tokens = tokenizer(list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    output = encoder(tokens.input_ids.to(next(encoder.parameters()).device), output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)
