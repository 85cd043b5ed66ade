"""Stable Diffusion XL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs

from kinema.families.base import Family


def _converted(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter wants the prefix of whole checkpoints, and the network's configuration."""
    whole = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    return convert_ldm_unet_checkpoint(whole, {"layers_per_block": 2, "addition_embed_type": "text_time"})


@dataclass(frozen=True, kw_only=True)
class SDXL(Case):
    family: str = "sdxl"
    height: int = 64
    width: int = 96

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE, PROMPT]

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        t = self.t(family, inputs)
        return inputs["sample"][:, :, None] * ((1 - t).square() + t.square()).sqrt().view(-1, 1, 1, 1, 1)

    def t(self, family: Any, inputs: Inputs) -> Tensor:
        step = inputs["timestep"].expand(len(inputs["sample"]))
        return family.schedule.time_at(step).float()

    def visible(self, inputs: Inputs) -> Inputs:
        # The pipeline gives one step for the whole batch, we one for each sample.
        return {**inputs, "timestep": inputs["timestep"].expand(len(inputs["sample"]))}

    def exact_t(self, pipeline: Any, step: int, t: Tensor) -> Tensor:
        sigma = pipeline.scheduler.sigmas[step].to(t)  # 4096 where there is no signal
        return (sigma / (1 + sigma)).expand_as(t)

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return native[:, :, 0]


CASES = [SDXL(variant=variant, converter=_converted, comfyui_loader=False) for variant in ("base-eps", "v-prediction")]
