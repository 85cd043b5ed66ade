"""``kinema extract``: a LoRA from the difference of two checkpoints.

The best approximation of rank r to a matrix, in the Frobenius norm, is the sum of its r first singular triples (Eckart
and Young 1936): B = U sqrt(S), A = sqrt(S) V^T.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.adapters.model import check_suffix, open_model
from kinema.adapters.state import lora_adapter
from kinema.adapters.store import new_path
from kinema.adapters.targets import adaptable_modules, match_patterns
from kinema.adapters.write import DIFFUSERS_FILE, file_metadata, save_adapter
from kinema.config.layouts import LayoutName
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.layout import LoraFactors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Extraction:
    """What was found."""

    layers: dict[str, LoraFactors] = field(default_factory=dict)
    energy: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Layer -> (squared norm of its difference, share of it that was kept)."""
    unchanged: int = 0
    others: dict[str, float] = field(default_factory=dict)
    """Changed tensors that a LoRA cannot hold -> squared norm of their difference."""


def extract(
    base: str,
    tuned: str,
    out: Path,
    to: LayoutName,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] = (),
    family: str | None = None,
    variant: str | None = None,
    part: str = "network",
    dtype: str | None = None,
    device: str = "cpu",
) -> list[str]:
    """Write the LoRA that leads from ``base`` to ``tuned``; lines that say how much of the difference it keeps.

    ``rank``: of every layer, at most; ``energy``: as many singular values as it takes to keep this share of each
    layer's squared norm (with both, no more than ``rank``). One layer is in memory at a time.
    """
    import torch

    from kinema.networks.unmade import made

    if rank is None and energy is None:
        raise UserError("How much to keep? Give --rank N, --energy SHARE (such as 0.95), or both.")
    first = open_model(base, family, variant, part)
    second = open_model(tuned, first.family.name, first.family.variant.name, part)
    modules = adaptable_modules(first.network)
    chosen = match_patterns(modules, targets, "--target") if targets else list(modules)
    before, after = first.weights(), second.weights()
    found = Extraction()
    for name, old in before.items():
        layer, _, ending = name.rpartition(".")
        delta = made(after[name]).to(device, torch.float32) - made(old).to(device, torch.float32)
        size = float(delta.square().sum(dtype=torch.float64))
        if ending == "weight" and layer in chosen:
            if size == 0:
                found.unchanged += 1
                continue
            factors, kept = truncated(delta, rank, energy)
            found.layers[layer] = factors
            found.energy[layer] = (size, kept)
        elif size:
            found.others[name] = size
    if not found.layers:
        raise UserError(f"{tuned} and {base} do not differ in any layer that a LoRA can change.")
    _save(found, out, to, first.family, part, base, dtype)
    return [*report(found), f"wrote {out} ({to})"]


def truncated(delta: Tensor, rank: int | None, energy: float | None) -> tuple[LoraFactors, float]:
    """The best low-rank approximation of ``delta`` [out, in, ...], with alpha = rank, and the share of the squared norm
    that it keeps."""
    import torch

    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    squares = s.double().square()
    shares = squares.cumsum(0) / squares.sum()
    count = len(s)
    if energy is not None:
        count = min(count, int((shares < energy - 1e-12).sum()) + 1)
    count = min(count, rank or count)
    root = s[:count].sqrt()
    a = (root[:, None] * v[:count]).reshape(count, *delta.shape[1:])
    b = (u[:, :count] * root).reshape(-1, count, *[1] * (delta.ndim - 2))
    return LoraFactors(a.cpu().contiguous(), b.cpu().contiguous(), float(count)), float(shares[count - 1])


def report(found: Extraction) -> list[str]:
    """Lines for people: kinds of layers (numbers of blocks aside), their ranks, the share of the difference kept."""
    kinds: dict[str, list[str]] = {}
    for layer in found.layers:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", layer), []).append(layer)
    width = max(len(kind) for kind in kinds)
    lines = [f"{'layers':<{width}}  count  rank      kept  least"]
    for kind, layers in kinds.items():
        ranks = sorted(found.layers[layer].rank for layer in layers)
        shown = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"
        least = min(found.energy[layer][1] for layer in layers)
        lines.append(f"{kind:<{width}}  {len(layers):>5}  {shown:<8}  {_kept(found, layers):.1%}  {least:.1%}")
    lines.append(
        f"kept of all that a LoRA can hold: {_kept(found, list(found.layers)):.2%} (share of the squared norm)"
    )
    if found.unchanged:
        lines.append(f"{found.unchanged} layers are the same in both and were left out")
    if found.others:
        total = sum(size for size, _ in found.energy.values()) + sum(found.others.values())
        lost = sum(found.others.values()) / total
        lines.append(
            f"not held by a LoRA: {len(found.others)} tensors that differ too, for instance {next(iter(found.others))} "
            f"({lost:.2%} of the whole difference)"
        )
    return lines


def _kept(found: Extraction, layers: Sequence[str]) -> float:
    sizes = [found.energy[layer] for layer in layers]
    return sum(size * kept for size, kept in sizes) / sum(size for size, _ in sizes)


def _save(
    found: Extraction, out: Path, to: LayoutName, family: Family, part: str, base: str, dtype: str | None
) -> None:
    if to == "diffusers" and out.suffix != ".safetensors":
        out /= DIFFUSERS_FILE
    elif to != "peft":
        check_suffix(out, "comfyui")
    metadata = file_metadata(
        title=out.stem,
        base_model=base,
        architecture=f"{family.name}/{family.variant.name}/lora",
        config_hash="",
        step=0,
    )
    with new_path(out) as partial:
        kind = None if dtype is None else torch_dtype(dtype)
        save_adapter(partial, to, [lora_adapter(found.layers, part)], family, metadata=metadata, dtype=kind)
