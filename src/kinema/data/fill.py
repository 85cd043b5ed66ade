"""Filling the cache: what is missing is found, its size forecast, and encoded, the work divided over the ranks.

Each entry is encoded by itself, so that it is the same on any number of ranks.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError

from .batch import Encoding
from .cache import Cache, CacheFull
from .contents import Contents
from .encode import Encoder, Entry, EntryPlanner, Ranks, pixels_of, reads_files, together
from .facts import FactStore
from .forecast import Forecast, Meter
from .items import Item, Items
from .reading import Decoded, encode_one, read_item
from .records import LeftOut, MediaError, left_out_for

if TYPE_CHECKING:
    import torch

ROUNDS = 3
"""How often what is still missing after all ranks are done (a file system that shows files late) is tried again."""
ASKED = 1 << 16
"""So many entries are looked up at a time."""
PATIENCE = 60.0
"""Seconds until what other ranks wrote must show up."""

Captions = Callable[[Item, Encoding], Sequence[str]]
"""All captions under which one encoding of an item may be read; ("",) for what reads no caption."""
Parts = tuple[str, ...]
Failed = dict[int, LeftOut]
"""Records that cannot be encoded, by `Items.record_keys`."""
NOTHING = Decoded()


@dataclass(frozen=True)
class Job:
    """One item's missing entries of one group of encodings, decoded."""

    item: Item
    entries: tuple[Entry, ...]
    decoded: Decoded = NOTHING
    left_out: LeftOut | None = None
    """Why the item cannot be encoded after all."""
    record: int = -1
    """Of the item; see `Items.record_keys`. -1: an entry of the caption alone, which many records may have."""


class Filler:
    """Encodes what is missing in a cache."""

    def __init__(
        self,
        cache: Cache,
        facts: FactStore,
        contents: Contents,
        encoder: Encoder,
        planner: EntryPlanner,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        """``dtype``: what the run computes in; ``workers``: threads that decode."""
        self.cache, self.facts, self.contents = cache, facts, contents
        self.encoder, self.planner, self.ranks = encoder, planner, ranks
        self.dtype, self.workers, self.say = dtype, workers, say

    def fill(
        self, items: Items, captions: Captions, encodings: Sequence[Encoding], *, stop_at_forecast: bool
    ) -> Failed:
        """Encode what is missing of these encodings; gives the records that could not be used, the same on all ranks.

        ``stop_at_forecast``: one entry of each encoding, to measure it, and no more.
        """
        together(self.ranks, lambda: self.cache.adopt() if self.ranks.rank == 0 else None)
        self.facts.refresh()  # hashes that other ranks have found
        units = together(self.ranks, lambda: self._survey(items, captions, encodings))
        todo = sum(self.ranks.gather_objects(units), Counter[str]())
        forecast = Forecast(todo, self.cache, self.ranks.size, self.say)
        failed: Failed = {}
        for _ in range(ROUNDS):
            if not todo:
                break
            self._round(items, captions, encodings, forecast, failed, stop_at_forecast)
            if stop_at_forecast or not self._waits(items, captions, encodings, failed):
                break
        else:
            raise UserError(
                f"entries written to the cache directory {self.cache.directory} do not show up there. Is it one "
                "directory, on a file system that all processes share? If so, start again"
            )
        for hashes in self.ranks.gather_objects(dict(self.contents.found)):
            self.contents.update(hashes)
        if stop_at_forecast:
            together(self.ranks, forecast.tell)
        return failed

    def _round(
        self,
        items: Items,
        captions: Captions,
        encodings: Sequence[Encoding],
        forecast: Forecast,
        failed: Failed,
        stop_at_forecast: bool,
    ) -> None:
        """Encode what every rank sees to be missing of its share; adds to ``failed`` what could not be."""
        groups = _by_parts(encodings)
        loaded: dict[str, Any] = {}
        for number, (names, group) in enumerate(groups.items()):
            later = {part for rest in list(groups)[number + 1 :] for part in rest}
            work = (items, captions, group, names, loaded, forecast, failed, stop_at_forecast)
            found = together(self.ranks, lambda work=work: self._fill_group(*work))  # type: ignore[misc]
            self._free(loaded, keep=later)
            for result in self.ranks.gather_objects(found):
                failed.update(result)

    # -- what is missing -------------------------------------------------------------------------------------------

    def _mine(self, items: Items) -> Iterator[Item]:
        """This rank's share of the items."""
        for index in range(self.ranks.rank, len(items), self.ranks.size):
            yield items[index]

    def _caption_entries(self, items: Items, captions: Captions, group: Sequence[Encoding]) -> Iterator[Entry]:
        """The missing entries that read the caption alone, of this rank's share of the captions, each once."""

        def mine() -> Iterator[Entry]:
            seen: set[bytes] = set()
            for item in items if group else ():
                for encoding in group:
                    for caption in captions(item, encoding):
                        entry = self.planner.entry(encoding, item, caption, None)
                        if entry.key[0] % self.ranks.size == self.ranks.rank and entry.key not in seen:
                            seen.add(entry.key)
                            yield entry

        return self._absent(mine())

    def _absent(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Those that the cache has not, asked for many at a time."""
        entries = iter(entries)
        while chunk := list(itertools.islice(entries, ASKED)):
            absent = set(self.cache.missing(entry.key for entry in chunk))
            yield from (entry for entry in chunk if entry.key in absent)

    def _needed(self, item: Item, captions: Captions, encodings: Collection[Encoding]) -> Iterator[Entry]:
        """An item's entries of these encodings."""
        for encoding in self.planner.of(item):
            if encoding in encodings:
                for caption in captions(item, encoding):
                    yield self.planner.entry(encoding, item, caption, self.contents)

    def _survey(self, items: Items, captions: Captions, encodings: Sequence[Encoding]) -> Counter[str]:
        """Units still to be written, by encoding, of this rank's share. A file that was never read counts as new."""
        of_files = [encoding for encoding in encodings if reads_files(encoding)]
        units: Counter[str] = Counter()

        def known() -> Iterator[Entry]:
            for item in self._mine(items) if of_files else ():
                if all(self.contents.is_known(path) for path in item.record.files):
                    try:
                        yield from list(self._needed(item, captions, of_files))
                        continue
                    except MediaError:  # it is met again, and listed, when it is read
                        pass
                for encoding in self.planner.of(item):
                    if encoding in of_files:
                        units[encoding.name] += pixels_of(item) * len(captions(item, encoding))

        texts = [encoding for encoding in encodings if not reads_files(encoding)]
        for entry in itertools.chain(self._absent(known()), self._caption_entries(items, captions, texts)):
            units[entry.encoding.name] += entry.units
        return units

    def _waits(self, items: Items, captions: Captions, encodings: Sequence[Encoding], failed: Failed) -> bool:
        """Whether any rank still misses an entry after waiting for the others' to show up."""

        def see_all() -> bool:
            patience = time.monotonic() + PATIENCE
            while True:
                self.cache.refresh()
                if not self._any_missing(items, captions, encodings, failed):
                    return False
                if self.ranks.size == 1 or time.monotonic() > patience:
                    return True
                time.sleep(0.5)

        return any(self.ranks.gather_objects(together(self.ranks, see_all)))

    def _any_missing(self, items: Items, captions: Captions, encodings: Sequence[Encoding], failed: Failed) -> bool:
        keys = items.record_keys.tolist() if failed else itertools.repeat(0)
        used = (item for item, key in zip(items, keys, strict=False) if key not in failed)
        return bool(self.cache.missing(entry.key for item in used for entry in self._needed(item, captions, encodings)))

    # -- encoding --------------------------------------------------------------------------------------------------

    def _fill_group(
        self,
        items: Items,
        captions: Captions,
        group: Sequence[Encoding],
        names: Parts,
        parts: dict[str, Any],
        forecast: Forecast,
        failed: Failed,
        stop_at_forecast: bool,
    ) -> Failed:
        """Encode this rank's share of a group of encodings that are made by the same parts, which are loaded when the
        first is missing."""
        new: Failed = {}
        total = sum(forecast.left.get(encoding.name, 0) for encoding in group)
        meter = Meter(f"Encoding {', '.join(encoding.name for encoding in group)}", total / self.ranks.size, self.say)
        of_files = [encoding for encoding in group if reads_files(encoding)]
        texts = [encoding for encoding in group if not reads_files(encoding)]
        try:
            for job in self._jobs(items, captions, texts, of_files, failed):
                if job.left_out is not None:
                    new[job.record] = job.left_out
                    continue
                self._load(names, parts)
                own = {name: parts[name] for name in names}
                for entry in job.entries:
                    if entry.key in self.cache:  # of a file of the same content, decoded at the same time
                        continue
                    tensors = encode_one(self.encoder, entry.encoding, own, job.decoded, entry.caption)
                    forecast.add(entry, self.cache.put(entry.key, tensors))
                    meter.step(entry.units)
                if stop_at_forecast and all(forecast.is_measured(encoding.name) for encoding in group):
                    break
        except CacheFull as error:
            raise forecast.explain(error) from error
        finally:
            self.cache.close()
        meter.finish()
        return new

    def _load(self, names: Parts, parts: dict[str, Any]) -> None:
        for name in names:
            if name not in parts:
                parts[name] = self.encoder.load(name, self.ranks.device, self.encoder.part_dtype(name, self.dtype))

    def _free(self, parts: dict[str, Any], keep: set[str]) -> None:
        gone = parts.keys() - keep
        for name in gone:
            del parts[name]
        if gone:
            import torch

            gc.collect()
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def _jobs(
        self,
        items: Items,
        captions: Captions,
        texts: Sequence[Encoding],
        of_files: Sequence[Encoding],
        failed: Failed,
    ) -> Iterator[Job]:
        """What is missing, files decoded a few ahead in threads."""
        for entry in self._caption_entries(items, captions, texts):
            yield Job(items[0], (entry,))
        if not of_files:
            return
        keys = items.record_keys[self.ranks.rank :: self.ranks.size].tolist()
        todo = ((item, key) for item, key in zip(self._mine(items), keys, strict=True) if key not in failed)
        for job in ahead(lambda pair: self._prepare(pair[0], pair[1], captions, of_files), todo, self.workers):
            if job is not None:
                yield job

    def _prepare(self, item: Item, key: int, captions: Captions, group: Sequence[Encoding]) -> Job | None:
        """Hash an item's files, see what is missing, decode it. None: nothing is missing."""
        record = item.record
        try:
            missing = [entry for entry in self._needed(item, captions, group) if entry.key not in self.cache]
            if not missing:
                return None
            decoded = read_item(item, [entry.encoding for entry in missing], self.facts)
            for path in record.files:
                if not self.contents.unchanged(path):
                    raise MediaError(f"{path} was changed while it was being prepared: start again", "changed")
        except MediaError as error:
            return Job(item, (), left_out=left_out_for(record, error), record=key)
        return Job(item, tuple(missing), decoded)


def ahead(work: Callable[[Any], Any], todo: Iterable[Any], workers: int) -> Iterator[Any]:
    """``work`` of each, in their order, done a few ahead in threads."""
    if not workers:
        yield from map(work, todo)
        return
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for one in todo:
                pending.append(pool.submit(work, one))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _by_parts(encodings: Sequence[Encoding]) -> dict[Parts, list[Encoding]]:
    """Encodings that the same parts make, the order kept."""
    groups: dict[Parts, list[Encoding]] = {}
    for encoding in encodings:
        groups.setdefault(encoding.parts, []).append(encoding)
    return groups
