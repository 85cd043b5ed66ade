"""Flow matching against its definition, in float64."""

from dataclasses import dataclass, field

import pytest
import torch

from kinema.config.schema import ObjectiveConfig
from kinema.data.batch import Batch
from kinema.families.base import Prepared
from kinema.families.noise_path import NoisePath
from kinema.objectives.base import Draws
from kinema.objectives.flow import FlowMatching, loss_weight, pointwise_error
from kinema.objectives.time import TimeLaw
from kinema.randomness import generator

SHAPE = (4, 3, 2, 2)  # C, T, H, W


@dataclass
class Known:
    """A denoiser whose x_0 is known, that remembers what it was asked and answers with ``answer(x_t, t, x_0)``."""

    answer: object
    given: torch.Tensor | None = None
    path: NoisePath = field(default_factory=NoisePath)
    asked: list = field(default_factory=list)
    time_range: tuple[float, float] = (0.0, 1.0)

    def at(self, t):
        return self

    def prepare(self, batch):
        self.x_0 = torch.stack(batch.tensors["latents"])
        return Prepared(self.x_0, {}, None if self.given is None else self.given[: len(batch)])

    def tokens(self, latents):
        return latents[0, 0].numel()

    def predict(self, x_t, t, conditioning):
        self.asked.append((x_t, t))
        return self.answer(x_t, t, self.x_0)


def flow_matching(config, default_shift):
    shift = config.shift or default_shift
    return FlowMatching(config, TimeLaw(config.time or "logit_normal", 1.0, shift, config.t_min, config.t_max))


def a_batch(count=6, weights=None):
    g = torch.Generator().manual_seed(5)
    latents = [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(count)]
    return Batch(0, {"latents": latents}, [""] * count, list(range(count)), weights or [1 / count] * count)


def truth(x_t, t, x_0):
    """The velocity that x_t and x_0 imply: (x_t - x_0) / t."""
    at = t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t
    return torch.where(at > 0, (x_t - x_0) / at.clamp(min=1e-12), torch.zeros_like(x_t))


def nothing(x_t, t, x_0):
    return torch.zeros_like(x_t)


def test_the_true_velocity_has_no_loss():
    student = Known(truth)
    loss = flow_matching(ObjectiveConfig(), 3.0)(a_batch(), {"student": student}, Draws(1, 2))
    assert loss.total.item() < 1e-10
    assert loss.per_sample.shape == (6,)


def test_the_loss_is_the_weighted_mean_of_eps_minus_x_0():
    weights = [0.5, 0.1, 0.1, 0.1, 0.2, 0.0]
    batch = a_batch(weights=weights)
    loss = flow_matching(ObjectiveConfig(), 3.0)(batch, {"student": Known(nothing)}, Draws(1, 2))
    expected = 0.0
    for i, weight in enumerate(weights):
        eps = torch.randn(SHAPE, generator=generator(1, 2, i, "noise")).double()
        expected += weight * (eps - batch.tensors["latents"][i]).square().mean().item()
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)


def test_micro_batches_add_up_to_the_batch():
    objective, batch = flow_matching(ObjectiveConfig(loss="huber"), 2.0), a_batch()
    whole = objective(batch, {"student": Known(nothing)}, Draws(3, 4)).total
    parts = [
        objective(batch.select(rows), {"student": Known(nothing)}, Draws(3, 4)).total
        for rows in ([4, 1], [0], [5, 2, 3])
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)


def test_what_is_given_is_clean_has_time_zero_and_no_loss():
    given = torch.zeros(6, 1, *SHAPE[1:], dtype=torch.float64)
    given[:, :, 0] = 1
    student = Known(lambda x_t, t, x_0: torch.where(given.bool(), torch.full_like(x_t, 1e3), truth(x_t, t, x_0)), given)
    loss = flow_matching(ObjectiveConfig(), 3.0)(a_batch(), {"student": student}, Draws(1, 2))
    x_t, t = student.asked[0]
    assert torch.equal(x_t[:, :, 0], student.x_0[:, :, 0])
    assert t.shape == given.shape and t[:, :, 0].abs().max() == 0 and t[:, :, 1:].min() > 0
    assert loss.total.item() < 1e-10


def test_evaluation_puts_every_time_at_the_quantile():
    config = ObjectiveConfig(time="uniform")
    student = Known(nothing)
    flow_matching(config, 3.0).at_quantile(a_batch(), {"student": student}, Draws(1, "evaluation"), 0.5)
    assert student.asked[0][1].tolist() == pytest.approx([0.75] * 6)  # 0.5 shifted by 3


def test_training_times_follow_the_law():
    student = Known(nothing)
    objective = flow_matching(ObjectiveConfig(time="uniform", shift=1.0), 3.0)
    for step in range(200):
        objective(a_batch(), {"student": student}, Draws(0, step))
    times = torch.cat([t for _, t in student.asked])
    assert len(times.unique()) == 1200
    assert (times.sort().values - torch.linspace(0, 1, 1200, dtype=torch.float64)).abs().max() < 1.63 / 1200**0.5


def test_pseudo_huber_is_squared_error_near_zero_and_linear_far_away():
    config = ObjectiveConfig(loss="huber", huber_delta=0.5)
    error = torch.tensor([0.0, 1e-3, 100.0])
    values = pointwise_error(error, torch.zeros(3), config)
    assert values.tolist() == pytest.approx([0.0, 1e-6, 2 * 0.5 * (100 - 0.5)], rel=1e-3, abs=1e-9)


def test_other_native_predictions():
    path = NoisePath(native="negative_velocity")
    student = Known(lambda x_t, t, x_0: -truth(x_t, t, x_0), path=path)
    loss = flow_matching(ObjectiveConfig(), 3.0)(a_batch(), {"student": student}, Draws(1, 2))
    assert loss.total.item() < 1e-10


def test_weights_agree_in_x0():
    """min-SNR weighs the same error in x_0 alike, whatever the network predicts; debiased estimation one in eps."""
    t = torch.linspace(0.02, 0.95, 19, dtype=torch.float64)
    snr = ((1 - t) / t) ** 2
    n = (t**2 + (1 - t) ** 2).sqrt()
    # |error of the prediction|^2 for a unit error in x_0 at a fixed x_t
    squared = {"x0": 1, "eps": snr, "velocity": 1 / t**2, "negative_velocity": 1 / t**2, "vp_velocity": (n / t) ** 2}
    for native, unit in squared.items():
        torch.testing.assert_close(loss_weight("min_snr", t, native, 5.0) * unit, snr.clamp(max=5.0))
        assert torch.equal(loss_weight("none", t, native, 5.0), torch.ones_like(t))
        if native != "vp_velocity":  # the same error in eps alike, at most a thousand times its square root
            torch.testing.assert_close(
                loss_weight("debiased", t, native, 5.0) * unit / snr, snr.clamp(max=1000) ** -0.5
            )
    sigma = t / (1 - t)
    edm = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(loss_weight("edm", t, "x0", 5.0), edm)


def test_weights_of_steps_of_stable_diffusion():
    """The formulas of Kohya's tools in terms of SNR = alphas_cumprod / (1 - alphas_cumprod), for noise and velocity;
    the step without signal of a rescaled schedule has no infinite weight."""
    products = torch.tensor([0.9991, 0.7, 0.05, 0.0047], dtype=torch.float64)
    snr = products / (1 - products)
    t = (1 - products).sqrt() / ((1 - products).sqrt() + products.sqrt())
    limited = snr.clamp(max=1000)
    for kind, native, expected in (
        ("min_snr", "eps", snr.clamp(max=5) / snr),
        ("min_snr", "vp_velocity", snr.clamp(max=5) / (snr + 1)),
        ("debiased", "eps", limited**-0.5),
        ("debiased", "vp_velocity", 1 / (limited + 1)),
    ):
        torch.testing.assert_close(loss_weight(kind, t, native, 5.0), expected, rtol=1e-9, atol=0)
    end = torch.ones(1, dtype=torch.float64)
    assert loss_weight("min_snr", end, "vp_velocity", 5.0).item() == pytest.approx(0.0, abs=2e-8)
    assert loss_weight("debiased", end, "vp_velocity", 5.0).item() == pytest.approx(1.0, abs=2e-8)


def test_an_expert_takes_the_whole_step():
    """One expert a step, drawn as often as its times come up; its times are then drawn from its range alone."""
    low = Known(nothing, time_range=(0.0, 0.7))
    high = Known(nothing, time_range=(0.7, 1.0))

    class Team(Known):
        def at(self, t):
            chosen = high if t > 0.7 else low
            chosen.x_0 = self.x_0
            return chosen

    objective = FlowMatching(ObjectiveConfig(), TimeLaw("uniform"))
    for step in range(400):
        objective(a_batch(2), {"student": Team(nothing)}, Draws(1, step))
    assert len(high.asked) + len(low.asked) == 400
    assert abs(len(high.asked) / 400 - 0.3) < 0.07  # three standard deviations
    times = torch.cat([t for _, t in high.asked])
    assert times.min() >= 0.7 and abs(float(times.mean()) - 0.85) < 0.02
    assert torch.cat([t for _, t in low.asked]).max() <= 0.7
    objective.at_quantile(a_batch(2), {"student": Team(nothing)}, Draws(1, "evaluation"), 0.8)
    assert torch.equal(high.asked[-1][1], torch.full((2,), 0.8, dtype=torch.float64))
