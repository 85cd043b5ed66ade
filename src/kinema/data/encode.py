"""Filling the cache: what each item needs, what is missing, and the encoders that make it.

The work is divided over the ranks; each entry is encoded by itself, so that it is the same on any number of ranks.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kinema.errors import UserError
from kinema.sizes import readable_bytes

from .batch import Encoding, Sample
from .buckets import Clip
from .cache import Cache, CacheFull, entry_key
from .examine import Item
from .facts import FactStore
from .media import MediaError, content_hash, decode_clip
from .records import LeftOut
from .transform import Transform

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

T = TypeVar("T")
Decoded = tuple["Tensor | None", "tuple[Tensor, ...]"]
"""A clip's pixels uint8 [C, T, H, W] and its control pictures uint8 [C, 1, H, W], as far as they are read."""
ROUNDS = 3
"""How often what is still missing after all ranks are done (a file system that shows files late) is tried again."""
LINE_SECONDS = 10.0


class Encoder(Protocol):
    """What the data layer asks of a family."""

    @property
    def grid(self) -> int: ...
    @property
    def frame_stride(self) -> int: ...
    def encodings(self) -> tuple[Encoding, ...]: ...
    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any: ...
    def part_dtype(self, part: str, compute: torch.dtype) -> torch.dtype: ...
    def fingerprint(self, parts: Sequence[str]) -> str: ...
    def encode(
        self, encoding: Encoding, parts: dict[str, Any], samples: Sequence[Sample]
    ) -> list[dict[str, Tensor]]: ...


class Ranks(Protocol):
    """What the data layer asks of the processes of a run."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def gather_objects(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Entry:
    """One cache entry that the data set needs."""

    key: bytes
    encoding: Encoding
    caption: str
    item: Item | None
    """None for what reads the caption alone."""
    content: str = ""
    """Hashes of the item's file and of its control pictures."""

    @property
    def units(self) -> int:
        """What its size grows with: pixels of the clip; 1 for what reads the caption alone."""
        if self.item is None:
            return 1
        bucket = self.item.bucket
        return bucket.frames * bucket.height * bucket.width


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on every rank; if it fails on one, every rank raises, so that none waits for ever."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failures = ranks.gather_objects(None if error is None else (isinstance(error, UserError), str(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            mistake, message = failure
            raise UserError(message) if mistake else RuntimeError(f"process {rank} failed: {message}")
    return result  # type: ignore[return-value]


def from_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on rank 0 alone and give its result to every rank."""
    result = together(ranks, lambda: work() if ranks.rank == 0 else None)
    return ranks.gather_objects(result)[0]


@lru_cache
def _transform(height: int, width: int) -> str:
    return Transform(height, width).fingerprint()


def clip_identity(item: Item, content: str) -> tuple[object, ...]:
    """What decides an item's pixels: the hash of its file's content, the clip, the bucket, the transform."""
    clip, bucket = item.clip, item.bucket
    return (
        content, (clip.start, clip.frames, clip.fps), (bucket.frames, bucket.height, bucket.width),
        _transform(bucket.height, bucket.width),
    )  # fmt: skip


class EntryPlanner:
    """Names the entries of items: the only place where keys are made."""

    def __init__(
        self,
        encodings: Iterable[Encoding],
        fingerprints: Mapping[tuple[str, ...], str],
        dtypes: Mapping[tuple[str, ...], str],
    ) -> None:
        """By the parts of an encoding: ``fingerprints`` of the encoders, ``dtypes`` that they are loaded in."""
        self.encodings = tuple(encodings)
        self._fixed = {
            e.name: (e.name, e.reads, e.settings, fingerprints[e.parts], dtypes[e.parts]) for e in self.encodings
        }

    def entries(self, item: Item, content: str, caption: str) -> list[Entry]:
        """One entry for each encoding, in their order, of an item with the given caption."""
        own, *controls = content.split()
        bucket = item.bucket
        result = []
        for encoding in self.encodings:
            media = clip_identity(item, own) if encoding.reads_pixels else ()
            if encoding.controls:
                media += (tuple(controls), (bucket.height, bucket.width), _transform(bucket.height, bucket.width))
            read = caption if encoding.reads_caption else None
            key = entry_key(self._fixed[encoding.name], media, read)
            of_item = item if encoding.reads_pixels or encoding.controls else None
            result.append(Entry(key, encoding, read or "", of_item, content if of_item else ""))
        return result


@dataclass
class _Forecast:
    """How much is still to be written, from what was written so far: bytes grow with an entry's units."""

    left: dict[str, int]
    """Units still to be written on all ranks, by encoding."""
    ranks: int
    done: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    entries: int = 0

    def add(self, entry: Entry, written: int) -> None:
        name = entry.encoding.name
        self.left[name] = max(0, self.left[name] - entry.units * self.ranks)
        self.done[name] = self.done.get(name, 0) + entry.units
        self.written[name] = self.written.get(name, 0) + written
        self.entries += 1

    def needed(self) -> int:
        """Bytes still to be written, on all ranks, of the encodings that have begun."""
        return sum(round(self.written[name] / self.done[name] * self.left[name]) for name in self.done)

    def due(self) -> bool:
        """Look at the disk often at first, when little is lost by stopping."""
        return self.entries & (self.entries - 1) == 0 or self.entries % 256 == 0


class Filler:
    """Encodes what is missing in a cache."""

    def __init__(
        self,
        cache: Cache,
        facts: FactStore,
        encoder: Encoder,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        workers: int,
        say: Callable[[str], None],
    ) -> None:
        """``dtype``: what the run computes in, from which each encoder's own follows; ``workers``: threads that
        decode."""
        self.cache, self.facts, self.encoder, self.ranks = cache, facts, encoder, ranks
        self.dtype, self.workers, self.say = dtype, workers, say

    def fill(self, entries: Sequence[Entry]) -> list[LeftOut]:
        """Encode every entry that is missing. Gives the files that could not be decoded, the same on all ranks."""
        together(self.ranks, lambda: self.cache.adopt() if self.ranks.rank == 0 else None)
        self.facts.refresh()  # hashes that other ranks have found
        unique = {entry.key: entry for entry in entries}
        failed: dict[str, LeftOut] = {}
        for _ in range(ROUNDS):
            missing = from_main(self.ranks, lambda: self._missing(unique, failed))
            if not missing:
                break
            work = [unique[key] for key in missing]
            found = together(self.ranks, lambda work=work: self._encode(work))  # type: ignore[misc]
            for result in self.ranks.gather_objects(found):
                failed.update(result)
            self.cache.refresh()
        else:
            if self._missing(unique, failed):
                raise UserError(
                    f"entries written to the cache directory {self.cache.directory} do not show up there. Is it one "
                    "directory, on a file system that all processes share? If so, start again"
                )
        together(self.ranks, lambda: self._wait_for(unique.keys(), failed, unique))
        return list(failed.values())

    def _missing(self, unique: Mapping[bytes, Entry], failed: Mapping[str, LeftOut]) -> list[bytes]:
        self.cache.refresh()
        return [
            key
            for key, entry in unique.items()
            if key not in self.cache and not (entry.item is not None and str(entry.item.record.path) in failed)
        ]

    def _wait_for(self, keys: Iterable[bytes], failed: Mapping[str, LeftOut], unique: Mapping[bytes, Entry]) -> None:
        """Other ranks may see new files a little later than rank 0 on a network file system."""
        patience = time.monotonic() + 60.0
        while self._missing(unique, failed):
            if time.monotonic() > patience:
                raise UserError(
                    f"process {self.ranks.rank} does not see in {self.cache.directory} what the others wrote there: "
                    "data.cache must be one directory that all machines share"
                )
            time.sleep(0.5)

    def _encode(self, missing: Sequence[Entry]) -> dict[str, LeftOut]:
        """Encode this rank's share, one group of parts after the other."""
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in missing:
            groups.setdefault(entry.encoding.parts, []).append(entry)
        units: dict[str, int] = {}
        for entry in missing:
            units[entry.encoding.name] = units.get(entry.encoding.name, 0) + entry.units
        forecast = _Forecast(units, self.ranks.size)
        failed: dict[str, LeftOut] = {}
        parts: dict[str, Any] = {}
        shares = [(names, _share(entries, self.ranks)) for names, entries in groups.items()]
        try:
            for number, (names, share) in enumerate(shares):
                later = {name for rest, _ in shares[number:] for name in rest}
                self._free(parts, keep=later)
                if share:
                    for name in names:
                        if name not in parts:
                            dtype = self.encoder.part_dtype(name, self.dtype)
                            parts[name] = self.encoder.load(name, self.ranks.device, dtype)
                    self._encode_group(share, {n: parts[n] for n in names}, forecast, failed)
        except CacheFull as error:
            if (needed := forecast.needed()) > 0:
                raise CacheFull(
                    f"{error}. About {readable_bytes(needed)} ({needed} bytes) more will be needed"
                ) from error
            raise
        finally:
            self._free(parts, keep=set())
            self.cache.close()
        return failed

    def _free(self, parts: dict[str, Any], keep: set[str]) -> None:
        gone = [name for name in parts if name not in keep]
        for name in gone:
            del parts[name]
        if gone:
            import torch

            gc.collect()
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def _encode_group(
        self, share: list[list[Entry]], parts: dict[str, Any], forecast: _Forecast, failed: dict[str, LeftOut]
    ) -> None:
        names = ", ".join(dict.fromkeys(entry.encoding.name for entries in share for entry in entries))
        meter = _Meter(f"Encoding {names}", len(share), self.say)
        for entries, decoded in self._decoded(share):
            if isinstance(decoded, LeftOut):
                failed[str(decoded.path)] = decoded
            else:
                pixels, controls = decoded
                for entry in entries:
                    own = pixels if entry.encoding.reads_pixels else None
                    info = None if own is None or entry.item is None else entry.item.info
                    size = None if info is None else (info.height, info.width)
                    sample = Sample(entry.caption, own, controls if entry.encoding.controls else (), size)
                    (tensors,) = self.encoder.encode(entry.encoding, parts, [sample])
                    forecast.add(entry, self.cache.put(entry.key, tensors))
                    if forecast.due():
                        self.cache.require_space(forecast.needed())
            meter.step()

    def _decoded(self, share: list[list[Entry]]) -> Iterator[tuple[list[Entry], Decoded | LeftOut]]:
        """Each clip's entries with what they read, decoded a few ahead in threads."""
        if not self.workers:
            yield from ((entries, self._decode(entries)) for entries in share)
            return
        pending: deque[tuple[list[Entry], Future[Decoded | LeftOut]]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            try:
                for entries in share:
                    pending.append((entries, pool.submit(self._decode, entries)))
                    if len(pending) > self.workers:
                        first, future = pending.popleft()
                        yield first, future.result()
                while pending:
                    first, future = pending.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, entries: Sequence[Entry]) -> Decoded | LeftOut:
        """What the entries of one clip read: its pixels, its control pictures."""
        item, content = entries[0].item, entries[0].content.split()
        if item is None:
            return None, ()
        path, bucket = item.record.path, item.bucket
        transform = Transform(bucket.height, bucket.width)
        pixels: np.ndarray | None = None
        controls: list[np.ndarray] = []
        try:
            if any(entry.encoding.reads_pixels for entry in entries):
                pixels = decode_clip(path, item.clip, transform, item.info)
            if any(entry.encoding.controls for entry in entries):
                controls = [decode_clip(control, Clip(), transform) for control in item.record.controls]
            for file, expected in zip((path, *item.record.controls), content, strict=True):
                if content_hash(file, self.facts) != expected:
                    raise MediaError(f"{file} was changed while it was being prepared: start again", "changed")
        except MediaError as error:
            reason = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
            return LeftOut(path, reason, error.code, item.record.source)
        from torch import from_numpy

        return None if pixels is None else from_numpy(pixels), tuple(from_numpy(one) for one in controls)


def _share(entries: Sequence[Entry], ranks: Ranks) -> list[list[Entry]]:
    """This rank's clips or captions, with all that is to be made of each: it is decoded once for all of them."""
    clips: dict[Any, list[Entry]] = {}
    for entry in entries:
        item = entry.item
        place = entry.key if item is None else (item.record.path, item.clip, item.bucket)
        clips.setdefault(place, []).append(entry)
    return list(clips.values())[ranks.rank :: ranks.size]


class _Meter:
    """A line of progress at the start, every few seconds, and at the end."""

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.say = what, total, say
        self.done, self.started = 0, time.monotonic()
        self.last = self.started
        say(f"{what}: {total} to do")

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total:
            self.say(f"{self.what}: {self.total} done in {now - self.started:.1f} s")
        elif now - self.last > LINE_SECONDS:
            self.last = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.say(f"{self.what}: {self.done} of {self.total}, {left:.0f} s left")
