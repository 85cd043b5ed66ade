"""Placing whole columns of records, against a slow reference that places one record at a time."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_columns import columns

from kinema.config.data import BucketConfig
from kinema.data import placement
from kinema.data.buckets import Bucket, bucket_groups
from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.data.placement import Placement, place
from kinema.data.records import MediaInfo, Record
from kinema.data.sources.base import MediaColumns, columns_of

NTSC = 30000 / 1001
TOLERANCE = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class Media:
    """One record of the reference: its file, and the stretch that is used."""

    info: MediaInfo
    cut: tuple[float, float | None] | None = None


def column_values(media: list[Media]) -> MediaColumns:
    records = [Record("x", ("",), one.info.kind, cut=one.cut) for one in media]
    return columns_of([one.info for one in media], records)


def placed(
    media: MediaColumns, config: BucketConfig, grid: int = 16, lengths: ClipLengths = CAUSAL, **how: Any
) -> Placement:
    rows = np.arange(len(media), dtype=np.uint32)
    return place(media, rows, config, grid, lengths, **({"seed": 1, "online": False} | how))


def items(found: Placement) -> list[tuple[Any, ...]]:
    parts = (found.index, found.group, found.frames, found.height, found.width, found.start, found.fps, found.spare)
    return list(zip(*(part.tolist() for part in parts), strict=True))


# The reference: one record, one thing after the other, times as exact fractions.


def reference_stretch(one: Media, fps: float | None) -> tuple[int, int, float]:
    """(first frame, number of frames, rate)."""
    info = one.info
    if info.kind == "image":
        return 0, 1, 0.0
    same = fps is None or (not info.variable and abs(fps / info.fps - 1) < 0.002)
    rate = info.fps if same else fps
    assert rate is not None
    if one.cut is None and rate == info.fps:
        return 0, info.frames, rate
    begin, end = (0.0, info.duration) if one.cut is None else (one.cut[0], min(one.cut[1] or math.inf, info.duration))
    whole, part = info.duration, end - begin
    low, high = (Fraction(time) * Fraction(rate) - TOLERANCE for time in (begin, begin + part))
    shown = [k for k in range(math.floor(low), math.ceil(high) + 1) if low <= k < high]  # k / rate in [begin, end)
    if rate == info.fps and begin == 0:
        return 0, max(1, round(info.frames * part / whole)), rate
    if not shown:
        return math.floor(low + 2 * TOLERANCE), 1, rate
    return shown[0], len(shown), rate


def reference_buckets(one: Media, available: int, config: BucketConfig, grid: int, lengths: ClipLengths) -> Any:
    """[(group, bucket)], or the code of the reason."""
    width, height = one.info.width, one.info.height
    chosen: list[tuple[int, Bucket]] = []
    for number, group in enumerate(bucket_groups(config, grid, lengths)):
        fitting = [bucket for bucket in group.buckets if bucket.frames <= available]
        if not fitting:
            return "picture without bucket" if one.info.kind == "image" else "too short"
        key = {}
        for bucket in fitting:
            distance = round(1e9 * abs(math.log(bucket.width / bucket.height) - math.log(width / height)))
            enlarged = max(bucket.height / height, bucket.width / width) > 1
            area = bucket.height * bucket.width
            key[bucket] = (distance, -bucket.frames, enlarged, area if enlarged else -area)
        chosen.append((number, min(fitting, key=key.__getitem__)))
    if config.upscale:
        return chosen
    kept = [pair for pair in chosen if max(pair[1].height / height, pair[1].width / width) <= 1]
    small = [pair for pair in chosen if pair not in kept]
    if small:
        if min(height, width) < grid:
            return "too small"
        number, bucket = small[0]
        own = Bucket(bucket.frames, height - height % grid, width - width % grid)
        if own not in [bucket for _, bucket in kept]:
            kept = sorted([*kept, (number, own)], key=lambda pair: pair[0])
    return kept


def reference_starts(config: BucketConfig, frames: int, available: int, online: bool, single: bool) -> Any:
    """[(start, spare)]; for cached random clips, how many there are."""
    last = available - frames
    count = 1 if single else min(config.clips, last + 1)
    if config.clip == "random":
        return [(0, last)] if online else count
    if config.clip in ("head", "full"):
        return [(0, 0)]
    if config.clip == "middle" or (config.clip == "uniform" and count == 1):
        return [(last // 2, 0)]
    if config.clip == "tail":
        return [(last, 0)]
    if config.clip == "uniform":
        return [(math.floor(Fraction(k * last, count - 1)), 0) for k in range(count)]
    step = frames if config.clip == "chunk" else config.clip_stride or max(1, frames // 2)
    starts = [(start, 0) for start in range(0, available, step) if start + frames <= available]
    return starts[:1] if single else starts


# What is drawn


@st.composite
def some_media(draw: st.DrawFn) -> Media:
    sides = st.one_of(st.integers(1, 1200), st.sampled_from([15, 16, 64, 100, 128, 256, 512]))
    width, height = draw(sides), draw(sides)
    if draw(st.integers(0, 3)) == 0:
        return Media(MediaInfo("image", width, height))
    frames = draw(st.integers(1, 150))
    fps = draw(st.sampled_from([8.0, 15.0, 16.0, 24000 / 1001, 24.0, 25.0, NTSC, 30.0, 60.0]))
    duration = frames / fps
    info = MediaInfo("video", width, height, frames, fps, duration, (frames - 1) / fps, variable=draw(st.booleans()))
    if draw(st.booleans()):
        return Media(info)
    begin = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.01, 1.0625, duration / 3, duration * 0.9]))
    begin = begin if begin < duration else 0.0
    end = draw(st.one_of(st.none(), st.floats(begin + 0.02, begin + 8)))
    return Media(info, (begin, end))


@st.composite
def some_config(draw: st.DrawFn) -> tuple[BucketConfig, int, ClipLengths]:
    grid = draw(st.sampled_from([8, 16, 32]))
    allowed = draw(st.sampled_from([ClipLengths(1), ClipLengths(4), ClipLengths(8), ClipLengths(4, first=8)]))
    count = st.sampled_from(allowed.between(1, 50)[:7])
    keys: dict[str, Any] = {
        "frames": tuple(sorted(draw(st.lists(count, min_size=1, max_size=4, unique=True)))),
        "fps": draw(st.sampled_from([None, 16.0, 24.0, 30.0])),
    }
    clip = draw(st.sampled_from(["head", "middle", "tail", "chunk", "slide", "uniform", "full", "random"]))
    keys["clip"] = clip
    if clip in ("uniform", "random"):
        keys["clips"] = draw(st.integers(1, 6))
    if clip == "slide":
        keys["clip_stride"] = draw(st.sampled_from([None, 1, 3, 20]))
    sides = st.sampled_from([32, 64, 96, 128, 256])  # few, so that several sizes have one aspect ratio
    way = draw(st.sampled_from(["even", "aspects", "sizes"]))
    if way == "sizes":
        size = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, count))
        keys["sizes"] = tuple(draw(st.lists(size, min_size=1, max_size=6, unique=True)))
        if all(len(one) == 3 for one in keys["sizes"]):
            del keys["frames"]  # each of them has its own
        return BucketConfig(**keys), grid, allowed
    keys["resolutions"] = tuple(
        draw(st.lists(st.sampled_from([64, 128, 200, 256]), min_size=1, max_size=3, unique=True))
    )
    keys["upscale"] = draw(st.booleans())
    if way == "aspects":
        ratios = st.sampled_from([0.25, 9 / 16, 0.75, 1.0, 4 / 3, 16 / 9, 2.0])
        keys["aspects"] = tuple(draw(st.lists(ratios, min_size=1, max_size=5, unique=True)))
    else:
        keys |= {
            "aspect_buckets": draw(st.integers(1, 9)),
            "min_aspect": 0.5,
            "max_aspect": draw(st.sampled_from([0.5, 2.0, 3.0])),
        }
    return BucketConfig(**keys), grid, allowed


@settings(max_examples=250, deadline=None)
@given(st.lists(some_media(), min_size=1, max_size=12), some_config(), st.booleans())
def test_every_record_is_placed_as_the_reference_places_it(
    media: list[Media], how: tuple[BucketConfig, int, ClipLengths], online: bool
) -> None:
    config, grid, lengths = how
    found = placed(column_values(media), config, grid, lengths, online=online)
    got = items(found)
    longer = any(bucket.frames > 1 for group in bucket_groups(config, grid, lengths) for bucket in group.buckets)
    expected: list[tuple[Any, ...]] = []
    missed = {}
    for index, one in enumerate(media):
        first, available, rate = reference_stretch(one, config.fps)
        buckets = reference_buckets(one, available, config, grid, lengths)
        if isinstance(buckets, str):
            missed[index] = buckets
            continue
        for group, bucket in buckets:
            place_of = (index, group, bucket.frames, bucket.height, bucket.width)
            single = bucket.frames == 1 and longer
            starts = reference_starts(config, bucket.frames, available, online, single)
            if isinstance(starts, int):  # drawn: as many as asked, all different, inside the stretch
                drawn = [item[5] for item in got if item[:5] == place_of]
                assert len(drawn) == starts == len(set(drawn))
                assert all(first <= start <= first + available - bucket.frames for start in drawn)
                starts = [(start - first, 0) for start in sorted(drawn)]
            expected += [(*place_of, first + start, rate, spare) for start, spare in starts]
    assert got == expected
    assert missed == {position: found.reason(position)[1] for position in found.missed.tolist()}
    assert len(set(got)) == len(got), "no item comes twice"
    assert list(found.buckets) == sorted({Bucket(*item[2:5]) for item in got})


def test_where_blocks_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    media = [
        Media(MediaInfo("video", int(w), int(h), int(n), 24.0, n / 24, (n - 1) / 24))
        for w, h, n in zip(
            *(rng.integers(20, 800, 300), rng.integers(20, 800, 300), rng.integers(1, 200, 300)), strict=True
        )
    ]
    cases = (dict(clip="random", clips=5), dict(upscale=False, resolutions=(128, 256)), dict(clip="chunk", frames=(5,)))
    for keys in cases:
        config = BucketConfig(**keys)
        whole = placed(column_values(media), config)
        with monkeypatch.context() as patch:
            patch.setattr(placement, "BLOCK", 7)
            pieces = placed(column_values(media), config)
        assert items(pieces) == items(whole)
        assert pieces.missed.tolist() == whole.missed.tolist()
        assert len(whole) > 300


def test_nothing_to_place() -> None:
    for keys in ({}, dict(clip="random", clips=3), dict(upscale=False), dict(table={"256px": {"1": (1.0, 4)}})):
        found = placed(columns(0), BucketConfig(**keys))
        assert len(found) == len(found.missed) == len(found.buckets) == len(found.frames) == 0


# Numbers worked out by hand


def test_lengths_after_resampling() -> None:
    config = BucketConfig(resolutions=(256,), frames=(1, 17, 33, 49, 81), aspect_buckets=1, clip="head")
    # 130 frames at 25 fps last 5.2 s: 84 frames at 16 fps, where 81 fit; 125 frames last 5 s: 80
    for frames, expected in ((130, 81), (125, 49), (76, 49), (75, 33), (20, 1)):
        found = placed(columns(frames=frames, fps=25.0), config)
        assert items(found) == [(0, 0, expected, 256, 256, 0, 16.0, 0)]


def test_ntsc_rate_counts_as_the_round_one() -> None:
    config = BucketConfig(frames=(385,), fps=30.0, resolutions=(256,), aspect_buckets=1)
    assert items(placed(columns(frames=390, fps=NTSC), config)) == [(0, 0, 385, 256, 256, 2, NTSC, 0)]
    # unevenly spaced frames are resampled, whatever their mean rate: 390 frames last 13.013 s
    found = placed(columns(frames=390, fps=NTSC, variable=True), config)
    assert items(found) == [(0, 0, 385, 256, 256, (391 - 385) // 2, 30.0, 0)]


def test_a_cut_begins_with_its_own_first_frame_and_ends_before_the_next_scene() -> None:
    media = [Media(MediaInfo("video", 256, 256, 200, 25.0, 8.0, 7.96), (1.03, 3.0))]
    config = BucketConfig(frames=(1, 5, 9, 13, 17, 21, 25, 29, 33), resolutions=(256,), aspect_buckets=1, clip="head")
    # 16.48 .. 48: frames 17 .. 47 at 16 fps, of which 29 fill the longest length
    assert items(placed(column_values(media), config)) == [(0, 0, 29, 256, 256, 17, 16.0, 0)]
    tail = config.model_copy(update={"clip": "tail"})
    assert items(placed(column_values(media), tail)) == [(0, 0, 29, 256, 256, 19, 16.0, 0)]


@pytest.mark.parametrize(
    "keys, starts",
    [
        (dict(clip="head"), [0]),
        (dict(clip="middle"), [33]),
        (dict(clip="tail"), [67]),
        (dict(clip="chunk"), [0, 33, 66]),
        (dict(clip="slide"), [0, 16, 32, 48, 64]),
        (dict(clip="slide", clip_stride=30), [0, 30, 60]),
        (dict(clip="uniform", clips=1), [33]),
        (dict(clip="uniform", clips=2), [0, 67]),
        (dict(clip="uniform", clips=4), [0, 22, 44, 67]),
    ],
)
def test_clips_of_100_frames(keys: dict[str, Any], starts: list[int]) -> None:
    found = placed(columns(), BucketConfig(**keys))
    assert found.start.tolist() == starts
    assert set(found.frames.tolist()) == {33}


def test_full_takes_the_longest_that_the_grid_of_lengths_allows() -> None:
    config = BucketConfig(clip="full", frames=(5, 81))
    for frames, expected in ((100, 81), (81, 81), (80, 77), (30, 29), (5, 5)):
        assert placed(columns(frames=frames), config).frames.tolist() == [expected]
    text, code = placed(columns(frames=4), config).reason(0)
    assert code == "too short" and "has 4 frames at 16 fps (it has 4 at 16), and the smallest bucket asks for 5" in text


def test_a_video_too_short_for_clips_gives_one_picture() -> None:
    for clip in ("chunk", "slide", "uniform", "random"):
        config = BucketConfig(clip=clip, **({"clips": 4} if clip in ("uniform", "random") else {}))
        assert len(placed(columns(frames=20), config)) == 1
    # where pictures are all that is asked for, they are taken as asked
    assert len(placed(columns(frames=20), BucketConfig(clip="uniform", clips=4, frames=(1,)))) == 4


def test_random_clips_are_drawn_evenly_by_seed_and_row() -> None:
    config = BucketConfig(clip="random", clips=2, frames=(33,))
    media = columns(20000, frames=36)  # 4 first frames: 6 pairs
    found = placed(media, config)
    pairs = Counter(map(tuple, found.start.reshape(-1, 2).tolist()))
    assert set(pairs) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert sum((count - 20000 / 6) ** 2 / (20000 / 6) for count in pairs.values()) < 20.5  # chi squared, 5: 0.1%
    assert placed(media, config).start.tolist() == found.start.tolist()
    assert placed(media, config, seed=2).start.tolist() != found.start.tolist()
    online = placed(columns(frames=100), config, online=True)
    assert (online.start.tolist(), online.spare.tolist()) == ([0], [67])


def test_small_records_keep_their_size_where_nothing_may_be_enlarged() -> None:
    config = BucketConfig(resolutions=(512, 256), aspects=(1.0, 2.0), upscale=False, frames=(1,))
    sizes = [(300, 310), (200, 210), (300, 300), (2000, 1900), (10, 500), (256, 260), (511, 512)]
    found = placed(column_values([Media(MediaInfo("image", w, h)) for w, h in sizes]), config)
    assert [(index, group, height, width) for index, group, _, height, width, *_ in items(found)] == [
        (0, 0, 304, 288), (0, 1, 256, 256),  # its own size at 512, enough for 256
        (1, 0, 208, 192),  # too small for both: its own size once
        (2, 0, 288, 288), (2, 1, 256, 256),
        (3, 0, 512, 512), (3, 1, 256, 256),
        (5, 1, 256, 256),  # its own size is that of the second resolution
        (6, 0, 512, 496), (6, 1, 256, 256),
    ]  # fmt: skip
    assert found.missed.tolist() == [4]
    assert found.reason(4) == (
        "has 10x500 pixels, less than one cell of the 16 pixel grid of this model: set data.buckets.upscale = true, "
        "or take it out",
        "too small",
    )


@pytest.mark.parametrize(
    "sizes, media, expected",
    [
        # nearest in aspect ratio, however little nearer (by 0.0005 in the logarithm), comes before frames
        (((4096, 4096, 33), (4096, 4104, 1)), dict(width=4101, height=4096), (1, 4096, 4104)),
        # then most frames, though that one is enlarged
        (((512, 512, 33), (256, 256, 17)), dict(width=400, height=400), (33, 512, 512)),
        # then the largest that is not enlarged, in neither side
        (((512, 512, 33), (384, 384, 33), (256, 256, 33)), dict(width=500, height=500), (33, 384, 384)),
        (((512, 512, 33), (384, 384, 33), (256, 256, 33)), dict(width=900, height=390), (33, 384, 384)),
        # then the smallest of those that are
        (((512, 512, 33), (384, 384, 33), (448, 448, 33)), dict(width=300, height=300), (33, 384, 384)),
        # upright and lying are equally near a square
        (((256, 512, 17), (512, 256, 33)), dict(width=777, height=777), (33, 512, 256)),
    ],
)
def test_order_of_preference(sizes: Any, media: dict[str, int], expected: tuple[int, int, int]) -> None:
    found = placed(columns(**media), BucketConfig(sizes=sizes), grid=8)
    assert items(found)[0][2:5] == expected


def test_each_record_is_used_once_at_each_resolution() -> None:
    found = placed(columns(50), BucketConfig(resolutions=(256, 512, 768)))
    assert found.index.tolist() == np.repeat(np.arange(50), 3).tolist()
    assert found.group.tolist() == [0, 1, 2] * 50


@pytest.mark.parametrize(
    "media, config, code, words",
    [
        (dict(frames=40, fps=25.0), dict(frames=(33, 81)), "too short",
         r"has 26 frames at 16 fps \(it has 40 at 25\), and the smallest bucket asks for 33: add a smaller"),
        (dict(frames=1), dict(frames=(33,), fps=None), "too short", "has 1 frame at its own 16 fps, and"),
        (dict(video=False), dict(frames=(33, 81)), "picture without bucket",
         "is a picture, and the smallest frame count is 33: add 1 to frames"),
        (dict(frames=20), dict(sizes=((256, 256, 33), (128, 128, 25))), "too short", "smallest bucket asks for 25"),
        (dict(known=False), {}, "media unknown", 'give height and width, .* or set data.examine = "headers"'),
        (dict(width=0), {}, "media unknown", "is said to have 0x360 pixels, 100 frames at 16 fps in 6.25 s"),
        (dict(fps=0.0, duration=1.0), {}, "media unknown", "100 frames at 0 fps"),
        (dict(fps=math.nan, duration=1.0), {}, "media unknown", "100 frames at nan fps"),
        (dict(frames=0, duration=1.0), {}, "media unknown", "0 frames at 16 fps"),
        (dict(duration=1e12), {}, "media unknown", r"in 1e\+12 s, which no file has"),
    ],
)  # fmt: skip
def test_misfits_are_told_why(media: dict[str, Any], config: dict[str, Any], code: str, words: str) -> None:
    found = placed(columns(3, **media), BucketConfig(**config))
    assert len(found) == 0 and found.missed.tolist() == [0, 1, 2]
    text, short = found.reason(1)
    assert short == code
    assert re.search(words, text)
