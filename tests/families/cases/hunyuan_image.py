"""HunyuanImage-2.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo import NEGATIVE, PROMPT, Case, Inputs

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class HunyuanImage(Case):
    family: str = "hunyuan_image"
    height: int = 64
    width: int = 96
    # The suite's prompts have no words in quotation marks; test_hunyuan_image.py has.
    unused: tuple[str, ...] = (r"context_embedder_2\..*",)

    def arguments(self, guided: bool) -> dict[str, Any]:
        return {}  # the base's guidance is a part of the pipeline, the distilled's is 3.25 where nothing is said

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE if self.variant == "base" and number % 2 else PROMPT]

    def visible(self, inputs: Inputs) -> Inputs:
        """Text without padding."""
        shown = dict(inputs)
        for end in ("", "_2"):
            mask = shown.pop(f"encoder_attention_mask{end}").bool()
            rows = shown[f"encoder_hidden_states{end}"]
            shown[f"encoder_hidden_states{end}"] = [row[kept] for row, kept in zip(rows, mask, strict=True)]
        return shown

    def told(self, family: Family, conditioning: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
        end = inputs["timestep_r"]
        return conditioning if end is None else conditioning | {"t_end": end / 1000}


CASES = [
    HunyuanImage(variant="base"),
    HunyuanImage(variant="distilled", model={"guidance": 3.25}),
]
