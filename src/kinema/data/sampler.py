"""Batch order as a pure function: (groups of the items, repeats, batch sizes, seed, step) -> the global batch.

Nothing is remembered between steps: resuming is one integer, and ranks only differ in the slice they take.

How often an item is drawn in an epoch says `kinema.data.epochs`. The k-th of an item's t draws gets a random place in
[k / t, (k + 1) / t) of the epoch, and so do the k-th of a bucket's t batches: what comes often is spread evenly, all
else is a plain shuffle.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kinema.randomness import derive_seed

from .epochs import MOST_DRAWS, Calendar, Pieces, group_items, pieces_of

_BLOCK = 1 << 18  # draws that are worked on together: what they need in passing stays small
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Drawn:
    """The global batch of a step: n samples of one bucket."""

    epoch: int
    items: np.ndarray
    """int64 [n]: item numbers."""
    uses: np.ndarray
    """int64 [n]: how often the item was drawn before, in the whole run."""


@dataclass(frozen=True)
class _Cut:
    """Draws of one bucket, cut into batches: all of ``size`` but batch ``short``, which has what is left over."""

    draws: int
    size: int
    count: int
    short: int

    @property
    def rest(self) -> int:
        return self.draws - (self.count - 1) * self.size

    def span(self, batch: int) -> tuple[int, int]:
        """Where a batch begins and ends."""
        begin = batch * self.size - (batch > self.short) * (self.size - self.rest)
        return begin, begin + (self.rest if batch == self.short else self.size)

    def batch_at(self, place: np.ndarray) -> np.ndarray:
        beyond = place >= self.short * self.size + self.rest
        return (place + beyond * (self.size - self.rest)) // self.size


@dataclass(frozen=True)
class _Epoch:
    """``draws``: uint32, numbers of the draws (see `Pieces`), shuffled within their bucket. ``order``: uint32, batches
    in the order of the steps, counted through all buckets: those of bucket k begin at ``batches[k]``, its draws at
    ``places[k]``."""

    number: int
    pieces: Pieces
    draws: np.ndarray
    order: np.ndarray
    cuts: list[_Cut]
    places: np.ndarray
    batches: np.ndarray


class BatchOrder:
    """Which items make up the global batch of each step.

    Every epoch is a new shuffle in which each item comes as often as the repeats of its source say. A batch holds
    items of one bucket; what is left of a bucket forms a smaller batch. The batches of all buckets are shuffled
    together. An item that comes several times in an epoch comes in different batches, where there are enough.
    May be asked from several threads.

    >>> order = BatchOrder([0, 0, 0, 1, 1], batch_sizes=[2, 2], seed=7)
    >>> order.steps_per_epoch
    3
    >>> sorted(int(i) for step in range(3) for i in order.batch(step).items)
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        bucket_of: Sequence[int] | np.ndarray,
        batch_sizes: Sequence[int],
        seed: int,
        *,
        source_of: Sequence[int] | np.ndarray | None = None,
        repeats: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        """``bucket_of``, ``source_of``: numbers of every item's bucket and source, from 0. ``batch_sizes``: of the
        global batch, for every bucket number. ``repeats``: of every source; see `kinema.data.mixing`."""
        assert len(bucket_of) > 0 and all(size > 0 for size in batch_sizes)
        self.bucket_of = np.asarray(bucket_of)
        self.batch_sizes = tuple(int(size) for size in batch_sizes)
        self.seed = seed
        sources = None if source_of is None else np.asarray(source_of)
        self._groups = group_items(self.bucket_of, sources, repeats, seed)
        assert self._groups.buckets[-1] < len(self.batch_sizes), "every bucket needs a batch size"
        self._calendar = Calendar(self._groups, self.batch_sizes)
        self._cached: tuple[_Epoch, ...] = ()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of items."""
        return len(self.bucket_of)

    @property
    def steps_per_epoch(self) -> float:
        """The mean over all epochs: an int where all have as many."""
        return self._calendar.mean

    def steps_before(self, epoch: int) -> int:
        """Steps before an epoch."""
        return self._calendar.before(epoch)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it). Epochs in which nothing is drawn, as very small repeats have them, are skipped."""
        return self._calendar.locate(step)

    def epochs_at(self, step: int) -> float:
        """How many epochs the first ``step`` steps make: whole ones and the fraction of the one begun."""
        epoch, within = self.epoch_of(step)
        return epoch + within / (self.steps_before(epoch + 1) - step + within)

    def steps_for(self, epochs: float) -> int:
        """How many steps make so many epochs; the inverse of `epochs_at`."""
        whole = int(epochs)
        before = self.steps_before(whole)
        return before + round((epochs - whole) * (self.steps_before(whole + 1) - before))

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        _, begin, end = self._find(step)
        return end - begin

    def batch(self, step: int) -> Drawn:
        """The global batch of a step, counted from 0."""
        epoch, begin, end = self._find(step)
        pieces = epoch.pieces
        draw = epoch.draws[begin:end].astype(np.int64)
        piece = np.searchsorted(pieces.first, draw, side="right") - 1
        member, again = np.divmod(draw - pieces.first[piece], pieces.times[piece])
        items = self._groups.items[pieces.member[piece] + member].astype(np.int64)
        return Drawn(epoch.number, items, pieces.used[piece] + again)

    def _find(self, step: int) -> tuple[_Epoch, int, int]:
        number, within = self.epoch_of(step)
        epoch = self._epoch(number)
        batch = int(epoch.order[within])
        k = int(np.searchsorted(epoch.batches, batch, side="right")) - 1
        begin, end = epoch.cuts[k].span(batch - int(epoch.batches[k]))
        place = int(epoch.places[k])
        return epoch, place + begin, place + end

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:  # the prefetching thread may be an epoch ahead: two are kept
            for epoch in self._cached:
                if epoch.number == number:
                    return epoch
            self._cached = self._cached[-1:]
            self._cached = (*self._cached, self._shuffle(number))
            return self._cached[-1]

    def _shuffle(self, number: int) -> _Epoch:
        # Raw words of the bit generator: numpy guarantees that stream, but not that of its permutations.
        random = np.random.PCG64(derive_seed(self.seed, "batch order", number))
        pieces = pieces_of(self._groups, number)
        assert pieces.total <= MOST_DRAWS + len(self._groups.size)
        places = np.append(pieces.first, pieces.total)[pieces.of_bucket]
        draws = np.empty(pieces.total, np.uint32)
        cuts = []
        for k, bucket in enumerate(self._groups.buckets.tolist()):
            begin, end = int(places[k]), int(places[k + 1])
            size = self.batch_sizes[bucket]
            count = -(-(end - begin) // size)
            cuts.append(_Cut(end - begin, size, count, int(random.random_raw()) % max(1, count)))
            if count:
                own = slice(pieces.of_bucket[k], pieces.of_bucket[k + 1])
                shuffled = _shuffled(pieces.first[own] - begin, pieces.times[own], cuts[k], random)
                np.add(shuffled, np.uint32(begin), out=draws[begin:end])
        counts = np.array([cut.count for cut in cuts])
        batches = np.cumsum(counts) - counts
        kept = counts > 0
        order = _spread(batches[kept], counts[kept], random.random_raw(int(counts.sum())))
        order.sort()
        return _Epoch(number, pieces, draws, order.astype(np.uint32), cuts, places, batches)


def _spread(first: np.ndarray, times: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Sort keys of n draws, made of n random words, in place: in the upper half the draw's place in the epoch, in the
    lower half its number. Draw d of a piece that begins at ``first`` is the (d - first) % times-th of its item."""
    ends = [*first[1:].tolist(), len(words)]
    for begin, end, t in zip(first.tolist(), ends, times.tolist(), strict=True):
        for low in range(begin, end, _BLOCK):
            block = words[low : min(low + _BLOCK, end)]
            number = np.arange(low, low + len(block), dtype=np.uint64)
            block[:] = _place(block, number - np.uint64(begin), np.uint64(t)) | number
    return words


def _place(words: np.ndarray, draw: np.ndarray, times: np.ndarray | np.uint64) -> np.ndarray:
    """Upper halves of the keys: places in the epoch, as fractions of 2^32, for draws counted from their piece's
    first."""
    return (((draw % times) << _HALF) + (words >> _HALF)) // times << _HALF


def _shuffled(first: np.ndarray, times: np.ndarray, cut: _Cut, random: np.random.PCG64) -> np.ndarray:
    """uint32: the numbers of a bucket's draws, shuffled."""
    keys = _spread(first, times, random.random_raw(cut.draws))
    keys.sort()
    if times.max() == 1:
        return keys.astype(np.uint32)
    # Draws that meet another one of their item in a batch get a new place. A few rounds separate nearly all that can
    # be.
    for _ in range(min(64, max(4, (1 << 22) // cut.draws))):
        meeting = _meeting(first, times, cut, keys)
        if not len(meeting):
            break
        draw = keys[meeting] & _LOW
        piece = np.searchsorted(first, draw, side="right") - 1
        own = _place(
            random.random_raw(len(draw)), draw - first[piece].astype(np.uint64), times[piece].astype(np.uint64)
        )
        keys[meeting] = own | draw
        keys.sort()
    return keys.astype(np.uint32)


def _meeting(first: np.ndarray, times: np.ndarray, cut: _Cut, keys: np.ndarray) -> np.ndarray:
    """Where in the sorted ``keys`` a draw lies that is in the batch of the item's draw before; not of items that have
    more draws than there are batches."""
    number = keys.astype(np.uint32)
    batch = np.empty(cut.draws, np.uint32)  # of each draw, by its number
    for low in range(0, cut.draws, _BLOCK):
        block = number[low : low + _BLOCK]
        batch[block] = cut.batch_at(np.arange(low, low + len(block)))
    meets = np.zeros(cut.draws, bool)
    np.equal(batch[1:], batch[:-1], out=meets[1:])
    ends = [*first[1:].tolist(), cut.draws]
    for begin, end, t in zip(first.tolist(), ends, times.tolist(), strict=True):
        meets[begin : end : 1 if t > cut.count else t] = False
    return np.flatnonzero(meets[number])


def rank_share(n: int, rank: int, size: int) -> tuple[list[int], list[float]]:
    """A data-parallel rank's positions in a global batch of ``n``, and their weights in the global loss.

    The positions are a contiguous slice, the weights 1/n; over all ranks the slices are disjoint, cover the
    batch, and their weights sum to 1. A rank without samples repeats one with weight 0, to take part in
    collectives.
    """
    assert n > 0 and 0 <= rank < size
    low, high = n * rank // size, n * (rank + 1) // size
    if low == high:
        return [min(low, n - 1)], [0.0]
    return list(range(low, high)), [1.0 / n] * (high - low)
