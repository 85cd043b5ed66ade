"""HiDream-I1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import convert_hidream_transformer_to_diffusers
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class HiDream(Case):
    family: str = "hidream"
    # Of ComfyUI's files its loader knows the names, but not the alpha that ours carry.

    def mend(self, pipeline: Any) -> None:
        """It stretches every size to an area of 1024 x 1024 pixels. The sampler of the distilled variants draws fresh
        noise in every step; Euler's stays on one path."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipeline.default_sample_size = math.sqrt(self.height * self.width) * 1.001 / 8
        if self.variant != "full":
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.shift)

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE, PROMPT]

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["timesteps"] / 1000

    def exact_t(self, pipeline: Any, step: int, t: Tensor) -> Tensor:
        return pipeline.scheduler.sigmas[step].to(t.dtype).expand(t.shape)  # UniPC tells whole thousandths


CASES = [
    HiDream(variant=variant, converter=convert_hidream_transformer_to_diffusers) for variant in ("full", "dev", "fast")
]
