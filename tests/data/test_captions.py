"""Captions as they are trained on: what is put together, what is shuffled and how evenly, whose turn it is."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.config.data import CaptionConfig
from kinema.data.captions import Captioner, score_text, with_scores
from kinema.data.records import Record

TAGS = "1girl, red hair, smile, sky, blue eyes"


def captioner(seed: int = 3, online: bool = False, **config: Any) -> Captioner:
    return Captioner(CaptionConfig.model_validate(config), seed, online)


def record(*captions: str, path: str = "clips/a.mp4", **scores: float) -> Record:
    return Record(path, captions, "video", scores=scores)


def assert_even(draws: Iterable[object], outcomes: int) -> None:
    """Pearson's statistic of independent draws against ``outcomes`` equally likely ones. Above the bound with a
    probability below exp(-x) (Laurent and Massart 2000, lemma 1: k + 2 sqrt(k x) + 2 x, k degrees of freedom)."""
    counts = Counter(draws)
    assert len(counts) == outcomes
    expected = counts.total() / outcomes
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    k, x = outcomes - 1, 12.0
    assert statistic < k + 2 * math.sqrt(k * x) + 2 * x, counts


# -- what is put together --------------------------------------------------------------------------------------------


def test_prefix_suffix_and_scores_as_written() -> None:
    """No white space is added but the one before the score text."""
    ours = captioner(prefix="sks,", suffix=" !", scores=["fps", "motion"])
    assert ours.variants(record("a ball", motion=4.0, fps=24.0)) == ("sks,a ball ! 24 FPS, 4 motion score.",)
    assert ours.variants(record("a ball", "a box")) == ("sks,a ball !", "sks,a box !")
    assert ours.choose(record("a ball", motion=4.0), 7) == "sks,a ball ! 4 motion score."
    plain = captioner()
    assert plain.variants(record("  two  spaces ", motion=1.0)) == ("  two  spaces ",)


def test_an_empty_caption_is_the_trigger_word() -> None:
    assert captioner(prefix="sks").variants(record("")) == ("sks",)
    assert captioner().variants(record("")) == ("",)
    assert captioner(scores=["motion"]).variants(record("", motion=2.5)) == ("2.5 motion score.",)
    shuffled = captioner(shuffle_tags=True, shuffle_capitals=True, variants=4, prefix="Sks")
    assert shuffled.variants(record("")) == ("Sks",)


def test_score_text() -> None:
    """Two of Open-Sora's training captions by hand; one order, whatever is asked in which; numbers in %g."""
    scores = {"motion": 4.0, "fps": 24.0, "aesthetic": 5.512345678, "unknown": 1.0}
    assert with_scores("a dog.", scores, ("fps", "motion")) == "a dog. 24 FPS, 4 motion score."
    assert with_scores("a dog.", scores, ("fps",)) == "a dog. 24 FPS."
    for which in itertools.permutations(("fps", "motion", "aesthetic")):
        assert score_text(scores, which) == "24 FPS, 4 motion score, 5.51235 aesthetic score."
    assert score_text({"fps": 30000 / 1001}, ("fps", "motion")) == "29.97 FPS."
    assert score_text({"motion": 0.0}, ("motion",)) == "0 motion score."
    assert score_text({"motion": math.nan, "fps": 8.0}, ("motion", "fps")) == "8 FPS."
    assert score_text({"motion": 4.0}, ("fps",)) == score_text({}, ("motion",)) == score_text(scores, ()) == ""
    assert with_scores("a dog", {}, ("fps",)) == "a dog"


def test_the_frame_rate_is_that_of_the_clip() -> None:
    """After resampling, where it is known; a picture has none."""
    ours, one = captioner(scores=["fps", "motion"]), record("a", fps=29.97, motion=3)
    assert ours.variants(one, 16.0) == ("a 16 FPS, 3 motion score.",)
    assert ours.choose(one, 5, 16.0) == "a 16 FPS, 3 motion score."
    assert ours.variants(one, 0.0) == ("a 3 motion score.",)
    assert ours.variants(one) == ("a 29.97 FPS, 3 motion score.",)
    assert ours.variants(record("a"), 24.0) == ("a 24 FPS.",)


# -- what is shuffled ------------------------------------------------------------------------------------------------

tag = st.text(st.characters(codec="utf-8", exclude_characters=",; ", exclude_categories=("C", "Z")), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    tags=st.lists(tag, min_size=1, max_size=6),
    delimiter=st.sampled_from([", ", ",", " ", "; "]),
    keep=st.integers(0, 4),
    count=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_tags_are_kept_and_the_head_stays(tags: list[str], delimiter: str, keep: int, count: int, seed: int) -> None:
    """Each variant has the same tags, the first ones in place; variants differ, as many as asked for or as exist."""
    ours = captioner(seed, shuffle_tags=True, delimiter=delimiter, keep_tags=keep, variants=count)
    variants = ours.variants(record(delimiter.join(tags)))
    for text in variants:
        found = text.split(delimiter)
        assert Counter(found) == Counter(tags) and found[:keep] == tags[:keep]
    moved = Counter(tags[keep:])
    orders = math.factorial(moved.total()) // math.prod(math.factorial(one) for one in moved.values())
    assert len(set(variants)) == len(variants) == min(count, orders)
    whole = ours.variants(Record("b", (delimiter.join(tags), "x y"), "image"))
    assert len(whole) % 2 == 0, "both captions have equally many"


@pytest.mark.parametrize(
    ("caption", "delimiter", "expected"),
    [
        ("a, b,", ", ", {"a, b,", "b, a,"}),
        ("a, b, ", ", ", {"a, b, ", "b, a, "}),
        ("One dog. Two cats.", ". ", {"One dog. Two cats.", "Two cats. One dog."}),
        ("a,b", ", ", {"a,b"}),
        ("a|b", "|", {"a|b", "b|a"}),
        (",", ",", {","}),
    ],
)
def test_what_ends_a_caption_ends_it_still(caption: str, delimiter: str, expected: set[str]) -> None:
    assert set(captioner(shuffle_tags=True, delimiter=delimiter, variants=9).variants(record(caption))) == expected


def test_orders_are_even() -> None:
    """Over 4800 records, over 4800 captions of one path, over 4800 uses on line: each of 24 orders equally often."""
    config = {"shuffle_tags": True, "keep_tags": 1}
    cached, online = captioner(**config), captioner(online=True, **config)
    count = 4800
    assert_even((cached.variants(record(TAGS, path=str(i)))[0] for i in range(count)), 24)
    parts = (cached.variants(record(f"{i}, a, b, c, d"))[0].partition(", ")[2] for i in range(count))
    assert_even(parts, 24)
    assert_even((online.choose(record(TAGS), use) for use in range(count)), 24)
    assert_even((captioner(seed, **config).variants(record(TAGS))[0] for seed in range(count)), 24)


def test_capitals_are_even_and_leave_prefix_and_suffix() -> None:
    config = {"shuffle_capitals": True, "prefix": "Sks ", "suffix": " End."}
    found = [captioner(**config).variants(record("a Red ball", path=str(i)))[0] for i in range(2000)]
    assert_even(found, 4)
    assert set(found) == {f"Sks {text} End." for text in ("a Red ball", "a red ball", "A Red Ball", "A RED BALL")}
    four = captioner(variants=9, **config).variants(record("a Red ball"))
    assert sorted(four) == sorted(set(found)), "each once, though more were asked for"
    assert len(captioner(variants=9, **config).variants(record("a red ball"))) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't stop", "Don't Stop"),
        ("1girl, blue-eyed (masterpiece)", "1girl, Blue-Eyed (Masterpiece)"),
        ("the NASA  logo", "The NASA  Logo"),
        ("élan l’été", "Élan L’été"),
    ],
)
def test_each_word(text: str, expected: str) -> None:
    assert expected in captioner(shuffle_capitals=True, variants=4).variants(record(text))


def test_tags_and_capitals_together() -> None:
    """2 orders in 4 capitalisations, all of them where so many are asked for."""
    ours = captioner(shuffle_tags=True, shuffle_capitals=True, variants=8)
    orders = ("red Hair, sky", "sky, red Hair")
    titles = ("Red Hair, Sky", "Sky, Red Hair")
    expected = {*orders, *titles, *(text.lower() for text in orders), *(text.upper() for text in orders)}
    assert set(ours.variants(record(orders[0]))) == expected
    same = captioner(shuffle_tags=True, shuffle_capitals=True, variants=20).variants(record("a, A"))
    assert set(same) == {"a, A", "A, a", "a, a", "A, A"}, "tags that differ in capitals alone"


# -- what a draw depends on ------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_name_and_caption_alone() -> None:
    config = {"shuffle_tags": True, "variants": 5}
    alone = captioner(**config).variants(record(TAGS))
    assert captioner(**config).variants(record("x, y, z, u", TAGS, "one"))[5:10] == alone, "other captions"
    assert captioner(**(config | {"prefix": "p"})).variants(record(TAGS, motion=3)) == tuple(f"p{one}" for one in alone)
    assert captioner(**(config | {"variants": 9})).variants(record(TAGS))[:5] == alone, "a larger number keeps them"
    assert captioner(4, **config).variants(record(TAGS)) != alone
    assert captioner(**config).variants(record(TAGS, path="b")) != alone
    for moved in ("./clips/a.mp4", "/else/where/a.mp4", "s3://bucket/a.mp4", "shard.tar::clips/a.mp4"):
        assert captioner(**config).variants(record(TAGS, path=moved)) == alone
        turns = [captioner(**config).turn(record(TAGS, path=path), 7, 5) for path in (moved, "clips/a.mp4")]
        assert turns[0] == turns[1], "a resumed run goes on with the same captions"


PINNED = [
    "1girl, smile, blue eyes, red hair, sky",
    "1girl, red hair, smile, blue eyes, sky",
    "a girl smiles",
    "A GIRL SMILES",
]
SCRIPT = """
import json, sys
from kinema.config.data import CaptionConfig
from kinema.data.captions import Captioner
from kinema.data.records import Record
record = Record("clips/a.mp4", ("1girl, red hair, smile, sky, blue eyes", "a girl smiles"), "video")
config = CaptionConfig(shuffle_tags=True, shuffle_capitals=True, keep_tags=1, variants=2)
cached, online = (Captioner(config, 3, online) for online in (False, True))
heavy = sorted({"torch", "numpy", "av", "pyarrow", "PIL"} & set(sys.modules))
uses = [[one.choose(record, use) for use in range(6)] for one in (cached, online)]
print(json.dumps([heavy, cached.variants(record), *uses]))
"""


def test_every_process_draws_the_same() -> None:
    """Whatever the hash seed; and these very captions on every machine, as caches outlive Python versions."""
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", SCRIPT], env=os.environ | {"PYTHONHASHSEED": seed},
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for seed in ("0", "12345")
    ]  # fmt: skip
    assert found[0] == found[1]
    heavy, variants, cached, online = found[0]
    assert heavy == [], "imported too early"
    assert variants == PINNED
    assert set(cached[:4]) == set(variants) and len(set(online)) > 3


# -- whose turn it is ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.integers(0, 50))
def test_everyone_has_one_turn_a_round(captions: int, variants: int, seed: int, number: int) -> None:
    ours = captioner(seed, shuffle_tags=True, variants=variants)
    one = record(*(f"{i}, a, b, c" for i in range(captions)))
    all_of_them = ours.variants(one)
    count = len(all_of_them)
    assert count == captions * variants
    uses = range(number * count, (number + 1) * count)
    assert Counter(ours.choose(one, use) for use in uses) == Counter(all_of_them)
    assert [ours.choose(one, use) for use in uses] == [all_of_them[ours.turn(one, use, count)] for use in uses]


def test_turns_are_in_a_new_random_order_every_round() -> None:
    """All 24 orders of four captions equally often over rounds and over records."""
    ours = captioner()
    rounds = [tuple(ours.choose(record(*"abcd"), 4 * number + i) for i in range(4)) for number in range(1200)]
    assert_even(rounds, 24)
    assert_even((tuple(ours.choose(record(*"abcd", path=str(n)), i) for i in range(4)) for n in range(1200)), 24)


def test_captions_with_fewer_orders_have_as_many_turns() -> None:
    ours = captioner(shuffle_tags=True, variants=4)
    one = record("a, b, c, d", "just this", "x, y")
    counts = Counter(ours.choose(one, use) for use in range(120))
    assert counts["just this"] == 40 and counts["x, y"] == counts["y, x"] == 20
    assert sorted(counts.values()) == [10] * 4 + [20, 20, 40]


def test_on_line_every_use_is_shuffled_anew() -> None:
    """`variants` is not read; captions take turns; each use's order is its own, and the same when asked again."""
    many = "a, b, c, d, e, f, g, h, i, j"
    ours, other = (captioner(online=True, shuffle_tags=True, variants=count) for count in (1, 7))
    one = record(many, "just this")
    uses = [ours.choose(one, use) for use in range(200)]
    assert uses == [other.choose(one, use) for use in range(200)]
    assert all(sorted([first, second])[-1] == "just this" for first, second in zip(uses[::2], uses[1::2], strict=True))
    assert len(set(uses)) == 101, "a hundred orders of 3.6 million, none twice"
    assert len(ours.variants(one)) == 2
