"""Pictures and videos that a sample is made from: how many frames they have at its rate, and the pixels of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from kinema.data.records import MediaInfo
    from kinema.families.steering import Cut


def picture(path: Path | str, height: int, width: int) -> Image.Image:
    """A picture (or the first frame of a video) at the sample's size, by the transform of training clips."""
    from PIL import Image

    return Image.fromarray(_frames(path, 0, 1, 0.0, height, width)[0])


def frames_at(info: MediaInfo, fps: float | None) -> tuple[int, float]:
    """How many frames a file has at ``fps``, and the rate: its own where that is nearly the same, or where none is
    asked for. A picture has one."""
    from kinema.data.choice import SAME_RATE

    if info.kind == "image" or not info.fps:
        return 1, 0.0
    near = fps is None or abs(fps / info.fps - 1) < SAME_RATE
    if fps is None or (near and not info.variable):
        return info.frames, info.fps
    return max(1, -int(-(info.duration * fps - 1e-6) // 1)), fps


def shown(
    images: Sequence[Path | str], cuts: Sequence[Cut], fps: float | None, height: int, width: int
) -> list[Image.Image | np.ndarray]:
    """The parts of the references that are used, at the sample's size and rate: a picture for one frame, else uint8
    [T, H, W, 3]. No more of a video is decoded than is used."""
    from PIL import Image

    from kinema.data.media import known_info

    found: list[Image.Image | np.ndarray] = []
    for index, count in cuts:
        image = images[index]
        if count == 1:
            found.append(picture(image, height, width))
            continue
        there, rate = frames_at(known_info(image), fps)
        wanted = abs(count) or there
        frames = _frames(image, there - wanted if count < 0 else 0, wanted, rate, height, width)
        found.append(frames if len(frames) > 1 else Image.fromarray(frames[0]))
    return found


def _frames(path: Path | str, start: int, count: int, rate: float, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: frames of the file at ``rate``, scaled to cover the size and cropped at the centre."""
    from kinema.data.buckets import Clip
    from kinema.data.media import decode_clip
    from kinema.data.transform import Transform

    return decode_clip(path, Clip(start, count, rate), Transform(height, width)).transpose(1, 2, 3, 0)
