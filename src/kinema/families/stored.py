"""Parts whose frozen weights are stored in 8 or 4 bits: which layers are, and loading them so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from kinema.config.section import QUANTIZED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kinema.families.base import Family
    from kinema.networks.quantized import Kind


def load_quantized(family: Family, part: str, load: Callable[[], nn.Module], dtype: torch.dtype | None) -> nn.Module:
    """What ``load`` makes in this machine's memory, its layers rounded one by one: with weights that wait in their
    files, no more of the wider ones is there at a time than a layer."""
    from kinema.networks.mapped import leaving_weights_mapped, may_wait, settle
    from kinema.networks.quantized import quantize

    with leaving_weights_mapped():
        module = load()
    quantize(*_layers(family, part, module, dtype))
    if not may_wait():
        settle(module)
    return module


def quantized_bytes(family: Family, part: str, module: nn.Module, dtype: torch.dtype | None) -> dict[nn.Parameter, int]:
    """What the weights that are stored so take, scales too; {} for a part that is stored as it is loaded."""
    from kinema.networks.quantized import chosen, stored_bytes

    if _stored(family, part) not in QUANTIZED:
        return {}
    found = chosen(*_layers(family, part, module, dtype))
    return {layer.weight: stored_bytes(kind, layer.out_features, layer.in_features) for _, _, layer, kind in found}


def table_bytes(family: Family, part: str, module: nn.Module, dtype: torch.dtype | None) -> int:
    """What the tables of levels take of a part that is stored in nf4: each of its layers has one."""
    from kinema.networks.quantized import TABLE_BYTES, chosen

    if _stored(family, part) not in QUANTIZED:
        return 0
    return TABLE_BYTES * sum(kind == "nf4" for *_, kind in chosen(*_layers(family, part, module, dtype)))


def quantize_on_paper(family: Family, part: str, module: nn.Module, dtype: torch.dtype | None) -> None:
    """Let a part on the meta device compute as it will once it is loaded, in place: where it is stored in few bits,
    products make their weights."""
    from kinema.networks.quantized import quantize

    if _stored(family, part) in QUANTIZED:
        quantize(*_layers(family, part, module, dtype))


def _layers(
    family: Family, part: str, module: nn.Module, dtype: torch.dtype | None
) -> tuple[Iterable[nn.Module], Kind, Iterable[str]]:
    """Below what layers are stored so, in which format, and words in the names of those that are not: of networks the
    layers of the blocks, for what lies before and after them is small and seen by every token; of others all but those
    that give words their probabilities; and never what the libraries keep in float32."""
    from kinema.families.loading import kept_in_float32

    kind = cast("Kind", _stored(family, part))
    exact = kept_in_float32(module, dtype)
    if part.startswith("network"):
        return family.blocks(module).values(), kind, exact
    return [module], kind, exact | {"lm_head"}


def _stored(family: Family, part: str) -> str:
    from kinema.families.loading import part_config

    return part_config(family.config, part).dtype or ""
