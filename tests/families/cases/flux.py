"""Flux.1 dev, schnell and Kontext."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from zoo import Case, Inputs, picture

from kinema.families.base import Family
from kinema.families.packing import pack, unpack


@dataclass(frozen=True, kw_only=True)
class Packed(Case):
    """Latents are packed into tokens, those of a control picture behind them; time is in [0, 1]."""

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        rows, columns = self.height // 16, self.width // 16
        return unpack(inputs["hidden_states"][:, : rows * columns], rows, columns)[:, :, None]

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["timestep"]

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return pack(native[:, :, 0])


@dataclass(frozen=True, kw_only=True)
class Flux(Packed):
    family: str = "flux"
    model: Mapping[str, Any] | None = None

    def arguments(self, guided: bool) -> dict[str, Any]:
        # The guidance of distilled models is an input; two calls a step come from a negative prompt with a scale.
        arguments: dict[str, Any] = {"guidance_scale": 3.5, "true_cfg_scale": 4.0 if guided else 1.0}
        if self.variant == "schnell":
            arguments["max_sequence_length"] = 256
        if self.controls:  # the pipeline would draw a square of 1024 x 1024, from a picture of a preferred size
            size = {"max_area": self.height * self.width, "_auto_resize": False}
            arguments |= {"image": picture(self.control_pictures[0]), **size}
        return arguments


CASES = [
    Flux(variant="dev", model={"guidance": 3.5}),
    Flux(variant="schnell"),
    Flux(variant="kontext-dev", model={"guidance": 3.5}, controls=1),
]
