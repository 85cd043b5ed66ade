"""Batch order: every item exactly once an epoch, in batches of one bucket, on any number of ranks."""

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from kinema.data.sampler import BatchOrder, rank_share


def random_orders(count: int = 60):
    rng = random.Random(0)
    for case in range(count):
        items, buckets = rng.randint(1, 200), rng.randint(1, 12)
        bucket_of = [rng.randrange(buckets) for _ in range(items)]
        yield BatchOrder(bucket_of, [rng.randint(1, 9) for _ in range(buckets)], seed=case), bucket_of


def test_each_item_exactly_once_in_every_epoch():
    for order, bucket_of in random_orders():
        steps = order.steps_per_epoch
        assert steps == sum(-(-bucket_of.count(b) // order.batch_sizes[b]) for b in set(bucket_of))
        for epoch in range(3):
            seen = []
            for step in range(epoch * steps, (epoch + 1) * steps):
                drawn = order.batch(step)
                assert drawn.epoch == epoch
                assert drawn.uses.tolist() == [epoch] * len(drawn.items)
                assert order.global_size(step) == len(drawn.items)
                (bucket,) = {bucket_of[i] for i in drawn.items}
                assert 1 <= len(drawn.items) <= order.batch_sizes[bucket]
                seen.extend(drawn.items.tolist())
            assert sorted(seen) == list(range(len(bucket_of)))


def test_only_the_rest_of_a_bucket_is_a_smaller_batch():
    for order, bucket_of in random_orders():
        sizes = {}
        for step in range(order.steps_per_epoch):
            items = order.batch(step).items
            sizes.setdefault(bucket_of[items[0]], []).append(len(items))
        for bucket, lengths in sizes.items():
            full, rest = divmod(bucket_of.count(bucket), order.batch_sizes[bucket])
            assert sorted(lengths, reverse=True) == [order.batch_sizes[bucket]] * full + [rest] * (rest > 0)


def test_the_smaller_batch_comes_anywhere():
    places = []
    order = BatchOrder([0] * 9, [2], seed=0)
    for epoch in range(500):
        places.append(next(s for s in range(5) if order.global_size(epoch * 5 + s) == 1))
    counts = np.bincount(places, minlength=5)
    assert float(((counts - 100) ** 2 / 100).sum()) < 18.5  # chi-square, 99.9th percentile at 4 degrees of freedom


def test_epochs_differ_and_seeds_differ():
    bucket_of = [0] * 400 + [1] * 400
    order = BatchOrder(bucket_of, [4, 4], seed=1)
    epochs = [[order.batch(e * 200 + s).items.tolist() for s in range(200)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [BatchOrder(bucket_of, [4, 4], seed=2).batch(s).items.tolist() for s in range(200)]


def test_buckets_are_spread_evenly_over_the_epoch():
    """At any point of an epoch each bucket had its share of the steps: at a time within it that all buckets share each
    is within one, so all four together are within four."""
    bucket_of = [0] * 1200 + [1] * 400 + [2] * 40 + [3]
    order = BatchOrder(bucket_of, [4, 2, 4, 4], seed=1)
    assert order.steps_per_epoch == 300 + 200 + 10 + 1
    for epoch in range(3):
        buckets = np.array([bucket_of[order.batch(epoch * 511 + s).items[0]] for s in range(511)])
        for bucket, steps in ((0, 300), (1, 200), (2, 10), (3, 1)):
            passed = np.cumsum(buckets == bucket)
            drift = np.abs(passed - np.arange(1, 512) / 511 * steps).max()
            assert drift <= 1 + 4 * steps / 511


def test_shuffle_is_uniform():
    """Every item is equally likely in the first batch: chi-square over 4,000 epochs of 8 items."""
    order = BatchOrder([0] * 8, [2], seed=3)
    counts = np.zeros(8)
    pairs = np.zeros((8, 8))
    for epoch in range(4000):
        items = order.batch(epoch * 4).items
        counts[items] += 1
        pairs[items.min(), items.max()] += 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 24.3  # 99.9th percentile at 7 degrees of freedom
    expected = 4000 / 28
    found = pairs[np.triu_indices(8, 1)]
    assert found.sum() == 4000
    assert float(((found - expected) ** 2 / expected).sum()) < 55.5  # at 27 degrees of freedom


def test_restart_gives_the_same_batches():
    bucket_of = [i % 3 for i in range(100)]
    unbroken = BatchOrder(bucket_of, [7, 7, 5], seed=5)
    batches = [unbroken.batch(step).items.tolist() for step in range(50)]
    for step in (0, 13, 14, 15, 37, 49):
        assert BatchOrder(bucket_of, [7, 7, 5], seed=5).batch(step).items.tolist() == batches[step]
    order = random.Random(1).sample(range(50), 50)  # out of order as well
    assert all(unbroken.batch(step).items.tolist() == batches[step] for step in order)


def test_order_does_not_depend_on_the_process():
    """Pinned numbers: an order that changed with a version would break every resume."""
    code = (
        "from fractions import Fraction; from kinema.data.sampler import BatchOrder;"
        "o = BatchOrder([0,1,0,1,0,0,1], [2, 2], 42, source_of=[0,0,0,1,1,1,1], repeats=[Fraction(3, 2), Fraction(2)]);"
        "print([[d.items.tolist(), d.uses.tolist()] for d in map(o.batch, range(o.steps_before(2)))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == PINNED
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert json.loads(printed.getvalue()) == PINNED


# fmt: off
PINNED = [  # items and uses of each batch
    [[1, 6], [0, 0]], [[5, 4], [0, 0]], [[2], [0]], [[3, 6], [0, 1]], [[2, 0], [1, 0]], [[4, 5], [1, 1]],
    [[3], [1]], [[3, 6], [2, 2]], [[4, 2], [2, 2]], [[0, 5], [1, 2]], [[1, 6], [1, 3]], [[4, 0], [3, 2]],
    [[5], [3]], [[3, 1], [3, 2]],
]
# fmt: on


def test_no_item_twice_in_a_batch_where_there_is_room():
    for items, repeats, batch in ((21, "10", 4), (20, "3", 4), (200, "1.7", 8), (100, "40", 32), (3, "2", 2)):
        order = BatchOrder([0] * items, [batch], seed=0, repeats=[Fraction(repeats)])
        for step in range(order.steps_before(2)):
            drawn = order.batch(step).items
            assert len(set(drawn.tolist())) == len(drawn), (items, repeats, batch)


def test_few_items_drawn_often_are_mixed_with_many_drawn_once():
    """10 of 10,010 items make up half of the draws: both sources are in nearly all batches of 8, and hardly ever is
    an item in one twice."""
    source_of = np.repeat([0, 1], [10_000, 10])
    order = BatchOrder(np.zeros(10_010, int), [8], 0, source_of=source_of, repeats=[Fraction(1), Fraction(1000)])
    assert order.steps_per_epoch == 2500
    batches = [order.batch(step).items for step in range(2500)]
    unmixed = sum(len(set(source_of[items].tolist())) == 1 for items in batches)
    assert unmixed < 40  # 2 / 2^8 of them by chance: 20
    assert sum(len(items) - len(set(items.tolist())) for items in batches) <= 10


def test_a_single_item_drawn_often_fills_batches_alone():
    order = BatchOrder([0, 1], [4, 4], seed=0, source_of=[0, 1], repeats=[Fraction(1), Fraction(10)])
    batches = [order.batch(step) for step in range(4)]
    assert sorted((len(b.items), set(b.items.tolist())) for b in batches) == [(1, {0}), (2, {1}), (4, {1}), (4, {1})]
    assert [u for b in batches if b.items[0] == 1 for u in b.uses.tolist()] == list(range(10))


def test_epochs_without_draws_are_skipped():
    order = BatchOrder([0], [1], seed=0, repeats=[Fraction(1, 10**9)])
    assert [order.batch(step).epoch for step in range(3)] == [10**9 - 1, 2 * 10**9 - 1, 3 * 10**9 - 1]
    assert [order.batch(step).uses.tolist() for step in range(3)] == [[0], [1], [2]]
    assert [order.steps_before(e) for e in (0, 10**9 - 1, 10**9, 10**12)] == [0, 0, 1, 1000]


def test_epochs_and_steps_are_inverse():
    for repeats in ("1", "0.3", "7/3", "1000003/1000001"):
        order = BatchOrder([0] * 50 + [1] * 7, [4, 3], seed=0, repeats=[Fraction(repeats)])
        assert order.epochs_at(0) == 0 == order.steps_for(0)
        for step in (1, 2, 9, 50, 777):
            epoch, within = order.epoch_of(step)
            assert order.steps_before(epoch) + within == step
            assert order.steps_for(order.epochs_at(step)) == step
            assert epoch <= order.epochs_at(step) < epoch + 1
        assert order.steps_for(2) == order.steps_before(2)


def test_steps_per_epoch_is_the_mean():
    constant = BatchOrder([0] * 10, [4], seed=0, repeats=[Fraction(2)])
    assert constant.steps_per_epoch == 5 and isinstance(constant.steps_per_epoch, int)
    order = BatchOrder([0] * 10, [4], seed=0, repeats=[Fraction(1, 4)])  # 2, 3, 2, 3 draws
    assert order.steps_per_epoch == 1
    order = BatchOrder([0] * 10, [2], seed=0, repeats=[Fraction(1, 4)])  # 1, 2, 1, 2 steps
    assert order.steps_per_epoch == 1.5


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_one_global_batch(size):
    order = BatchOrder([i % 5 for i in range(83)], [6] * 5, seed=9)
    for step in range(2 * order.steps_per_epoch):
        items = order.batch(step).items
        shares = [rank_share(len(items), rank, size) for rank in range(size)]
        taken = [p for positions, weights in shares for p, w in zip(positions, weights, strict=True) if w > 0]
        assert taken == list(range(len(items)))  # disjoint, complete, in order
        assert sum(sum(weights) for _, weights in shares) == pytest.approx(1.0, abs=1e-12)
        assert all(len(positions) >= 1 for positions, _ in shares)
        assert max(len(p) for p, _ in shares) - min(len(p) for p, _ in shares) <= 1


def test_a_rank_without_samples_repeats_one_with_weight_zero():
    shares = [rank_share(2, rank, 4) for rank in range(4)]
    assert [weights for _, weights in shares] == [[0.0], [0.5], [0.0], [0.5]]
    assert all(0 <= p < 2 for positions, _ in shares for p in positions)


def test_a_million_items_are_planned_in_about_a_second():
    bucket_of = np.random.default_rng(0).integers(0, 40, 1_000_000)
    start = time.process_time()
    order = BatchOrder(bucket_of, [8] * 40, seed=0)
    order.batch(0)
    assert time.process_time() - start < 2.0
    start = time.process_time()
    for step in range(1000):
        order.batch(step)
    assert time.process_time() - start < 0.1


def test_threads_see_the_order_that_one_sees():
    bucket_of = [i % 3 for i in range(500)]
    order = BatchOrder(bucket_of, [4, 4, 4], seed=0, repeats=[Fraction(3, 2)])
    steps = range(order.steps_before(6))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: order.batch(step).items.tolist(), steps))
    alone = BatchOrder(bucket_of, [4, 4, 4], seed=0, repeats=[Fraction(3, 2)])
    assert found == [alone.batch(step).items.tolist() for step in steps]


@pytest.mark.slow
def test_memory_at_ten_million_items():
    """The order's own at the peak, with two epochs held and a third one shuffled: at most 500 MB above the columns."""
    code = """
import numpy as np
from kinema.data.sampler import BatchOrder
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
bucket_of = np.zeros(10_000_000, np.uint32)
before = peak()
order = BatchOrder(bucket_of, [8], seed=0)
for epoch in range(3):
    order.batch(order.steps_before(epoch))
print((peak() - before) / 1024)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 500


def test_what_fractional_repeats_draw_is_a_random_part():
    """With half repeats an epoch draws half of the items: neither the first ones nor every other, another half with
    another seed, and the rest in the next epoch."""
    halves = []
    for seed in range(2):
        order = BatchOrder([0] * 400, [8], seed, repeats=[Fraction(1, 2)])
        first, second = (
            {i for step in range(25) for i in order.batch(25 * epoch + step).items.tolist()} for epoch in range(2)
        )
        assert len(first) == len(second) == 200 and not first & second
        halves.append(first)
        assert 70 < len([i for i in first if i < 200]) < 130  # 100 expected, standard deviation 5
        assert 70 < len([i for i in first if i % 2]) < 130
    assert 70 < len(halves[0] & halves[1]) < 130
