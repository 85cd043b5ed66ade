"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from zoo import NEGATIVE, PROMPT, Case


@dataclass(frozen=True, kw_only=True)
class SD3(Case):
    family: str = "sd3"
    # The last block's text is only attended to: its queries have no output.
    unused: tuple[str, ...] = (r"transformer_blocks\.2\.attn\.(add_q_proj|norm_added_q)\..*",)

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE, PROMPT]


CASES = [
    SD3(variant=variant, converter=convert_sd3_transformer_checkpoint_to_diffusers)
    for variant in ("sd3-medium", "sd3.5-medium", "sd3.5-large")
]
