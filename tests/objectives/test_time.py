import numpy as np
import pytest
import torch
from scipy import stats

from kinema.families.noise_path import ResolutionShift
from kinema.objectives.time import TimeLaw, shifted

U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def test_logit_normal_quantiles_are_scipys():
    law = TimeLaw("logit_normal", scale=1.3, shift=1.0)
    reference = 1 / (1 + np.exp(-1.3 * stats.norm.ppf(U.numpy())))
    np.testing.assert_allclose(law.quantile(U, 1).numpy(), reference, rtol=1e-12)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_a_range_conditions_the_law(distribution, shift):
    """Quantiles in [t_min, t_max] are the full law's quantiles of the renormalised probability."""
    full = TimeLaw(distribution, 1.0, shift)
    part = TimeLaw(distribution, 1.0, shift, t_min=0.3, t_max=0.9)
    many = full.quantile((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000, 1)
    inside = many[(many >= 0.3) & (many <= 0.9)]
    for q in (0.1, 0.5, 0.9):
        assert part.quantile(torch.tensor(q), 1).item() == pytest.approx(inside.quantile(q).item(), abs=2e-5)
    assert part.quantile(torch.tensor([0.0, 1.0]), 1).tolist() == pytest.approx([0.3, 0.9], abs=1e-9)


def test_shift_maps_the_middle_and_keeps_the_ends():
    t = shifted(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 3.0)
    assert t.tolist() == pytest.approx([0.0, 0.75, 1.0])


def test_resolution_shift_has_fluxs_ends():
    assert ResolutionShift()(256) == pytest.approx(np.exp(0.5))
    assert ResolutionShift()(4096) == pytest.approx(np.exp(1.15))
    assert TimeLaw("uniform", 1.0, ResolutionShift()).quantile(torch.tensor(0.5), 4096).item() == pytest.approx(
        np.exp(1.15) / (1 + np.exp(1.15))
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_range_conditions_a_native_law(shift):
    """A family's own law, given by its quantile function alone (here t = u^2), restricted and shifted."""
    full = TimeLaw("native", shift=shift, native=torch.square)
    part = TimeLaw("native", shift=shift, native=torch.square).within(0.3, 0.9)
    many = full.quantile((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000, 1)
    inside = many[(many >= 0.3) & (many <= 0.9)]
    for q in (0.1, 0.5, 0.9):
        assert part.quantile(torch.tensor(q), 1).item() == pytest.approx(inside.quantile(q).item(), abs=2e-5)


def test_a_law_of_discrete_steps_draws_the_ends_of_a_range_as_often_as_the_rest():
    """Ten steps, of which the range keeps six, the first and the last included."""
    steps = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)

    def native(u):
        return steps[(u * 10).floor().clamp(max=9).long()]

    for low, high in ((2, 7), (0, 9), (4, 4), (0, 0), (9, 9)):
        law = TimeLaw("native", t_min=float(steps[low]), t_max=float(steps[high]), native=native)
        count = high - low + 1
        u = (torch.arange(count * 50, dtype=torch.float64) + 0.5) / (count * 50)
        assert torch.equal(law.quantile(u, 1), steps[low : high + 1].repeat_interleave(50))
