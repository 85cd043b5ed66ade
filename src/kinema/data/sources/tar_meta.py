"""The .json member of a sample: its captions, its scores, what its media is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kinema.data.records import NO_EXTRAS, Kind, MediaInfo

from .caption_files import caption_list, decode_text

CAPTIONS = ("captions", "caption", "text")
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "width": ("width",),
    "height": ("height",),
    "frames": ("num_frames", "frames"),
    "fps": ("fps",),
    "motion": ("motion", "score_vmafmotion", "score_motion", "motion_score"),
    "aesthetic": ("aesthetic", "score_aesthetic", "aesthetic_score"),
    "start": ("start",),
    "end": ("end",),
}
"""What is read, and the keys that say it; the first that is there counts."""
READ = frozenset((*CAPTIONS, *(key for keys in NUMBERS.values() for key in keys), "crop"))
"""Keys that are no extras."""
SCORES = ("motion", "aesthetic", "fps")


@dataclass(frozen=True)
class Meta:
    """What the .json of a sample says; None and nothing where it does not."""

    captions: tuple[str, ...] | None = None
    scores: Mapping[str, float] = field(default_factory=lambda: NO_EXTRAS)
    size: tuple[int, int] | None = None
    """Width, height."""
    frames: int | None = None
    cut: tuple[float, float | None] | None = None
    crop: tuple[int, int, int, int] | None = None
    extras: Mapping[str, Any] = field(default_factory=lambda: NO_EXTRAS)

    def info(self, kind: Kind) -> MediaInfo | None:
        """What is known of media of this kind; None where that is not enough to place it."""
        if self.size is None:
            return None
        width, height = self.size
        if kind == "image":
            return MediaInfo("image", width, height)
        fps = self.scores.get("fps")
        if self.frames is None or fps is None:
            return None
        return MediaInfo("video", width, height, self.frames, fps, self.frames / fps, (self.frames - 1) / fps)


def read_meta(data: bytes, name: str) -> tuple[Meta, tuple[str, str]]:
    """(what it says, (code, reason) why its record is left out, or empty words). ``name``: that of the member."""
    text, problem = decode_text(data, name)
    if problem:
        return Meta(), ("unreadable caption", problem)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return Meta(), ("unreadable caption", f"{name} beside it is no JSON ({error}): mend it or take it out")
    if not isinstance(found, dict):
        expected = f'expected {{"caption": ...}}, got a {type(found).__name__}'
        return Meta(), ("unreadable caption", f"{name} beside it: {expected}")
    captions: tuple[str, ...] | None = None
    for key in reversed(CAPTIONS):
        if (value := found.get(key)) is not None:
            captions = caption_list(value)
            if captions is None:
                return Meta(), ("unreadable caption", f"{name} beside it: {key!r} is no text and no list of texts")
    numbers = {what: _number(found, keys) for what, keys in NUMBERS.items()}
    cut, crop, trouble = _place(found, numbers, name)
    width, height, frames = (_count(numbers[key]) for key in ("width", "height", "frames"))
    scores = {key: value for key in SCORES if (value := numbers[key]) is not None and (key != "fps" or value > 0)}
    extras = {key: value for key, value in found.items() if key not in READ and value is not None}
    size = None if width is None or height is None else (width, height)
    return Meta(captions, scores or NO_EXTRAS, size, frames, cut, crop, extras or NO_EXTRAS), trouble


def _number(found: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = found.get(key)
        if value is not None:
            break
    else:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and 1 <= value < 2**31 else None


def _place(
    found: Mapping[str, Any], numbers: Mapping[str, float | None], name: str
) -> tuple[tuple[float, float | None] | None, tuple[int, int, int, int] | None, tuple[str, str]]:
    """(cut, crop, (code, reason) where they make no sense)."""
    start, end = numbers["start"], numbers["end"]
    cut = None if start is None and end is None else (start or 0.0, end)
    if cut is not None and (cut[0] < 0 or (cut[1] is not None and cut[1] <= cut[0])):
        stop = "its end" if cut[1] is None else f"{cut[1]:g} s"
        reason = f"it is cut from {cut[0]:g} s to {stop} in {name}: expected 0 <= start < end"
        return None, None, ("bad cut", reason)
    crop = found.get("crop")
    if crop is None:
        return cut, None, ("", "")
    whole = isinstance(crop, list) and len(crop) == 4 and all(isinstance(edge, int) for edge in crop)
    if not whole or not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
        reason = f"its crop in {name} is {crop!r}: expected [left, top, right, bottom] in pixels"
        return cut, None, ("bad crop", reason)
    return cut, (crop[0], crop[1], crop[2], crop[3]), ("", "")
