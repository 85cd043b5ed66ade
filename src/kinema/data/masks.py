"""Masks: where in a clip the loss counts. White counts whole, black not at all, grey in between.

A mask is a picture, which stands for all frames, or a video, which is read at the same times as its media. Its red
channel is the weight. What is transparent counts as black: of a mask that was painted in white on nothing, the rest is
not learnt; one painted in black on nothing is black all over, and is left out with a reason.
Colour profiles are not applied, for the values are weights. A mask need not have the size of its media: of the same
shape, it is stretched to it.

    check_mask(location, info)
    weights = decode_mask(location, clip, transform, info)    # uint8 [1, 1 or T, H, W]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from .buckets import Clip
from .media import Renderer, clip_frames, known_info
from .picture_reader import to_rgb
from .records import MediaError, MediaInfo
from .transform import Transform, crop_within, fit
from .video_reader import display_turn

if TYPE_CHECKING:
    import numpy as np

SHAPE_TOLERANCE = 0.01
"""So much may the aspect ratio of a mask differ from that of its media."""


def check_mask(location: str, info: MediaInfo) -> None:
    """MediaError where the mask cannot be read, or does not belong to media of ``info``. Reads its header alone."""
    mask = known_info(location)
    if abs(mask.width / mask.height * info.height / info.width - 1) > SHAPE_TOLERANCE:
        raise MediaError(
            f"{location} has {mask.width}x{mask.height} pixels and its {info.kind} {info.width}x{info.height}: "
            "give it the same size, or the same aspect ratio",
            "mask of another shape",
        )
    if mask.kind == "image":
        return
    if info.kind == "image":
        raise MediaError(f"{location} is a video of {mask.frames} frames and masks a picture", "mask of another length")
    if mask.duration < info.duration - 0.5 / info.fps - 0.5 / mask.fps:
        raise MediaError(
            f"{location} lasts {mask.duration:.2f} s and its video {info.duration:.2f} s: "
            "give it as many frames, or a picture for all of them",
            "mask of another length",
        )


def decode_mask(location: str, clip: Clip, transform: Transform, info: MediaInfo) -> np.ndarray:
    """The mask of a clip of media of ``info``: uint8 [1, T, H, W], T = 1 for a mask that is a picture.

    It is cropped as the clip is, and scaled by area averages, so that what is black stays black. MediaError where it is
    damaged or too short.
    """
    import numpy as np

    frames = 1 if known_info(location).kind == "image" else clip.frames
    out = np.empty((1, frames, transform.height, transform.width), np.uint8)
    for k, weights in enumerate(_mask_frames(location, clip, transform, info)):
        out[0, k] = weights
    return out


def is_black(location: str, clip: Clip, transform: Transform, info: MediaInfo) -> bool:
    """Whether a mask leaves nothing of a clip to be learnt. Decodes all of it, and raises as `decode_mask` does."""
    empty = True
    for weights in _mask_frames(location, clip, transform, info):
        empty = empty and not weights.any()
    return empty


def _mask_frames(location: str, clip: Clip, transform: Transform, info: MediaInfo) -> Iterator[np.ndarray]:
    """The weights uint8 [H, W] of each frame; of a picture, once."""
    mask, shown = known_info(location), (info.width, info.height)
    clip = Clip() if mask.kind == "image" else replace(clip, fps=clip.fps or info.fps)
    crop = transform.crop and crop_within(location, transform.crop, shown)
    transform = replace(transform, crop=crop, resample="box")
    renderer = Renderer(transform, mask)
    last = -1
    for index, frame in clip_frames(location, clip, mask):
        if index != last:
            last, turn = index, None
            if mask.stream >= 0:
                turn, _ = display_turn(frame)
                colours = renderer.rgb(frame, background=0)
            else:
                colours = to_rgb(frame, background=0, profiled=False)
            weights = fit(colours.getchannel("R"), transform, turn, shown)[0]
        yield weights
