"""Columns of media for tests of placing."""

from __future__ import annotations

import numpy as np

from kinema.data.sources.base import MediaColumns


def columns(
    count: int = 1,
    *,
    known: bool = True,
    video: bool = True,
    width: int = 640,
    height: int = 360,
    frames: int = 100,
    fps: float = 16.0,
    duration: float | None = None,
    offset: float = 0.0,
    variable: bool = False,
) -> MediaColumns:
    """``count`` equal rows. The duration is that of the frames, unless given."""
    if not video:
        frames, fps, duration = 1, 0.0, 0.0
    if duration is None:
        duration = frames / fps
    kinds = (np.bool_, np.bool_, np.int32, np.int32, np.int32, np.float64, np.float64, np.float64, np.bool_)
    values = (known, video, width, height, frames, fps, duration, offset, variable)
    return MediaColumns(*(np.full(count, value, kind) for value, kind in zip(values, kinds, strict=True)))
