"""Real clips, and small media files made on the fly with PyAV and Pillow."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SHARED_CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "clips"


def shared_clips() -> Path:
    """The folder of real clips beside the checkout; skips the test where there is none."""
    if not SHARED_CLIPS.is_dir():
        pytest.skip("shared/clips is not beside this checkout")
    return SHARED_CLIPS


def package_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    pytest.skip(f"{package} does not carry {name}")


def numbered_frame(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame that shows its number: grey level 16 + 4 * (index % 56) all over. uint8 [H, W, 3]."""
    return np.full((height, width, 3), 16 + 4 * (index % 56), np.uint8)


def frame_number(pixels: np.ndarray) -> np.ndarray:
    """The numbers (mod 56) that decoded frames [C, T, H, W] show."""
    return np.rint((pixels.astype(np.float64).mean(axis=(0, 2, 3)) - 16) / 4).astype(int)


Setup = Callable[[Any], None]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 1000),
    options: dict[str, str] | None = None,
    setup: Setup | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode RGB frames; ``stamps`` (in ``time_base``) make the frame rate variable."""
    import av

    if options is None:
        options = {"crf": "8", "preset": "ultrafast"} if codec.startswith("libx26") else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if setup is not None:
            setup(stream)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
