"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from kinema.config.schema import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Share of the peak learning rate that step ``step`` (from 0) of ``total`` uses.

    Warm-up is linear and reaches the peak at step ``warmup_steps``; the decay then runs over the rest of the real
    horizon and reaches ``final_fraction`` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.decay == "constant":
        return 1.0
    span = max(total - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_fraction + (1 - config.final_fraction) * left
