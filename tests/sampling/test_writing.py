"""Files are written whole, in the right colours, with their settings inside; equal input gives equal bytes."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.errors import UserError
from kinema.sampling.writing import read_metadata, to_uint8, write_video

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
COLOURS += [(255, 255, 255), (0, 0, 0), (128, 64, 32), (17, 200, 90)]


def colour_frames(height: int = 64, width: int = 96) -> np.ndarray:
    """One frame a colour, each with a quadrant of the next colour."""
    frames = np.empty((len(COLOURS), height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        frames[i] = colour
        frames[i, : height // 2, : width // 2] = COLOURS[(i + 1) % len(COLOURS)]
    return frames


def decode(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3] by kinema's own reader, at the stored size."""
    from kinema.data.buckets import Clip
    from kinema.data.media import decode_clip, probe
    from kinema.data.transform import Transform

    info = probe(path)
    clip = Clip(start=0, frames=info.frames, fps=info.fps)
    return decode_clip(path, clip, Transform(info.height, info.width), info).transpose(1, 2, 3, 0)


def test_colours_come_back_within_three_levels(tmp_path: Path) -> None:
    frames = colour_frames()
    path = write_video(frames, tmp_path / "a.mp4", 16)
    back = decode(path)
    assert back.shape == frames.shape
    error = np.abs(back.astype(int) - frames)
    error[:, 28:36, :] = 0  # 4:2:0 and the scaling filter blend colours at edges
    error[:, :, 44:52] = 0
    assert error.max() <= 3, error.max()


def test_the_file_is_tagged_and_timed(tmp_path: Path) -> None:
    import av

    path = write_video(colour_frames(), tmp_path / "a.mp4", fps=29.97)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == Fraction(2997, 100)
        frames = list(container.decode(video=0))
    assert [f.pts * f.time_base for f in frames] == [pytest.approx(i * 100 / 2997, abs=1e-4) for i in range(10)]
    assert frames[0].format.name == "yuv420p"
    assert (frames[0].colorspace, frames[0].color_range) == (1, 1)
    head = path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "a browser wants the index first"


def test_floats_and_bytes_of_the_same_frames_agree(tmp_path: Path) -> None:
    frames = colour_frames()
    floats = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert np.array_equal(to_uint8(floats), frames)
    assert to_uint8(torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1, 1)).ravel().tolist() == [0, 128, 255]
    a = write_video(frames, tmp_path / "a.mp4").read_bytes()
    assert write_video(floats, tmp_path / "b.mp4").read_bytes() == a


@pytest.mark.parametrize("shape", [(64, 64), (480, 832)])
def test_equal_input_gives_equal_bytes(tmp_path: Path, shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (21, shape[0] // 16, shape[1] // 16, 3), np.uint8)
    frames = frames.repeat(16, 1).repeat(16, 2)
    settings = {"prompt": "größe 雪", "seed": 0, "guidance": 5.0, "negative": None}
    a = write_video(frames, tmp_path / "a.mp4", 16, settings)
    b = write_video(frames, tmp_path / "b.mp4", 16, settings)
    assert a.read_bytes() == b.read_bytes()
    assert read_metadata(a) == settings


def test_one_frame_is_a_png_with_its_exact_pixels(tmp_path: Path) -> None:
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 256, (1, 33, 47, 3), np.uint8)
    path = write_video(frame, tmp_path / "a.png", metadata={"prompt": "größe 雪", "seed": 3})
    assert np.array_equal(np.asarray(Image.open(path)), frame[0])
    assert read_metadata(path) == {"prompt": "größe 雪", "seed": 3}
    with pytest.raises(UserError, match=r"written as \.png; name the file a\.png"):
        write_video(frame, tmp_path / "a.mp4")


def test_odd_sides_gain_a_copy_of_the_last_row_and_column(tmp_path: Path) -> None:
    frames = np.full((5, 33, 47, 3), 100, np.uint8)
    back = decode(write_video(frames, tmp_path / "a.mp4"))
    assert back.shape == (5, 34, 48, 3)
    assert np.abs(back.astype(int) - 100).max() <= 2


def test_a_better_quality_is_nearer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (9, 64, 64, 1), np.uint8).repeat(3, 3)  # grey: no loss by chroma subsampling
    sizes, errors = [], []
    for crf in (0, 10, 40):
        path = write_video(grey, tmp_path / "a.mp4", crf=crf)
        sizes.append(path.stat().st_size)
        errors.append(np.abs(decode(path).astype(int) - grey).mean())
    assert errors[0] < 1 < errors[1] < errors[2] and sizes[0] > sizes[1] > sizes[2]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    frames = colour_frames()
    path = write_video(frames, tmp_path / "a.mp4", metadata={"take": 1})
    with pytest.raises(TypeError):
        write_video(frames, path, metadata={"take": object()})
    with pytest.raises(Exception, match=r"(?i)invalid|crf"):
        write_video(frames, path, fps=16, crf="not a number")  # type: ignore[arg-type]
    assert read_metadata(path) == {"take": 1}
    assert os.listdir(tmp_path) == ["a.mp4"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_video(frames, tmp_path / "file" / "a.mp4")


def test_a_foreign_file_carries_no_settings(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="carries no settings"):
        read_metadata(tmp_path / "x.mp4")
    with pytest.raises(UserError, match="no such file"):
        read_metadata(tmp_path / "y.mp4")
