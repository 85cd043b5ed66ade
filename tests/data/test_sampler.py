"""Batch order: every item exactly once an epoch, in batches of one bucket, on any number of ranks."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from kinema.data.sampler import BatchOrder, rank_share


def random_orders(count: int = 60):
    rng = random.Random(0)
    for case in range(count):
        items, buckets = rng.randint(1, 200), rng.randint(1, 12)
        bucket_of = [rng.randrange(buckets) for _ in range(items)]
        yield BatchOrder(bucket_of, rng.randint(1, 9), seed=case), bucket_of


def test_each_item_exactly_once_in_every_epoch():
    for order, bucket_of in random_orders():
        steps = order.steps_per_epoch
        assert steps == sum(-(-bucket_of.count(b) // order.batch_size) for b in set(bucket_of))
        for epoch in range(3):
            seen = []
            for step in range(epoch * steps, (epoch + 1) * steps):
                number, items = order.batch(step)
                assert number == epoch
                assert 1 <= len(items) <= order.batch_size
                assert len({bucket_of[i] for i in items}) == 1
                seen.extend(items.tolist())
            assert sorted(seen) == list(range(len(bucket_of)))


def test_only_the_rest_of_a_bucket_is_a_smaller_batch():
    for order, bucket_of in random_orders():
        sizes = {}
        for step in range(order.steps_per_epoch):
            items = order.batch(step)[1]
            sizes.setdefault(bucket_of[items[0]], []).append(len(items))
        for bucket, lengths in sizes.items():
            full, rest = divmod(bucket_of.count(bucket), order.batch_size)
            assert sorted(lengths, reverse=True) == [order.batch_size] * full + [rest] * (rest > 0)


def test_epochs_differ_seeds_differ_and_buckets_are_interleaved():
    bucket_of = [0] * 400 + [1] * 400
    order = BatchOrder(bucket_of, 4, seed=1)
    epochs = [[order.batch(e * 200 + s)[1].tolist() for s in range(200)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [BatchOrder(bucket_of, 4, seed=2).batch(s)[1].tolist() for s in range(200)]
    buckets = np.array([bucket_of[batch[0]] for batch in epochs[0]])
    changes = int((buckets[1:] != buckets[:-1]).sum())
    assert 70 < changes < 130  # 99.5 expected, standard deviation 7


def test_shuffle_is_uniform():
    """Every item is equally likely in the first batch: chi-square over 4,000 epochs of 8 items."""
    order = BatchOrder([0] * 8, 2, seed=3)
    counts = np.zeros(8)
    for epoch in range(4000):
        counts[order.batch(epoch * 4)[1]] += 1
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 24.3  # 99.9th percentile at 7 degrees of freedom


def test_restart_gives_the_same_batches():
    bucket_of = [i % 3 for i in range(100)]
    unbroken = BatchOrder(bucket_of, 7, seed=5)
    batches = [unbroken.batch(step)[1].tolist() for step in range(50)]
    for step in (0, 13, 14, 15, 37, 49):
        assert BatchOrder(bucket_of, 7, seed=5).batch(step)[1].tolist() == batches[step]
    order = random.Random(1).sample(range(50), 50)  # out of order as well
    assert all(unbroken.batch(step)[1].tolist() == batches[step] for step in order)


def test_order_does_not_depend_on_the_process():
    """Pinned numbers: an order that changed with a version would break every resume."""
    code = (
        "from kinema.data.sampler import BatchOrder; o = BatchOrder([0,1,0,1,0,0,1], 2, 42);"
        "print([o.batch(s)[1].tolist() for s in range(o.steps_per_epoch)])"
    )
    here = BatchOrder([0, 1, 0, 1, 0, 0, 1], 2, 42)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    batches = [here.batch(s)[1].tolist() for s in range(here.steps_per_epoch)]
    assert printed.strip() == str(batches) == PINNED


PINNED = "[[3, 6], [2, 5], [1], [4, 0]]"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_one_global_batch(size):
    order = BatchOrder([i % 5 for i in range(83)], 6, seed=9)
    for step in range(2 * order.steps_per_epoch):
        items = order.batch(step)[1]
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
    order = BatchOrder(bucket_of, 8, seed=0)
    order.batch(0)
    assert time.process_time() - start < 2.0
    start = time.process_time()
    for step in range(1000):
        order.batch(step)
    assert time.process_time() - start < 0.1
