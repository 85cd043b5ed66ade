"""What happens after each step of a pipeline: progress is told, and a guidance scale that oscillates is set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from kinema.families.steering import FULL_STEPS, oscillating

if TYPE_CHECKING:
    from kinema.families.base import Family
    from kinema.sampling.pipeline import OnStep, SampleSettings

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""diffusers' ``callback_on_step_end``: (pipeline, index of the step, its time, tensors)."""


def step_end(
    family: Family, one: SampleSettings, scale: float | None, group: Sequence[int], on_step: OnStep | None
) -> StepEnd | None:
    """What a call, and those that extend what it drew, are to do after each step; None where that is nothing.

    ``scale``: the pipeline's guidance scale, which oscillates where the settings ask for it and the pipeline reads it
    anew in each step (``family.low_guidance``); diffusers documents setting it from here.
    """
    low = family.low_guidance if one.text_osci else None
    if on_step is None and (low is None or scale is None):
        return None
    done = count(1)
    full_steps = FULL_STEPS if one.full_steps is None else one.full_steps

    def report(pipeline: Any, index: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if low is not None and scale is not None:
            pipeline._guidance_scale = oscillating(scale, index + 1, full_steps, low)
        if on_step is not None:
            on_step(group, next(done), one.all_steps)
        return {}

    return report
