"""Open-Sora's bucket table: sizes and choices against those of the original (tests/golden/open_sora), and its use."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_columns import columns

from kinema.config.data import BucketConfig
from kinema.data.bucket_table import Length, Level, table_batch_size, table_levels, table_sizes, walk_table
from kinema.data.buckets import Bucket, bucket_groups
from kinema.data.lengths import CAUSAL
from kinema.data.placement import Placement, place
from kinema.errors import UserError

TABLE = {"256px": {"1": (0.5, 4), "17": (0.3, 3), "33": ((1.0, 0.5), 2)}, "768px": {"1": (0.2, 1), "129": (0.25, 1)}}


@cache
def golden() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "golden" / "open_sora" / "buckets.json").read_text())


def test_sizes_are_those_of_the_original() -> None:
    assert len(golden()["sizes"]) == 20
    for case in golden()["sizes"]:
        expected = []
        for name, size in case["sizes"].items():
            width, height = map(float, name.split(":"))
            expected.append((height / width, tuple(size)))
        assert list(table_sizes(case["area"], case["grid"]).items()) == expected


@pytest.mark.parametrize("case", ["C1/D16/24", "C1/D32/16", "C2/D16/16", "C2/D32/24"])
def test_choices_are_those_of_the_original_given_its_random_numbers(case: str) -> None:
    name, grid, highest = case.split("/")
    levels = original_levels(name, f"{name}/{grid}")
    draws = np.stack([np.random.default_rng(5000 + 7 * i).random(16) for i in range(1000)])
    frames, height, width, fps = np.array(golden()["records"], float).T
    available = frames // np.where(fps >= int(highest), np.ceil(fps / int(highest)), 1)
    level, length, shape = walk_table(
        levels, available.astype(np.int32), height.astype(np.int32), width.astype(np.int32), lambda at, n: draws[at, n]
    )
    found = [
        None if k < 0 else [levels[k].name, n, *levels[k].sizes[s], levels[k].lengths[n].batch_size]
        for k, n, s in zip(level.tolist(), length.tolist(), shape.tolist(), strict=True)
    ]
    expected = golden()["results"][case]
    assert found == expected
    assert 300 < sum(choice is not None for choice in expected) < 1000


def original_levels(name: str, key: str) -> list[Level]:
    """The levels of a golden configuration. Its names of resolutions (360p, 720p_max) are more than ours."""
    levels = []
    for resolution, about in golden()["resolutions"][key].items():
        lengths = {}
        for frames, (chance, batch_size) in golden()["configs"][name][resolution].items():
            taken, shorter = chance if isinstance(chance, list) else (chance, None)
            lengths[int(frames)] = Length(taken, shorter, batch_size)
        pairs = [tuple(map(float, ratio.split(":"))) for ratio in about["sizes"]]
        levels.append(
            Level(
                resolution,
                about["area"],
                dict(sorted(lengths.items(), reverse=True)),
                tuple(tuple(size) for size in about["sizes"].values()),
                tuple(height / width for width, height in pairs),
            )
        )
    return levels


def test_of_two_equally_near_ratios_the_first_is_taken() -> None:
    (level,) = table_levels(BucketConfig(table={"256px": {"1": (1.0, 1)}}), 16, CAUSAL)
    one = np.ones(1, np.int32)
    _, _, shape = walk_table([level], one, 700 * one, 800 * one, lambda at, _: np.zeros(len(at)))
    assert level.sizes[shape[0]] == (224, 288)  # 7/8 lies between 3/4 and 1


def test_levels_of_a_configuration_are_those_of_the_original() -> None:
    table = {
        name: {frames: tuple(entry) for frames, entry in entries.items()}
        for name, entries in golden()["configs"]["C1"].items()
    }
    for grid in (16, 32):
        levels = table_levels(BucketConfig(table=table), grid, CAUSAL)
        assert list(levels) == original_levels("C1", f"C1/D{grid}")
        assert sum(len(level.sizes) * len(level.lengths) for level in levels) == {16: 126, 32: 100}[grid]
        (group,) = bucket_groups(BucketConfig(table=table), grid, CAUSAL)
        assert len(group.buckets) == {16: 126, 32: 88}[grid], "ratios that share a size share a bucket"


def placed(table: dict[str, Any] = TABLE, seed: int = 3, count: int = 4000, **media: Any) -> Placement:
    rows = np.arange(count, dtype=np.uint32)
    return place(columns(count, **media), rows, BucketConfig(table=table), 16, CAUSAL, seed=seed, online=False)


def test_records_are_drawn_with_the_probabilities_of_the_table() -> None:
    cases = (  # 768px is asked first; what it does not take goes on to 256px
        (dict(video=False, width=1024, height=576), {(1, 576): 0.2, (1, 192): 0.8 * 0.5}),
        (dict(frames=200, width=1024, height=576), {(129, 576): 0.25, (33, 192): 0.375, (17, 192): 0.375 * 0.3}),
        (dict(frames=50, width=1024, height=576), {(33, 192): 0.5, (17, 192): 0.5 * 0.3}),
        (dict(frames=20, width=400, height=300), {(17, 224): 0.3}),
    )
    for media, shares in cases:
        found = placed(**media)
        for (frames, height), share in shares.items():
            drawn = np.mean((found.frames == frames) & (found.height == height)) * len(found) / 4000
            assert drawn == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
        assert len(found) + len(found.missed) == 4000
        assert set(zip(found.frames.tolist(), found.height.tolist(), strict=True)) == set(shares)


def test_what_is_drawn_hangs_on_the_seed_and_the_row_alone() -> None:
    media = columns(3000, frames=50, width=1024, height=576)
    config, rows = BucketConfig(table=TABLE), np.arange(3000, dtype=np.uint32)
    whole = place(media, rows, config, 16, CAUSAL, seed=3, online=False)
    chosen = dict(zip(rows[whole.index].tolist(), whole.frames.tolist(), strict=True))
    shuffled = np.random.default_rng(0).permutation(rows)
    again = place(media, shuffled, config, 16, CAUSAL, seed=3, online=False)
    assert dict(zip(shuffled[again.index].tolist(), again.frames.tolist(), strict=True)) == chosen
    other = place(media, rows, config, 16, CAUSAL, seed=4, online=False)
    assert dict(zip(rows[other.index].tolist(), other.frames.tolist(), strict=True)) != chosen


@pytest.mark.parametrize(
    "media, code, words",
    [
        (dict(frames=50, width=120, height=90), "too small", "has 120x90 pixels, and 256px, .* asks for 52429"),
        (
            dict(frames=9),
            "too short",
            r"has 9 frames at 16 fps \(it has 9 at 16\), and the smallest bucket asks for 17",
        ),
        (dict(frames=1), "not drawn", "with 1 for all lengths of its lowest resolution"),
    ],
)
def test_those_that_are_passed_over_are_told_why(media: dict[str, Any], code: str, words: str) -> None:
    found = placed(**media, count=8)
    texts = [found.reason(int(position)) for position in found.missed]
    assert {code} == {code for _, code in texts}
    assert re.search(words, texts[0][0])


def test_a_table_without_a_kind_of_media_says_so() -> None:
    found = placed({"256px": {"1": (1.0, 4)}}, frames=9, count=1)
    assert found.reason(0) == (
        "has 9 frames at 16 fps (it has 9 at 16), and data.buckets.table has no length for videos: add one, or take "
        "it out",
        "too short",
    )
    found = placed({"256px": {"17": (1.0, 4)}}, video=False, count=1)
    assert found.reason(0) == (
        "is a picture, and the smallest frame count is 17: add 1 to frames, or take it out",
        "picture without bucket",
    )


def test_batch_sizes_are_those_of_the_table() -> None:
    config = BucketConfig(table=TABLE)
    (group,) = bucket_groups(config, 16, CAUSAL)
    sizes = {(b.frames, b.height * b.width > 300**2): table_batch_size(config, b, 16) for b in group.buckets}
    assert sizes == {(1, False): 4, (17, False): 3, (33, False): 2, (1, True): 1, (129, True): 1}
    assert table_batch_size(config, Bucket(5, 256, 256), 16) is None
    assert table_batch_size(BucketConfig(), Bucket(17, 256, 256), 16) is None
    near = BucketConfig(table={"256px": {"1": (1.0, 4)}, "257px": {"1": (1.0, 3)}})
    assert table_batch_size(near, Bucket(1, 256, 256), 16) == 3


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(table={"256px": {"32": (1.0, 1)}}), r'table."256px": 32 frames .* nearest: 29 or 33'),
        (dict(table={"8px": {"1": (1.0, 1)}}), r'table."8px": 8 is smaller than the 16 pixel grid .* nearest: 16'),
        (dict(table={"256px": {"1": ((1.0, 0.5), 1)}}), r"pictures have no shorter length .* one probability: 1.0"),
        (dict(table={"256px": {"33": (1.0, 1), "033": (0.5, 1)}}), r'table."256px": length 33 is given twice'),
        (dict(table=TABLE, clip="full"), "the bucket table says how long clips are"),
    ],
)
def test_tables_that_no_model_takes_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bucket_groups(BucketConfig(**given), 16, CAUSAL)
