"""Open-Sora, told the first frame, and from text alone. Its pipeline is ours; golden tensors tie it to its authors'."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs, picture

from kinema.families.base import Family
from kinema.networks.open_sora import pack, unpack


@dataclass(frozen=True, kw_only=True)
class OpenSora(Case):
    family: str = "open_sora"
    height: int = 64
    width: int = 96
    frames: int = 9
    model: dict[str, Any] = field(default_factory=lambda: {"conditions": {"i2v_head": 1}})

    def pipeline_class(self, family: Family) -> Any:
        from kinema.families.open_sora_pipeline import OpenSoraPipeline

        return OpenSoraPipeline

    def mend(self, pipeline: Any) -> None:
        if isinstance(getattr(pipeline.vae, "use_framewise_encoding", None), bool):
            pipeline.vae.use_framewise_encoding = pipeline.vae.use_framewise_decoding = False  # as its authors use it
        pipeline.vae.enable_tiling()

    @property
    def from_image(self) -> bool:
        assert self.model is not None
        return "i2v_head" in self.model["conditions"]

    def arguments(self, guided: bool) -> dict[str, Any]:
        """Frames are given with guidance alone: a sample's own would be put in place of what the network makes."""
        arguments = super().arguments(guided)
        if self.from_image and guided:
            arguments |= {"references": [picture(self.clip)], "image_guidance_scale": 3.0}
        return arguments

    def captions(self, number: int) -> list[str]:
        """In one call: the prompt, then the negative text, with the frame and without where there is one."""
        return [PROMPT, NEGATIVE, NEGATIVE] if self.from_image else [PROMPT, NEGATIVE]

    def _size(self, family: Family) -> tuple[int, int, int]:
        side = family.grid // family.variant.patch[1]
        return family.lengths.latents(self.frames), self.height // side, self.width // side

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        return unpack(inputs["hidden_states"], self._size(family), family.variant.patch[1])

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["timestep"]

    def told(self, family: Family, conditioning: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
        """Guidance leads away from a call that is told no frames."""
        cond = conditioning["cond"]
        if self.from_image and len(cond) == 3:
            return conditioning | {"cond": torch.cat([cond[:2], torch.zeros_like(cond[2:])])}
        return conditioning

    def visible(self, inputs: Inputs) -> Inputs:
        """No frames are zeros, and the text is at position 0: both may be said or left out."""
        cond, places = inputs["cond"], inputs["txt_ids"]
        assert places is None or not places.any()
        nothing = {"cond": None} if cond is not None and not cond.any() else {}
        return inputs | nothing | {"txt_ids": None}

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Tensor:
        return pack(native, family.variant.patch[1])


@dataclass(frozen=True, kw_only=True)
class Dense(OpenSora):
    variant: str = "v2-dc"
    frames: int = 12

    def encoded(self, autoencoder: Any, clip: Tensor) -> Tensor:
        """No posterior."""
        return autoencoder.encode(clip)


@dataclass(frozen=True, kw_only=True)
class FromText(OpenSora):
    """Trained on text alone: what makes tokens of given frames sees zeros."""

    variant: str = "v2"
    model: dict[str, Any] = field(default_factory=lambda: {"conditions": {"t2v": 1}})
    unused: tuple[str, ...] = (r"cond_in\.weight",)

    @property
    def id(self) -> str:
        return f"{super().id}.text"


CASES = [OpenSora(variant="v2"), FromText(), Dense()]
