"""What a sample can be told besides texts, size and schedule: given frames, scales that oscillate, further stretches.

What stands here holds for a family that does what its diffusers pipeline does; one that can do more has methods of its
own in the place of these (`kinema.families.base.Family`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError

if TYPE_CHECKING:
    from kinema.families.base import Family, Variant

FULL_STEPS = 10
"""Steps before a guidance scale begins to oscillate. Its first low step is then number 11, counted from 0."""

ABOVE_ONE = math.nextafter(1.0, 2.0)
"""The scale of the low steps of pipelines that ask the network for both branches in one call: up to 1 they would drop
one of them, which is in the batch already. In float32 it is 1."""

Cut = tuple[int, int]
"""Which of the references (negative from the end), and what is used of it: its first so many frames, its last ones
where negative, all with 0."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """None of each: what the family does by itself."""

    condition: str | None = None
    """Which frames are given, from which reference: a name, or a mask strategy."""
    text_osci: bool | None = None
    """Whether the guidance towards the text oscillates (`oscillating`)."""
    image_osci: bool | None = None
    """Whether the guidance towards given frames does."""
    temporal_osci: bool | None = None
    """Whether that guidance grows over the frames of the video."""
    full_steps: int | None = None
    """Steps before anything oscillates."""
    extend: int | None = None
    """Stretches that are added to the video."""
    overlap: int | None = None
    """Frames that each of them is told of the video before it."""
    edit: float | None = None
    """How freely these are made anew in the stretch, from 0 to 1."""

    @property
    def has_strategy(self) -> bool:
        """Whether the condition is a mask strategy."""
        return self.condition is not None and is_strategy(self.condition)

    @property
    def said(self) -> dict[str, Any]:
        """Those that say something, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}


def is_strategy(condition: str) -> bool:
    """Whether a condition is written as a mask strategy, in numbers, or else is a name."""
    return condition[:1].isdecimal()


NAMES = tuple(one.name for one in fields(Steering))


def oscillating(scale: float, step: int, full_steps: int = FULL_STEPS, low: float = 1.0) -> float:
    """The scale in step number ``step`` (from 0): whole in the first ``full_steps`` and in every even one, else
    ``low``.

    With 10 whole steps, number 10 is whole too, since it is even: up to 11 steps nothing changes. This is Open-Sora's
    rule, and its published results were made with it; ``full_steps`` is there for samples of few steps.
    """
    return scale if step < full_steps or step % 2 == 0 else low


def whole_length(asked: Steering, frames: int, overlap: int) -> int:
    """Frames of a video whose stretches have ``frames``."""
    return frames + (asked.extend or 0) * (frames - overlap)


# -- families that do what their pipeline does ---------------------------------------------------------------------


def usual_condition(variant: Variant) -> str | None:
    """The name of what the variant is given; None of those that make pictures."""
    if variant.modality == "image":
        return None
    if "last_frame" in variant.conditions:
        return "i2v_loop"
    return "i2v_head" if "first_frame" in variant.conditions else "t2v"


_WORDS = {"t2v": "no frames", "i2v_head": "the first frame", "i2v_loop": "the first frame and the last one"}


def check_usual(family: Family, asked: Steering, guidance: float) -> None:
    """UserError for what the family's pipeline cannot be told, or what tells it nothing."""
    name = family.variant.name
    usual = usual_condition(family.variant)
    if asked.condition is not None and asked.condition != usual:
        what = "makes pictures" if usual is None else f"is given {_WORDS[usual]} ({usual})"
        raise UserError(f"--condition {asked.condition}: {name} {what}, and nothing else; leave the option away.")
    for option, value in (("image-osci", asked.image_osci), ("temporal-osci", asked.temporal_osci)):
        if value:
            raise UserError(f"--{option}: {name} has no guidance towards given frames apart; leave it away.")
    if asked.text_osci and family.low_guidance is None:
        raise UserError(
            f"--text-osci: {family.variant.pipeline} sets its guidance before the first step, for all of them, so that "
            "it cannot oscillate; leave it away."
        )
    if asked.text_osci and guidance <= 1:
        raise UserError(f"--text-osci: with a guidance of {guidance:g} nothing is guided; leave it away.")
    if asked.full_steps is not None and not family.oscillates(asked, guidance, 0):
        raise UserError(f"--full-steps {asked.full_steps}: nothing oscillates; it belongs to --text-osci.")
    if asked.edit is not None:
        raise UserError(f"--edit {asked.edit:g}: {name} keeps the frames that it is given; leave it away.")


def usual_overlap(variant: Variant, overlap: int | None) -> int:
    """A stretch goes on from one frame, the last of the video before it. UserError for a variant that is not told its
    first frame and no other."""
    if "first_frame" not in variant.conditions:
        raise UserError(
            f"--extend: {variant.name} makes {variant.modality}s from text alone, and a further stretch has to be told "
            "the last frame of the video. Take a variant that is given a first frame (`kinema models`)."
        )
    if "last_frame" in variant.conditions:
        raise UserError(
            f"--extend: {variant.name} has to be told the last frame of every stretch too, which is not known. Take a "
            "variant that is given the first frame alone (`kinema models`)."
        )
    if overlap not in (None, 1):
        raise UserError(f"--overlap {overlap}: {variant.name} is told one frame; leave it away.")
    return 1


def usual_cuts(references: int) -> tuple[Cut, ...]:
    """The first frame of each reference."""
    return tuple((index, 1) for index in range(references))
