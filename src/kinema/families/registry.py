"""Families by name. Each is a module of this package, imported when it is asked for; other packages add theirs
through the entry-point group ``kinema.families``."""

from __future__ import annotations

from kinema.config.schema import ModelConfig
from kinema.families.base import Family
from kinema.plugins import Catalog

BUILT_IN: dict[str, str] = {
    "cosmos1": "kinema.families.cosmos1:Cosmos1",
    "cosmos_predict2": "kinema.families.cosmos_predict2:CosmosPredict2",
    "hunyuan_image": "kinema.families.hunyuan_image:HunyuanImage",
    "z_image": "kinema.families.z_image:ZImage",
    "flux": "kinema.families.flux:Flux",
    "chroma": "kinema.families.chroma:Chroma",
    "qwen_image": "kinema.families.qwen_image:QwenImage",
    "aura_flow": "kinema.families.aura_flow:AuraFlow",
    "hidream": "kinema.families.hidream:HiDream",
    "omnigen2": "kinema.families.omnigen2:OmniGen2",
    "open_sora": "kinema.families.open_sora:OpenSora",
    "lumina2": "kinema.families.lumina2:Lumina2",
    "sd3": "kinema.families.sd3:SD3",
    "sdxl": "kinema.families.sdxl:SDXL",
    "hunyuan_video15": "kinema.families.hunyuan_video15:HunyuanVideo15",
    "hunyuan_video": "kinema.families.hunyuan_video:HunyuanVideo",
    "ltx_video": "kinema.families.ltx_video:LTXVideo",
    "wan": "kinema.families.wan:Wan",
}


FAMILIES = Catalog("family", "model.family", "kinema.families", BUILT_IN)


def family_names() -> list[str]:
    """Names of all families, built in and installed."""
    return FAMILIES.names()


def family_class(name: str) -> type[Family]:
    """The class of a family; ConfigError with the nearest name if there is none."""
    return FAMILIES.load(name)


def open_family(config: ModelConfig, seed: int = 0) -> Family:
    """The family of a model configuration, bound to it; loads no weights. ``seed`` draws random weights."""
    return family_class(config.family)(config, seed)
