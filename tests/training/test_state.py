from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.optim.ema import Ema
from kinema.parallel.mesh import start
from kinema.runs.checkpoint_load import contents
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.state import averages_in_use, load_training_state, optimizer_numbers, training_state


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4), nn.Linear(4, 2, bias=False))


def adamw(net: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)]


def amsgrad(net: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(net.parameters(), lr=0.01, amsgrad=True)]


def torch_muon(net: nn.Module) -> list[Optimizer]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([p for p in net.parameters() if p.ndim != 2], lr=0.02, weight_decay=0.0),
    ]


def sgd(net: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)]


def steps(net: nn.Module, optimizers: Sequence[Optimizer], ema: Ema, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step)


def flat(tensors: Any) -> dict[str, Tensor]:
    return {f"{group}.{name}": t for group, named in tensors.items() for name, t in named.items()}


@pytest.mark.parametrize("make", [adamw, amsgrad, torch_muon, sgd])
def test_resumed_equals_unbroken(tmp_path: Path, make: Callable[[nn.Module], list[Optimizer]]) -> None:
    checkpointer = Checkpointer(tmp_path, 1, False, start(ParallelConfig(), "cpu"))
    net = network()
    optimizers, ema = make(net), Ema(named_trainables({"net": net}).items(), 0.9)
    steps(net, optimizers, ema, 0, 3)
    checkpointer.save(3, training_state({"net": net}, optimizers, ema), {"a": 1})
    steps(net, optimizers, ema, 3, 6)

    again = network()
    again_optimizers, again_ema = make(again), Ema(named_trainables({"net": again}).items(), 0.9)
    settings = [[dict(g, params=None) for g in o.param_groups] for o in again_optimizers]
    path = tmp_path / "step-00000003"
    assert load_training_state(checkpointer, path, {"net": again}, again_optimizers, again_ema) == {"a": 1}
    assert [[dict(g, params=None) for g in o.param_groups] for o in again_optimizers] == settings
    assert all(p.grad is None for p in again.parameters())
    steps(again, again_optimizers, again_ema, 3, 6)

    want = flat(training_state({"net": net}, optimizers, ema))
    got = flat(training_state({"net": again}, again_optimizers, again_ema))
    assert got.keys() == want.keys()
    assert "networks.net.1.running_var" in want and "ema.net.0.weight" in want
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    "kind",
    ["adamw8bit", "automagic", "lion", "adafactor", "prodigy", "schedulefree", "torch.NAdam", "pytorch_optimizer.CAME"],
)
def test_codes_and_numbers_come_back(tmp_path: Path, kind: str) -> None:
    """What is no tensor of a parameter's shape: codes and scales, averages of rows, and numbers beside tensors."""
    from kinema.config.optimizer import OptimizerConfig
    from kinema.optim.optimizers import build_optimizers

    def start_anew() -> tuple[nn.Module, list[Optimizer]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 4)).bfloat16()
        own: dict[str, Any] = {"rounding": "kahan"} if kind in ("adamw8bit", "automagic") else {}
        own |= {"options": {"d0": 1e-3}} if kind == "prodigy" else {}
        config = OptimizerConfig(type=kind, **own)
        return net, build_optimizers(named_trainables({"net": net}), set(), config, seed=1)

    def run(net: nn.Module, optimizers: list[Optimizer], first: int, last: int) -> None:
        for step in range(first, last):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            for optimizer in optimizers:
                optimizer.step()

    checkpointer = Checkpointer(tmp_path, 1, True, start(ParallelConfig(), "cpu"))
    net, optimizers = start_anew()
    run(net, optimizers, 0, 3)
    meta = {"optimizer_numbers": optimizer_numbers({"net": net}, optimizers)}
    averages = averages_in_use({"net": net}, optimizers)
    assert (averages != {}) == (kind == "schedulefree")
    checkpointer.save(3, training_state({"net": net}, optimizers) | averages, meta)
    checkpointer.wait()
    run(net, optimizers, 3, 6)

    again, again_optimizers = start_anew()
    load_training_state(checkpointer, tmp_path / "step-00000003", {"net": again}, again_optimizers)
    run(again, again_optimizers, 3, 6)
    want, got = (flat(training_state({"net": n}, o)) for n, o in ((net, optimizers), (again, again_optimizers)))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert optimizer_numbers({"net": net}, optimizers) == optimizer_numbers({"net": again}, again_optimizers)


def test_names_of_an_adapter(tmp_path: Path) -> None:
    """A frozen base is not stored."""
    net = network().requires_grad_(False)
    net[3].weight.requires_grad_(True)
    del net[1]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert list(flat(training_state({"net": net}, [optimizer]))) == [
        "networks.net.2.weight",
        "optimizer.net.2.weight.step",
        "optimizer.net.2.weight.exp_avg",
        "optimizer.net.2.weight.exp_avg_sq",
    ]


def test_before_the_first_step_and_unused_parameters(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 2, False, start(ParallelConfig(), "cpu"))
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    checkpointer.save(0, training_state({"net": net}, [optimizer]), {})
    net["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpointer.save(1, training_state({"net": net}, [optimizer]), {})

    for step, states in ((0, 0), (1, 2)):
        fresh = torch.optim.AdamW(net.parameters(), lr=0.1)
        load_training_state(checkpointer, tmp_path / f"step-{step:08d}", {"net": net}, [fresh])
        assert len(fresh.state) == states
    assert fresh.state[net["used"].weight]["step"].item() == 1
    # an optimiser that has already stepped goes back to having no state
    load_training_state(checkpointer, tmp_path / "step-00000000", {"net": net}, [fresh])
    assert len(fresh.state) == 0


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 2, False, start(ParallelConfig(), "cpu"))
    net = network()
    optimizers, ema = sgd(net), Ema(named_trainables({"net": net}).items(), 0.9)
    steps(net, optimizers, ema, 0, 1)
    checkpointer.save(1, training_state({"net": net}, optimizers), {})
    assert "optimizer.net.0.weight.momentum_buffer" in contents(tmp_path / "step-00000001")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    steps(net, optimizers, ema, 1, 2)
    after = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(UserError, match=r"no 'optimizer\.net\.0\.weight\.step'.*another network, adapter or optimiser"):
        load_training_state(checkpointer, tmp_path / "step-00000001", {"net": net}, adamw(net))
    assert all(torch.equal(p, after[name]) for name, p in net.named_parameters())
    load_training_state(checkpointer, tmp_path / "step-00000001", {"net": net})  # weights alone
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_state_that_is_no_tensor_is_not_lost_silently() -> None:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.weight]["k"] = 3
    (numbers,) = optimizer_numbers({"net": net}, [optimizer])
    assert numbers == {"groups": [], "state": {"net.weight": {"k": 3}}}
    optimizer.state[net.weight]["k"] = {"a": 3}
    with pytest.raises(TypeError, match="keeps 'k' as dict"):
        optimizer_numbers({"net": net}, [optimizer])
