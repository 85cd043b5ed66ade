"""Families by name. Each is a module of this package, imported when it is asked for; other packages add theirs
through the entry-point group ``kinema.families``."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from kinema.config.schema import ModelConfig
from kinema.errors import ConfigError
from kinema.families.base import Family
from kinema.suggest import did_you_mean

BUILT_IN: dict[str, str] = {
    "z_image": "kinema.families.z_image:ZImage",
    "flux": "kinema.families.flux:Flux",
    "chroma": "kinema.families.chroma:Chroma",
    "qwen_image": "kinema.families.qwen_image:QwenImage",
    "aura_flow": "kinema.families.aura_flow:AuraFlow",
    "sd3": "kinema.families.sd3:SD3",
    "ltx_video": "kinema.families.ltx_video:LTXVideo",
    "wan": "kinema.families.wan:Wan",
}


def family_names() -> list[str]:
    """Names of all families, built in and installed."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="kinema.families"))})


def family_class(name: str) -> type[Family]:
    """The class of a family; ConfigError with the nearest name if there is none."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group="kinema.families"):
        if point.name == name:
            return point.load()
    names = family_names()
    raise ConfigError(
        f"model.family: there is no family '{name}'{did_you_mean(name, names)} Known: {', '.join(names)}."
    )


def open_family(config: ModelConfig, seed: int = 0) -> Family:
    """The family of a model configuration, bound to it; loads no weights. ``seed`` draws random weights."""
    return family_class(config.family)(config, seed)
