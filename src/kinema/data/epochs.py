"""How often each item is drawn in an epoch, and how many steps epochs have: closed forms, for which nothing is drawn.

Item j of the n items that a source has in a bucket is drawn, with r the repeats of its source and phase j / n,

    floor((e + 1) r + j / n) - floor(e r + j / n)

times in epoch e. So after any number of epochs it is within one draw of its share, and by Hermite's identity all n
together are drawn floor(n (e + 1) r) - floor(n e r) times. All of it is integer arithmetic: with e r = a + c / q,
0 <= c < q, the floor above is a for the items j < n - f and a + 1 for the rest, where f = floor(n c / q).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from kinema.randomness import derive_seed

MOST_DRAWS = 2**31 - 1
"""Most draws in an epoch, and the largest denominator of repeats: what the arithmetic here holds."""

_CELLS = 1 << 20  # epochs x groups that are looked at together: a few 8 MB arrays


@dataclass(frozen=True)
class Groups:
    """The items of each source in each bucket: G groups of at least one item, sorted by bucket, then source."""

    items: np.ndarray
    """uint32 [N]: item numbers, group by group; an item's place in its group is its phase."""
    begin: np.ndarray
    """int64 [G]: where each group begins in ``items``."""
    size: np.ndarray
    """int64 [G]."""
    bucket: np.ndarray
    """int64 [G]: number of its bucket."""
    source: np.ndarray
    """int64 [G]: number of its source."""
    repeats: tuple[Fraction, ...]
    """Of each source."""

    @cached_property
    def buckets(self) -> np.ndarray:
        """int64 [K]: the buckets that have items, ascending."""
        return np.unique(self.bucket)

    @cached_property
    def first_of_bucket(self) -> np.ndarray:
        """int64 [K]: the first group of each of `buckets`."""
        return np.searchsorted(self.bucket, self.buckets)

    def progress(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(a, f) of the module's text for each group: its first n - f items were drawn a times before ``epoch``, the
        others a + 1 times. int64 [G] each."""
        parts = [(*divmod(epoch * r.numerator, r.denominator), r.denominator) for r in self.repeats]
        a, c, q = (np.array(column, np.int64)[self.source] for column in zip(*parts, strict=True))
        return a, self.size * c // q


def group_items(bucket_of: np.ndarray, source_of: np.ndarray | None, repeats: Sequence[Fraction], seed: int) -> Groups:
    """Sort N items into groups. Where a source has fractional repeats, the phases of its items are shuffled by
    ``seed``; with whole ones they do not matter."""
    assert 0 < len(bucket_of) <= MOST_DRAWS and (source_of is None or len(source_of) == len(bucket_of))
    assert all(r >= 0 and r.denominator <= MOST_DRAWS for r in repeats)
    sources = len(repeats)
    both = bucket_of
    if sources > 1:
        assert source_of is not None
        both = bucket_of.astype(np.uint64) * np.uint64(sources) + source_of.astype(np.uint64)
    counts = np.bincount(both.astype(np.int64, copy=False))
    numbers = np.flatnonzero(counts)
    narrow = np.min_scalar_type(len(numbers))  # stable sorting of 16 bits is a radix sort
    compact = np.zeros(len(counts), narrow)
    compact[numbers] = np.arange(len(numbers), dtype=narrow)
    items = np.argsort(compact[both], kind="stable").astype(np.uint32)
    size = counts[numbers]
    groups = Groups(items, np.cumsum(size) - size, size, numbers // sources, numbers % sources, tuple(repeats))
    assert all(repeats[s] > 0 for s in np.unique(groups.source))
    for g in range(len(numbers)):
        if repeats[groups.source[g]].denominator > 1:
            members = items[groups.begin[g] : groups.begin[g] + size[g]]
            words = np.random.PCG64(derive_seed(seed, "phases", int(numbers[g]))).random_raw(len(members))
            members[:] = members[np.argsort(words, kind="stable")]
    return groups


@dataclass(frozen=True)
class Pieces:
    """The draws of an epoch, numbered group by group: piece p stands for ``items[member[p]:]`` of the groups, as many
    as it has draws / times, each drawn ``times`` times in a row. P pieces, none empty."""

    first: np.ndarray
    """int64 [P]: number of its first draw."""
    times: np.ndarray
    """int64 [P]."""
    member: np.ndarray
    """int64 [P]: place of its first item in `Groups.items`."""
    used: np.ndarray
    """int64 [P]: how often its items were drawn in earlier epochs."""
    total: int
    """Draws of the epoch."""
    of_bucket: np.ndarray
    """int64 [K + 1]: where each bucket's pieces begin."""


def pieces_of(groups: Groups, epoch: int) -> Pieces:
    """What is drawn in an epoch."""
    (a, f), (after, f_after) = groups.progress(epoch), groups.progress(epoch + 1)
    low, high = groups.size - np.maximum(f, f_after), groups.size - np.minimum(f, f_after)
    zero = np.zeros_like(low)
    ends = np.stack([zero, low, high, groups.size], axis=1)
    early, late = f > f_after, f_after > f  # items between low and high had, or have, their extra draw
    used = np.stack([a, a + early, a + 1], axis=1)
    times = np.stack([after - a, after - a + late - early.astype(np.int64), after - a], axis=1)
    draws = np.diff(ends, axis=1) * times
    kept = draws > 0
    count = draws[kept]
    of_group = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    of_bucket = np.append(of_group[groups.first_of_bucket], len(count))
    member = (groups.begin[:, None] + ends[:, :3])[kept]
    return Pieces(np.cumsum(count) - count, times[kept], member, used[kept], int(count.sum()), of_bucket)


@dataclass(frozen=True)
class _Known:
    """The epochs before ``until`` that have steps, and the steps until the end of each."""

    until: int
    epochs: np.ndarray
    ends: np.ndarray

    @property
    def steps(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


class Calendar:
    """Which steps belong to which epoch. The counts repeat after as many epochs as the repeats' common denominator;
    they are computed as far as they are asked for."""

    def __init__(self, groups: Groups, batch_sizes: Sequence[int]) -> None:
        """``batch_sizes``: of each bucket number."""
        self._groups = groups
        self._sizes = np.asarray(batch_sizes, np.int64)[groups.buckets]
        self._period = math.lcm(*(groups.repeats[s].denominator for s in np.unique(groups.source)))
        self._known = _Known(0, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._lock = threading.Lock()

    def before(self, epoch: int) -> int:
        """Steps before an epoch."""
        assert epoch >= 0
        known = self._grown(lambda known: known.until >= epoch)
        whole, rest = divmod(epoch, self._period)
        passed = int(np.searchsorted(known.epochs, rest))
        return whole * known.steps + (int(known.ends[passed - 1]) if passed else 0)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        assert step >= 0
        known = self._grown(lambda known: known.steps > step)
        whole, rest = divmod(step, known.steps)
        passed = int(np.searchsorted(known.ends, rest, side="right"))
        begin = int(known.ends[passed - 1]) if passed else 0
        return whole * self._period + int(known.epochs[passed]), rest - begin

    @cached_property
    def mean(self) -> float:
        """Steps per epoch: an int where all epochs have as many. Where the counts repeat after very many epochs only,
        the mean of the first ones."""
        many = min(self._period, max(1, 4 * _CELLS // len(self._groups.size)))
        known = self._grown(lambda known: known.until >= many)
        steps = np.diff(known.ends, prepend=0)
        if len(steps) == known.until and (steps == steps[0]).all():
            return int(steps[0])
        return known.steps / known.until

    def _grown(self, enough: Callable[[_Known], bool]) -> _Known:
        with self._lock:
            while self._known.until < self._period and not enough(self._known):
                self._known = self._longer(self._known)
            return self._known

    def _longer(self, known: _Known) -> _Known:
        most = max(1, _CELLS // len(self._groups.size))
        count = min(max(1, known.until), most, self._period - known.until)
        steps = self._steps(known.until, count)
        filled = np.flatnonzero(steps)
        until = known.until + count
        if not len(filled):
            until = min(self._period, max(until, self._next_draw(until)))
        ends = np.concatenate([known.ends, known.steps + np.cumsum(steps[filled])])
        return _Known(until, np.concatenate([known.epochs, known.until + filled]), ends)

    def _steps(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: steps of the epochs from ``first`` on."""
        groups = self._groups
        epochs = np.arange(first, first + count + 1, dtype=np.int64)[:, None]
        p = np.array([r.numerator for r in groups.repeats], np.int64)
        q = np.array([r.denominator for r in groups.repeats], np.int64)
        c = epochs % q * (p % q) % q
        whole = (p + c[:-1] - c[1:]) // q
        done = groups.size * c[:, groups.source] // q[groups.source]
        draws = groups.size * whole[:, groups.source] + np.diff(done, axis=0)
        of_bucket = np.add.reduceat(draws, groups.first_of_bucket, axis=1)
        return (-(-of_bucket // self._sizes)).sum(axis=1)

    def _next_draw(self, epoch: int) -> int:
        """The first epoch from ``epoch`` on in which anything is drawn."""
        found = []
        for n, s in zip(self._groups.size.tolist(), self._groups.source.tolist(), strict=True):
            rate = n * self._groups.repeats[s]
            found.append(math.ceil((math.floor(epoch * rate) + 1) / rate) - 1)
        return min(found)
