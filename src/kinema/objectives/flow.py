"""Flow matching (Lipman et al. 2023; Liu et al. 2023): regress the network's native prediction on the path
x_t = (1 - t) x_0 + t eps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.config.schema import ObjectiveConfig
from kinema.data.batch import Batch
from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.families.base import Family
from kinema.families.noise_path import Native
from kinema.families.prediction import native_target
from kinema.objectives.base import Denoiser, Draws, Loss
from kinema.objectives.mask import kept_latents, masked_mean
from kinema.objectives.time import TimeLaw

if TYPE_CHECKING:
    from torch import Tensor


SIGMA_DATA = 0.5
"""Standard deviation of the data in EDM's weight."""


def pointwise_error(prediction: Tensor, target: Tensor, config: ObjectiveConfig) -> Tensor:
    """Squared error, or pseudo-Huber 2 d (sqrt(e^2 + d^2) - d), which is e^2 for small e and 2 d |e| for large.

    The latter is computed as 2 d e^2 / (sqrt(e^2 + d^2) + d), in which nothing cancels.
    """
    squared = (prediction.float() - target.float()).square()
    if config.loss == "huber":
        delta = config.huber_delta
        return 2 * delta * squared / ((squared + delta**2).sqrt() + delta)
    return squared


def loss_weight(kind: str, t: Tensor, native: Native, gamma: float) -> Tensor:
    """The weight of each sample's loss at times t [B], with SNR = ((1 - t) / t)^2.

    - "min_snr" (Hang et al. 2023, arXiv 2303.09556): min(SNR, gamma) / SNR for eps, / (SNR + 1) for the
      variance-preserving velocity, and min(SNR, gamma) itself for x_0; all three weigh the same error in x_0 alike.
      A flow velocity is (x_t - x_0) / t, so there it is min(SNR, gamma) t^2.
    - "debiased" (Yu et al. 2023, arXiv 2310.08442): 1 / sqrt(SNR) for eps, with SNR at most 1000. For the
      variance-preserving velocity 1 / (SNR + 1), as Kohya's tools have it, which weighs steps without signal too; for
      the others what weighs the same error in eps alike, which for a flow velocity is t (1 - t).
    - "edm" (Karras et al. 2022, arXiv 2206.00364, table 1): 1 / c_out^2 = (sigma^2 + sd^2) / (sigma sd)^2 with
      sd = 0.5, for networks that predict x_0.
    """
    t = t.double().clamp(1e-4, 1 - 1e-4)
    snr = ((1 - t) / t).square()
    in_x0 = {"x0": 1.0, "eps": 1 / snr, "vp_velocity": 1 / (snr + 1)}.get(native, t.square())
    if kind == "min_snr":
        return snr.clamp(max=gamma) * in_x0
    if kind == "debiased":
        limited = snr.clamp(max=1000)
        if native == "vp_velocity":
            return 1 / (limited + 1)
        return limited.rsqrt() * (snr * in_x0)
    if kind == "edm":
        variance = SIGMA_DATA**2
        return (1 / snr + variance) * snr / variance
    assert kind == "none", kind
    return t.new_ones(t.shape)


@dataclass(frozen=True)
class FlowMatching:
    """E over t, eps of the error between the native prediction at x_t and its true value."""

    config: ObjectiveConfig
    law: TimeLaw
    weighting: str = "none"
    roles: tuple[str, ...] = ("student",)
    lengths: ClipLengths = CAUSAL
    """Which frames of a mask each latent frame stands for."""

    def __call__(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws) -> Loss:
        return self._loss(batch, networks["student"], draws, quantile=None)

    def at_quantile(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws, quantile: float) -> Loss:
        return self._loss(batch, networks["student"], draws, quantile)

    def _loss(self, batch: Batch, student: Denoiser, draws: Draws, quantile: float | None) -> Loss:
        prepared = student.prepare(batch)
        x_0 = prepared.latents
        size = student.tokens(x_0), x_0.shape[2]
        law = self.law.within(*student.time_range)
        eps = draws.normal(batch, x_0, "noise")
        u = draws.uniform(batch, x_0.device, "time")
        if quantile is None:
            # Experts share the range of times: one of them takes the whole step, as often as its times come up.
            student = student.at(float(law.quantile(draws.shared("expert"), *size)))
            law = law.within(*student.time_range)
        else:
            u = u.new_full(u.shape, quantile)
            student = student.at(float(law.quantile(u[0], *size)))
        t = law.quantile(u, *size).to(x_0.dtype)

        t_at = t.view(-1, 1, 1, 1, 1)
        if prepared.given is not None:
            t_at = t_at * (1 - prepared.given)  # what is given is clean
        if student.path.sigma_min:  # the noise that is left at t = 0
            left = student.path.sigma_min * eps
            x_0 = x_0 + (left if prepared.given is None else left * (1 - prepared.given))
        x_t = (1 - t_at) * x_0 + t_at * eps
        prediction = student.predict(x_t, t if prepared.given is None else t_at, prepared.conditioning)
        target = native_target(student.path, x_0, eps, t)
        kept = kept_latents(batch.masks, x_0, prepared.given, self.lengths)
        per_sample = masked_mean(pointwise_error(prediction, target, self.config), kept)
        per_sample = per_sample * loss_weight(self.weighting, t, student.path.native, self.config.min_snr_gamma).to(
            per_sample
        )
        weights = per_sample.new_tensor(batch.weights, device="cpu").to(per_sample.device, non_blocking=True)
        return Loss((per_sample * weights).sum(), per_sample.detach(), {})


def flow_matching(config: ObjectiveConfig, family: Family) -> FlowMatching:
    """The objective of a configuration; the shift, the time law and the weight that it leaves open are the family's."""
    shift = family.default_shift() if config.shift is None else config.shift
    time_range = family.path.t_min, family.path.t_max
    law = TimeLaw(
        distribution=config.time or family.default_time,
        scale=config.time_scale,
        shift=family.resolution_shift if shift == "resolution" else shift,
        t_min=config.t_min,
        t_max=config.t_max,
        native=family.native_time,
    )
    weighting = config.weighting or family.default_weighting
    return FlowMatching(config, law.within(*time_range), weighting, lengths=family.lengths)
