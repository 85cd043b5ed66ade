"""From a decoded frame of any size to the pixels of a bucket: scale to cover, crop the centre.

Pictures and video frames go through the same function on 8-bit RGB, so that a picture and a one-frame video
of it give the same pixels. The scaling is Pillow's Lanczos with its support widened when shrinking
(antialiased), and crop and scale are one operation with a sub-pixel box: only the pixels that are kept are
touched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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

    def fingerprint(self) -> str:
        """A stable name for the transform, for cache keys: equal exactly when the pixels are equal."""
        parts = {"version": VERSION, "fit": "cover-centre", "background": "white", **asdict(self)}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def cover_box(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest centred box of the given width/height ratio in a frame: (left, top, right, bottom)."""
    box_w, box_h = (height * aspect, float(height)) if width > height * aspect else (float(width), width / aspect)
    left, top = (width - box_w) / 2, (height - box_h) / 2
    return max(left, 0.0), max(top, 0.0), min(left + box_w, float(width)), min(top + box_h, float(height))


def crop_offset(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """How many pixels, at the bucket's scale, are cut off above and to the left of a picture of ``size`` as shown that
    is scaled to cover ``bucket`` and cropped at the centre; all are (height, width)."""
    (height, width), (target_height, target_width) = size, bucket
    left, top, _, _ = cover_box(width, height, target_width / target_height)
    scale = max(target_height / height, target_width / width)
    return round(top * scale), round(left * scale)


def fit(image: Image.Image, transform: Transform, turn: Any = None, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale an RGB picture to cover the bucket and crop its centre.

    ``turn`` is the `PIL.Image.Transpose` that stored frames are shown with, if any; ``pixel_aspect`` the
    width of a stored pixel over its height. Returns uint8 [C, H, W].
    """
    import numpy as np
    from PIL import Image

    sideways = turn is not None and Image.Transpose(turn) in sideways_turns()
    width, height = (transform.width, transform.height)
    if sideways:
        width, height = height, width
    box = cover_box(image.width, image.height, width / height / pixel_aspect)
    image = image.resize((width, height), Image.Resampling[transform.resample.upper()], box=box)
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(image).transpose(2, 0, 1)


def sideways_turns() -> frozenset[Any]:
    """The transpositions that exchange width and height."""
    from PIL.Image import Transpose

    return frozenset({Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE})
