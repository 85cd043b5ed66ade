"""What the factors of one layer say of themselves: whether they are complete, their rank and alpha, their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from kinema.adapters.state import IA3, LORA_A, LORA_B, MAGNITUDE, Adapter

if TYPE_CHECKING:
    from torch import Tensor


def lokr_sizes(factors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a, c), (b, d)): sizes of w1 and w2; the layer has a b outputs and c d inputs (times its kernel, where w2 is a
    product)."""
    w1, w2 = factors.get("lokr_w1"), factors.get("lokr_w2")
    first = w1.shape if w1 is not None else (factors["lokr_w1_a"].shape[0], factors["lokr_w1_b"].shape[1])
    if w2 is not None:
        second = w2.shape
    elif "lokr_t2" in factors:
        second = (factors["lokr_w2_a"].shape[1], factors["lokr_w2_b"].shape[1])
    else:
        second = (factors["lokr_w2_a"].shape[0], factors["lokr_w2_b"].shape[1])
    return (first[0], first[1]), (second[0], second[1])


def is_whole(kind: str, factors: Mapping[str, Tensor]) -> bool:
    if kind in ("lora", "dora"):
        return factors[LORA_A].shape[0] == factors[LORA_B].shape[1]
    if kind == "ia3":
        return True
    pairs = all(("lokr_w1_a" in factors) == ("lokr_w1_b" in factors) for _ in (1, 2))
    return pairs and all(
        (f"lokr_w{i}" in factors) != ({f"lokr_w{i}_a", f"lokr_w{i}_b"} <= set(factors)) for i in (1, 2)
    )


def rank_and_alpha(
    kind: str, layer: str, factors: Mapping[str, Tensor], given: float | None, config: Mapping[str, Any] | None
) -> tuple[int, float]:
    """Rank and alpha of a layer: the file's own alpha, else PEFT's configuration, else the rank (a scale of 1)."""
    if kind == "lokr":
        inner = factors.get("lokr_w2_b", factors.get("lokr_w1_b"))
        if inner is None:
            given = None  # LyCORIS ignores alpha where both matrices are whole
        rank = max(lokr_sizes(factors)[1]) if inner is None else inner.shape[0]
    else:
        rank = factors[LORA_A].shape[0]
    if given is not None or not config:
        return rank, float(rank) if given is None else given
    alpha = float(_of_pattern(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha", rank))))
    said = int(_of_pattern(config, "rank_pattern", layer, config.get("r", rank)))
    if kind == "lokr":
        return said, alpha
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha  # alpha / sqrt(rank), arXiv 2312.03732


def _of_pattern(config: Mapping[str, Any], key: str, layer: str, usual: Any) -> Any:
    patterns = config.get(key) or {}
    return next((value for one, value in patterns.items() if re.match(rf"(.*\.)?({one})$", layer)), usual)


def fitted(adapter: Adapter, layer: str, shape: tuple[int, ...]) -> dict[str, Tensor] | None:
    """A layer's factors for a weight of this shape; None if they do not fit. Some tools write linear layers as 1 x 1
    convolutions, or the other way round."""
    factors = adapter.factors(layer)
    if adapter.kind == "lokr":
        (a, c), (b, d) = lokr_sizes(factors)
        kernel = prod(factors["lokr_w2"].shape[2:]) if "lokr_w2" in factors else 1
        kernel = prod(factors["lokr_t2"].shape[2:]) if "lokr_t2" in factors else kernel
        return factors if a * b == shape[0] and c * d * kernel == prod(shape[1:]) else None
    if adapter.kind == "ia3":
        size = shape[1] if layer in adapter.on_input else shape[0]
        return factors if factors[IA3].numel() == size else None
    down, up = factors[LORA_A], factors[LORA_B]
    rank = down.shape[0]
    if down.numel() != rank * prod(shape[1:]) or up.numel() != rank * shape[0]:
        return None
    found = {LORA_A: down.reshape(rank, *shape[1:]), LORA_B: up.reshape(shape[0], rank, *[1] * (len(shape) - 2))}
    if adapter.kind == "dora":
        magnitude = factors[MAGNITUDE]
        on_outputs = magnitude.numel() == shape[0] and (magnitude.ndim == 1 or 1 in magnitude.shape[:2])
        if not on_outputs or (magnitude.ndim == 2 and magnitude.shape[0] == 1 and shape[0] > 1):
            return None
        found[MAGNITUDE] = (
            magnitude.reshape(-1) if len(shape) == 2 else magnitude.reshape(1, -1, *[1] * (len(shape) - 2))
        )
    return found
