"""Qwen-Image and its edit variants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor
from transformers import Qwen2_5_VLProcessor
from zoo import Case, Inputs, picture

from kinema.families.base import Family
from kinema.families.packing import pack, unpack
from kinema.families.qwen_processor import load_qwen_processor

AREA = 32 * 64
# The edit pipelines bring control pictures to a million pixels, whatever is sampled. Here to those of a sample, so that
# thirty steps take seconds; test_qwen_image.py compares at the real size.
_dimensions = pipeline_qwenimage_edit.calculate_dimensions
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: _dimensions(AREA, ratio)
pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = AREA
pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 4 * AREA
# diffusers reads the processor through its class, which cannot be without torchvision (and its processor of videos).
Qwen2_5_VLProcessor.from_pretrained = lambda place, **_: load_qwen_processor(Path(place))


@dataclass(frozen=True, kw_only=True)
class QwenImage(Case):
    family: str = "qwen_image"
    width: int = 64
    comfyui_loader: bool = True
    # What the last block makes of the text is not looked at.
    unused: tuple[str, ...] = (
        r"transformer_blocks\.2\.attn\.(to_add_out|add_q_proj|norm_added_q)\..*",
        r"transformer_blocks\.2\.txt_mlp\..*",
    )

    def arguments(self, guided: bool) -> dict[str, Any]:
        pictures = [picture(one) for one in self.control_pictures]
        image = {"image": pictures if self.controls > 1 else pictures[0]} if pictures else {}
        return {"true_cfg_scale": 4.0 if guided else 1.0, **image}

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        rows, columns = self.height // 16, self.width // 16
        assert inputs["img_shapes"][0][0] == (1, rows, columns)
        return unpack(inputs["hidden_states"][:, : rows * columns], rows, columns)[:, :, None]

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return inputs["timestep"]

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        return pack(native[:, :, 0])


CASES = [
    QwenImage(variant="base", converter=dict),
    QwenImage(variant="edit", controls=1, converter=dict),
    QwenImage(variant="edit-plus", controls=2, converter=dict),
    QwenImage(variant="edit-2511", controls=2, converter=dict),
]
