"""Media files: what they hold (`probe`), the pixels of a clip (`decode_clip`), and their identity
(`content_hash`).

Files are named by their location (`kinema.data.files`). Pictures and animations are read through Pillow, videos through
PyAV; the content decides, not the extension.
Nothing here grows with the length of a file: frames are scaled and cropped to the bucket one at a time.

    info = probe(location)
    pixels = decode_clip(location, Clip(start=0, frames=33, fps=16.0), Transform(height=480, width=832), info)
    x = to_unit(pixels)            # float32 [3, 33, 480, 832] in [-1, 1]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError

from .files import absolute, is_remote, local_path, open_binary, status
from .picture_reader import open_picture, probe_picture, read_animation, to_rgb
from .records import MediaError, MediaInfo, exact_rate
from .transform import Transform, crop_within, fit
from .video_reader import colour_of, display_turn, frames_from, probe_video

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from .buckets import Clip

__all__ = [
    "MediaError", "MediaInfo", "Transform", "check_clip", "content_hash", "decode_clip", "memo_key", "probe", "to_unit",
]  # fmt: skip

HASH_CHUNK = 2**20


def probe(path: Path | str, decode: bool = False) -> MediaInfo:
    """What a picture or video holds. ``decode`` reads every pixel, so that damage anywhere is found.

    Without it a picture's header is read, and a video's packets are counted and its first frame decoded;
    whatever is not certain then (see `probe_video`) is settled by decoding. Raises MediaError, with the
    reason, for a file that is missing, empty, unreadable, too large, or holds no picture.
    """
    location = str(path)
    _require_file(location)
    with _connection(location):
        with open_picture(location) as image:
            if image is not None:
                return probe_picture(image, decode)
        return probe_video(location, decode)


def known_info(path: Path | str) -> MediaInfo:
    """`probe` of a file; the last few hundred are remembered until they change."""
    return _probed(str(path), memo_key(path))


@lru_cache(maxsize=512)
def _probed(location: str, _version: str) -> MediaInfo:
    return probe(location)


def _require_file(location: str) -> None:
    if status(location).size == 0:
        raise MediaError(f"{location} is empty (0 bytes): fetch it again or take it out", "zero bytes")
    path = local_path(location)
    if path is not None and not os.access(path, os.R_OK):
        raise MediaError(f"{location} may not be read: check its permissions", "missing")


@contextmanager
def _connection(location: str) -> Iterator[None]:
    """A disk or a connection that fails while a file is read, as a MediaError: storages have errors of their own. (What
    decoders find in a file is one by then.)"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(location):
            raise
        raise MediaError(f"{location} cannot be read ({type(error).__name__}: {error})", "unreachable") from error


def decode_clip(path: Path | str, clip: Clip, transform: Transform, info: MediaInfo | None = None) -> np.ndarray:
    """The clip's pixels as the bucket wants them: uint8 [C, T, H, W] in RGB.

    Frame k of the clip is the source frame nearest to (clip.start + k) / clip.fps seconds after the file's
    first frame, the earlier one of two equally near. Raises MediaError where the file is damaged before the
    clip ends, and where the transform's crop lies outside the frames.
    """
    import numpy as np

    location = str(path)
    if info is None:
        info = known_info(location)
    if transform.crop is not None:
        transform = replace(transform, crop=crop_within(location, transform.crop, (info.width, info.height)))
    out = np.empty((3, clip.frames, transform.height, transform.width), np.uint8)
    render = Renderer(transform, info)
    last_index = -1
    for k, (index, frame) in enumerate(clip_frames(location, clip, info)):
        if index != last_index:
            last_index, pixels = index, render(frame)
        out[:, k] = pixels
    return out


def check_clip(path: Path | str, clip: Clip, info: MediaInfo) -> None:
    """Decode a clip and throw the pixels away; raises MediaError as `decode_clip` would."""
    for _ in clip_frames(str(path), clip, info):
        pass


def clip_frames(location: str, clip: Clip, info: MediaInfo) -> Iterator[tuple[int, Any]]:
    """(position in decoding order, frame) for each frame of the clip; a frame may repeat. The frame is a PIL picture
    or, where ``info.stream`` >= 0, one of PyAV's, and may be used until the next is asked for."""
    _require_file(location)
    with _connection(location):
        yield from _clip_frames(location, clip, info)


def _clip_frames(location: str, clip: Clip, info: MediaInfo) -> Iterator[tuple[int, Any]]:
    if info.stream >= 0:
        start = Fraction(clip.start) / _rate(clip, info)
        yield from _nearest(location, frames_from(location, info, start), clip, info)
        return
    with open_picture(location) as image:
        if image is None:
            raise MediaError(f"{location} was a picture when it was probed and no longer is", "unreadable picture")
        if info.kind == "image":
            if clip.frames != 1:
                raise MediaError(f"{location} is a picture: it cannot fill {clip.frames} frames", "too short")
            image.load()
            yield 0, image
            return
        yield from _nearest(location, read_animation(image), clip, info)


def _rate(clip: Clip, info: MediaInfo) -> Fraction:
    return exact_rate(clip.fps or info.fps or 1.0)


def _nearest(
    location: str, frames: Iterator[tuple[Fraction, Any]], clip: Clip, info: MediaInfo
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
            f"{location}: only {done} of the {clip.frames} frames from frame {clip.start} on "
            f"at {float(rate):g} fps can be decoded ({damage or 'the file ends'}): "
            "fetch it again or take it out",
            "damaged",
        )


class Renderer:
    """Turns decoded frames into uint8 [C, H, W], keeping the colour converter between frames."""

    def __init__(self, transform: Transform, info: MediaInfo) -> None:
        self.transform, self.info = transform, info
        self._reformatter: Any = None

    def __call__(self, frame: Any) -> np.ndarray:
        if self.info.stream < 0:
            return fit(to_rgb(frame), self.transform)
        turn, _ = display_turn(frame)
        return fit(self.rgb(frame), self.transform, turn, (self.info.width, self.info.height))

    def rgb(self, frame: Any, background: int = 255) -> Image.Image:
        """8-bit RGB of a video's frame at the stored size, with the frame's own matrix and range; transparency on white
        or another grey ``background``."""
        from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
        from PIL import Image

        self._reformatter = self._reformatter or VideoReformatter()
        matrix, full = colour_of(frame)
        spaces = {
            "bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709, "bt2020": Colorspace.BT2020,
            "fcc": Colorspace.FCC, "smpte240m": Colorspace.SMPTE240M,
        }  # fmt: skip
        components = frame.format.components
        transparent = frame.format.name.startswith("pal") or any(c.is_alpha for c in components)
        # planes are made several times faster than pixels, and are the same, save where a channel has fewer bits
        coarse = any(c.bits < 8 for c in components)
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        found = self._reformatter.reformat(
            frame,
            format="rgba" if transparent else "rgb24" if coarse else "gbrp",
            src_colorspace=spaces.get(matrix),
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=flags | Interpolation.BITEXACT,
            threads=1,
        )
        if transparent or coarse:
            picture = Image.fromarray(found.to_ndarray())
            return to_rgb(picture, background) if transparent else picture
        green, blue, red = (
            Image.frombuffer("L", (plane.width, plane.height), plane, "raw", "L", plane.line_size, 1)
            for plane in found.planes
        )
        return Image.merge("RGB", (red, green, blue))


def to_unit(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 pixels as float32 in [-1, 1]: x / 127.5 - 1. Any shape."""
    import torch

    tensor = pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(pixels)
    return tensor.to(torch.float32).div_(127.5).sub_(1.0)


def content_hash(path: Path | str, memo: MutableMapping[str, str] | None = None) -> str:
    """Hash of a file's bytes (BLAKE2b, 32 hexadecimal digits), independent of its name and place.

    ``memo`` remembers hashes under `memo_key` (location, size and modification time or the like);
    any mapping will do, such as one that the cache keeps on disk. A file that changes while it is read is
    not remembered.
    """
    location = str(path)
    _require_file(location)
    key = memo_key(location)
    if memo is not None and key in memo:
        return memo[key]
    digest = hashlib.blake2b(digest_size=16)
    with _connection(location), open_binary(location) as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    if memo is not None and memo_key(location) == key:
        memo[key] = digest.hexdigest()
    return digest.hexdigest()


def memo_key(path: Path | str) -> str:
    """What a memoised fact about a file is filed under: it changes when the file does. MediaError where there is
    none."""
    location = str(path)
    found = status(location)
    return f"{absolute(location)}\0{found.size}\0{found.stamp}"
