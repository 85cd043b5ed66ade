"""Flow matching (Lipman et al. 2023; Liu et al. 2023): regress the network's native prediction on the path
x_t = (1 - t) x_0 + t eps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.config.schema import ObjectiveConfig
from kinema.data.batch import Batch
from kinema.families.prediction import native_target
from kinema.objectives.base import Denoiser, Draws, Loss
from kinema.objectives.time import TimeLaw

if TYPE_CHECKING:
    from torch import Tensor


def pointwise_error(prediction: Tensor, target: Tensor, config: ObjectiveConfig) -> Tensor:
    """Squared error, or pseudo-Huber 2 d (sqrt(e^2 + d^2) - d), which is e^2 for small e and 2 d |e| for large.

    The latter is computed as 2 d e^2 / (sqrt(e^2 + d^2) + d), in which nothing cancels.
    """
    squared = (prediction.float() - target.float()).square()
    if config.loss == "huber":
        delta = config.huber_delta
        return 2 * delta * squared / ((squared + delta**2).sqrt() + delta)
    return squared


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample [B, ...] over what the mask [B, 1, ...] keeps; 0 where it keeps nothing."""
    if mask is None:
        return values.flatten(1).mean(1)
    mask = mask.expand_as(values)
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class FlowMatching:
    """E over t, eps of the error between the native prediction at x_t and its true value."""

    config: ObjectiveConfig
    law: TimeLaw
    roles: tuple[str, ...] = ("student",)

    def __call__(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws) -> Loss:
        return self._loss(batch, networks["student"], draws, quantile=None)

    def at_quantile(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws, quantile: float) -> Loss:
        return self._loss(batch, networks["student"], draws, quantile)

    def _loss(self, batch: Batch, student: Denoiser, draws: Draws, quantile: float | None) -> Loss:
        prepared = student.prepare(batch)
        x_0 = prepared.latents
        eps = draws.normal(batch, x_0, "noise")
        u = draws.uniform(batch, x_0.device, "time")
        if quantile is not None:
            u = u.new_full(u.shape, quantile)
        t = self.law.quantile(u, student.tokens(x_0)).to(x_0.dtype)

        t_at = t.view(-1, 1, 1, 1, 1)
        if prepared.given is not None:
            t_at = t_at * (1 - prepared.given)  # what is given is clean
        x_t = (1 - t_at) * x_0 + t_at * eps
        prediction = student.predict(x_t, t if prepared.given is None else t_at, prepared.conditioning)
        target = native_target(student.path, x_0, eps)
        kept = None if prepared.given is None else 1 - prepared.given
        per_sample = masked_mean(pointwise_error(prediction, target, self.config), kept)
        weights = per_sample.new_tensor(batch.weights)
        return Loss((per_sample * weights).sum(), per_sample.detach(), {})


def flow_matching(config: ObjectiveConfig, default_shift: float) -> FlowMatching:
    """The objective of a configuration; a shift that it leaves open is the family's."""
    shift = default_shift if config.shift is None else config.shift
    return FlowMatching(config, TimeLaw(config.time, config.time_scale, shift, config.t_min, config.t_max))
