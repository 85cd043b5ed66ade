"""What `kinema plan` says of an optimiser's state is what it takes, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinema.config.schema import Config
from kinema.optim.numbers import tensors_of
from kinema.optim.optimizers import build_optimizers
from kinema.training.dry_step import _optimizer_state

SHAPES = {"blocks.0.w": (96, 300), "blocks.0.lora_A": (8, 300), "conv": (16, 8, 3, 3), "bias": (96,)}
TYPES: list[tuple[dict[str, Any], torch.dtype, float]] = [
    ({"type": "adamw"}, torch.float32, 8),
    ({"type": "adamw"}, torch.bfloat16, 4),
    ({"type": "adamw", "rounding": "kahan"}, torch.bfloat16, 10),
    ({"type": "adamw", "rounding": "stochastic"}, torch.bfloat16, 8),
    ({"type": "adamw8bit"}, torch.float32, 2),
    ({"type": "adamw8bit", "rounding": "kahan"}, torch.bfloat16, 4),
    ({"type": "muon"}, torch.float32, 4),
    ({"type": "automagic"}, torch.float32, 3),
    ({"type": "automagic", "rounding": "kahan"}, torch.bfloat16, 5),
    ({"type": "lion"}, torch.float32, 4),
    ({"type": "adafactor"}, torch.float32, 0),
    ({"type": "prodigy"}, torch.float32, 16),
    ({"type": "schedulefree"}, torch.float32, 8),
    ({"type": "torch.SGD", "options": {"momentum": 0.9}}, torch.float32, 4),
    ({"type": "pytorch_optimizer.CAME"}, torch.float32, 4),
]


@pytest.mark.parametrize(("settings", "dtype", "each"), TYPES)
def test_forecast_and_count(settings: dict[str, Any], dtype: torch.dtype, each: float) -> None:
    tables = {"model": {"family": "wan"}, "data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
    config = Config.model_validate(tables | {"optimizer": settings})
    matrices = {"blocks.0.w", "blocks.0.lora_A"}
    paper = {n: torch.nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for n, s in SHAPES.items()}
    forecast = _optimizer_state(paper, matrices, config)

    weights = {f"network.{n}": torch.nn.Parameter(torch.ones(s, dtype=dtype)) for n, s in SHAPES.items()}
    counted = dict.fromkeys(SHAPES, 0)
    for optimizer in build_optimizers(weights, {f"network.{name}" for name in matrices}, config.optimizer):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.randn(parameter.shape).to(dtype)
        optimizer.step()
        names = {p: name.removeprefix("network.") for name, p in weights.items()}
        for parameter, state in optimizer.state.items():
            counted[names[parameter]] = sum(tensor.nbytes for tensor in tensors_of(state).values())
    for name, size in counted.items():
        assert abs(forecast[name] - size) <= 4, (
            name
        )  # a count of steps may be a tensor on one way and a number on the other
    assert counted["blocks.0.w"] / (96 * 300) == pytest.approx(each, abs=0.12)
