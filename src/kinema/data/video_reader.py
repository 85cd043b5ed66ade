"""Video files, read through PyAV: which stream, how many frames and when, and the frames one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from .files import local_path, open_binary, status
from .records import MediaError, MediaInfo, exact_rate

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,obu,h264,hevc,av1,m4v,yuv4mpegpipe,nut,mxf,dv,rm,wtv"
)
"""What FFmpeg may open: no playlists and no subtitles, which could make it read other files or the
network."""
TIMEOUT = 60.0
"""Seconds that opening a file, or reading the next packet, may take."""
ONE_FRAME_A_PACKET = frozenset(
    ("h264", "hevc", "vvc", "av1", "vp9", "prores", "dnxhd", "ffv1", "mjpeg", "mpeg2video", "rawvideo", "png")
)
"""Codecs whose packets are frames: counting needs no decoding unless something looks wrong."""
COMMON_RATES = tuple(
    Fraction(n, d)
    for n, d in ((24000, 1001), (24, 1), (25, 1), (30000, 1001), (30, 1), (50, 1), (60000, 1001), (60, 1))
)
SEEK_MARGINS = (0, 2, 10)
"""Seconds before the wanted time to try in turn; a seek is only believed after its first frame is checked."""
MATRICES: dict[int, Literal["bt601", "bt709", "bt2020", "fcc", "smpte240m"]] = {
    1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020",
}  # fmt: skip
"""FFmpeg's AVColorSpace by our name."""


@contextmanager
def open_video(location: str, stream: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream (or the one of the given index), set up to decode.

    Raises MediaError where the file is no video, is damaged beyond opening, or holds no moving picture.
    """
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    path = local_path(location)
    with nullcontext(f"file:{path}") if path is not None else open_binary(location) as file:
        try:
            container = av.open(file, options=options, timeout=TIMEOUT)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise _cannot_open(location, error) from error
        try:
            chosen = container.streams[stream] if stream is not None else choose_stream(location, container)
            chosen.thread_type = "SLICE"
            yield container, chosen
        finally:
            container.close()


def choose_stream(location: str, container: InputContainer) -> VideoStream:
    """The video stream that a viewer would be shown: no attached picture, default first, then the largest."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    videos = [s for s in container.streams.video if not s.disposition & still and s.width and s.height]
    if videos:
        return max(
            videos,
            key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, s.frames, -s.index),
        )
    if container.streams.audio:
        raise MediaError(f"{location} holds sound but no video: take it out of the dataset", "audio only")
    raise MediaError(f"{location} holds no video stream that can be decoded", "no video")


def _cannot_open(location: str, error: Exception) -> MediaError:
    with open_binary(location) as file:
        head = file.read(4096)
    if head[4:8] == b"ftyp" and b"moov" not in _boxes(location):
        return MediaError(
            f"{location} is an mp4 cut short: its index, written last, is missing; copy or download it again",
            "truncated",
        )
    if _looks_like_text(head):
        return MediaError(
            f"{location} is a text file, not a picture or video: give it its own extension or take it out",
            "not media",
        )
    detail = "its format is not supported" if "whitelist" in str(error) else _detail(error)
    return MediaError(
        f"{location} is neither a picture nor a video that can be read, or is damaged ({detail}): "
        "fetch it again, convert it, or take it out",
        "unreadable",
    )


def _boxes(location: str) -> set[bytes]:
    """Names of the top-level boxes of an mp4 or mov file, as far as they can be followed."""
    names: set[bytes] = set()
    end = status(location).size
    with open_binary(location) as file:
        position = 0
        while position + 8 <= end and len(names) < 100:
            file.seek(position)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:
                size = int.from_bytes(header[8:16], "big")
            names.add(header[4:8])
            if size < 8:
                break
            position += size
    return names


def _looks_like_text(head: bytes) -> bool:
    text = head.decode("utf-8", errors="replace")
    plain = sum((c.isprintable() or c.isspace()) and c != "\ufffd" for c in text)
    return b"\0" not in head and plain >= 0.97 * len(text)


@dataclass
class Timeline:
    """Timestamps of a stream's frames as they were found, and what went wrong on the way."""

    stamps: list[int | None] = field(default_factory=list)
    last_duration: int = 0
    sure: bool = True
    damage: str = ""


def probe_video(location: str, decode: bool = False) -> MediaInfo:
    """What a video holds. Frames are counted from packets, and by decoding where that is not safe.

    Decoding happens with ``decode``, and when the header disagrees with the packets, timestamps are missing
    or repeated, the stream starts without a key frame, or the codec may hide frames. A file that is damaged
    part of the way counts the frames before the damage, and says so in ``notes``. Raises MediaError where
    there are none.
    """
    with open_video(location) as (container, stream):
        timeline = _timeline_of_packets(container, stream)
        index, header = stream.index, stream.frames
        rates = (stream.average_rate, stream.guessed_rate)
        time_base = stream.time_base or Fraction(1, 1000)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
    if decode or not timeline.sure:
        first, timeline = _timeline_of_frames(location, index, timeline)
    else:
        first = _first_frame(location, index)
        if first is None:
            first, timeline = _timeline_of_frames(location, index, timeline)
    if first is None or not timeline.stamps:
        raise MediaError(
            f"{location} has a video stream, but not one frame of it can be decoded "
            f"({timeline.damage or 'no frames'}): fetch it again or take it out",
            "damaged",
        )
    info = _appearance(first, pixel_aspect)
    info = replace(info, stream=index, time_base=time_base)
    info = _timing(info, timeline, [Fraction(r) for r in rates if r])
    if timeline.damage:
        of = f" of {header}" if header > info.frames else ""
        note = f"damaged after frame {info.frames}{of} ({timeline.damage}): only the frames before are used"
        info = replace(info, notes=(note, *info.notes))
    return info


def _timeline_of_packets(container: InputContainer, stream: VideoStream) -> Timeline:
    """Timestamps in display order, from the packets alone; reads the file once and decodes nothing."""
    import av

    found = Timeline(sure=stream.codec.canonical_name in ONE_FRAME_A_PACKET)
    packets, first_is_key = 0, None
    last = None
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            packets += 1
            if packet.is_corrupt:
                found.sure = False
            if packet.is_discard:  # outside the edit list: decoded for others' sake, never shown
                continue
            if first_is_key is None:
                first_is_key = packet.is_keyframe
            found.stamps.append(packet.pts)
            if packet.pts is not None and (last is None or packet.pts > last):
                last, found.last_duration = packet.pts, packet.duration or 0
    except av.error.FFmpegError as error:
        found.sure, found.damage = False, _detail(error)
    known = {s for s in found.stamps if s is not None}
    if len(known) != len(found.stamps) or not known or not first_is_key:
        found.sure = False
    if stream.frames and stream.frames not in (packets, len(found.stamps)):
        found.sure = False
    if found.sure:
        found.stamps.sort()  # type: ignore[type-var]
    return found


def _first_frame(location: str, index: int) -> VideoFrame | None:
    try:
        with open_video(location, index) as (container, stream):
            return next(decoded(container, stream), None)
    except MediaError:
        return None


def _timeline_of_frames(location: str, index: int, packets: Timeline) -> tuple[VideoFrame | None, Timeline]:
    """Timestamps in display order from decoding the whole stream, up to damage if there is any."""
    first, found = None, Timeline(last_duration=packets.last_duration, damage="")
    with open_video(location, index) as (container, stream):
        try:
            for frame in decoded(container, stream):
                first = first or frame
                found.stamps.append(frame.pts)
        except MediaError as error:
            found.damage = str(error)
    if not found.damage:
        found.damage = packets.damage
    return first, found


def decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Good frames in display order. Corrupt ones at the beginning are skipped; later damage raises
    MediaError."""
    import av

    started = False
    try:
        for packet in container.demux(stream):
            for frame in packet.decode():
                if frame.is_corrupt and started:
                    raise MediaError("a frame is corrupt", "damaged")
                if not frame.is_corrupt:
                    started = True
                    yield frame
    except av.error.FFmpegError as error:
        raise MediaError(_detail(error), "damaged") from error


def frames_from(location: str, info: MediaInfo, time: Fraction) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames in display order with their times in seconds, from one at or before ``time`` on.

    Seeks where that saves decoding, and believes a seek only when it lands on a key frame at or before
    ``time``; else decodes from the start.
    """
    if info.timed and time > 1:
        for margin in SEEK_MARGINS:
            with open_video(location, info.stream) as (container, stream):
                frames = _after_seek(container, stream, info, time, margin)
                if frames is not None:
                    yield from frames
                    return
            if margin >= time:
                break
    with open_video(location, info.stream) as (container, stream):
        for index, frame in enumerate(decoded(container, stream)):
            if not info.timed:
                yield index / exact_rate(info.fps), frame
            elif frame.pts is not None:
                yield (frame.pts - info.start) * info.time_base, frame


def _after_seek(
    container: InputContainer, stream: VideoStream, info: MediaInfo, time: Fraction, margin: int
) -> Iterator[tuple[Fraction, VideoFrame]] | None:
    import av

    wanted = info.start + int(max(time - margin, Fraction(0)) / info.time_base)
    try:
        container.seek(wanted, stream=stream, backward=True)
        frames = decoded(container, stream)
        first = next((frame for frame in frames if frame.key_frame), None)  # before it: open-GOP leftovers
    except (av.error.FFmpegError, MediaError):
        return None
    origin = first.pts if first is not None else None
    if first is None or origin is None or (origin - info.start) * info.time_base > time:
        return None

    def rest() -> Iterator[tuple[Fraction, VideoFrame]]:
        yield (origin - info.start) * info.time_base, first
        for frame in frames:
            if frame.pts is not None and frame.pts > origin:
                yield (frame.pts - info.start) * info.time_base, frame

    return rest()


def _timing(info: MediaInfo, timeline: Timeline, rates: list[Fraction]) -> MediaInfo:
    """Fill in frames, fps, times. Where timestamps are missing or run backwards, frames are taken as evenly
    spaced."""
    stamps = [s for s in timeline.stamps if s is not None]
    count = len(timeline.stamps)
    timed = len(stamps) == count and all(a < b for a, b in pairwise(stamps))
    notes = info.notes
    if not timed:
        rate = next((r for r in rates if 1 <= r <= 240), Fraction(25))
        if not rates:
            notes += ("neither timestamps nor a frame rate: taken as 25 frames a second",)
        last = (count - 1) / rate
        return replace(
            info, frames=count, fps=float(rate), last_time=float(last), duration=float(last + 1 / rate),
            timed=False, notes=notes,
        )  # fmt: skip
    last = (stamps[-1] - stamps[0]) * info.time_base
    rate = _measured_rate(count, last, info.time_base, rates)
    tolerance = max(Fraction(1, 2) / rate, info.time_base)
    variable = any(abs((s - stamps[0]) * info.time_base - k / rate) > tolerance for k, s in enumerate(stamps))
    hold = timeline.last_duration * info.time_base
    if not variable or not 0 < hold <= 1:
        hold = 1 / rate
    return replace(
        info, frames=count, fps=float(rate), last_time=float(last), duration=float(last + hold),
        start=stamps[0], timed=True, variable=variable, notes=notes,
    )  # fmt: skip


def _measured_rate(count: int, span: Fraction, time_base: Fraction, rates: list[Fraction]) -> Fraction:
    """Frames a second by the timestamps; the header's or a common rate where it explains them."""
    if count < 2 or span <= 0:
        return next((r for r in rates if 1 <= r <= 240), Fraction(25))
    measured = (count - 1) / span
    slack = float(time_base / span) + 2e-4
    for rate in (*rates, *COMMON_RATES):
        if abs(float(measured / rate) - 1) <= slack:
            return rate.limit_denominator(1001)
    return measured.limit_denominator(1001) or measured


def _appearance(frame: VideoFrame, pixel_aspect: float) -> MediaInfo:
    turn, rotation = display_turn(frame)
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    if turn is not None and turn in (2, 4, 5, 6):  # PIL's ROTATE_90, ROTATE_270, TRANSPOSE, TRANSVERSE
        width, height = height, width
    notes: tuple[str, ...] = ()
    if frame.color_trc in (16, 18):
        notes += ("HDR (PQ or HLG) is not tone-mapped: colours will look flat",)
    if frame.interlaced_frame:
        notes += ("interlaced: frames are taken as they are, with both fields",)
    matrix, full = colour_of(frame)
    return MediaInfo(
        "video", width, height, pixel_format=frame.format.name, color_range="full" if full else "limited",
        color_matrix=matrix, rotation=rotation, notes=notes,
    )  # fmt: skip


def colour_of(frame: VideoFrame) -> tuple[str, bool]:
    """The matrix and whether the range is full. What is not tagged: BT.709 from 720p up, else BT.601;
    limited."""
    name = frame.format.name
    if frame.format.is_rgb or name.startswith(("gray", "mono", "pal")):
        return "rgb", True
    matrix = MATRICES.get(frame.colorspace) or ("bt709" if frame.width >= 1280 or frame.height > 576 else "bt601")
    return matrix, frame.color_range == 2 or (frame.color_range == 0 and name.startswith("yuvj"))


def display_turn(frame: VideoFrame) -> tuple[Any, int]:
    """How a stored frame is turned or mirrored to be shown: (PIL transpose or None, degrees
    counter-clockwise)."""
    import numpy as np
    from PIL.Image import Transpose

    side: Any = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return None, 0
    matrix = np.frombuffer(memoryview(side), np.int32).reshape(3, 3)[:2, :2].astype(np.float64)
    signs = tuple(int(x) for x in np.rint(matrix / max(np.abs(matrix).max(), 1)).ravel())
    turns: dict[tuple[int, ...], tuple[Any, int]] = {
        (0, -1, 1, 0): (Transpose.ROTATE_90, 90),
        (-1, 0, 0, -1): (Transpose.ROTATE_180, 180),
        (0, 1, -1, 0): (Transpose.ROTATE_270, 270),
        (-1, 0, 0, 1): (Transpose.FLIP_LEFT_RIGHT, 0),
        (1, 0, 0, -1): (Transpose.FLIP_TOP_BOTTOM, 0),
        (0, 1, 1, 0): (Transpose.TRANSPOSE, 90),
        (0, -1, -1, 0): (Transpose.TRANSVERSE, 270),
    }
    return turns.get(signs, (None, 0))


def _detail(error: BaseException) -> str:
    text = str(error)
    if "last error log:" in text:
        text = text.split("last error log:", 1)[1]
    elif "]" in text:
        text = text.split("]", 1)[1]
    return text.strip().rstrip(".")[:160]
