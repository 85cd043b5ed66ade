"""Cosmos-Predict2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from torch import Tensor
from zoo import Case, Inputs, picture

from kinema.families.base import Family
from kinema.families.cosmos import stand_in_for_torchvision
from kinema.families.cosmos_tiny import Unguarded


@dataclass(frozen=True, kw_only=True)
class Picture(Case):
    family: str = "cosmos_predict2"
    last_sigma: float = 0.002
    converter: Any = convert_cosmos_transformer_checkpoint_to_diffusers

    def components(self, family: Family, directory: Path) -> dict[str, Any]:
        stand_in_for_torchvision()
        return {"safety_checker": Unguarded()}

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        time: Tensor = inputs["timestep"]
        return time

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return native


@dataclass(frozen=True, kw_only=True)
class Video(Picture):
    frames: int = 9

    def arguments(self, guided: bool) -> dict[str, Any]:
        return super().arguments(guided) | {"image": picture(self.clip)}

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        given: Tensor = inputs["condition_mask"]
        return inputs["timestep"] * (1 - given)  # the network is told a little noise in the given frame; it has none


CASES = [
    Picture(variant="text2image-2b"),
    Picture(variant="text2image-14b"),
    Video(variant="video2world-2b"),
    Video(variant="video2world-14b"),
]
