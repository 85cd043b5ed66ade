"""LTX-Video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs, picture

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class LTXVideo(Case):
    family: str = "ltx_video"
    height: int = 64
    width: int = 96
    frames: int = 17

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.frames - 1) // 8 + 1, self.height // 32, self.width // 32

    def arguments(self, guided: bool) -> dict[str, Any]:
        image = {"image": picture(self.clip)} if self.variant.startswith("i2v") else {}
        if image and not self.variant.endswith(("0.9", "0.9.1")):
            image["image_cond_noise_scale"] = 0.0  # noise on the given frame is an option of sampling
        return super().arguments(guided) | image

    def captions(self, number: int) -> list[str]:
        return [NEGATIVE, PROMPT]

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"].transpose(1, 2).unflatten(2, self.sizes)

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        time: Tensor = inputs["timestep"] / 1000
        if time.ndim == 2 and time.shape[1] > 1:
            return time[:, None].unflatten(2, self.sizes)
        return time.flatten()

    def visible(self, inputs: Inputs) -> Inputs:
        text = inputs["encoder_hidden_states"] * inputs["encoder_attention_mask"][..., None]
        return inputs | {"encoder_hidden_states": text}

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return native.flatten(2).transpose(1, 2)


CASES = [
    LTXVideo(variant=f"{kind}-{version}", converter=convert_ltx_transformer_checkpoint_to_diffusers)
    for version in ("2b-0.9", "2b-0.9.1", "2b-0.9.5", "13b-0.9.7")
    for kind in ("t2v", "i2v")
]
