"""From a decoded frame of any size to the pixels of a bucket: scale to cover, crop the centre.

Where a record says which part of its frames is used, that part is taken first, in whole pixels, so that nothing around
it bleeds in: the result is that of a file which holds that part alone.

Pictures and video frames go through the same function on 8-bit RGB, so that a picture and a one-frame video
of it give the same pixels. The scaling is Pillow's Lanczos with its support widened when shrinking
(antialiased), and the crop of the centre and the scaling are one operation with a sub-pixel box: only the pixels that
are kept are touched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .records import MediaError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

VERSION = 1
"""Raise it whenever the same file would give other pixels: it is part of every cache key."""


@dataclass(frozen=True)
class Transform:
    """How decoded frames become the pixels of a bucket of ``height`` x ``width``."""

    height: int
    width: int
    resample: str = "lanczos"
    """"lanczos", "bicubic" or "box"; all of them antialiased."""
    crop: tuple[int, int, int, int] | None = None
    """The part of the frames that is used: left, top, right, bottom, in pixels as shown; None: all of it."""

    def fingerprint(self) -> str:
        """A stable name for the transform, for cache keys: equal exactly when the pixels are equal."""
        parts = {"version": VERSION, "fit": "cover-centre", "background": "white", **asdict(self)}
        if self.crop is None:
            del parts["crop"]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def cover_box(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest centred box of the given width/height ratio in a frame: (left, top, right, bottom)."""
    box_w, box_h = (height * aspect, float(height)) if width > height * aspect else (float(width), width / aspect)
    left, top = (width - box_w) / 2, (height - box_h) / 2
    return max(left, 0.0), max(top, 0.0), min(left + box_w, float(width)), min(top + box_h, float(height))


def crop_within(location: str, crop: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The crop of a file of ``size`` (width, height) as shown; what reaches one pixel beyond it, as rounding may, is
    cut off. MediaError where the crop is empty or reaches further."""
    (width, height), (left, top, right, bottom) = size, crop
    if right <= left or bottom <= top:
        problem = "is empty"
    elif left < 0 or top < 0 or left >= width or top >= height or right > width + 1 or bottom > height + 1:
        problem = f"does not lie within its {width}x{height} pixels"
    else:
        return left, top, min(right, width), min(bottom, height)
    raise MediaError(
        f"{location}: its crop [{left}, {top}, {right}, {bottom}] {problem}: "
        f"give [left, top, right, bottom] with left < right <= {width} and top < bottom <= {height}",
        "crop outside",
    )


def crop_offset(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """How many pixels, at the bucket's scale, are cut off above and to the left of a picture of ``size`` as shown (of a
    record's crop: the size of that) which is scaled to cover ``bucket`` and cropped at the centre; all are
    (height, width)."""
    (height, width), (target_height, target_width) = size, bucket
    left, top, _, _ = cover_box(width, height, target_width / target_height)
    scale = max(target_height / height, target_width / width)
    return round(top * scale), round(left * scale)


def fit(image: Image.Image, transform: Transform, turn: Any = None, shown: tuple[int, int] | None = None) -> np.ndarray:
    """Take the transform's crop of a picture, scale it to cover the bucket, and crop its centre.

    ``turn`` is the `PIL.Image.Transpose` that stored frames are shown with, if any; ``shown`` their (width, height) as
    shown, which the crop refers to: after the turn and with square pixels, by default those of the picture itself.
    Returns uint8 [C, H, W].
    """
    import numpy as np
    from PIL import Image

    sideways = turn is not None and Image.Transpose(turn) in sideways_turns()
    width, height = (transform.width, transform.height)
    pixel_aspect = 1.0
    if sideways:
        width, height = height, width
    if shown is not None:
        upright_width, upright_height = shown[::-1] if sideways else shown
        pixel_aspect = upright_width / upright_height * image.height / image.width
    if transform.crop is not None:
        image = image.crop(_stored_box(image.size, transform.crop, turn, shown or image.size))
    box = cover_box(image.width, image.height, width / height / pixel_aspect)
    image = image.resize((width, height), Image.Resampling[transform.resample.upper()], box=box)
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _stored_box(
    size: tuple[int, int], crop: tuple[int, int, int, int], turn: Any, shown: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a crop of what is shown lies in the stored frame of ``size`` (width, height): whole pixels, 1 or more."""
    (width, height), (left, top, right, bottom) = shown, crop
    xs, ys = (left, right), (top, bottom)
    far_xs, far_ys = (width - right, width - left), (height - bottom, height - top)
    across, down = {
        None: (xs, ys), "ROTATE_90": (far_ys, xs), "ROTATE_180": (far_xs, far_ys), "ROTATE_270": (ys, far_xs),
        "FLIP_LEFT_RIGHT": (far_xs, ys), "FLIP_TOP_BOTTOM": (xs, far_ys), "TRANSPOSE": (ys, xs),
        "TRANSVERSE": (far_ys, far_xs),
    }[None if turn is None else turn.name]  # fmt: skip
    upright = shown[::-1] if turn is not None and turn in sideways_turns() else shown
    (x0, x1), (y0, y1) = (
        _whole(span[0] * stored / of, span[1] * stored / of, stored)
        for span, stored, of in zip((across, down), size, upright, strict=True)
    )
    return x0, y0, x1, y1


def _whole(start: float, end: float, size: int) -> tuple[int, int]:
    first = min(max(round(start), 0), size - 1)
    return first, min(max(round(end), first + 1), size)


def sideways_turns() -> frozenset[Any]:
    """The transpositions that exchange width and height."""
    from PIL.Image import Transpose

    return frozenset({Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE})
