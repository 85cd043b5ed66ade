"""HunyuanVideo-1.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs, picture

from kinema.families.base import Family

# The suite's prompts have no words in quotation marks (test_hunyuan_video15 has), and what the last block makes of
# the text goes nowhere.
UNUSED = (
    r"context_embedder_2\..*",
    r"transformer_blocks\.2\.(ff_context|attn\.to_add_out|attn\.add_q_proj|attn\.norm_added_q)\..*",
)
T2V_UNUSED = (*UNUSED, r"image_embedder\..*")  # there the picture's tokens are hidden


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo15(Case):
    family: str = "hunyuan_video15"
    frames: int = 9
    unused: tuple[str, ...] = UNUSED

    def arguments(self, guided: bool) -> dict[str, Any]:
        return {"image": picture(self.clip)} if "i2v" in self.variant else {}  # guidance is a part of the pipeline

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE if "distilled" not in self.variant and number % 2 else PROMPT]

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"][:, :32]  # the rest are the first frame and its mask

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
    *(HunyuanVideo15(variant=name, unused=T2V_UNUSED) for name in ("480p-t2v", "720p-t2v", "480p-t2v-distilled")),
    *(HunyuanVideo15(variant=name) for name in ("480p-i2v", "720p-i2v", "480p-i2v-distilled", "720p-i2v-distilled")),
    HunyuanVideo15(variant="480p-i2v-step-distilled"),
]
