"""AdamW with moments of 8 bits: the codes, and twenty steps against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.low_bit import blocks_of, decode, encode, nearest, numbers, takes_codes, zero_codes
from kinema.optim.optimizers import build_optimizers


def tree(signed: bool) -> np.ndarray:
    """The dynamic tree numbers in another way: centres of the parts that numpy cuts [0.1, 1] into."""
    found = [0.0, 1.0]
    for place in range(7):
        edges = np.linspace(0.1, 1, 2 ** (place + (not signed)) + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (place - 6)
        found += [*centres, *(-centres if signed else [])]
    return np.array(sorted(found))


def quantised(values: np.ndarray, signed: bool) -> np.ndarray:
    """Each row in blocks of 256, each element the nearest number times its block's largest magnitude."""
    table = tree(signed)
    rows = values.reshape(len(values), -1)
    out = np.empty_like(rows)
    for start in range(0, rows.shape[1], 256):
        block = rows[:, start : start + 256]
        scale = np.abs(block).max(1, keepdims=True)
        relative = block / np.maximum(scale, 1e-300)
        nearest = np.abs(relative[..., None] - table).argmin(-1)
        out[:, start : start + 256] = table[nearest] * scale
    return out.reshape(values.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers(signed: bool) -> None:
    ours = numbers(signed)
    assert len(ours) == 256 and ours[-1] == 1 and (ours == 0).any()
    np.testing.assert_allclose(ours.numpy(), tree(signed), rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(6, 100), (6, 256), (3, 700), (4, 5, 3, 3)])
def test_codes_are_the_nearest(shape: tuple[int, ...], signed: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.abs()
    values[0] = 0
    codes, scales = zero_codes(torch.nn.Parameter(torch.empty(shape)), signed)
    assert codes.dtype == torch.uint8 and codes.shape == shape and scales.shape == (shape[0], blocks_of(codes.shape)[0])
    assert torch.equal(decode(codes, scales, signed), torch.zeros(shape))
    encode(values, codes, scales, signed)
    got = decode(codes, scales, signed).numpy()
    np.testing.assert_allclose(got, quantised(values.double().numpy(), signed), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_the_bounds(signed: bool) -> None:
    """Every bound, and the float32 numbers next to it."""
    values = numbers(signed)
    bounds = (values[1:] + values[:-1]) / 2
    inf = torch.tensor(torch.inf)
    tried = torch.cat([values, bounds, bounds.nextafter(inf), bounds.nextafter(-inf), torch.linspace(-1, 1, 10_001)])
    tried = tried if signed else tried.abs()
    assert torch.equal(nearest(tried, signed), torch.bucketize(tried, bounds, out_int32=True))


def test_small_parameters_and_vectors_keep_float32() -> None:
    for shape, wanted in (
        ((64, 64), True),
        ((63, 64), False),
        ((5000,), False),
        ((5000, 1), False),
        ((64, 8, 3, 3), True),
    ):
        assert takes_codes(torch.empty(shape)) == wanted, shape


def test_twenty_steps() -> None:
    """Against float64 with codes of its own; and against AdamW without codes, which it stays near to."""
    draw = torch.Generator().manual_seed(1)
    begin = torch.randn(14, 300, generator=draw)
    gradients = [torch.randn(14, 300, generator=draw) * torch.logspace(-3, 0, 300) for _ in range(20)]
    weight = torch.nn.Parameter(begin.clone())
    config = OptimizerConfig(type="adamw8bit", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    (optimizer,) = build_optimizers({"network.w": weight}, set(), config)
    (coded, *_), (exact, *_) = (reference(begin, gradients, codes) for codes in (True, False))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["root_avg_sq"].dtype == torch.uint8
    ours = weight.detach().double()
    travelled = (exact - begin.double()).norm()
    assert (ours - coded).norm() / travelled < 1e-3  # a code may differ where float32 rounds the other way
    assert 1e-4 < (ours - exact).norm() / travelled < 0.06


def reference(begin: Tensor, gradients: list[Tensor], codes: bool, lr: float = 1e-2) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, and the moments as they are kept: m and the root of v."""
    w = begin.double().numpy()
    m, root = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.99 * root**2 + 0.01 * g**2
        root = np.sqrt(v)
        w = w - lr * 0.1 * w - lr * m / (1 - 0.9**step) / (root / np.sqrt(1 - 0.99**step) + 1e-8)
        if codes:
            m, root = quantised(m, True), quantised(root, False)
    return torch.from_numpy(w), torch.from_numpy(m), torch.from_numpy(root)


def test_twenty_steps_of_weights_in_bf16() -> None:
    """20 steps of 3e-4 travel 0.006, and weights of 1 to 2 have bf16 neighbours 0.008 apart: plainly rounded, they stay
    where they are. With what Kahan keeps they are those of float64 with codes of its own, and so are the moments."""
    draw = torch.Generator().manual_seed(2)
    begin = torch.linspace(0.5, 2.0, 32 * 300).view(32, 300).bfloat16()
    signs = torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0) * torch.logspace(-3, 0, 300)
    gradients = [((torch.rand(32, 300, generator=draw) + 0.5) * signs).bfloat16() for _ in range(20)]
    for gradient in gradients:  # the largest of a block has another prime in it: none is half way between two codes
        gradient.view(torch.int16).bitwise_and_(-2)
        gradient[:, [255, 299]] = 251 / 128
    (want, *moments), (exact, *_) = (reference(begin, gradients, codes, 3e-4) for codes in (True, False))
    travelled = (want - begin.double()).abs()
    assert travelled.mean() > 0.005
    assert (want - exact).norm() > 0.01 * travelled.norm(), "codes make no difference here"

    weights, states = {}, {}
    for rounding in ("none", "kahan"):
        weight = torch.nn.Parameter(begin.clone())
        config = OptimizerConfig(type="adamw8bit", lr=3e-4, weight_decay=0.1, betas=(0.9, 0.99), rounding=rounding)
        (optimizer,) = build_optimizers({"network.w": weight}, set(), config)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        weights[rounding], states[rounding] = weight.detach().double(), optimizer.state[weight]
    large = begin.float() > 1.0
    assert torch.equal(weights["none"][large], begin.double()[large])

    state = states["kahan"]
    assert state["compensation"].dtype == torch.bfloat16
    assert (weights["kahan"] + state["compensation"].double() - want).abs().max() < 0.02 * travelled.mean()
    assert ((weights["kahan"] - want).abs() / want).max() < 2**-8  # the weight itself is the nearest that there is
    for (key, signed), moment in zip((("exp_avg", True), ("root_avg_sq", False)), moments, strict=True):
        kept = decode(state[key], state[f"{key}_scale"], signed).double()
        torch.testing.assert_close(kept, moment, rtol=1e-5, atol=0, msg=key)


def test_elements_of_very_different_size_in_a_block() -> None:
    """A gradient a thousandth of its neighbour's: the step is as large, where 8 bits of v itself would give one much
    larger."""
    weight = torch.nn.Parameter(torch.zeros(16, 256))
    config = OptimizerConfig(type="adamw8bit", lr=1e-3, weight_decay=0.0)
    (optimizer,) = build_optimizers({"network.w": weight}, set(), config)
    for _ in range(30):
        weight.grad = torch.ones(16, 256)
        weight.grad[:, ::2] = 1e-3
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((16, 256), -0.03), rtol=0.05, atol=0)
