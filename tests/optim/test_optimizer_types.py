"""Each type of optimiser against its definition in float64, over twenty steps of a matrix and a vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.optimizers import build_optimizers, set_lr

LR, DECAY, STEPS = 1e-2, 0.1, 20
Weights = dict[str, Tensor]
Rule = Callable[[Tensor, float], Iterator[Tensor]]
"""A generator over one weight, given its decay: it takes gradients and yields weights."""


def gradients(step: int) -> Weights:
    draw = torch.Generator().manual_seed(100 + step)
    return {"matrix": torch.randn(6, 10, generator=draw), "vector": torch.randn(7, generator=draw)}


def start() -> Weights:
    draw = torch.Generator().manual_seed(0)
    return {"matrix": torch.randn(6, 10, generator=draw), "vector": torch.randn(7, generator=draw)}


def trained(steps: int = STEPS, **settings: Any) -> Weights:
    config = OptimizerConfig(**({"lr": LR, "weight_decay": DECAY} | settings))
    weights = {f"network.{name}": torch.nn.Parameter(value) for name, value in start().items()}
    optimizers = build_optimizers(weights, set(), config)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            weights[f"network.{name}"].grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    return {name.removeprefix("network."): weight.detach() for name, weight in weights.items()}


def follow(rule: Rule) -> Weights:
    """The rule over all steps, in float64; the vector has no decay."""
    found = {}
    for name, value in start().items():
        steps = rule(value.double(), DECAY if name == "matrix" else 0.0)
        found[name] = next(steps)
        for step in range(STEPS):
            found[name] = steps.send(gradients(step)[name].double())  # type: ignore[attr-defined]
    return found


def assert_follows(ours: Weights, want: Weights, tolerance: float = 1e-5) -> None:
    for name, weight in ours.items():
        travelled = (want[name] - start()[name].double()).norm()
        assert travelled > 1e-6
        assert (weight.double() - want[name]).norm() / travelled < tolerance, name


def adam_like(w: Tensor, decay: float) -> Iterator[Tensor]:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, STEPS + 2):
        g = yield w
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w - LR * decay * w - LR * m / (1 - 0.9**step) / (torch.sqrt(v / (1 - 0.99**step)) + 1e-8)


def lion(w: Tensor, decay: float) -> Iterator[Tensor]:
    m = torch.zeros_like(w)
    while True:
        g = yield w
        w = w - LR * ((0.9 * m + 0.1 * g).sign() + decay * w)
        m = 0.99 * m + 0.01 * g


def adafactor(w: Tensor, decay: float) -> Iterator[Tensor]:
    matrix = w.ndim == 2
    r, c, v = w.new_zeros(len(w)), w.new_zeros(w.shape[-1]), torch.zeros_like(w)
    for step in range(1, STEPS + 2):
        g = yield w
        beta = 1 - step**-0.8
        if matrix:
            r = beta * r + (1 - beta) * (g**2 + 1e-30).mean(1)
            c = beta * c + (1 - beta) * (g**2 + 1e-30).mean(0)
            u = g / torch.sqrt(torch.outer(r, c) / r.mean())
        else:
            v = beta * v + (1 - beta) * (g**2 + 1e-30)
            u = g / v.sqrt()
        w = w - LR * decay * w - LR * u / max(1.0, float(u.square().mean().sqrt()))


def schedule_free(w: Tensor, decay: float) -> Iterator[Tensor]:
    """y is where gradients are taken; x, the average, is what is meant to be used."""
    z = x = y = w
    v = torch.zeros_like(w)
    for step in range(1, STEPS + 2):
        g = yield y
        v = 0.99 * v + 0.01 * g**2
        z = z - LR * (g / (torch.sqrt(v / (1 - 0.99**step)) + 1e-8) + decay * y)
        x = (1 - 1 / step) * x + z / step
        y = 0.1 * z + 0.9 * x


def automagic(w: Tensor, decay: float, start: float = 1e-4, bump: float = 3e-6) -> Iterator[Tensor]:
    """The authors' rule, with the learning rates themselves in float64; between the bounds it is the same."""
    r, c, v = w.new_zeros(len(w)), w.new_zeros(w.shape[-1]), torch.zeros_like(w)
    before, lr = torch.zeros_like(w, dtype=torch.bool), torch.full_like(w, start)
    while True:
        g = yield w
        square = g**2 + 1e-30
        if w.ndim == 2:
            r, c = 0.999 * r + 0.001 * square.mean(-1), 0.999 * c + 0.001 * square.mean(-2)
            u = g * (r / r.mean())[:, None] ** -0.5 * c[None] ** -0.5
        else:
            v = 0.999 * v + 0.001 * square
            u = g * v**-0.5
        u = u / max(1.0, float(u.square().mean().sqrt()))
        now = u > 0
        lr = (lr + torch.where(now == before, bump, -bump)).clamp(1e-7, 1e-3)
        before = now
        w = w - lr * (u + decay * w)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"type": "adamw"}, adam_like),
        ({"type": "adamw8bit"}, adam_like),  # parameters this small have no codes
        ({"type": "adamw", "rounding": "kahan"}, adam_like),  # nor are weights in float32 rounded
        ({"type": "lion"}, lion),
        ({"type": "adafactor"}, adafactor),
        ({"type": "schedulefree"}, schedule_free),
        ({"type": "automagic", "lr": 1e-4, "lr_bump": 3e-6}, automagic),
    ],
)
def test_twenty_steps_of_the_definition(settings: dict[str, Any], rule: Rule) -> None:
    small_steps = settings["type"] == "automagic"  # beside which float32 weights of 1 are coarse
    assert_follows(trained(**settings), follow(rule), 1e-3 if small_steps else 1e-5)


def test_prodigy() -> None:
    """Algorithm 4 of the paper: one d for all weights, so that they are stepped together here."""
    w = {name: value.double() for name, value in start().items()}
    first = dict(w)
    m, v, s = ({name: torch.zeros_like(value) for name, value in w.items()} for _ in range(3))
    beta3, d, r = 0.99**0.5, 1e-3, 0.0
    for step in range(STEPS):
        g = {name: gradient.double() for name, gradient in gradients(step).items()}
        r = beta3 * r + (1 - beta3) * d * d * sum(float((g[name] * (first[name] - w[name])).sum()) for name in w)
        total = 0.0
        for name in w:
            m[name] = 0.9 * m[name] + 0.1 * d * g[name]
            v[name] = 0.99 * v[name] + 0.01 * d * d * g[name] ** 2
            s[name] = beta3 * s[name] + (1 - beta3) * d * d * g[name]
            total += float(s[name].abs().sum())
        after = max(d, r / total)
        for name in first:
            decay = DECAY if name == "matrix" else 0.0
            w[name] = w[name] - d * decay * w[name] - d * m[name] / (v[name].sqrt() + after * 1e-8)
        d = after
    assert d > 1.5e-3  # it has begun to find the learning rate
    assert_follows(trained(type="prodigy", lr=1.0, options={"d0": 1e-3}), w, 1e-4)


def test_automagics_learning_rates_stay_within_their_bounds() -> None:
    config = OptimizerConfig(type="automagic", min_lr=5e-7, max_lr=3.5e-6)
    assert config.lr == 1e-6
    weight = torch.nn.Parameter(torch.zeros(2, 4))
    (optimizer,) = build_optimizers({"network.w": weight}, set(), config)
    seen = []
    for step in range(8):
        weight.grad = torch.tensor([[1.0, -1.0, 1.0, -1.0], [(-1.0) ** step] * 4]) + 0.01 * torch.randn(2, 4)
        before = weight.detach().clone()
        optimizer.step()
        state = optimizer.state[weight]
        seen.append((state["bumps"].double() * 1e-6 + 1e-6).clamp(5e-7, 3.5e-6))
        assert (weight.detach() - before).abs().max() <= 3.5e-6 * 1.8  # rms of the update is 1 at most
    assert torch.equal(seen[-1][0], torch.full((4,), 3.5e-6, dtype=torch.float64))  # signs agree: at the top
    assert torch.equal(seen[-1][1], torch.full((4,), 5e-7, dtype=torch.float64))  # they never do: at the bottom
    weight.grad = torch.ones(2, 4)
    optimizer.step()
    assert (optimizer.state[weight]["bumps"][0, 1::2] == 2).all()  # the first step down from the top is felt at once


def test_the_schedule_scales_automagics_steps() -> None:
    def moved(factor: float) -> Tensor:
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        optimizers = build_optimizers({"network.w": weight}, set(), OptimizerConfig(type="automagic"))
        set_lr(optimizers, factor, 1.0)
        weight.grad = torch.linspace(-1, 1, 16).view(4, 4)
        optimizers[0].step()
        return weight.detach()

    torch.testing.assert_close(moved(0.25), 0.25 * moved(1.0))
