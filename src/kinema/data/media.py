"""Media files: what they hold (`probe`), the pixels of a clip (`decode_clip`), and their identity
(`content_hash`).

Pictures and animations are read through Pillow, videos through PyAV; the content decides, not the extension.
Nothing here grows with the length of a file: frames are scaled and cropped to the bucket one at a time.

    info = probe(path)
    pixels = decode_clip(path, Clip(start=0, frames=33, fps=16.0), Transform(height=480, width=832), info)
    x = to_unit(pixels)            # float32 [3, 33, 480, 832] in [-1, 1]
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, MutableMapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .picture_reader import open_picture, probe_picture, read_animation, to_rgb
from .records import MediaError, MediaInfo, exact_rate
from .transform import Transform, fit, sideways_turns
from .video_reader import colour_of, display_turn, frames_from, probe_video

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from .buckets import Clip

__all__ = [
    "MediaError", "MediaInfo", "Transform", "check_clip", "content_hash", "decode_clip", "probe", "to_unit",
]  # fmt: skip

HASH_CHUNK = 2**20


def probe(path: Path | str, decode: bool = False) -> MediaInfo:
    """What a picture or video holds. ``decode`` reads every pixel, so that damage anywhere is found.

    Without it a picture's header is read, and a video's packets are counted and its first frame decoded;
    whatever is not certain then (see `probe_video`) is settled by decoding. Raises MediaError, with the
    reason, for a file that is missing, empty, unreadable, too large, or holds no picture.
    """
    path = Path(path)
    _require_file(path)
    with open_picture(path) as image:
        if image is not None:
            return probe_picture(path, image, decode)
    return probe_video(path, decode)


def _require_file(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror or error}", "missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file", "missing")
    if status.st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes): fetch it again or take it out", "zero bytes")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path} may not be read: check its permissions", "missing")


def decode_clip(path: Path | str, clip: Clip, transform: Transform, info: MediaInfo | None = None) -> np.ndarray:
    """The clip's pixels as the bucket wants them: uint8 [C, T, H, W] in RGB.

    Frame k of the clip is the source frame nearest to (clip.start + k) / clip.fps seconds after the file's
    first frame, the earlier one of two equally near. Raises MediaError where the file is damaged before the
    clip ends.
    """
    import numpy as np

    path = Path(path)
    if info is None:
        info = probe(path)
    out = np.empty((3, clip.frames, transform.height, transform.width), np.uint8)
    render = _Renderer(transform, info)
    last_index = -1
    for k, (index, frame) in enumerate(_clip_frames(path, clip, info)):
        if index != last_index:
            last_index, pixels = index, render(frame)
        out[:, k] = pixels
    return out


def check_clip(path: Path | str, clip: Clip, info: MediaInfo) -> None:
    """Decode a clip and throw the pixels away; raises MediaError as `decode_clip` would."""
    for _ in _clip_frames(Path(path), clip, info):
        pass


def _clip_frames(path: Path, clip: Clip, info: MediaInfo) -> Iterator[tuple[int, Any]]:
    """(position in decoding order, frame) for each frame of the clip; a frame may repeat."""
    _require_file(path)
    if info.stream >= 0:
        start = Fraction(clip.start) / _rate(clip, info)
        yield from _nearest(path, frames_from(path, info, start), clip, info)
        return
    with open_picture(path) as image:
        if image is None:
            raise MediaError(f"{path} was a picture when it was probed and no longer is", "unreadable picture")
        if info.kind == "image":
            if clip.frames != 1:
                raise MediaError(f"{path} is a picture: it cannot fill {clip.frames} frames", "too short")
            image.load()
            yield 0, image
            return
        yield from _nearest(path, read_animation(image), clip, info)


def _rate(clip: Clip, info: MediaInfo) -> Fraction:
    return exact_rate(clip.fps or info.fps or 1.0)


def _nearest(
    path: Path, frames: Iterator[tuple[Fraction, Any]], clip: Clip, info: MediaInfo
) -> Iterator[tuple[int, Any]]:
    """Pick from timed frames, as they stream by, the one nearest to each time that the clip wants."""
    rate = _rate(clip, info)
    done, damage = 0, ""
    previous: tuple[int, Fraction, Any] | None = None
    try:
        for index, (time, frame) in enumerate(frames):
            while previous is not None and done < clip.frames:
                wanted = (clip.start + done) / rate
                if wanted - previous[1] > time - wanted:
                    break
                yield previous[0], previous[2]
                done += 1
            if done == clip.frames:
                return
            previous = (index, time, frame)
    except MediaError as error:
        damage = str(error)
    reach = Fraction(0)  # the last frame stands for the times up to its end
    if previous is not None:
        at_end = float(previous[1]) >= info.last_time - 0.5 / info.fps
        reach = Fraction(info.duration) if at_end else previous[1] + Fraction(1, 2) / exact_rate(info.fps)
    while previous is not None and done < clip.frames and (clip.start + done) / rate <= reach:
        yield previous[0], previous[2]
        done += 1
    if done < clip.frames:
        raise MediaError(
            f"{path}: only {done} of the {clip.frames} frames from frame {clip.start} on "
            f"at {float(rate):g} fps can be decoded ({damage or 'the file ends'}): "
            "fetch it again or take it out",
            "damaged",
        )


class _Renderer:
    """Turns decoded frames into uint8 [C, H, W], keeping the colour converter between frames."""

    def __init__(self, transform: Transform, info: MediaInfo) -> None:
        self.transform, self.info = transform, info
        self.reformatter: Any = None

    def __call__(self, frame: Any) -> np.ndarray:
        if self.info.stream < 0:
            return fit(to_rgb(frame), self.transform)
        turn, _ = display_turn(frame)
        width, height = self.info.width, self.info.height
        if turn is not None and turn in sideways_turns():
            width, height = height, width
        pixel_aspect = width / height * frame.height / frame.width
        return fit(self._rgb(frame), self.transform, turn, pixel_aspect)

    def _rgb(self, frame: Any) -> Image.Image:
        """8-bit RGB at the stored size, transparency on white, with the frame's own matrix and range."""
        from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
        from PIL import Image

        self.reformatter = self.reformatter or VideoReformatter()
        matrix, full = colour_of(frame)
        spaces = {
            "bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709, "bt2020": Colorspace.BT2020,
            "fcc": Colorspace.FCC, "smpte240m": Colorspace.SMPTE240M,
        }  # fmt: skip
        transparent = frame.format.name.startswith("pal") or any(c.is_alpha for c in frame.format.components)
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        rgb = self.reformatter.reformat(
            frame,
            format="rgba" if transparent else "rgb24",
            src_colorspace=spaces.get(matrix),
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=flags | Interpolation.BITEXACT,
            threads=1,
        ).to_ndarray()
        return to_rgb(Image.fromarray(rgb)) if transparent else Image.fromarray(rgb)


def to_unit(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 pixels as float32 in [-1, 1]: x / 127.5 - 1. Any shape."""
    import torch

    tensor = pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(pixels)
    return tensor.to(torch.float32).div_(127.5).sub_(1.0)


def content_hash(path: Path | str, memo: MutableMapping[str, str] | None = None) -> str:
    """Hash of a file's bytes (BLAKE2b, 32 hexadecimal digits), independent of its name and place.

    ``memo`` remembers hashes under `memo_key` (absolute path, size and modification time in nanoseconds);
    any mapping will do, such as one that the cache keeps on disk. A file that changes while it is read is
    not remembered.
    """
    path = Path(path)
    _require_file(path)
    key = memo_key(path)
    if memo is not None and key in memo:
        return memo[key]
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    if memo is not None and memo_key(path) == key:
        memo[key] = digest.hexdigest()
    return digest.hexdigest()


def memo_key(path: Path | str) -> str:
    """What a memoised fact about a file is filed under: it changes when the file does."""
    status = os.stat(path)
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
