"""Which shard holds which key: sorted arrays instead of a dictionary, 12 bytes an entry instead of hundreds.

Entries are numbered through: a row of a shard has the shard's base plus its row. The arrays hold the first 8 bytes of
each key and the entry's number, sorted; the other 12 bytes are compared where the shard's mapped index has them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from .segments import KEY_BYTES
from .shard import Shard, prefixes_of

CHUNK = 1 << 18
"""So many keys are looked up at a time."""

Run = tuple[np.ndarray, np.ndarray]
"""Sorted uint64 prefixes of keys and the uint32 numbers of their entries; among equal ones the lower number first."""


class KeyIndex:
    """The entries of some shards. Never changed: `with_shards` gives a new one, so that threads may share it."""

    def __init__(self, shards: Sequence[Shard] = (), runs: Sequence[Run] = ()) -> None:
        self.shards = tuple(shards)
        self.bases = [0]
        for shard in self.shards:
            self.bases.append(self.bases[-1] + shard.rows)
        self.rows = self.bases.pop()
        """Entries in all shards; a key that two shards hold counts twice."""
        assert self.rows < 1 << 32
        self._take(runs)
        self._repeated: tuple[np.ndarray, np.ndarray] | None = None

    def _take(self, runs: Sequence[Run]) -> None:
        self._views = [(prefixes.data, numbers.data) for prefixes, numbers in runs]
        self._runs = list(runs)

    def with_shards(self, shards: Sequence[Shard]) -> KeyIndex:
        """This index with some shards more. Runs of like sizes are merged, so that there are few."""
        if not shards:
            return self
        runs = [*self._runs, _run_of(shards, self.rows)]
        while len(runs) > 1 and len(runs[-2][0]) < 2 * len(runs[-1][0]):
            runs[-2:] = [_merged(*runs[-2:])]
        return KeyIndex((*self.shards, *shards), runs)

    def find(self, key: bytes) -> list[tuple[Shard, int]]:
        """(shard, row) of every copy of an entry."""
        prefix = int.from_bytes(key[:8], "big")
        found = []
        for prefixes, numbers in self._views:
            place = bisect_left(prefixes, prefix)  # of a memoryview: faster for a single key than numpy is
            while place < len(prefixes) and prefixes[place] == prefix:
                number = numbers[place]
                which = bisect_right(self.bases, number) - 1
                shard, row = self.shards[which], number - self.bases[which]
                if shard.key(row) == key:
                    found.append((shard, row))
                place += 1
        return found

    def __contains__(self, key: bytes) -> bool:
        return bool(self.find(key))

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """int64 [n]: number of the entry with each key of uint8 [n, 20]; -1 where there is none."""
        found = np.full(len(keys), -1, np.int64)
        prefixes = prefixes_of(keys)
        order = prefixes.argsort()  # neighbours in the arrays are then looked up one after the other
        for run_prefixes, run_numbers in self._runs:
            rest = order[found[order] < 0]
            places = run_prefixes.searchsorted(prefixes[rest])
            hit = places < len(run_prefixes)
            hit[hit] = run_prefixes[places[hit]] == prefixes[rest[hit]]
            rest, candidates = rest[hit], run_numbers[places[hit]]
            same = (self._keys(candidates) == keys[rest]).all(1)
            found[rest[same]] = candidates[same]
            for place in rest[~same].tolist():  # another key has the same first 8 bytes
                for shard, row in self.find(keys[place].tobytes())[:1]:
                    found[place] = self.bases[self.shards.index(shard)] + row
        return found

    def _keys(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 [n, 20]: the keys of entries."""
        keys = np.empty((len(numbers), KEY_BYTES), np.uint8)
        order = numbers.argsort()
        ends = numbers[order].searchsorted(np.array([*self.bases[1:], self.rows]))
        first = 0
        for shard, base, last in zip(self.shards, self.bases, ends.tolist(), strict=True):
            if last > first:
                mine = order[first:last]
                keys[mine] = shard.keys[numbers[mine].astype(np.int64) - base]
                first = last
        return keys

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of entries whose key another entry has too, the number of the first with that key)."""
        if self._repeated is None:
            runs = self._runs
            while len(runs) > 1:
                runs = [*runs[:-2], _merged(*runs[-2:])]
            self._take(runs)
            self._repeated = self._find_repeated()
        return self._repeated

    def _find_repeated(self) -> tuple[np.ndarray, np.ndarray]:
        extra: list[int] = []
        firsts: list[int] = []
        for prefixes, numbers in self._runs:
            equal = np.flatnonzero(prefixes[1:] == prefixes[:-1])
            for same in np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1) if len(equal) else ():
                group = numbers[same[0] : same[-1] + 2]
                seen: dict[bytes, int] = {}
                for number, key in zip(group.tolist(), self._keys(group), strict=True):
                    first = seen.setdefault(key.tobytes(), number)
                    if first != number:
                        extra.append(number)
                        firsts.append(first)
        return np.array(extra, np.int64), np.array(firsts, np.int64)

    def __len__(self) -> int:
        """How many keys."""
        return self.rows - len(self.repeated()[0])

    def keys(self) -> Iterator[bytes]:
        """Every key once."""
        extra = np.sort(self.repeated()[0])
        for shard, base in zip(self.shards, self.bases, strict=True):
            low, high = extra.searchsorted((base, base + shard.rows)).tolist()
            once = np.delete(shard.keys, extra[low:high] - base, axis=0).tobytes()
            yield from (once[i : i + KEY_BYTES] for i in range(0, len(once), KEY_BYTES))

    def marked(self, keys: Iterable[bytes]) -> np.ndarray:
        """bool [rows]: which entries have one of these keys, each copy of it."""
        extra, firsts = self.repeated()
        marks = np.zeros(self.rows, bool)
        for chunk in chunks(keys):
            numbers = self.numbers(chunk)
            marks[numbers[numbers >= 0]] = True
        marks[extra] = marks[firsts]
        return marks


def chunks(keys: Iterable[bytes]) -> Iterator[np.ndarray]:
    """Keys as uint8 [n, 20], many at a time."""
    iterator = iter(keys)
    while part := list(islice(iterator, CHUNK)):
        yield np.frombuffer(b"".join(part), np.uint8).reshape(len(part), KEY_BYTES)


def _run_of(shards: Sequence[Shard], base: int) -> Run:
    """All entries of some shards, numbered from ``base``."""
    prefixes = np.empty(sum(shard.rows for shard in shards), np.uint64)
    first = 0
    for shard in shards:
        prefixes[first : first + shard.rows] = shard.prefixes()
        first += shard.rows
    order = prefixes.argsort(kind="stable")
    prefixes = prefixes[order]
    numbers = order.astype(np.uint32)
    numbers += np.uint32(base)
    return prefixes, numbers


def _merged(first: Run, second: Run) -> Run:
    prefixes = np.concatenate((first[0], second[0]))
    order = prefixes.argsort(kind="stable")
    return prefixes[order], np.concatenate((first[1], second[1]))[order]
