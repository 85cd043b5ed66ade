"""Which stretches of the videos become clips: the modes of `data.buckets.clip`, for whole columns of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .draws import uniforms

if TYPE_CHECKING:
    from kinema.config.data import BucketConfig


def take_clips(
    config: BucketConfig,
    frames: np.ndarray,
    available: np.ndarray,
    single: np.ndarray,
    rows: np.ndarray,
    *,
    seed: int,
    online: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clips of N records: (position of the record, first frame of the clip, spare), [K] each, sorted by the first
    two. ``spare``: how many later first frames a clip drawn anew for every use may take.

    ``frames`` [N] of a clip, of ``available`` [N] at least as many. ``single`` bool [N]: no more than one clip is
    taken, whatever the mode. ``rows`` [N]: what random clips are keyed by.
    """
    room = available - frames
    every = np.arange(len(frames))
    none = np.zeros(len(frames), np.int32)
    if config.clip == "random" and online:
        return every, none, room
    if config.clip in _ONE:
        return every, _ONE[config.clip](room), none
    counts = _count(config, frames, available, room)
    counts[single] = 1
    owner = np.repeat(every, counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    if config.clip == "random":
        start = _distinct(room + 1, counts, rows, seed)[owner, number]
    elif config.clip == "uniform":
        gaps = np.maximum(counts - 1, 1)
        spread = number * room[owner].astype(np.int64) // gaps[owner]
        start = np.where(counts[owner] == 1, room[owner] // 2, spread)
    else:
        start = number * _step(config, frames)[owner]
    return owner, start.astype(np.int32), np.zeros(len(owner), np.int32)


_ONE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "head": np.zeros_like,
    "middle": lambda room: room // 2,
    "tail": lambda room: room,
    "full": np.zeros_like,
}
"""First frame of the only clip, by the frames that are left over."""


def _step(config: BucketConfig, frames: np.ndarray) -> np.ndarray:
    """Frames between the beginnings of clips that follow each other."""
    if config.clip == "chunk":
        return frames
    return np.maximum(frames // 2, 1) if config.clip_stride is None else np.full_like(frames, config.clip_stride)


def _count(config: BucketConfig, frames: np.ndarray, available: np.ndarray, room: np.ndarray) -> np.ndarray:
    if config.clip in ("chunk", "slide"):
        return room // _step(config, frames) + 1
    return np.minimum(config.clips, room + 1)


def _distinct(choices: np.ndarray, counts: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """``counts`` [N] different integers below ``choices`` [N] for each row, ascending from the left; every set of them
    is as likely as any other (Floyd's algorithm)."""
    beyond = np.iinfo(np.int32).max
    found = np.full((len(counts), int(counts.max(initial=0))), beyond, np.int32)
    for number in range(found.shape[1]):
        at = np.flatnonzero(counts > number)
        last = choices[at] - counts[at] + number
        drawn = (uniforms(rows[at], seed, "random clips", number) * (last + 1)).astype(np.int32)
        taken = (found[at, :number] == drawn[:, None]).any(axis=1)
        found[at, number] = np.where(taken, last, drawn)
    found.sort(axis=1)
    return found
