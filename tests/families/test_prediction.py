"""Conversions between kinds of prediction, against the definitions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from kinema.families.noise_path import NoisePath
from kinema.families.prediction import SMALLEST_DIVISOR, convert, native_target

KINDS = ("velocity", "negative_velocity", "x0", "eps", "vp_velocity")


def case(t: torch.Tensor, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Data, noise, their mixture at t, and the true prediction of every kind, by definition."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(len(t), 4, 3, 6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    at = t.double().view(-1, 1, 1, 1, 1) if t.ndim == 1 else t.double()
    truth = {"x_t": (1 - at) * x_0 + at * eps, "x0": x_0, "eps": eps, "velocity": eps - x_0}
    truth["negative_velocity"] = x_0 - eps
    n = (at**2 + (1 - at) ** 2).sqrt()
    truth["vp_velocity"] = ((1 - at) * eps - at * x_0) / n
    return {name: value.to(dtype) for name, value in truth.items()}


@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
def test_every_kind_to_every_kind(source: str, target: str) -> None:
    t = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    truth = case(t)
    got = convert(truth[source], source, target, truth["x_t"], t)
    torch.testing.assert_close(got, truth[target], rtol=0, atol=1e-11)


def test_time_per_latent_position() -> None:
    t = torch.rand(2, 1, 3, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.98 + 0.01
    truth = case(t)
    for source, target in itertools.product(KINDS, KINDS):
        got = convert(truth[source], source, target, truth["x_t"], t)
        torch.testing.assert_close(got, truth[target], rtol=0, atol=1e-10)


@pytest.mark.parametrize("native", KINDS)
def test_native_target_recovers_the_data(native: str) -> None:
    """A network that is always right gives back x_0, whatever it predicts, at all times where that is defined."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    truth = case(t)
    target = native_target(NoisePath(native), truth["x0"], truth["eps"], t)
    torch.testing.assert_close(target, truth[native], rtol=0, atol=1e-14 if native == "vp_velocity" else 0.0)
    x_0 = convert(target, native, "x0", truth["x_t"], t)
    defined = t < 1 if native == "eps" else t <= 1
    torch.testing.assert_close(x_0[defined], truth["x0"][defined], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_wrong_predictions_at_the_ends_stay_finite(source: str, target: str, end: float) -> None:
    t = torch.full((1,), end)
    truth = case(t, torch.float32)
    wrong = truth[source] + 1
    got = convert(wrong, source, target, truth["x_t"], t)
    assert got.isfinite().all()
    assert got.abs().max() <= (wrong.abs().max() + truth["x_t"].abs().max()) / SMALLEST_DIVISOR


def test_half_precision_is_raised() -> None:
    t = torch.tensor([0.9])
    truth = case(t)
    half = {name: value.to(torch.bfloat16) for name, value in truth.items()}
    got = convert(half["velocity"], "velocity", "x0", half["x_t"], t.to(torch.bfloat16))
    assert got.dtype == torch.float32
    exact = half["x_t"].float() - t.to(torch.bfloat16).float() * half["velocity"].float()
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)
