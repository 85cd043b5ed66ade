"""Frames that a sample is given: one general form, of which image-to-video and video-to-video are cases.

A strategy is a list of `Given`: which frames of the video are given, from which reference, how strongly. It is the mask
strategy of Open-Sora 1.x (``"0,0,0,0,1,0;0,1,0,-1,1,0"``), by the means of Open-Sora 2.0: the network sees a mask, and
beside it the latents of the frames that the mask keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from kinema.errors import UserError
from kinema.families.open_sora_conditions import (
    frame_count,
    frames_of,
    given_of,
    latents_of,
    lengths_of,
)
from kinema.families.steering import is_strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Given:
    """A stretch of the video that comes from a reference. All positions count latent frames; negative ones count from
    the end."""

    reference: int = 0
    """Which of the sample's references."""
    source: int = 0
    """Its first frame that is used."""
    target: int = 0
    """Where in the video that frame goes."""
    frames: int = 1
    """How many frames; fewer where the reference or the video ends before."""
    edit: float = 0.0
    """0 keeps the frames, 1 makes them anew. Between: they are given while t > ``edit``, then are mixed with noise to
    the time of that step and go on as all others, so that they keep their larger features."""


Strategy = tuple[Given, ...]


class Condition(NamedTuple):
    """A condition that has a name."""

    cuts: tuple[tuple[int, int], ...]
    """What becomes of the references before they are encoded, so that nothing leaks into them: (which one, its first
    so many frames, or its last where negative); one reference for each cut."""
    strategy: Strategy


def named_condition(name: str, causal: bool = True) -> Condition:
    """The condition of this name, for an autoencoder that is causal or not. UserError for a name that is none."""
    head, tail = given_of(name, causal)
    cuts, strategy = [], []
    if head:
        cuts.append((0, frames_of(head, causal)))
        strategy.append(Given(frames=latents_of(head, causal)))
    if tail:
        count = latents_of(tail, causal)
        cuts.append((-1, -frames_of(tail, causal)))
        strategy.append(Given(len(strategy), -count, -count, count))
    return Condition(tuple(cuts), tuple(strategy))


def resolved(condition: str | Sequence[Given] | None, references: int, causal: bool) -> Condition:
    """What a condition means for a sample with so many references: a name, a mask strategy (its stretch 0), `Given`s,
    or None for what the number of references stands for. UserError for what is none of these."""
    if condition is None:
        if references > 2:
            raise UserError(f"{references} references: say with condition which frames come from each.")
        condition = ("t2v", "i2v_head", "i2v_loop")[references]
    if isinstance(condition, str) and not is_strategy(condition):
        return named_condition(condition, causal)
    strategy = parse_strategy(condition).get(0, ()) if isinstance(condition, str) else tuple(condition)
    return Condition(tuple((index, 0) for index in range(references) if strategy), strategy)


def cut_length(frames: int, there: int, causal: bool) -> int:
    """How many frames a cut takes of a reference that has ``there``, signed as the cut; UserError if there are
    fewer."""
    if frames == 0:
        return lengths_of(causal).at_most(there)
    if abs(frames) > there:
        raise UserError(
            f"This condition is told {abs(frames)} frames, and the reference has {there}. Take a longer one."
        )
    return frames


# -- Open-Sora 1.x's notation ----------------------------------------------------------------------------------------

_FIELDS = ("loop", "reference", "source", "target", "frames", "edit")
_DEFAULTS = ("0", "0", "0", "0", "1", "0")


def parse_strategy(text: str) -> dict[int, Strategy]:
    """A mask strategy in Open-Sora 1.x's notation, by the number of the stretch ("loop") that each part is for.

    Parts are separated by ``;``. Each has up to six numbers: stretch, reference, first frame of the reference, place
    in the video, number of frames, edit; what is left out is 0, but 1 for the number of frames. UserError names the
    part that cannot be read.
    """
    found: dict[int, Strategy] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        values = part.split(",")
        if len(values) > len(_FIELDS):
            raise UserError(f"Mask strategy '{part}': {len(values)} numbers, and there are six: {', '.join(_FIELDS)}.")
        values += _DEFAULTS[len(values) :]
        try:
            loop, reference, source, target, frames = (int(value) for value in values[:5])
            edit = float(values[5])
        except ValueError as error:
            raise UserError(f"Mask strategy '{part}': write whole numbers for {', '.join(_FIELDS[:5])}.") from error
        if loop < 0 or frames < 1 or not 0 <= edit <= 1:
            raise UserError(f"Mask strategy '{part}': loop is 0 or more, frames 1 or more, edit from 0 to 1.")
        found[loop] = (*found.get(loop, ()), Given(reference, source, target, frames, edit))
    return found


# -- as tensors ------------------------------------------------------------------------------------------------------


@dataclass
class Conditions:
    """What a batch of samples is given."""

    edit: Tensor
    """[B, 1, T, 1, 1]: `Given.edit`, and 1 where nothing is given."""
    reference: Tensor
    """Latents [B, C, T, H, W] of what is given, else 0."""

    def given(self, t: float) -> bool:
        """Whether any frame of any sample is given at time ``t``."""
        return bool(self.mask(t).any())

    def mask(self, t: float) -> Tensor:
        """1 where frames are given at time ``t``, [B, 1, T, 1, 1]."""
        return (self.edit < min(t, 1.0)).to(self.reference.dtype)  # in float32 the first time may be above 1

    def told(self, t: float) -> Tensor:
        """What the network is told at time ``t``: the mask, and the latents that it keeps; [B, 1 + C, T, H, W]."""
        import torch

        mask = self.mask(t).expand(-1, -1, -1, *self.reference.shape[3:])
        return torch.cat([mask, mask * self.reference], dim=1)

    def release(self, x: Tensor, noise: Tensor, t: float, before: float) -> Tensor:
        """x_t with the frames set free that were given at time ``before`` and are no longer at ``t``: their latents,
        mixed with noise to time ``t``."""
        freed = self.mask(before) - self.mask(t)
        return x + freed * ((1 - t) * self.reference + t * noise - x) if bool(freed.any()) else x

    def put_back(self, x: Tensor) -> Tensor:
        """The sample with the frames that are given to the end as they were given."""
        import torch

        return torch.where(self.edit == 0, self.reference.to(x.dtype), x)


def placed(strategy: Strategy, lengths: Sequence[int], latent_frames: int) -> Strategy:
    """The strategy over references of these latent ``lengths`` and a video of ``latent_frames``, every position counted
    from the start and nothing beyond an end. UserError for a stretch that is not there."""
    found = []
    for one in strategy:
        if not -len(lengths) <= one.reference < len(lengths):
            raise UserError(f"Frames are to come from reference {one.reference}; the sample has {len(lengths)}.")
        reference = one.reference % len(lengths)
        source = _place(one.source, lengths[reference], "the reference")
        target = _place(one.target, latent_frames, "the video")
        frames = min(one.frames, lengths[reference] - source, latent_frames - target)
        found.append(replace(one, reference=reference, source=source, target=target, frames=frames))
    return tuple(found)


def check_room(strategy: Strategy, latent_frames: int, causal: bool) -> None:
    """UserError where a strategy that is `placed` gives every frame of the video as it is."""
    edit = [1.0] * latent_frames
    for one in strategy:
        edit[one.target : one.target + one.frames] = [one.edit] * one.frames
    if not any(edit):
        raise UserError(
            f"The condition gives all {frame_count(latent_frames, causal)} frames of the video, which leaves none to "
            "be made. Ask for more."
        )


def lay_out(strategies: Sequence[Strategy], references: Sequence[Sequence[Tensor]], like: Tensor) -> Conditions:
    """The strategy of each sample over its references, latents [C, T', H, W], for samples of the shape of ``like``
    [B, C, T, H, W]. Where stretches overlap the later one holds. UserError for a stretch that is not there."""
    assert len(strategies) == len(references) == len(like), "a strategy and references for every sample"
    edit, kept = like.new_ones(len(like), 1, like.shape[2], 1, 1), like.new_zeros(like.shape)
    for i, (strategy, own) in enumerate(zip(strategies, references, strict=True)):
        for one in placed(strategy, [shown.shape[1] for shown in own], like.shape[2]):
            shown = own[one.reference].to(like)[:, one.source : one.source + one.frames]
            edit[i, :, one.target : one.target + one.frames] = one.edit
            kept[i, :, one.target : one.target + one.frames] = shown * (one.edit < 1)
    return Conditions(edit, kept)


def _place(start: int, length: int, what: str) -> int:
    if not -length <= start < length:
        raise UserError(f"Frame {start} is not there: {what} has {length} latent frame(s).")
    return start % length
