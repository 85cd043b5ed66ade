"""Updates of bf16 weights: what plain rounding loses, and what stochastic rounding and Kahan summation keep."""

from __future__ import annotations

import pytest
import torch
from test_optimizer_types import automagic
from torch import Tensor

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.optimizers import build_optimizers
from kinema.optim.rounding import noise, round_by_chance

STEPS = 100
LR = 3e-4


def gradients(step: int) -> Tensor:
    """Of one sign in each column, so that the weights travel."""
    draw = torch.rand(32, 64, generator=torch.Generator().manual_seed(step)) + 0.5
    return draw * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)


def start() -> Tensor:
    return torch.linspace(0.5, 2.0, 32 * 64).view(32, 64).bfloat16()


def trained(rounding: str, kind: str = "adamw") -> tuple[Tensor, Tensor]:
    """The weights after all steps, and with Kahan's compensation."""
    weight = torch.nn.Parameter(start())
    given = {"betas": (0.9, 0.99)} if kind == "adamw" else {}
    config = OptimizerConfig(type=kind, lr=LR, weight_decay=0.1, rounding=rounding, **given)
    (optimizer,) = build_optimizers({"network.weight": weight}, set(), config, seed=3)
    for step in range(STEPS):
        weight.grad = gradients(step).bfloat16()
        optimizer.step()
    compensation = optimizer.state[weight].get("compensation", torch.zeros(()))
    return weight.detach().double(), weight.detach().double() + compensation.double()


def reference(kind: str = "adamw") -> Tensor:
    """The optimiser in float64, of weights that round nothing."""
    w = start().double()
    if kind == "automagic":
        rule = automagic(w, 0.1, LR, 1e-6)
        next(rule)
        for step in range(STEPS):
            w = rule.send(gradients(step).bfloat16().double())
        return w
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(STEPS):
        g = gradients(step).bfloat16().double()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - LR * 0.1 * w
        w = w - LR * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("kind", ["adamw", "automagic"])
def test_plain_bf16_loses_what_the_others_keep(kind: str) -> None:
    """100 steps of about 3e-4 travel 0.03. Weights of 1 to 2 have bf16 neighbours 0.008 apart: plainly rounded, they
    stay where they are. (`test_low_bit` has the same of adamw8bit.)"""
    want = reference(kind)
    travelled = (want - start().double()).abs()
    assert travelled.mean() > 0.025
    large = start().float() > 1.0
    plain, _ = trained("none", kind)
    assert torch.equal(plain[large], start().double()[large])

    kahan, exact = trained("kahan", kind)
    assert (exact - want).abs().max() < 0.02 * travelled.mean()  # the compensation has 8 bits of its own
    assert ((kahan - want).abs() / want).max() < 2**-8 + 1e-3  # the weight itself is the nearest that there is

    stochastic, _ = trained("stochastic", kind)
    error = (stochastic - want)[large]
    spread = error.std()
    assert error.mean().abs() < 4 * spread / error.numel() ** 0.5 + 2e-5  # no bias
    assert spread < 0.02


def test_rounding_by_chance_is_right_on_average() -> None:
    values = torch.tensor([1.001, -1.001, 3.3e-5, 0.0, 1.0, -2.5]).repeat(20_000, 1)
    rounded = round_by_chance(values, noise(values, 5, "a"))
    assert rounded.dtype == torch.bfloat16
    want = values[0].double()
    spacing = 2.0 ** (torch.floor(torch.log2(want.abs().clamp(min=1e-30))) - 7)
    assert (rounded.double() - want).abs().max(0).values.le(spacing).all()
    assert ((rounded.double().mean(0) - want).abs() <= 4 * spacing / 2 / 20_000**0.5).all()
    assert torch.equal(rounded[:, 3:], values[:, 3:].bfloat16())  # what bf16 has stays
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(round_by_chance(infinite, noise(infinite, 1)).float(), infinite)


def test_noise_is_uniform_and_keyed() -> None:
    shape = torch.empty(512, 512)
    first, again, other = noise(shape, 1, "w", 7), noise(shape, 1, "w", 7), noise(shape, 1, "w", 8)
    assert torch.equal(first, again)
    counts = torch.bincount(first.flatten() >> 8, minlength=256).double()  # 1024 expected of each
    assert ((counts - 1024) ** 2 / 1024).sum() < 350  # chi-square of 255 degrees of freedom: 1 in 30 000 is above
    a, b = first.double().flatten(), other.double().flatten()
    for x, y in ((a, b), (a[1:], a[:-1]), (a[512:], a[:-512])):
        assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 5 / len(x) ** 0.5
    assert len(torch.unique(first & 1)) == 2


def test_fp16_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    (optimizer,) = build_optimizers({"network.w": weight}, set(), OptimizerConfig(rounding="kahan", lr=1e-5))
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    total = weight.detach().double() + optimizer.state[weight]["compensation"].double()
    torch.testing.assert_close(total, torch.full_like(total, 1 - 20e-5 * 1.01), atol=2e-6, rtol=0)
    with pytest.raises(Exception, match=r"network\.w is in fp16"):
        build_optimizers({"network.w": weight}, set(), OptimizerConfig(rounding="stochastic"))
