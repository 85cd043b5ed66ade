"""``kinema merge``: adapters folded into base weights, as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.adapters.arithmetic import exact_type, merged_weight
from kinema.adapters.files import read_adapter
from kinema.adapters.inject import shifted
from kinema.adapters.model import Model, empty_modules, open_model, write_checkpoint
from kinema.adapters.state import Adapter
from kinema.config.layouts import LayoutName
from kinema.dtypes import torch_dtype
from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Folded:
    """An adapter and how far it is folded in."""

    adapter: Adapter
    factor: float
    layers: frozenset[str]
    shifts: dict[str, Tensor] = field(default_factory=dict)


def merge(
    base: str,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    to: LayoutName,
    *,
    family: str | None = None,
    variant: str | None = None,
    part: str = "network",
    dtype: str | None = None,
    shard_gb: float = 5.0,
) -> list[str]:
    """Write the weights of ``base`` with the adapters (files and factors) folded in; lines that say what was done.

    Computed in fp32, a block in memory at a time. UserError for adapters that do not fit.
    """
    if not adapters:
        raise UserError("Nothing to merge: name at least one --adapter FILE, or FILE:FACTOR.")
    model = open_model(base, family, variant, part)
    modules = empty_modules(model.family, part)
    folded: list[Folded] = []
    lines: list[str] = []
    for path, factor in adapters:
        found = read_adapter(path, model.family, modules).adapters
        if part not in found:
            raise UserError(f"{path} changes the {', '.join(found)}, not the {part}. Name what to merge with --part.")
        folded.append(Folded(found[part], factor, frozenset(found[part].layers)))
        lines.append(f"{path}: {found[part].kind} of {len(found[part].layers)} layers, factor {factor:g}")
        others = [one for one in found if one != part]
        lines += [f"  it also changes the {one}: merge that with --part {one}" for one in others]
    weights = model.weights()
    folded = [replace(one, shifts=_shifts(one.adapter, weights)) for one in folded]
    kind = None if dtype is None else torch_dtype(dtype)
    write_checkpoint(
        out,
        to,
        model,
        weights,
        lambda names: _merged(names, weights, folded, kind),
        metadata=_metadata(model, adapters),
        dtype=kind,
        shard_bytes=round(shard_gb * 1e9),
    )
    return [f"{base}: the {part} of {model.name}", *lines, f"wrote {out} ({to})"]


def _shifts(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {shifted(name, shift, weights): shift for name, shift in adapter.shifts.items()}


def _metadata(model: Model, adapters: Sequence[tuple[Path, float]]) -> dict[str, str]:
    merged = ", ".join(f"{path.name}:{factor:g}" for path, factor in adapters)
    return {"modelspec.architecture": model.name, "kinema.merged": merged}


def _merged(
    names: Sequence[str], weights: dict[str, Tensor], folded: Sequence[Folded], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """These tensors with every adapter folded in: in fp32 until all have been, then in their type."""
    from kinema.networks.unmade import made

    exact: dict[str, Tensor] = {}

    def now(name: str) -> Tensor:
        value = exact[name] if name in exact else made(weights[name])
        return value.to(exact_type(value.dtype))

    for one in folded:
        for name in names:
            layer, _, ending = name.rpartition(".")
            if ending == "weight" and layer in one.layers:
                keys = [key for key in (name, f"{layer}.bias") if key in names]
                bias = now(keys[1]) if len(keys) > 1 else None
                exact |= zip(keys, merged_weight(now(name), bias, one.adapter, layer, one.factor), strict=True)
        for name in one.shifts.keys() & set(names):
            exact[name] = now(name) + one.factor * one.shifts[name]
    typed = {name: value.to(dtype or weights[name].dtype) for name, value in exact.items()}
    return {name: typed[name] if name in typed else made(weights[name]) for name in names}
