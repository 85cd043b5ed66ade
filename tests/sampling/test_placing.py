"""Parts of a pipeline on their way to the device and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kinema.sampling.placing import encoders_together, on_device


def as_sharded(module: nn.Module) -> nn.Module:
    """With the class that FSDP2 gives to what it shards."""
    kind = type(module)
    module.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
    return module


def test_what_is_sharded_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shards in the host's memory its first parameter is on the CPU, and its buffers are on the device: moved to
    the device and back, they would all be on the CPU."""
    plain, whole, inside = nn.Linear(2, 2), as_sharded(nn.Linear(2, 2)), nn.Sequential(as_sharded(nn.Linear(2, 2)))
    moved: list[tuple[nn.Module, torch.device]] = []
    monkeypatch.setattr(nn.Module, "to", lambda module, place: moved.append((module, place)))
    with on_device([plain, whole, inside], "meta"):
        assert moved == [(plain, torch.device("meta"))]
    assert moved[1:] == [(plain, torch.device("cpu"))]


@pytest.mark.parametrize("width, together", [(2, []), (9, ["text_encoder", "text_encoder_2"])])
def test_text_encoders_work_together_if_they_take_no_more_than_another_part(width: int, together: list[str]) -> None:
    """Where parts take turns, the device was said to hold the largest of them."""
    sizes = {"text_encoder": 3, "text_encoder_2": 3, "transformer": width}
    parts = {name: nn.Linear(size, size) for name, size in sizes.items()}
    assert encoders_together(SimpleNamespace(components={**parts, "tokenizer": None})) == together
