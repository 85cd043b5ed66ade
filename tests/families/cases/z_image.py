"""Z-Image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class ZImage(Case):
    family: str = "z_image"
    comfyui_loader: bool = True

    def arguments(self, guided: bool) -> dict[str, Any]:
        return {"guidance_scale": 4.0 if guided else 0.0}

    def captions(self, number: int) -> list[str]:
        return [PROMPT, NEGATIVE]  # both in one call

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        return torch.stack(inputs["x"])

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return 1 - inputs["t"]

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return list(native.unbind(0))


CASES = [
    ZImage(variant=variant, converter=convert_z_image_transformer_checkpoint_to_diffusers)
    for variant in ("base", "turbo")
]
