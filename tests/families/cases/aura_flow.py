"""AuraFlow."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.loaders.single_file_utils import convert_auraflow_transformer_checkpoint_to_diffusers
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class AuraFlow(Case):
    family: str = "aura_flow"

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE, PROMPT]

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["timestep"]


CASES = [
    AuraFlow(variant=variant, converter=convert_auraflow_transformer_checkpoint_to_diffusers)
    for variant in ("v0.2", "v0.3")
]
