"""Writing samples: H.264 mp4 for videos, png for one frame, with the settings that made them inside the file.

The same frames and settings give the same bytes, and a file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.data.records import exact_rate
from kinema.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CRF = 10
"""Quality of the H.264 files: 0 is lossless, 18 visually so, 51 the worst. Low, for judges read them too."""
KEY = "comment"
"""Where a file carries its settings: mp4's comment, or png's text chunk of that name."""


def to_uint8(frames: np.ndarray | Tensor) -> np.ndarray:
    """Frames as uint8 [T, H, W, 3]: from pixels in [-1, 1], float [C, T, H, W], rounded to the nearest level."""
    import numpy as np

    array: np.ndarray = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().float().numpy()
    if array.dtype == np.uint8:
        assert array.ndim == 4 and array.shape[3] == 3, f"uint8 frames are [T, H, W, 3], not {array.shape}"
        return array
    assert array.ndim == 4 and array.shape[0] == 3, f"float frames are [3, T, H, W], not {array.shape}"
    levels = np.rint((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 3, 0))


def suffix(frames: int) -> str:
    """The extension of a file of so many frames."""
    return ".png" if frames == 1 else ".mp4"


def write_video(
    frames: np.ndarray | Tensor,
    path: Path | str,
    fps: float = 16.0,
    metadata: Mapping[str, Any] | None = None,
    crf: int = CRF,
) -> Path:
    """Write frames, uint8 [T, H, W, 3] or float [3, T, H, W] in [-1, 1]; returns the path.

    One frame is written as png, exactly; more as H.264 mp4 (yuv420p, BT.709, limited range), where a side of odd
    length gets one more row or column, a copy of the last. ``metadata`` is stored in the file as JSON; `read_metadata`
    gives it back. The path's suffix must be the one that `suffix` gives. UserError if the file cannot be written.
    """
    path, pixels = Path(path), to_uint8(frames)
    expected = suffix(len(pixels))
    if path.suffix != expected:
        name = path.with_suffix(expected).name
        raise UserError(f"{path}: {len(pixels)} frame(s) are written as {expected}; name the file {name}.")
    text = json.dumps(metadata or {}, sort_keys=True)
    with _whole_or_not_at_all(path) as temporary:
        if expected == ".png":
            _write_png(temporary, pixels[0], text)
        else:
            _write_mp4(temporary, pixels, fps, text, crf)
    return path


def sidecar(path: Path) -> Path:
    """The JSON file beside a sample that says its settings: of ``a.mp4`` it is ``a.mp4.json``."""
    return path.with_name(f"{path.name}.json")


def write_sidecar(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the settings of the sample at ``path`` beside it, for people and other programs."""
    text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False)
    with _whole_or_not_at_all(sidecar(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that is renamed to it at the end, and removed if anything fails before."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _write_png(path: Path, frame: np.ndarray, text: str) -> None:
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, text)
    Image.fromarray(frame).save(path, pnginfo=chunks)


def _write_mp4(path: Path, pixels: np.ndarray, fps: float, text: str, crf: int) -> None:
    """BT.709, limited range, tagged as such: untagged files of this size are guessed as BT.601 by players."""
    import av
    import numpy as np
    from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

    odd = pixels.shape[1] % 2, pixels.shape[2] % 2
    if any(odd):  # 4:2:0 has one chroma value for 2 x 2 pixels
        pixels = np.pad(pixels, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.BITEXACT
    reformatter = VideoReformatter()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata[KEY] = text
        stream = container.add_stream("libx264", rate=exact_rate(fps))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # a number that depends on the machine would make the bytes depend on it
        stream.thread_count = 1 if pixels.size < 2**24 else 4
        stream.options = {"crf": str(crf), "preset": "medium"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        for frame in pixels:
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=flags,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The settings that a file of `write_video` carries; UserError if it carries none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as image:
                text = str(image.info[KEY])
        else:
            import av

            with av.open(f"file:{path}") as container:
                text = container.metadata[KEY]
        found = json.loads(text)
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"{path} carries no settings: it was not written by kinema sample.") from error
    return dict(found)
