"""Classes of libraries by name: their options, what is refused, and the switch of schedule-free weights."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from kinema.config.optimizer import OptimizerConfig
from kinema.errors import ConfigError
from kinema.optim.library import averaged_weights, averages_now, check_library
from kinema.optim.optimizers import build_optimizers

PAPER = {
    "network.w": torch.empty(40, 50, device="meta"),
    "network.b": torch.empty(40, device="meta"),
    "network.conv": torch.empty(8, 4, 3, 3, device="meta"),
}


def check(kind: str, **settings: Any) -> None:
    check_library(OptimizerConfig(type=kind, **settings), PAPER)


@pytest.mark.parametrize("kind", ["prodigy", "adafactor", "schedulefree", "pytorch_optimizer.CAME", "torch.RMSprop"])
def test_these_train_and_resume(kind: str) -> None:
    check(kind)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("torch.SDG", {}, "torch has no optimiser SDG; did you mean 'SGD'?"),
        ("pytorch_optimizer.Lyon", {}, "no optimiser Lyon; did you mean 'Lion'?"),
        ("torch.SGD", {"options": {"momentun": 0.9}}, "SGD has no such argument; did you mean 'momentum'?"),
        ("torch.SGD", {"options": {"lr": 0.9}}, "options.lr: this is optimizer.lr"),
        ("prodigy", {"options": {"betas": (0.9, 0.9)}}, "options.betas: this is optimizer.betas"),
        ("torch.SGD", {"options": {"nesterov": True}}, "Nesterov momentum requires a momentum"),
        ("torch.LBFGS", {"weight_decay": 0.0}, "cannot train here"),
        ("torch.Rprop", {}, "has no weight decay: set optimizer.weight_decay = 0"),
        ("torch.Muon", {}, "only supports 2D parameters"),
        ("pytorch_optimizer.SAM", {}, "needs optimizer.options.base_optimizer, which no file can hold"),
        ("pytorch_optimizer.AliG", {"weight_decay": 0.0}, "takes no learning rate"),
        ("pytorch_optimizer.AggMo", {}, "keeps 'momentum_buffer' as dict: checkpoints hold tensors and numbers"),
        (
            "pytorch_optimizer.FTRL",
            {"weight_decay": 0.0},
            "cannot be saved and resumed exactly: a step with learning rate 0",
        ),
    ],
)
def test_what_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(kind, **settings)
    assert message in str(caught.value) and "optimizer." in str(caught.value)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"pip install 'kinema\[optim\]'"):
        check("lion")


def test_prodigy_has_one_learning_rate() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(3, 3)) for name in ("network.a", "network.b")}
    config = OptimizerConfig(type="prodigy", groups=({"pattern": "a$", "lr": 0.5},))
    with pytest.raises(ConfigError, match="one learning rate for all weights"):
        build_optimizers(weights, set(), config)


def test_schedule_free_weights_are_switched_and_come_back_to_the_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(type="schedulefree", lr=0.03, betas=(0.8, 0.99))
    optimizers = build_optimizers({"network.w": weight}, set(), config)
    for step in range(7):
        weight.grad = torch.randn(5, 5, generator=torch.Generator().manual_seed(step))
        optimizers[0].step()
    held, z = weight.detach().clone(), optimizers[0].state[weight]["z"].clone()
    with averaged_weights(optimizers):
        inside = weight.detach().clone()
    assert torch.equal(weight, held) and optimizers[0].param_groups[0]["train_mode"]
    torch.testing.assert_close(0.2 * z + 0.8 * inside, held)  # y = (1 - beta) z + beta x
    assert (inside - held).abs().max() > 1e-4
    assert torch.equal(averages_now(optimizers)[weight], inside) and torch.equal(weight, held)
    adamw = build_optimizers({"network.w": weight}, set(), OptimizerConfig())
    with averaged_weights(adamw):
        assert torch.equal(weight, held)
    assert averages_now(adamw) == {}
