"""The tar source: samples in tar files as WebDataset writes them. Nothing is unpacked.

A sample is the members of one tar that have the same path up to the first dot of their name. The dot and what follows
says what a member is: ``.jpg``, ``.mp4`` and so on the media, ``.txt`` its caption, ``.json`` its caption, scores and
size, ``.mask.png`` its mask, ``.control.png`` or ``.control0.png``, ``.control1.png`` ... its control pictures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.data.files import (
    FileStatus,
    expand,
    is_folder,
    is_pattern,
    is_remote,
    join,
    local_path,
    split_member,
    status,
)
from kinema.data.records import LeftOut, MediaError, Record
from kinema.errors import UserError

from .base import MediaColumns
from .kinds import IMAGE_EXTENSIONS, SIDECARS, VIDEO_EXTENSIONS, is_hidden
from .partners import add_partners, partner_places
from .tar_rows import TarRows, read_store, replaced, rows_of, store_file, write_store
from .tar_samples import read_tar, sample_stem
from .walk import walk

if TYPE_CHECKING:
    import numpy as np

REMOTE_READERS = 8
"""Tars that are looked through at once in a storage."""


@dataclass(frozen=True)
class TarSource:
    """Samples of tar files, by the names of tar and sample."""

    config: SourceConfig
    name: str
    tars: Sequence[TarRows]
    left_out: list[LeftOut]
    counts: Counter[str]

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64: how many rows there are up to the end of each tar."""
        import numpy as np

        return np.cumsum([0, *(len(rows.batch) for rows in self.tars)], dtype=np.int64)[1:]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.tars else 0

    @property
    def fingerprint(self) -> str:
        return repr([(rows.tar, rows.state, len(rows.batch)) for rows in self.tars])

    def record(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name} has {len(self)} records; there is no record {row}")
        number = int(self._ends.searchsorted(row, "right"))
        rows = self.tars[number]
        return rows.record(row - int(self._ends[number]) + len(rows.batch), self.name)

    def columns(self) -> MediaColumns | None:
        import numpy as np

        columns = MediaColumns(
            *(np.concatenate([rows.column(one.name) for rows in self.tars]) for one in fields(MediaColumns))
        )
        return columns if columns.known.any() else None


def open_tar(config: SourceConfig, name: str, store: Path | None = None) -> TarSource:
    """The samples of a tar, of the tars in a folder, or of those that a pattern names.

    Reads headers, captions and .json members. What was read is kept in the directory ``store``, if one is given: a tar
    that did not change is not opened the next time. Every member is accounted for: the counts "image", "video",
    "caption", "mask", "control", "sidecar", "hidden" and "left out" add up to "files". A damaged tar is used as far as
    it can be read, and listed. UserError where there is no tar, or one is compressed.
    """
    tars, strays, counts = _find_tars(config, name)
    captions = config.captions or CaptionConfig()
    found = list(_read_all(tars, captions)) if store is None else _read_or_recall(tars, captions, config.path, store)
    for rows in found:
        counts.update(rows.counts)
    left_out = [*strays, *(replace(entry, source=name) for rows in found for entry in rows.left_out)]
    if config.controls or config.masks is not None or config.default_mask is not None:
        found, missed, changes = _with_partners(found, config, name)
        left_out += missed
        counts.update(changes)
    left_out.sort(key=lambda entry: entry.path)
    return TarSource(config, name, found, left_out, +counts)


def _read_all(
    tars: Sequence[str], config: CaptionConfig, states: Sequence[FileStatus | None] | None = None
) -> Iterator[TarRows]:
    """Read tars, in their order; several at once where they are remote."""

    def read(number: int) -> TarRows:
        shard = read_tar(tars[number], config)
        return rows_of(shard, None if states is None or shard.unread else states[number])

    if not any(is_remote(tar) for tar in tars):
        yield from map(read, range(len(tars)))
        return
    with ThreadPoolExecutor(REMOTE_READERS, thread_name_prefix="tar") as pool:
        yield from pool.map(read, range(len(tars)))


def _read_or_recall(tars: Sequence[str], config: CaptionConfig, path: str, store: Path) -> list[TarRows]:
    """Like `_read_all`, with what is kept in ``store`` where a tar is as it was."""
    with ThreadPoolExecutor(REMOTE_READERS if any(map(is_remote, tars)) else 1, thread_name_prefix="tar") as pool:
        states = list(pool.map(_state, tars))
    place = path if local_path(path) is None else os.path.abspath(path)
    file = store_file(store, place, config.missing, config.empty, sorted(IMAGE_EXTENSIONS), sorted(VIDEO_EXTENSIONS))
    kept = read_store(file)
    wanted = list(zip(tars, states, strict=True))
    if None not in states and [(rows.tar, rows.state) for rows in kept] == wanted:
        return kept
    known = {(rows.tar, rows.state): rows for rows in kept if rows.state is not None}
    new = [one for one in wanted if one not in known]
    coming = _read_all([tar for tar, _ in new], config, [state for _, state in new])
    write_store(file, (known[one] if one in known else next(coming) for one in wanted))
    kept = read_store(file)
    # another process may have written it anew, or taken it away
    return kept if [rows.tar for rows in kept] == list(tars) else list(_read_all(tars, config))


def _state(tar: str) -> FileStatus | None:
    try:
        return status(tar)
    except MediaError:  # missing, not to be reached: reading it will say so
        return None


def _with_partners(
    found: Sequence[TarRows], config: SourceConfig, source: str
) -> tuple[list[TarRows], list[LeftOut], Counter[str]]:
    """The rows with control pictures and masks from folders, what is left out for the lack of one, and changes of the
    counts."""
    records = [[rows.record(row, source) for row in range(len(rows.batch))] for rows in found]
    pairs = [(_stem(record.path), record) for one in records for record in one]
    stems = {stem for stem, _ in pairs} | {_stem(entry.path) for rows in found for entry in rows.left_out}
    paired, missed, counts = add_partners(pairs, config, stems)
    by_path = {record.path: record for record in paired}
    changed = []
    for rows, old in zip(found, records, strict=True):
        kept = [row for row, record in enumerate(old) if record.path in by_path]
        counts.subtract(record.kind for record in old if record.path not in by_path)
        changed.append(replaced(rows, kept, [by_path[old[row].path] for row in kept]))
    counts["left out"] += len(missed)
    return changed, missed, counts


def _stem(location: str) -> str:
    member = split_member(location)
    return "" if member is None else sample_stem(member[1])


def _find_tars(config: SourceConfig, source: str) -> tuple[list[str], list[LeftOut], Counter[str]]:
    """(locations of the tars by name, files beside them that are none, counts)."""
    path = config.path.rstrip("/") or "/"
    if is_pattern(path):
        tars = expand(path)
        if not tars:
            raise UserError(f"there is no file {path}: give a pattern that tar files match")
        return tars, [], Counter()
    if not is_folder(path):
        return [path], [], Counter()
    tars, strays, counts = [], [], Counter[str]()
    for folder in walk(path, partner_places(config)):
        counts["hidden"] += folder.hidden
        counts["files"] += folder.hidden
        if folder.trouble:
            reason = f"the folder {folder.trouble}"
            strays.append(LeftOut(join(path, folder.prefix), reason, "unreadable folder", source))
        for name in folder.names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix == ".tar" and not is_hidden(name):
                tars.append(folder.prefix + name)
                continue
            counts["files"] += 1
            if is_hidden(name) or suffix in SIDECARS | {".txt", ".idx"}:
                counts["hidden" if is_hidden(name) else "sidecar"] += 1
            else:
                reason = "is no tar file: this source reads tar files alone; give other files as a source of their own"
                strays.append(LeftOut(join(path, folder.prefix + name), reason, "unknown extension", source))
                counts["left out"] += 1
    if not tars:
        raise UserError(f"there is no tar file in the folder {path}: expected names that end in .tar")
    return [join(path, name) for name in sorted(tars)], strays, counts
