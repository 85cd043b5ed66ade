"""What is encoded and under which keys: the encoders that make it, the entries that an item needs, the ranks that share
the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kinema.errors import UserError

from .batch import Encoding, Sample
from .cache import entry_key
from .items import Item
from .lengths import ClipLengths
from .transform import Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .contents import Contents

T = TypeVar("T")

MASK = Encoding("mask", "media", ())
"""The mask of a record: kept like an encoding, made by no encoder. Which file it is read from is in the record."""


class Encoder(Protocol):
    """What the data layer asks of a family."""

    @property
    def grid(self) -> int: ...
    @property
    def lengths(self) -> ClipLengths: ...
    @property
    def text_encoders(self) -> tuple[str, ...]: ...
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


@dataclass(frozen=True)
class Entry:
    """One cache entry that an item needs."""

    key: bytes
    encoding: Encoding
    caption: str
    units: int
    """What its size grows with: pixels of the clip; 1 for what reads the caption alone."""


@lru_cache
def _transform(height: int, width: int, crop: tuple[int, int, int, int] | None) -> str:
    return Transform(height, width, crop=crop).fingerprint()


def clip_identity(item: Item, content: str) -> tuple[object, ...]:
    """What decides an item's pixels: the hash of its file's content, the clip, the bucket, the transform."""
    clip, bucket = item.clip, item.bucket
    return (
        content, (clip.start, clip.frames, clip.fps), (bucket.frames, bucket.height, bucket.width),
        _transform(bucket.height, bucket.width, item.record.crop),
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

    def entry(self, encoding: Encoding, item: Item, caption: str, contents: Contents | None) -> Entry:
        """An item's entry of one encoding, with the given caption. ``contents`` names the content of its files; it is
        needed for what reads files alone."""
        bucket, record, pixels = item.bucket, item.record, pixels_of(item)
        if encoding is MASK:
            assert contents is not None and record.mask is not None
            media: tuple[object, ...] = (*clip_identity(item, contents[record.path]), contents[record.mask])
            return Entry(entry_key("mask", media), encoding, "", pixels)
        media = ()
        if encoding.reads_pixels:
            assert contents is not None
            media = clip_identity(item, contents[record.path])
        if encoding.controls:
            assert contents is not None
            controls = tuple(contents[path] for path in record.controls)
            media += (controls, (bucket.height, bucket.width), _transform(bucket.height, bucket.width, None))
        read = caption if encoding.reads_caption else None
        key = entry_key(self._fixed[encoding.name], media, read)
        return Entry(key, encoding, read or "", pixels if reads_files(encoding) else 1)

    def of(self, item: Item) -> Iterator[Encoding]:
        """The encodings that an item has: all, and its mask's."""
        yield from self.encodings
        if item.record.mask is not None:
            yield MASK


def pixels_of(item: Item) -> int:
    """Pixels of an item's clip."""
    return item.bucket.frames * item.bucket.height * item.bucket.width


def reads_files(encoding: Encoding) -> bool:
    """Whether files go in, and not the caption alone."""
    return encoding.reads_pixels or encoding.controls


def plan_entries(encoder: Encoder, ranks: Ranks, compute: torch.dtype) -> EntryPlanner:
    """The planner of a family; ``compute``: what the run computes in, from which each encoder's own type follows."""
    encodings = encoder.encodings()
    prints = from_main(ranks, lambda: {e.parts: encoder.fingerprint(e.parts) for e in encodings})
    dtypes = {e.parts: " ".join(str(encoder.part_dtype(part, compute)) for part in e.parts) for e in encodings}
    return EntryPlanner(encodings, prints, dtypes)
