from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from kinema.config.data import BucketConfig
from kinema.data.buckets import Bucket, Clip, bucket_groups
from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.errors import UserError


def buckets(grid: int = 16, lengths: ClipLengths = CAUSAL, **keys: Any) -> tuple[Bucket, ...]:
    (group,) = bucket_groups(BucketConfig(**keys), grid, lengths)
    return group.buckets


def test_sides_are_on_the_grid_and_keep_the_area() -> None:
    for grid in (16, 32):
        found = buckets(grid, resolutions=(512,), aspect_buckets=7)
        assert len({(b.height, b.width) for b in found}) == 7
        for bucket in found:
            assert bucket.height % grid == bucket.width % grid == 0
            # each side is off by at most half a grid step
            assert abs(math.sqrt(bucket.height * bucket.width) / 512 - 1) < grid / 512
    assert {b for b in found if b.height == b.width} == {Bucket(1, 512, 512), Bucket(33, 512, 512)}


def test_aspect_ratios_are_log_spaced() -> None:
    found = buckets(resolutions=(4096,), frames=(1,), min_aspect=0.25, max_aspect=4.0, aspect_buckets=5)
    assert sorted(b.width / b.height for b in found) == pytest.approx([0.25, 0.5, 1, 2, 4], rel=0.01)


def test_aspect_ratios_can_be_listed() -> None:
    found = buckets(resolutions=(1024,), frames=(1,), aspects=(9 / 16, 1.0, 2.39))
    assert [b.width / b.height for b in found] == pytest.approx([9 / 16, 1, 2.39], rel=0.02)


def test_a_group_for_each_resolution() -> None:
    groups = bucket_groups(BucketConfig(resolutions=(256, 512), aspect_buckets=1), 16, CAUSAL)
    assert [(group.name, len(group.buckets)) for group in groups] == [("256", 2), ("512", 2)]


@pytest.mark.parametrize("count, nearest", [(32, "29 or 33"), (16, "13 or 17"), (2, "1 or 5")])
def test_frame_counts_must_fit_the_stride(count: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"data.buckets.frames: {count} frames .* nearest: {nearest}$"):
        buckets(frames=(count,))
    buckets(lengths=ClipLengths(1), frames=(17, 18, 19))


@pytest.mark.parametrize("count, nearest", [(2, "1 or 8"), (7, "1 or 8"), (9, "8 or 12"), (33, "32 or 36")])
def test_lengths_of_an_autoencoder_that_is_not_causal(count: int, nearest: str) -> None:
    """Four frames a latent, and no latent for the first one alone: 4 frames would come back as one."""
    lengths = ClipLengths(4, first=8)
    wanted = rf"data.buckets.frames: {count} frames .* takes 1, 8, 12, 16\.\.\.; nearest: {nearest}$"
    with pytest.raises(UserError, match=wanted):
        buckets(lengths=lengths, frames=(count,))
    assert {b.frames for b in buckets(lengths=lengths, frames=(1, 16), clip="full")} == {1, 8, 12, 16}


def test_lengths() -> None:
    causal, dense, every = ClipLengths(4), ClipLengths(4, first=8), ClipLengths(1)
    assert [n for n in range(-3, 14) if n in causal] == [1, 5, 9, 13] == causal.between(-3, 13)
    assert [n for n in range(-3, 14) if n in dense] == [1, 8, 12]
    assert [n for n in range(-3, 4) if n in every] == [1, 2, 3]
    assert [causal.latents(n) for n in (1, 5, 9, 129)] == [1, 2, 3, 33]
    assert [dense.latents(n) for n in (1, 8, 12, 128)] == [1, 2, 3, 32]
    assert [every.latents(n) for n in (1, 2, 17)] == [1, 2, 17]
    for lengths in (causal, dense, every, ClipLengths(8)):
        for n in range(-2, 40):
            fitting = [k for k in range(1, 60) if k in lengths]
            below, above = [k for k in fitting if k <= n], [k for k in fitting if k > n]
            assert lengths.at_most(n) == (below or [1])[-1]
            if n not in lengths:
                assert lengths.nearest(n) == ((below[-1], above[0]) if below else (1,))
    assert [str(one) for one in (causal, dense, ClipLengths(8), every)] == [
        "4 k + 1", "1, 8, 12, 16...", "8 k + 1", "any number of",
    ]  # fmt: skip


def test_sizes_are_checked_and_used_as_they_are() -> None:
    with pytest.raises(UserError, match=r"data.buckets.sizes: \[512, 500\]: width must be a multiple .* 496 or 512"):
        buckets(sizes=((512, 500),))
    with pytest.raises(UserError, match=r"\[8, 16, 1\]: height must be a multiple of 16 .* nearest: 16$"):
        buckets(sizes=((8, 16, 1),))
    with pytest.raises(UserError, match=r"data.buckets.sizes: 80 frames .* nearest: 77 or 81"):
        buckets(sizes=((480, 832, 80),))
    assert buckets(sizes=((480, 832, 81), (480, 480)), frames=(1, 17)) == (
        Bucket(81, 480, 832), Bucket(1, 480, 480), Bucket(17, 480, 480)
    )  # fmt: skip


def test_full_has_every_length_of_the_stride() -> None:
    found = buckets(resolutions=(256,), aspect_buckets=1, frames=(5, 17), clip="full")
    assert [b.frames for b in found] == [5, 9, 13, 17]
    found = buckets(sizes=((256, 256, 1), (256, 256, 9), (512, 512, 5)), clip="full")
    assert found == (Bucket(1, 256, 256), Bucket(5, 256, 256), Bucket(9, 256, 256), Bucket(5, 512, 512))


def test_a_resolution_below_the_grid_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data.buckets.resolutions: 8 is smaller than the 16 pixel grid .* nearest: 16"
    ):
        buckets(resolutions=(8,))


def test_a_clip_knows_when_it_begins() -> None:
    assert Clip(33, 33, 25.0).start_seconds == pytest.approx(33 / 25)
    assert Clip().start_seconds == 0


def test_planning_imports_neither_torch_nor_av() -> None:
    code = (
        "import sys, kinema.data.records, kinema.data.buckets, kinema.data.bucket_table, kinema.data.media;"
        "print([m for m in ('torch', 'av', 'PIL', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
