"""What a sample of Open-Sora can be told, checked in numbers before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kinema.errors import UserError
from kinema.families.open_sora_conditions import frames_of, given_of, latent_frames_of
from kinema.families.open_sora_strategy import (
    Strategy,
    check_room,
    cut_length,
    parse_strategy,
    placed,
    resolved,
)
from kinema.families.steering import Cut, Steering, is_strategy

MOST_FRAMES = 257
"""Frames of a reference that a mask strategy reads whole: twice the longest stretch, at the sample's size."""


class Abilities(NamedTuple):
    """What the network and its autoencoder can do."""

    causal: bool
    """Whether the first latent frame stands for the first frame alone."""
    is_told_frames: bool
    is_distilled: bool
    """Whether it is told its guidance scale, in one pass a step."""


def cuts_of(condition: str | None, references: int, causal: bool) -> tuple[Cut, ...]:
    """What is read of the references, over all stretches of a sample."""
    if condition is not None and is_strategy(condition):
        return tuple((index, 0) for index in range(references))
    return resolved(condition, references, causal).cuts


def overlap_of(overlap: int | None, frames: int, there: int, causal: bool) -> int:
    """Frames that a stretch of ``frames`` is told of a video that has ``there``: by default as many as "v2v_head"
    gives, or 1 for short stretches. UserError for what the autoencoder does not take, or what leaves nothing new."""
    if overlap is None:
        usual = frames_of(given_of("v2v_head", causal).head, causal)
        overlap = usual if usual < frames and usual <= there else 1
    most = min(there, frames - 1)
    if not 1 <= overlap <= most:
        raise UserError(
            f"overlap {overlap}: the video has {there} frames, and a stretch {frames}, of which some must be new. "
            f"Give 1 to {most}."
        )
    try:
        latent_frames_of(overlap, causal, exact=True)
    except UserError as error:
        raise UserError(f"overlap {overlap}: {error}") from None
    return overlap


def check_asked(asked: Steering, frames: int, guidance: float, references: Sequence[int], can: Abilities) -> None:
    """UserError for what a sample of ``frames`` cannot be told. ``references``: how many frames each of them has, 1 of
    a picture."""
    _check_oscillation(asked, guidance, len(references), can)
    if asked.extend and not can.is_told_frames:
        raise UserError("--extend: this network was made for text alone (cond_embed = false): it is told no frames.")
    condition = asked.condition
    stretches: Mapping[int, Strategy] = {}
    if condition is not None and asked.has_strategy:
        stretches = parse_strategy(condition)
    elif condition is not None:
        given_of(condition, can.causal)
    if not references:
        if condition not in (None, "t2v"):
            raise UserError(
                f"--condition {condition} takes frames from pictures or videos, and there are none: give them with "
                "--image."
            )
        return
    if not can.is_told_frames:
        raise UserError("--image: this network was made for text alone (cond_embed = false); leave it away.")
    if frames == 1:
        raise UserError("--frames 1: a picture has no place beside a reference. Ask for more frames.")
    try:
        if stretches:
            _check_strategy(stretches, asked, frames, references, can.causal)
        else:
            _check_named(condition, frames, references, can.causal)
    except UserError as error:
        raise UserError(f"--condition {condition}: {error}" if condition else f"--image: {error}") from None


def oscillates(asked: Steering, guidance: float, references: int, can: Abilities) -> bool:
    """Whether a scale of such a sample oscillates: that of the text by default, and that of the frames where some are
    given."""
    of_text = asked.text_osci is not False and guidance > 1
    of_frames = asked.image_osci is not False and _is_given_frames(asked, references)
    return (of_text or of_frames) and not can.is_distilled


def _is_given_frames(asked: Steering, references: int) -> bool:
    """A further stretch is given the end of the video."""
    return references > 0 or bool(asked.extend)


def _check_oscillation(asked: Steering, guidance: float, references: int, can: Abilities) -> None:
    oscillate = {
        "text-osci": asked.text_osci,
        "image-osci": asked.image_osci,
        "temporal-osci": asked.temporal_osci,
        "full-steps": asked.full_steps,
    }
    named = [name for name, value in oscillate.items() if value]
    if named and can.is_distilled:
        raise UserError(
            f"--{named[0]}: this network was distilled and is told its guidance scale; nothing oscillates. Leave it "
            "away."
        )
    if asked.text_osci and guidance <= 1:
        raise UserError(f"--text-osci: with a guidance of {guidance:g} nothing is guided; leave it away.")
    for name in ("image-osci", "temporal-osci"):
        if oscillate[name] and not _is_given_frames(asked, references):
            raise UserError(
                f"--{name}: it is of the guidance towards given frames, and there are none; leave it away or give some "
                "with --image."
            )
    if asked.full_steps is not None and not oscillates(asked, guidance, references, can):
        raise UserError(f"--full-steps {asked.full_steps}: nothing oscillates; leave it away.")


def _check_named(condition: str | None, frames: int, references: Sequence[int], causal: bool) -> None:
    cuts, strategy = resolved(condition, len(references), causal)
    used = {index % len(references) for index, _ in cuts}
    if len(used) < len(references):
        raise UserError(
            f"it takes frames from {len(used) or 'no'} reference(s), and {len(references)} are given with --image: "
            "leave the others away."
        )
    latent_frames = latent_frames_of(frames, causal)
    told = [abs(cut_length(count, references[index], causal)) for index, count in cuts]
    lengths = [latent_frames_of(count, causal) for count in told]
    check_room(placed(strategy, lengths, latent_frames), latent_frames, causal)


def _check_strategy(
    stretches: Mapping[int, Strategy],
    asked: Steering,
    frames: int,
    references: Sequence[int],
    causal: bool,
) -> None:
    for index, count in enumerate(references):
        if count > MOST_FRAMES:
            raise UserError(
                f"reference {index} has {count} frames at the sample's rate; a mask strategy reads references whole, "
                f"up to {MOST_FRAMES}. Cut it, or take v2v_head or v2v_tail, which read one end."
            )
    latent_frames = latent_frames_of(frames, causal)
    lengths = [latent_frames_of(cut_length(0, count, causal), causal) for count in references]
    unused = set(range(len(references)))
    for stretch, strategy in stretches.items():
        if stretch > (asked.extend or 0):
            raise UserError(
                f"it gives frames to stretch {stretch}, and the last one is {asked.extend or 0}. Stretches are added "
                "with --extend."
            )
        # a stretch that is added has the end of the video as one more reference
        end = [latent_frames_of(overlap_of(asked.overlap, frames, frames, causal), causal)] if stretch else []
        own = placed(strategy, [*lengths, *end], latent_frames)
        if not stretch:
            check_room(own, latent_frames, causal)
        unused -= {one.reference for one in own}
    if unused:
        raise UserError(f"no frame is taken from reference {min(unused)}; leave it away.")
