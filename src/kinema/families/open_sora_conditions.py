"""Which frames of a clip Open-Sora is given: conditions by name, and how training draws one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.errors import ConfigError, UserError
from kinema.suggest import did_you_mean

FRAMES_PER_LATENT = 4


class Given(NamedTuple):
    """Frames that are given at the beginning and at the end of a clip: 0, 1 (a picture) or a stretch."""

    head: int = 0
    tail: int = 0


CONDITIONS: dict[str, Given] = {
    "t2v": Given(),
    "i2v_head": Given(1, 0),
    "i2v_tail": Given(0, 1),
    "i2v_loop": Given(1, 1),
    "v2v_head": Given(32, 0),
    "v2v_tail": Given(0, 32),
    "v2v_head_easy": Given(64, 0),
    "v2v_tail_easy": Given(0, 64),
}
"""The authors' names. A causal autoencoder takes one frame more of a stretch."""
SHIPPED: dict[str, float] = {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0}
"""The weights that the authors train image-to-video with."""
NOTHING: dict[str, float] = {"t2v": 1.0}


def given_of(name: str, causal: bool) -> Given:
    """What the condition of this name gives: one of `CONDITIONS`, or ``v2v_head_N`` or ``v2v_tail_N``, a stretch of N
    frames. UserError for any other name, and for a stretch that the autoencoder does not take whole."""
    if name in CONDITIONS:
        return CONDITIONS[name]
    stretch = re.fullmatch(r"v2v_(head|tail)_(\d+)", name)
    if stretch is None:
        raise UserError(
            f"There is no condition '{name}'{did_you_mean(name, CONDITIONS)} Known: {', '.join(CONDITIONS)}, and "
            "v2v_head_N and v2v_tail_N for N frames."
        )
    side, frames = stretch[1], int(stretch[2])
    lengths = lengths_of(causal)
    if frames == 1 or frames not in lengths:
        near = " or ".join(str(one) for one in lengths.nearest(frames) if one > 1)
        raise UserError(
            f"{name}: this autoencoder takes {lengths} frames; nearest: {near}. A single frame is i2v_{side}."
        )
    return Given(**{side: frames - causal})


class End(NamedTuple):
    """One reference that is encoded by itself, so that nothing of the rest of the clip leaks into it."""

    side: str
    """"head" or "tail"."""
    frames: int
    """Of the clip."""

    @property
    def name(self) -> str:
        """The name of its encoding."""
        return f"{self.side}_{self.frames}"


def lengths_of(causal: bool) -> ClipLengths:
    """Frames that the autoencoder takes whole."""
    return CAUSAL if causal else ClipLengths(FRAMES_PER_LATENT, FRAMES_PER_LATENT)


def latent_frames_of(frames: int, causal: bool, exact: bool = False) -> int:
    """Latent frames of a sample of ``frames``; UserError for a length that a causal autoencoder does not make.

    A DC-AE makes more frames than are asked for where they do not fill the last latent one. ``exact``: UserError there
    too."""
    lengths = lengths_of(causal)
    if frames < 1 or (frames not in lengths and (causal or exact)):
        near = " or ".join(map(str, lengths.nearest(frames)))
        raise UserError(f"{frames} frames: this autoencoder takes {lengths}; nearest: {near}.")
    return lengths.latents(frames)


def frame_count(latent_frames: int, causal: bool) -> int:
    """Frames that so many latent ones stand for."""
    return (latent_frames - 1) * FRAMES_PER_LATENT + 1 if causal else latent_frames * FRAMES_PER_LATENT


def frames_of(given: int, causal: bool) -> int:
    """Frames of the clip that are encoded for a stretch of ``given``."""
    return given + causal if given > 1 else given


def latents_of(given: int, causal: bool) -> int:
    """Latent frames that they make."""
    return given // FRAMES_PER_LATENT + causal if given > 1 else given


def ends(given: Given, causal: bool) -> list[End]:
    """The references of one condition."""
    sides = (("head", given.head), ("tail", given.tail))
    return [End(side, frames_of(count, causal)) for side, count in sides if count]


def possible(weights: Mapping[str, float], latent_frames: int, causal: bool) -> dict[str, float]:
    """Of these conditions, those that leave at least one of ``latent_frames`` to be learnt; text alone if none does."""
    kept = {
        name: weight
        for name, weight in weights.items()
        if weight > 0 and sum(latents_of(count, causal) for count in given_of(name, causal)) < latent_frames
    }
    return kept or NOTHING


def choose(weights: Mapping[str, float], u: float) -> str:
    """The condition at quantile ``u`` in [0, 1), each as often as its weight says."""
    rest = u * sum(weights.values())
    for name, weight in weights.items():
        rest -= weight
        if rest < 0:
            return name
    return list(weights)[-1]  # sums of floats: u just below 1


def check_weights(weights: Mapping[str, float] | None, told: bool, causal: bool) -> None:
    """ConfigError for unknown conditions, for stretches that the autoencoder does not take, for weights without a
    positive one, and for frames that a network without ``cond_embed`` cannot be ``told``."""
    if weights is None:
        return
    for name in weights:
        try:
            given_of(name, causal)
        except UserError as error:
            raise ConfigError(f"model.conditions: {error}") from None
    if not sum(weights.values()) > 0:
        raise ConfigError("model.conditions: no weight is above 0. Give { t2v = 1 } for text alone.")
    asked = [name for name, weight in weights.items() if weight > 0 and name != "t2v"]
    if asked and not told:
        raise ConfigError(
            f"model.conditions: this network is told no frames (cond_embed = false), which {asked[0]} needs. Leave the "
            "key out, or take a network with cond_embed."
        )
