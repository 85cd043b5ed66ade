"""OmniGen2, with references and from text alone. Its pipeline is ours; golden tensors tie it to its authors'."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from zoo import NEGATIVE, PROMPT, Case, Inputs, picture

from kinema.families.base import Family
from kinema.families.qwen_processor import load_qwen_processor


@dataclass(frozen=True, kw_only=True)
class OmniGen2(Case):
    family: str = "omnigen2"
    variant: str = "omnigen2"
    controls: int = 2

    def pipeline_class(self, family: Family) -> Any:
        from kinema.networks.omnigen2_pipeline import OmniGen2Pipeline

        return OmniGen2Pipeline

    def components(self, family: Family, directory: Path) -> dict[str, Any]:
        # Its class cannot be without torchvision, and the processor of videos that needs it.
        return {"processor": load_qwen_processor(directory / "processor")}

    def arguments(self, guided: bool) -> dict[str, Any]:
        pictures = [picture(one) for one in self.control_pictures]
        return {"image": pictures, **super().arguments(guided)}

    def captions(self, number: int) -> list[str]:
        """All, then the negative text with the references, then without them; from text alone, both texts in turn."""
        calls = 3 if self.controls else 2
        return [PROMPT if number % calls == 0 else NEGATIVE]

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        return 1 - inputs["timestep"]

    def told(self, family: Family, conditioning: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
        """Guidance leads away from a call that is told no references."""
        if inputs["ref_image_hidden_states"] is None:
            return conditioning | {"ref_image_hidden_states": None}
        return conditioning


@dataclass(frozen=True, kw_only=True)
class FromText(OmniGen2):
    controls: int = 0
    # Nothing depends on what makes tokens of references where there is none.
    unused: tuple[str, ...] = (r"ref_image_(patch_embedder|refiner).*", "image_index_embedding")

    @property
    def id(self) -> str:
        return f"{super().id}.text"


CASES = [OmniGen2(converter=dict), FromText()]
