"""Which parts a pipeline has, and their way to the device and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def text_encoders(pipeline: Any) -> list[nn.Module]:
    return [part for name, part in modules(pipeline) if is_text_encoder(pipeline, name)]


def other_parts(pipeline: Any) -> list[nn.Module]:
    """All but text encoders: the networks, the autoencoder, picture encoders."""
    return [part for name, part in modules(pipeline) if not is_text_encoder(pipeline, name)]


def encoders_together(pipeline: Any) -> list[str]:
    """The text encoders, by the names of components, if all of them take no more memory than the largest part does by
    itself; else none."""
    sizes = {name: _size(part) for name, part in modules(pipeline)}
    encoders = [name for name in sizes if is_text_encoder(pipeline, name)]
    return encoders if sum(sizes[name] for name in encoders) <= max(sizes.values(), default=0) else []


def is_text_encoder(pipeline: Any, name: str) -> bool:
    """By the usual names of components; pipelines of ours that have others say so."""
    return name.startswith("text_encoder") or name in getattr(pipeline, "text_encoders", ())


def modules(pipeline: Any) -> list[tuple[str, nn.Module]]:
    from torch import nn

    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]


def _size(part: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*part.parameters(), *part.buffers()))


@contextmanager
def on_device(parts: list[nn.Module], device: torch.device | str) -> Iterator[None]:
    """The parts on ``device``, and afterwards back where they were; no copy where they are there already. What FSDP2
    has sharded stays: it fetches its own weights, from the host's memory too, and would not bring back what it leaves
    where it is (buffers, parameters that it does not shard)."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    there = torch.empty(0, device=device).device  # with its index, which "cuda" leaves out
    parts = [part for part in parts if not any(isinstance(module, FSDPModule) for module in part.modules())]
    places = [(part, next((p.device for p in part.parameters()), there)) for part in parts]
    moved = [(part, place) for part, place in places if place != there]
    for part, _ in moved:
        part.to(there)
    try:
        yield
    finally:
        for part, place in moved:
            part.to(place)
        if moved and there.type == "cuda":
            torch.cuda.empty_cache()
