"""Batch sizes of buckets: what decides, and what a run keeps of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.config.data import SourceConfig
from kinema.config.schema import BatchSizeConfig, TrainingConfig
from kinema.data.batch_sizes import (
    BatchSize,
    batch_sizes,
    by_hand,
    from_json,
    in_words,
    left_to_trials,
    sizes_of_tables,
    to_json,
    tokens_of,
)
from kinema.data.buckets import Bucket
from kinema.data.lengths import CAUSAL

PICTURE, CLIP, LARGE = Bucket(1, 256, 256), Bucket(33, 256, 256), Bucket(33, 512, 768)
ALL = (PICTURE, CLIP, LARGE)


def nothing(bucket):
    return None


def training(**keys):
    return TrainingConfig(steps=1, **keys)


def totals(config, ranks=1, table=nothing, found=None, buckets=ALL):
    sizes = batch_sizes(config, buckets, grid=16, lengths=CAUSAL, ranks=ranks, table=table, found=found)
    return [size.total for size in sizes]


def test_one_size_for_all():
    assert totals(training(batch_size=6), ranks=3) == [6, 6, 6]
    sizes = batch_sizes(training(batch_size=6), ALL, grid=16, lengths=CAUSAL, ranks=3, table=nothing)
    assert sizes == [BatchSize(6, None)] * 3


def test_a_token_budget_holds_for_each_device():
    assert [tokens_of(bucket, 16, CAUSAL) for bucket in ALL] == [256, 9 * 256, 9 * 32 * 48]
    assert totals(training(token_budget=5000)) == [5000 // 256, 2, 1]  # the last has 13,824: one at least
    assert totals(training(token_budget=5000), ranks=4) == [4 * (5000 // 256), 8, 4]


@given(budget=st.integers(1, 10**6), frames=st.integers(0, 30), side=st.integers(1, 40), ranks=st.integers(1, 8))
def test_a_token_budget_is_kept_and_used(budget, frames, side, ranks):
    bucket = Bucket(4 * frames + 1, 16 * side, 16)
    (total,) = totals(training(token_budget=budget), ranks, buckets=[bucket])
    device, tokens = total // ranks, (frames + 1) * side
    assert total == device * ranks and device >= 1
    assert device * tokens <= max(budget, tokens) and (device + 1) * tokens > budget


def rules(*given):
    return [BatchSizeConfig(**one) for one in given]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([{"size": 9}], [9, 9, 9]),
        ([{"size": 9, "frames": 1}], [9, None, None]),
        ([{"size": 9}, {"size": 4, "frames": 33}], [9, 4, 4]),
        ([{"size": 9, "resolution": 256}, {"size": 4, "resolution": 640}], [9, 9, 4]),
        ([{"size": 9, "resolution": 240}, {"size": 4, "resolution": 300}], [9, 9, None]),  # the nearest; 627 is far
        ([{"size": 9, "resolution": 256}, {"size": 4}], [9, 9, 4]),
        ([{"size": 9, "resolution": 256}, {"size": 4, "frames": 33}], [9, 4, 4]),  # its own length goes first
        ([{"size": 2, "frames": 33, "resolution": 600}, {"size": 4, "frames": 33}], [None, 4, 2]),
    ],
)
def test_sizes_by_hand(given, expected):
    found = [by_hand(rules(*given), bucket) for bucket in ALL]
    assert [size and size.total for size in found] == expected


def test_what_goes_before_what():
    def table(bucket):
        return {PICTURE: 5, CLIP: 3}.get(bucket)

    by_rule = rules({"size": 8, "frames": 1})
    assert totals(training(batch_size=2), 2, table) == [10, 6, 2]
    assert totals(training(batch_size=2, batch_sizes=by_rule), 2, table) == [8, 6, 2]
    assert totals(training(token_budget=30000), 2, table) == [10, 6, 4]
    found = {str(bucket): 7 for bucket in ALL}
    assert totals(training(batch_size="auto", batch_sizes=by_rule), 2, table, found) == [8, 6, 14]
    assert totals(training(batch_size="auto"), 2) == [2, 2, 2]  # until trials have been made
    kept = {str(CLIP): BatchSize(11, 4)}
    sizes = batch_sizes(
        training(batch_size=2, batch_sizes=by_rule), ALL, grid=16, lengths=CAUSAL, ranks=2, table=table, recorded=kept
    )
    assert sizes == [BatchSize(8), BatchSize(11, 4), BatchSize(2)]


def test_what_is_left_to_trials():
    def table(bucket):
        return 3 if bucket == CLIP else None

    auto = training(batch_size="auto", batch_sizes=rules({"size": 8, "frames": 1}))
    assert left_to_trials(auto, ALL, table) == [LARGE]
    assert left_to_trials(auto, ALL, table, {str(LARGE): BatchSize(4, 2)}) == []
    assert left_to_trials(training(batch_size=4), ALL, nothing) == []
    assert left_to_trials(training(token_budget=4), ALL, nothing) == []


def test_tables_of_several_sources():
    def source(size, **more):
        return SourceConfig(path="x", buckets={"table": {"256": {"1": (1.0, size), "33": (1.0, 2 * size)}}}, **more)

    square = Bucket(33, 256, 256)
    plain = SourceConfig(path="y", buckets={"resolutions": [256]})
    table = sizes_of_tables([source(6), plain, source(5)], 16)
    assert (table(square), table(Bucket(1, 256, 256)), table(Bucket(17, 256, 256))) == (10, 5, None)
    assert sizes_of_tables([plain], 16)(square) is None


def test_what_a_run_keeps():
    sizes = [BatchSize(4), BatchSize(8, 2), BatchSize(1, 1)]
    kept = json.loads(json.dumps(to_json(ALL, sizes)))
    assert kept["256x256x33"] == {"total": 8, "device": 2}
    assert from_json(kept) == {str(bucket): size for bucket, size in zip(ALL, sizes, strict=True)}
    assert in_words(sizes) == "1 to 8" and in_words(sizes[:1] * 3) == "4"
