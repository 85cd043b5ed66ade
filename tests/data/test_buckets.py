from __future__ import annotations

import math
import subprocess
import sys

import pytest

from kinema.data.buckets import Bucket, BucketSpec, Clip, Misfit, assign, frames_at, make_buckets
from kinema.data.records import MediaInfo
from kinema.errors import UserError


def video(width: int = 640, height: int = 360, frames: int = 100, fps: float = 25.0) -> MediaInfo:
    return MediaInfo("video", width, height, frames, fps, frames / fps, (frames - 1) / fps)


def test_sides_are_on_the_grid_and_keep_the_area() -> None:
    for grid in (16, 32):
        (group,) = make_buckets(BucketSpec(resolutions=(512,), num_aspect_buckets=7), grid=grid)
        assert len({(b.height, b.width) for b in group.buckets}) == 7
        for bucket in group.buckets:
            assert bucket.height % grid == bucket.width % grid == 0
            # each side is off by at most half a grid step
            assert abs(math.sqrt(bucket.height * bucket.width) / 512 - 1) < grid / 512
    assert {b for b in group.buckets if b.height == b.width} == {Bucket(1, 512, 512), Bucket(33, 512, 512)}


def test_aspect_ratios_are_log_spaced() -> None:
    (group,) = make_buckets(BucketSpec((4096,), (1,), 0.25, 4.0, 5), grid=16)
    ratios = sorted(b.width / b.height for b in group.buckets)
    assert ratios == pytest.approx([0.25, 0.5, 1, 2, 4], rel=0.01)


@pytest.mark.parametrize("width, height, expected", [(640, 360, 16 / 9), (360, 640, 9 / 16), (500, 480, 1.0)])
def test_nearest_in_log_aspect(width: int, height: int, expected: float) -> None:
    (group,) = make_buckets(BucketSpec((1024,), (1,), 9 / 16, 16 / 9, 3))
    place = assign(MediaInfo("image", width, height), group)
    assert not isinstance(place, Misfit)
    assert place[0].width / place[0].height == pytest.approx(expected, rel=0.02)
    assert place[1] == Clip(0, 1, 0.0)


@pytest.mark.parametrize("count, nearest", [(32, "29 or 33"), (16, "13 or 17"), (2, "1 or 5"), (0, "1"), (-3, "1")])
def test_frame_counts_must_fit_the_stride(count: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"{count} frames .* nearest: {nearest}$"):
        make_buckets(BucketSpec(frames=(count,)))
    make_buckets(BucketSpec(frames=(17, 18, 19)), stride=1)


def test_size_buckets_are_checked_and_used_as_they_are() -> None:
    with pytest.raises(UserError, match=r"500x512x1: width must be a multiple of 16.*496 or 512"):
        make_buckets(BucketSpec(size_buckets=[(500, 512, 1)]))
    (group,) = make_buckets(BucketSpec(size_buckets=[(832, 480, 81), (832, 480, 17), (480, 832, 17), (480, 480, 1)]))
    assert assign(video(frames=100), group) == (Bucket(81, 480, 832), Clip(0, 81, 25.0))
    assert assign(video(frames=50), group) == (Bucket(17, 480, 832), Clip(0, 17, 25.0))
    assert assign(MediaInfo("image", 900, 100), group) == (Bucket(1, 480, 480), Clip())


def test_largest_frame_bucket_that_fits_after_resampling() -> None:
    (group,) = make_buckets(BucketSpec((256,), (1, 17, 33, 49, 81), num_aspect_buckets=1))
    # 130 frames at 25 fps last 5.2 s: 84 frames at 16 fps, where 81 fit; 125 frames last 5 s: 80
    for frames, expected in ((130, 81), (125, 49), (76, 49), (75, 33), (20, 1)):
        place = assign(video(frames=frames), group, 16.0)
        assert not isinstance(place, Misfit)
        assert place[0].frames == expected <= frames_at(video(frames=frames), 16.0)
        assert place[1] == Clip(0, expected, 16.0)


def test_middle_is_centred() -> None:
    (group,) = make_buckets(BucketSpec((256,), (33,), frames_mode="middle"))
    place = assign(video(frames=100), group)
    assert not isinstance(place, Misfit)
    assert place[1] == Clip(33, 33, 25.0)
    assert place[1].start_seconds == pytest.approx(33 / 25)


def test_ntsc_rate_counts_as_the_round_one() -> None:
    ntsc = video(frames=390, fps=30000 / 1001)
    assert frames_at(ntsc, 30.0) == 390
    assert frames_at(ntsc, 24.0) == math.ceil(390 * 1001 / 30000 * 24)


def test_too_short_says_how_many_frames_there_are() -> None:
    (group,) = make_buckets(BucketSpec((256,), (33, 81)))
    misfit = assign(video(frames=40), group, 16.0)
    assert isinstance(misfit, Misfit)
    assert misfit.code == "too short"
    assert "has 26 frames at 16 fps (it has 40 at 25)" in misfit.reason
    assert "smallest bucket asks for 33" in misfit.reason
    misfit = assign(MediaInfo("image", 100, 100), group)
    assert isinstance(misfit, Misfit)
    assert "add 1 to frames" in misfit.reason


@pytest.mark.parametrize(
    "spec, message",
    [
        (BucketSpec(resolutions=()), "resolutions is empty"),
        (BucketSpec(frames=()), "frames is empty"),
        (BucketSpec(min_aspect=3.0), "0 < min_aspect <= max_aspect"),
        (BucketSpec(num_aspect_buckets=0), "at least 1"),
        (BucketSpec(resolutions=(8,)), "smaller than the 16 pixel grid"),
        (BucketSpec(frames_mode="end"), 'expected "head" or "middle"'),  # type: ignore[arg-type]
    ],
)
def test_impossible_specifications_are_refused(spec: BucketSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_buckets(spec)


def test_planning_imports_neither_torch_nor_av() -> None:
    code = (
        "import sys, kinema.data.records, kinema.data.folder, kinema.data.buckets, kinema.data.media;"
        "print([m for m in ('torch', 'av', 'PIL', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
