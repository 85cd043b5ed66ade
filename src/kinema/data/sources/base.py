"""What a source is: records by their row, and what it says of their media without a file being opened."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from kinema.data.records import LeftOut, MediaInfo, Record

if TYPE_CHECKING:
    import numpy as np

    from kinema.config.data import SourceConfig


@dataclass(frozen=True)
class MediaColumns:
    """What is known of the media of many records, a row each: what placing them in buckets asks for.

    Sizes are as shown and after the record's crop, ``duration`` and ``frames`` are those of its cut. ``video`` False:
    a picture, with 1 frame and fps and duration of 0.
    """

    known: np.ndarray
    """bool [N]: whether the other columns hold anything for this row."""
    video: np.ndarray
    """bool [N]."""
    width: np.ndarray
    """int32 [N]."""
    height: np.ndarray
    """int32 [N]."""
    frames: np.ndarray
    """int32 [N]: frames that can be used, at the file's own rate."""
    fps: np.ndarray
    """float64 [N]."""
    duration: np.ndarray
    """float64 [N]: seconds."""
    offset: np.ndarray
    """float64 [N]: where the cut begins, in seconds after the file's first frame."""
    variable: np.ndarray
    """bool [N]: frames unevenly spaced in time."""

    def __len__(self) -> int:
        return len(self.known)

    def take(self, rows: np.ndarray) -> MediaColumns:
        """The columns of these rows."""
        if len(rows) == len(self):
            return self
        return MediaColumns(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})

    def with_rows(self, rows: np.ndarray, other: MediaColumns) -> MediaColumns:
        """These columns, but at ``rows`` what ``other`` says, row by row."""
        columns = {one.name: getattr(self, one.name).copy() for one in fields(self)}
        for name, column in columns.items():
            column[rows] = getattr(other, name)
        return MediaColumns(**columns)


class Source(Protocol):
    """Records by row, 0 .. len - 1, in an order that depends on the source alone. Reading a row is cheap; nothing here
    opens a media file. May be read from several threads."""

    @property
    def config(self) -> SourceConfig: ...
    @property
    def name(self) -> str: ...
    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Rows and files that are no records, each with its reason."""
        ...

    @property
    def counts(self) -> Counter[str]:
        """What else is to be said: "empty caption", "missing caption", "sidecar", "hidden" and so on (see
        `kinema.data.gather.COUNTED`)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of all its records, found without a media file being opened."""
        ...

    def __len__(self) -> int: ...
    def record(self, row: int) -> Record: ...
    def columns(self) -> MediaColumns | None:
        """What the source itself says of its media, for `data.examine = "trust"`; None where it says nothing."""
        ...


@dataclass(frozen=True)
class RecordList:
    """A source whose records are all in memory."""

    config: SourceConfig
    name: str
    records: list[Record]
    left_out: list[LeftOut] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            digest.update(repr((record.files, record.captions, record.cut, record.crop, dict(record.scores))).encode())
        return digest.hexdigest()

    def record(self, row: int) -> Record:
        return self.records[row]

    def columns(self) -> MediaColumns | None:
        return None


def columns_of(infos: Iterable[MediaInfo | None], records: Iterable[Record]) -> MediaColumns:
    """The columns of probed files, with the cuts and crops of their records applied; None: not known. Cuts and crops
    reach at most to the end of the file; `kinema.data.examine` refuses those outside it."""
    import numpy as np

    rows: list[tuple[object, ...]] = []
    for info, record in zip(infos, records, strict=True):
        if info is None:
            rows.append((False, False, 0, 0, 0, 0.0, 0.0, 0.0, False))
            continue
        width, height, frames, duration, offset = info.width, info.height, info.frames, info.duration, 0.0
        if record.crop is not None:
            left, top, right, bottom = record.crop
            width, height = min(right, width) - left, min(bottom, height) - top
        if record.cut is not None and info.kind == "video":
            offset = record.cut[0]
            end = duration if record.cut[1] is None else min(record.cut[1], duration)
            whole, duration = duration, end - offset
            frames = max(1, round(frames * duration / whole)) if whole else frames
        rows.append((True, info.kind == "video", width, height, frames, info.fps, duration, offset, info.variable))
    kinds = (np.bool_, np.bool_, np.int32, np.int32, np.int32, np.float64, np.float64, np.float64, np.bool_)
    table = list(zip(*rows, strict=True)) if rows else [()] * len(kinds)
    return MediaColumns(*(np.array(column, kind) for column, kind in zip(table, kinds, strict=True)))
