"""Lumina-Image 2.0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from zoo import NEGATIVE, Case, Inputs

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class Lumina2(Case):
    family: str = "lumina2"
    variant: str = "image-2.0"

    def arguments(self, guided: bool) -> dict[str, Any]:
        """The pipeline puts its system prompt before the prompt alone; captions of training all have it."""
        from diffusers import Lumina2Pipeline

        system = Lumina2Pipeline(None, None, None, None, None).system_prompt
        negative = {"negative_prompt": f"{system} <Prompt Start> {NEGATIVE}"} if guided else {}
        return super().arguments(guided) | negative

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return 1 - inputs["timestep"]

    def visible(self, inputs: Inputs) -> Inputs:
        mask = inputs["encoder_attention_mask"].bool()
        text = inputs["encoder_hidden_states"] * mask[..., None]
        return {**inputs, "encoder_hidden_states": text, "encoder_attention_mask": mask}


CASES = [Lumina2()]
