"""Layers of an adapter under the names of other layouts, through what the family knows of them.

Two functions do all of it: `to_original_layers` and `from_original_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from kinema.adapters.state import Adapter, lora_adapter
from kinema.errors import UserError
from kinema.families.layout import Layout, LoraFactors

if TYPE_CHECKING:
    from torch import Tensor


class Names(Protocol):
    """What a family knows about names (`Family` has all of it)."""

    def layout(self, part: str = "network") -> Layout:
        """The original layout of a part."""

    def kohya_prefix(self, part: str) -> str:
        """How the names of a part's layers begin in Kohya's layout."""

    def folder(self, part: str) -> str:
        """A part's name in a diffusers pipeline."""

    def expert(self, part: str) -> str:
        """What tells the files of one expert from those of the other; empty where there is one network."""


def original_name(layout: Layout, layer: str) -> str | None:
    """The original name of a layer, of the whole where several of ours are one there; None if it has none."""
    try:
        return layout.original_layer(layer)
    except KeyError:
        return None


def to_original_layers(adapter: Adapter, names: Names) -> Adapter:
    """The adapter by layer of the original layout. UserError for what cannot be written there."""
    layout = names.layout(adapter.part)
    nameless = [layer for layer in adapter.layers if original_name(layout, layer) is None]
    if nameless:
        raise UserError(
            f"{nameless[0]} has no name in the original layout ({len(nameless)} layers have none). Use the layout "
            "diffusers or peft, or name such layers in adapter.exclude."
        )
    if adapter.kind in ("lora", "dora"):
        found = lora_adapter(layout.adapter_to_original(adapter.lora()), adapter.part)
    else:
        found = _each(adapter, lambda layer, rows: layout.adapter_to_original({layer: _numbered(rows)}))
    return replace(found, shifts=layout.to_original(adapter.shifts))


def from_original_layers(adapter: Adapter, names: Names) -> Adapter:
    """The inverse of `to_original_layers`; layers that the original layout does not know keep their names."""
    layout = names.layout(adapter.part)
    if adapter.kind in ("lora", "dora"):
        found = lora_adapter(layout.adapter_from_original(adapter.lora()), adapter.part)
    else:
        found = _each(adapter, lambda layer, rows: layout.adapter_from_original({layer: _numbered(rows)}))
    return replace(found, shifts=layout.from_original(adapter.shifts))


def _numbered(rows: int) -> LoraFactors:
    """Factors whose B numbers its rows, so that it shows where each of them goes."""
    import torch

    count = torch.arange(1, rows + 1, dtype=torch.float64)
    return LoraFactors(torch.zeros(1, 1), count[:, None], 1.0)


def _each(adapter: Adapter, moved: Callable[[str, int], Mapping[str, LoraFactors]]) -> Adapter:
    """Kronecker products, layer by layer, with the rows that the one layout has where the other has the layer."""
    assert adapter.kind == "lokr", f"{adapter.kind} has no original layout"
    state: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for layer in adapter.layers:
        factors = adapter.factors(layer)
        size, block = _rows(factors)
        for name, numbered in moved(layer, size).items():
            rows = numbered.B[:, 0].long() - 1
            if bool((rows < 0).any()):
                raise UserError(
                    f"{layer} is a part of {name} in the original layout, and a Kronecker product (lokr) cannot be "
                    "written for a part. Use the layout diffusers or peft, or name the layer in adapter.exclude."
                )
            chosen = _take(factors, rows, block)
            if chosen is None:
                raise UserError(
                    f"{layer} has its outputs in another order in the other layout, in which this Kronecker product "
                    "(lokr) cannot be written: its small matrix does not divide them. Use the layout diffusers or peft."
                )
            state |= {f"{name}.{ending}": value for ending, value in chosen.items()}
            ranks[name], alphas[name] = adapter.ranks[layer], adapter.alphas[layer]
    return replace(adapter, state=state, ranks=ranks, alphas=alphas)


def _rows(factors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(outputs of the layer, how many of them belong to one row of w1)."""
    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"]
    if "lokr_t2" in factors:
        block = factors["lokr_w2_a"].shape[1]
    else:
        block = (factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"]).shape[0]
    return first.shape[0] * block, block


def _take(factors: Mapping[str, Tensor], rows: Tensor, block: int) -> dict[str, Tensor] | None:
    """Factors of these rows of the layer alone; None where they cut through a row of w1."""
    import torch

    if len(rows) % block:
        return None
    blocks = rows.view(-1, block)
    starts = blocks[:, :1]
    if bool((starts % block).any()) or not torch.equal(blocks, starts + torch.arange(block)):
        return None
    index = starts[:, 0] // block
    ending = "lokr_w1" if "lokr_w1" in factors else "lokr_w1_a"
    return {**factors, ending: factors[ending][index.to(factors[ending].device)]}


def flat_names(layers: Collection[str], prefix: str, layout: Layout) -> dict[str, tuple[bool, str]]:
    """Name with underscores -> (whether the layer is an original one, layer), for every layer of a network.

    Both the original names and diffusers' are flattened: Kohya's tools write the first, LyCORIS' wrapper the second.
    """
    table: dict[str, tuple[bool, str]] = {}
    for layer in layers:
        if (original := original_name(layout, layer)) is None:
            continue
        table[f"{prefix}_{original.replace('.', '_')}"] = (True, original)
    for start in (prefix, "lycoris", "lora_transformer"):
        for layer in layers:
            table.setdefault(f"{start}_{layer.replace('.', '_')}", (False, layer))
    return table
