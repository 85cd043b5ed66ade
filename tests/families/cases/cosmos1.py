"""Cosmos 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from zoo import Case, Inputs, picture

from kinema.families.base import Family
from kinema.families.cosmos import stand_in_for_torchvision
from kinema.families.cosmos_tiny import Unguarded

DATA = 0.5
"""Standard deviation of the data in EDM's preconditioning."""


@dataclass(frozen=True, kw_only=True)
class Text(Case):
    family: str = "cosmos1"
    frames: int = 9
    last_sigma: float = 0.002

    def components(self, family: Family, directory: Path) -> dict[str, Any]:
        stand_in_for_torchvision()
        return {"safety_checker": Unguarded()}

    def sigma(self, inputs: Inputs) -> Tensor:
        """The noise level, [B, 1, 1, 1, 1]: the network is told a quarter of its logarithm."""
        return (4 * inputs["timestep"].double()).exp().view(-1, 1, 1, 1, 1)

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        sigma = self.sigma(inputs) * (1 - inputs["condition_mask"]) if family.from_image else self.sigma(inputs)
        x = inputs["hidden_states"] * (sigma**2 + DATA**2).sqrt()
        return (x / (1 + sigma)).float()

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        sigma = self.sigma(inputs)
        if not family.from_image:
            return (sigma / (1 + sigma)).float().flatten()
        return (sigma / (1 + sigma) * (1 - inputs["condition_mask"])).float()

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        """F of EDM's D = c_skip x + c_out F, for D = ``native``."""
        sigma = self.sigma(inputs)
        total = (sigma**2 + DATA**2).sqrt()
        x = inputs["hidden_states"] * total
        return ((native - DATA**2 / total**2 * x) * total / (sigma * DATA)).float()


@dataclass(frozen=True, kw_only=True)
class Image(Text):
    def arguments(self, guided: bool) -> dict[str, Any]:
        # Without the noise of 0.001 that the pipeline otherwise adds to the given frame.
        return super().arguments(guided) | {"image": picture(self.clip), "augment_sigma": 0.0}


CASES = [
    Text(variant="text2world-7b"),
    Text(variant="text2world-14b"),
    Image(variant="video2world-7b"),
    Image(variant="video2world-14b"),
]
