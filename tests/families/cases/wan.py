"""Wan 2.1 and 2.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor
from zoo import Case, Inputs, picture

from kinema.families.base import Family


@dataclass(frozen=True, kw_only=True)
class Wan(Case):
    frames: int = 9
    family: str = "wan"
    comfyui_loader: bool = True

    def arguments(self, guided: bool) -> dict[str, Any]:
        further: dict[str, Any] = {}
        if "i2v" in self.variant.replace("ti2v", "") or self.variant.startswith("flf2v"):
            further["image"] = picture(self.clip)
        if self.variant.startswith("flf2v"):
            further["last_image"] = picture(self.clip, -1)
        return super().arguments(guided) | further

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        hidden: Tensor = inputs["hidden_states"]
        return hidden[:, :16] if hidden.shape[1] in (16, 36) else hidden  # the rest: the mask and the given frames

    def exact_t(self, pipeline: Any, step: int, t: Tensor) -> Tensor:
        sigma = pipeline.scheduler.sigmas[step].to(t)  # the network is told whole thousandths
        return sigma.where(t > 0, t)


@dataclass(frozen=True, kw_only=True)
class PerToken(Wan):
    """A time for each token; one latent is 16 x 16 pixels, a token two by two of them."""

    frames: int = 5
    height: int = 64
    width: int = 64

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        time: Tensor = inputs["timestep"] / 1000
        if not family.from_image:
            assert (time == time[:, :1]).all()
            return time[:, 0]
        batch, _, frames, height, width = inputs["hidden_states"].shape
        grid = time.view(batch, 1, frames, height // 2, width // 2)
        return grid.repeat_interleave(2, 3).repeat_interleave(2, 4)


def convert_with_positions(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter does not know the image embedding's table of positions; its conversion script does."""
    positions = original.pop("img_emb.emb_pos")
    converted: dict[str, Tensor] = convert_wan_transformer_to_diffusers(original)
    return converted | {"condition_embedder.image_embedder.pos_embed": positions}


CASES = [
    Wan(variant="t2v-1.3b", converter=convert_wan_transformer_to_diffusers),
    Wan(variant="t2v-14b", converter=convert_wan_transformer_to_diffusers),
    Wan(variant="i2v-14b-480p", converter=convert_wan_transformer_to_diffusers),
    Wan(variant="i2v-14b-720p", converter=convert_wan_transformer_to_diffusers),
    Wan(variant="flf2v-14b-720p", converter=convert_with_positions),
    Wan(variant="t2v-a14b", converter=convert_wan_transformer_to_diffusers),
    Wan(variant="i2v-a14b", converter=convert_wan_transformer_to_diffusers),
    PerToken(variant="ti2v-5b", converter=convert_wan_transformer_to_diffusers),
    PerToken(variant="ti2v-5b-i2v", converter=convert_wan_transformer_to_diffusers),
]
