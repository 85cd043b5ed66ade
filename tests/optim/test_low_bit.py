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
    coded, exact = (reference(begin, gradients, codes) for codes in (True, False))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["root_avg_sq"].dtype == torch.uint8
    ours = weight.detach().double()
    travelled = (exact - begin.double()).norm()
    assert (ours - coded).norm() / travelled < 1e-3  # a code may differ where float32 rounds the other way
    assert 1e-4 < (ours - exact).norm() / travelled < 0.06


def reference(begin: Tensor, gradients: list[Tensor], codes: bool) -> Tensor:
    w = begin.double().numpy()
    m, root = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.99 * root**2 + 0.01 * g**2
        root = np.sqrt(v)
        w = w - 1e-2 * 0.1 * w - 1e-2 * m / (1 - 0.9**step) / (root / np.sqrt(1 - 0.99**step) + 1e-8)
        if codes:
            m, root = quantised(m, True), quantised(root, False)
    return torch.from_numpy(w)


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
