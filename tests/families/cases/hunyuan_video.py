"""HunyuanVideo. diffusers' converters hard-code the published width: test_hunyuan_video runs them there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from zoo import PROMPT, Case, Inputs, picture

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo(Case):
    family: str = "hunyuan_video"
    frames: int = 9
    model: dict[str, Any] = field(default_factory=lambda: {"guidance": 5.0})

    @property
    def from_image(self) -> bool:
        return self.variant.startswith("i2v")

    def arguments(self, guided: bool) -> dict[str, Any]:
        arguments = super().arguments(guided)
        if self.from_image:  # with guidance by two calls it would show LLaVA a black picture in the second
            return arguments | {"image": picture(self.clip)}
        return arguments | {"true_cfg_scale": 3.0 if guided else 1.0}

    def captions(self, number: int) -> list[str]:
        return [PROMPT] if self.from_image else super().captions(number)

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"][:, :16]  # the rest are the first frame and its mask

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        time = super().t(family, inputs)
        if self.variant != "i2v":
            return time
        each = time.view(-1, 1, 1, 1, 1).expand(-1, 1, *inputs["hidden_states"].shape[2:]).clone()
        each[:, :, 0] = 0  # the network itself knows that the first frame is given
        return each

    def visible(self, inputs: Inputs) -> Inputs:
        text = inputs["encoder_hidden_states"] * inputs["encoder_attention_mask"][..., None]
        return inputs | {"encoder_hidden_states": text}


CASES = [
    HunyuanVideo(variant="t2v"),
    HunyuanVideo(variant="i2v"),
    HunyuanVideo(variant="i2v-33ch", model={}),
]
