"""The layouts of weight files, and which of them can hold what."""

from __future__ import annotations

from typing import Literal

LayoutName = Literal["diffusers", "comfyui", "kohya", "peft"]
AdapterType = Literal["lora", "dora", "lokr", "ia3"]

_NO_READER = "no version of it reads IA3"
_REASONS: dict[tuple[AdapterType, LayoutName], str] = {
    ("ia3", "diffusers"): f"{_NO_READER}; the layout `peft` holds it",
    ("ia3", "comfyui"): f"{_NO_READER}; the layout `peft` holds it, and `kinema merge` folds it into a checkpoint",
    ("ia3", "kohya"): "its names are those of low-rank and Kronecker factors; the layout `peft` holds it",
}


def why_not(kind: AdapterType | None, layout: LayoutName) -> str | None:
    """Why a layout cannot hold an adapter of this kind, or (None) a whole network; None if it can."""
    if kind is not None:
        return _REASONS.get((kind, layout))
    return "its names are those of adapters" if layout in ("kohya", "peft") else None


def default_layouts(kind: AdapterType | None) -> tuple[LayoutName, ...]:
    """The layouts that are written when nobody names one."""
    usual: tuple[LayoutName, ...] = ("diffusers", "comfyui")
    return tuple(layout for layout in usual if why_not(kind, layout) is None) or ("peft",)
