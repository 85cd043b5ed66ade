"""Updates inside the backward pass: the same weights as after it, without all gradients in memory."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kinema.config.optimizer import OptimizerConfig
from kinema.memory.dry_run import LiveBytes
from kinema.optim.optimizers import build_optimizers, set_lr
from kinema.optim.release import GradientRelease

CONFIGS = [
    OptimizerConfig(lr=1e-2, weight_decay=0.1),
    OptimizerConfig(type="adamw8bit", lr=1e-2),
    OptimizerConfig(type="automagic", lr=1e-5),
    OptimizerConfig(type="generic", lr=1e-2, first_moment="subspace", second_moment="subset_norm", rank=4,
                    projection="srht", refresh_steps=6),
    OptimizerConfig(type="torch.SGD", lr=1e-2, options={"momentum": 0.9}),
]  # fmt: skip


class Network(nn.Module):
    """Blocks, the second of which runs again in the backward pass, a weight that is used twice, and one that is not."""

    def __init__(self, width=24, checkpointed=True):
        super().__init__()
        self.table = nn.Parameter(torch.empty(width, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
                                    for _ in range(3))  # fmt: skip
        self.unused = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(width)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * width**-0.5)
        if checkpointed:
            inner = self.blocks[1].forward
            self.blocks[1].forward = MethodType(
                lambda block, x: checkpoint(inner, x, use_reentrant=False), self.blocks[1]
            )

    def forward(self, x):
        x = x @ self.table
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x) @ self.table.mT


def optimised(config):
    net = Network()
    parameters = {f"network.{name}": p for name, p in net.named_parameters()}
    matrices = {name for name, p in parameters.items() if "blocks" in name and p.ndim == 2}
    return net, build_optimizers(parameters, matrices, config, seed=3)


def loss_of(net, step):
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_equal_to_the_bit_over_twenty_steps(config):
    plain, optimizers = optimised(config)
    net, released = optimised(config)
    release = GradientRelease(released)
    for step in range(20):
        set_lr(optimizers, 1 - step / 40, 1.0)
        set_lr(released, 1 - step / 40, 1.0)
        loss_of(plain, step).backward()
        norm = float(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with release.updating():
            loss_of(net, step).backward()
        assert release.norm == pytest.approx(norm, rel=1e-5) and release.skipped == 0
        assert all(p.grad is None for p in net.parameters())
    for (name, p), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other), name
    begin = Network().state_dict()
    assert all(torch.equal(p, begin[n]) == n.startswith("unused") for n, p in net.named_parameters())
    theirs = {name: optimizers[0].state[p] for name, p in plain.named_parameters()}
    for name, p in net.named_parameters():
        for key, value in released[0].state[p].items():
            torch.testing.assert_close(value, theirs[name][key], rtol=0, atol=0)


def test_gradients_are_left_alone_outside():
    """Trials of the batch size, or whoever else runs a backward pass."""
    net, optimizers = optimised(CONFIGS[0])
    release = GradientRelease(optimizers)
    before = net.table.detach().clone()
    loss_of(net, 0).backward()
    assert torch.equal(net.table, before) and net.table.grad is not None
    with pytest.raises(RuntimeError, match="on purpose"), release.updating():
        raise RuntimeError("on purpose")
    loss_of(net, 1).backward()
    assert torch.equal(net.table, before)


def test_a_gradient_that_is_not_finite_updates_nothing():
    """Its weight alone is skipped, and the norm says so."""
    net, optimizers = optimised(CONFIGS[0])
    release = GradientRelease(optimizers)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with release.updating():
        loss = loss_of(net, 0) + net.blocks[0][0].bias.sum() * float("inf")
        loss.backward()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert release.skipped == 1 and release.norm == float("inf")
    assert changed == set(before) - {"blocks.0.0.bias", "unused.weight", "unused.bias"}
    with release.updating():
        loss_of(net, 1).backward()
    assert release.skipped == 0 and release.norm < 100


def test_peak_memory_falls_by_all_gradients_but_the_largest():
    """Counted storage of a step of few activations and eight equal weights, which themselves do not count."""
    peaks = {}
    for kind in ("plain", "released"):
        net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        release = GradientRelease([optimizer]) if kind == "released" else None
        x = torch.randn(1, 64)
        with LiveBytes() as counted:
            counted.exclude(net.parameters())
            if release is None:
                net(x).square().mean().backward()
                optimizer.step()
            else:
                with release.updating():
                    net(x).square().mean().backward()
        peaks[kind] = counted.peak
    weight, slack = 64 * 64 * 4, 8 * 1024
    assert 8 * weight <= peaks["plain"] < 8 * weight + slack + weight
    assert weight <= peaks["released"] < 2 * weight + slack
