"""Batch order as a pure function: (buckets of the items, batch size, seed, step) -> the global batch.

Nothing is remembered between steps: resuming is one integer, and ranks only differ in the slice they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kinema.randomness import derive_seed


@dataclass(frozen=True)
class _Epoch:
    """``items``: item numbers grouped by bucket, shuffled inside; batch k is ``items[starts[k]:ends[k]]``."""

    items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class BatchOrder:
    """Which items make up the global batch of each step.

    Every epoch is a new shuffle in which each item comes exactly once. A batch holds items of one bucket;
    what is left of a bucket forms a smaller batch. The batches of all buckets are shuffled together.

    >>> order = BatchOrder([0, 0, 0, 1, 1], batch_size=2, seed=7)
    >>> order.steps_per_epoch
    3
    >>> sorted(int(i) for step in range(3) for i in order.batch(step)[1])
    [0, 1, 2, 3, 4]
    """

    def __init__(self, bucket_of: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        """``bucket_of``: the bucket's number of every item, non-negative."""
        assert len(bucket_of) > 0 and batch_size > 0
        self.bucket_of = np.asarray(bucket_of, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        counts = np.bincount(self.bucket_of)
        batches = -(-counts // batch_size)
        self.steps_per_epoch = int(batches.sum())
        # Where each batch lies in a list of items grouped by bucket: the same in every epoch.
        bucket_ends = np.cumsum(counts)
        within = np.arange(self.steps_per_epoch) - np.repeat(np.cumsum(batches) - batches, batches)
        self._starts = np.repeat(bucket_ends - counts, batches) + within * batch_size
        self._ends = np.minimum(self._starts + batch_size, np.repeat(bucket_ends, batches))
        self._cached: tuple[tuple[int, _Epoch], ...] = ()

    def __len__(self) -> int:
        """Number of items."""
        return len(self.bucket_of)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, item numbers of the global batch) of a step, both counted from 0."""
        assert step >= 0
        number, position = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        return number, epoch.items[epoch.starts[position] : epoch.ends[position]]

    def _epoch(self, number: int) -> _Epoch:
        for key, epoch in self._cached:  # one tuple, replaced whole: safe to read from the prefetching thread
            if key == number:
                return epoch
        # Raw words of the bit generator: numpy guarantees that stream, but not that of its permutations.
        words = np.random.PCG64(derive_seed(self.seed, "batch order", number))
        items = np.lexsort((words.random_raw(len(self)), self.bucket_of))
        shuffled = np.argsort(words.random_raw(self.steps_per_epoch), kind="stable")
        epoch = _Epoch(items, self._starts[shuffled], self._ends[shuffled])
        self._cached = (*self._cached[-1:], (number, epoch))
        return epoch


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
