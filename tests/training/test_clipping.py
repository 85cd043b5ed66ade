from __future__ import annotations

import pytest
import torch
from torch import nn

from kinema.training.clipping import clip_gradients


def with_gradients(dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 3), (7,), (), (2, 2, 2))]
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
    return parameters


@pytest.mark.parametrize("max_norm", [0.3, 1e6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(dtype: torch.dtype, max_norm: float | None) -> None:
    ours, reference = with_gradients(dtype), with_gradients(dtype)
    norm = clip_gradients(ours, max_norm)
    want = nn.utils.clip_grad_norm_(reference, float("inf") if max_norm is None else max_norm)
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
    assert norm.dtype == dtype
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_norm_of_short_types_is_summed_in_float32() -> None:
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float16)) for _ in range(10_000)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad = torch.full((1,), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert clip_gradients(parameters, None).item() == pytest.approx((300.0**2 + 9999) ** 0.5, rel=1e-6)


def test_types_together() -> None:
    parameters = with_gradients(torch.float32) + with_gradients(torch.bfloat16) + with_gradients(torch.float64)
    flat = torch.cat([p.grad.double().reshape(-1) for p in parameters if p.grad is not None])
    assert clip_gradients(parameters, 0.5).item() == pytest.approx(flat.norm().item(), rel=1e-6)
    after = torch.cat([p.grad.double().reshape(-1) for p in parameters if p.grad is not None])
    assert after.norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite_is_seen(value: float) -> None:
    parameters = with_gradients(torch.float32)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = value
    assert not torch.isfinite(clip_gradients(parameters, 1.0))


def test_parameters_without_gradients_do_not_count() -> None:
    assert clip_gradients([nn.Parameter(torch.ones(3))], 1.0).item() == 0.0
