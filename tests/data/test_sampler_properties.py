"""Properties of the batch order, over any sources, repeats, buckets, batch sizes, ranks and restart points."""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data.sampler import BatchOrder, rank_share

BUCKETS = 4


@dataclass(frozen=True)
class Case:
    """Sources with their repeats, each a list of the buckets of its items."""

    sources: list[list[int]]
    repeats: list[Fraction]
    batch_sizes: list[int]
    seed: int

    @property
    def bucket_of(self) -> list[int]:
        return [bucket for source in self.sources for bucket in source]

    @property
    def source_of(self) -> list[int]:
        return [number for number, source in enumerate(self.sources) for _ in source]

    def order(self) -> BatchOrder:
        sizes, sources, repeats = self.batch_sizes, self.source_of, self.repeats
        return BatchOrder(self.bucket_of, sizes, self.seed, source_of=sources, repeats=repeats)

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """(source, bucket) -> items."""
        found: dict[tuple[int, int], list[int]] = {}
        for item, key in enumerate(zip(self.source_of, self.bucket_of, strict=True)):
            found.setdefault(key, []).append(item)
        return found

    def group_draws(self, source: int, n: int, epoch: int) -> int:
        r = self.repeats[source]
        return math.floor(n * (epoch + 1) * r) - math.floor(n * epoch * r)

    def epoch_steps(self, epoch: int) -> int:
        draws: Counter[int] = Counter()
        for (source, bucket), items in self.groups().items():
            draws[bucket] += self.group_draws(source, len(items), epoch)
        return sum(math.ceil(count / self.batch_sizes[bucket]) for bucket, count in draws.items())


def any_repeats() -> st.SearchStrategy[Fraction]:
    """Whole numbers, decimals as users give them, and the unwieldy fractions that weights make."""
    return st.one_of(
        st.integers(1, 5).map(Fraction),
        st.integers(1, 40).map(lambda tenths: Fraction(tenths, 10)),
        st.fractions(Fraction(1, 20), 6, max_denominator=2**31 - 1).filter(bool),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sources = draw(st.lists(st.lists(st.integers(0, BUCKETS - 1), max_size=20), min_size=1, max_size=4).filter(any))
    repeats = [draw(any_repeats()) for _ in sources]
    sizes = draw(st.lists(st.integers(1, 9), min_size=BUCKETS, max_size=BUCKETS))
    return Case(sources, repeats, sizes, draw(st.integers(0, 2**31)))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_each_item_is_drawn_as_often_as_its_repeats_say(case: Case) -> None:
    order, groups = case.order(), case.groups()
    drawn_before: Counter[int] = Counter()
    step = 0
    for epoch in range(6):
        steps = case.epoch_steps(epoch)
        assert order.steps_before(epoch) == step
        assert order.steps_before(epoch + 1) == step + steps
        drawn: Counter[int] = Counter()
        sizes: dict[int, list[int]] = {}
        for within in range(steps):
            assert order.epoch_of(step) == (epoch, within)
            batch = order.batch(step)
            assert batch.epoch == epoch and order.global_size(step) == len(batch.items) > 0
            (bucket,) = {case.bucket_of[i] for i in batch.items}
            sizes.setdefault(bucket, []).append(len(batch.items))
            for item, use in zip(batch.items.tolist(), batch.uses.tolist(), strict=True):
                assert use == drawn_before[item] + drawn[item]  # uses count up without a gap, in the order of steps
                drawn[item] += 1
            step += 1
        for (source, _), items in groups.items():
            counts = [drawn[item] for item in items]
            assert sum(counts) == case.group_draws(source, len(items), epoch)
            whole = math.floor(case.repeats[source])
            assert set(counts) <= {whole, whole + 1}  # exactly r where r is whole, see the next line
            assert case.repeats[source].denominator > 1 or set(counts) == {whole}
        for bucket, lengths in sizes.items():
            full, rest = divmod(sum(lengths), case.batch_sizes[bucket])
            assert sorted(lengths, reverse=True) == [case.batch_sizes[bucket]] * full + [rest] * (rest > 0)
        drawn_before.update(drawn)
        for item, source in enumerate(case.source_of):
            assert abs(drawn_before[item] - (epoch + 1) * case.repeats[source]) < 1


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 10**7), st.data())
def test_late_epochs_follow_the_closed_form(case: Case, epoch: int, data: st.DataObject) -> None:
    """Any epoch at once, against a straight evaluation of the definition with exact fractions: each item's draws are
    those of one phase j / n, and each phase of a group is taken once."""
    if math.lcm(*(r.denominator for r in case.repeats)) > 10_000:
        epoch %= 2000  # counts of so long a period are summed up from the beginning
    order = case.order()
    begin, end = order.steps_before(epoch), order.steps_before(epoch + 1)
    assert end - begin == case.epoch_steps(epoch)
    uses: dict[int, list[int]] = {item: [] for item in range(len(case.bucket_of))}
    for step in range(begin, end):
        batch = order.batch(step)
        for item, use in zip(batch.items.tolist(), batch.uses.tolist(), strict=True):
            uses[item].append(use)
    for (source, _), items in case.groups().items():
        r, n = case.repeats[source], len(items)
        spans = [
            (math.floor(epoch * r + Fraction(j, n)), math.floor((epoch + 1) * r + Fraction(j, n))) for j in range(n)
        ]
        assert sorted(uses[item] for item in items) == sorted(list(range(low, high)) for low, high in spans)
    step = data.draw(st.integers(begin, max(begin, end - 1)))
    assert order.steps_for(order.epochs_at(step)) == step


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_restart_anywhere_on_any_ranks_is_no_restart(case: Case, data: st.DataObject) -> None:
    unbroken = case.order()
    steps = max(1, min(60, unbroken.steps_before(4)))
    batches = [unbroken.batch(step) for step in range(steps)]
    at = data.draw(st.integers(0, steps - 1), label="restart")
    restarted = case.order()
    for step in range(at, steps):
        again = restarted.batch(step)
        assert again.epoch == batches[step].epoch
        np.testing.assert_array_equal(again.items, batches[step].items)
        np.testing.assert_array_equal(again.uses, batches[step].uses)
    for ranks in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="ranks"):
        for batch in batches[at : at + 5]:
            shares = [rank_share(len(batch.items), rank, ranks) for rank in range(ranks)]
            taken = [p for places, weights in shares for p, w in zip(places, weights, strict=True) if w > 0]
            assert taken == list(range(len(batch.items)))  # disjoint, together the whole batch
            assert abs(sum(sum(weights) for _, weights in shares) - 1) < 1e-12
            assert {len(weights) for _, weights in shares} <= {len(batch.items) // ranks + k for k in (0, 1)} | {1}


@settings(max_examples=40, deadline=None)
@given(st.lists(any_repeats(), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 1000))
def test_a_bucket_with_a_single_record(repeats: list[Fraction], size: int, seed: int) -> None:
    """One record a source, all in one bucket and each in one of its own."""
    n = len(repeats)
    for bucket_of in ([0] * n, list(range(n))):
        order = BatchOrder(bucket_of, [size] * n, seed, source_of=range(n), repeats=repeats)
        drawn: Counter[int] = Counter()
        for step in range(order.steps_before(5)):
            drawn.update(order.batch(step).items.tolist())
        assert [drawn[item] for item in range(n)] == [math.floor(5 * r) for r in repeats]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 6), st.integers(0, 1000))
def test_an_item_comes_once_in_a_batch(repeats: int, size: int, spare: int, seed: int) -> None:
    """Where a bucket has at least twice as many items as a batch."""
    order = BatchOrder([0] * (2 * size + spare), [size], seed, repeats=[Fraction(repeats)])
    for step in range(order.steps_before(2)):
        items = order.batch(step).items.tolist()
        assert len(set(items)) == len(items)
