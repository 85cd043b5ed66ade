"""A table as it is kept on disk: batches of rows that are read by memory map, and an array of each number.

A store is a directory, named by the files that it was made of, their sizes and times, and how their columns were
read. It is made once, in streams, and appears whole, by one rename; what is lost of it is made again.

- ``rows.arrow``: batches of rows one after the other, each an Arrow stream of its own, since the columns of one file
  need not be those of the next.
- ``<number>.bin``: an array of each of `NUMBERS`; what is zero all over is left as a hole.
- ``store.json``: the files, where the batches lie, the sizes of the above.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kinema.data.files import local_path, status, stem, suffix
from kinema.errors import UserError

from .kinds import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from .table_names import check_path, check_renamed, resolve
from .table_read import raw_batches
from .table_rows import NUMBERS, Rows, normalise

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Columns = dict[str, tuple["pa.Field", "pa.Array"]]
"""The columns of a batch by their names."""
FORMAT = 1
"""Of stores: another number makes them anew."""
READS = 500
"""After so many, the pages of the table are given back: each read maps up to 400 KB, which the system may take back
at any time and yet counts as this process' memory."""
ABANDONED = 6 * 3600
"""Seconds after which an unfinished store is taken for that of a process that died."""


@dataclass(frozen=True)
class Stretch:
    """One batch of rows in ``rows.arrow``."""

    file: int
    """Number of its file."""
    in_file: int
    """Rows of that file before it."""
    first: int
    """Rows of the table before it."""
    rows: int
    offset: int
    size: int
    """Bytes."""


class TableStore:
    """Rows by their number, 0 .. len - 1, those that are no records included. May be read from several threads."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        """``files``: those that it was made of. Raises where there is no whole store."""
        import pyarrow as pa

        text = (directory / "store.json").read_text(encoding="utf-8")
        about = json.loads(text)
        for name, size in about["sizes"].items():
            if (directory / name).stat().st_size != size:
                raise FileNotFoundError(directory / name)
        self.directory = directory
        self.files = files
        self.columns: list[list[str]] = about["columns"]
        """Names of the columns of each file."""
        self.captioned: list[bool] = about["captioned"]
        """Whether one of them holds the captions."""
        self.stretches = [Stretch(**stretch) for stretch in about["stretches"]]
        self._firsts = [stretch.first for stretch in self.stretches]
        self._length: int = about["rows"]
        self._arrays: dict[str, np.ndarray] = {}
        self._batches: dict[int, Columns] = {}
        self._reads = 0
        with (directory / "rows.arrow").open("rb") as file:  # of nothing, no map can be made
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.stretches else None
        self._rows = pa.py_buffer(self._map) if self._map is not None else None
        for name in NUMBERS:
            self._arrays[name] = self._map_numbers(name)

    def __len__(self) -> int:
        return self._length

    def numbers(self, name: str) -> np.ndarray:
        """One of `NUMBERS`, [N], read only, mapped from disk."""
        return self._arrays[name]

    def _map_numbers(self, name: str) -> np.ndarray:
        import numpy as np

        if not self._length:
            return np.zeros(0, NUMBERS[name])
        return np.memmap(self.directory / f"{name}.bin", NUMBERS[name], "r", shape=(self._length,))

    def locate(self, row: int) -> tuple[Columns, int, Stretch]:
        """The columns of the batch that holds a row, the row's number in it, and where the batch comes from."""
        import pyarrow as pa

        self._reads += 1
        if self._reads % READS == 0 and self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
        number = bisect_right(self._firsts, row) - 1
        stretch = self.stretches[number]
        columns = self._batches.get(number)
        if columns is None:
            assert self._rows is not None
            with pa.ipc.open_stream(self._rows.slice(stretch.offset, stretch.size)) as reader:
                batch = reader.read_next_batch()
            columns = {field.name: (field, batch.column(place)) for place, field in enumerate(batch.schema)}
            self._batches[number] = columns
        return columns, row - stretch.first, stretch


def open_store(files: Sequence[str], renames: Mapping[str, str], stores: Path) -> TableStore:
    """The store of a table, made where there is none in the directory ``stores``. UserError for a table that cannot be
    read, or a full disk; MediaError for a file that is missing."""
    states = _states(files)
    places = [file if (path := local_path(file)) is None else os.path.abspath(path) for file in files]
    what = _hash(FORMAT, places, sorted(renames.items()), sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))
    family = f"{re.sub(r'[^a-zA-Z0-9_]', '_', stem(files[0]))[:40]}-{what}"
    directory = stores / f"{family}-{_hash(states)}"
    try:
        return TableStore(directory, files)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        stores.mkdir(parents=True, exist_ok=True)
        _tidy(stores)
        unfinished = directory.with_name(f"{directory.name}.{os.urandom(4).hex()}.part")
        unfinished.mkdir()
        try:
            _write(unfinished, files, renames)
            if states != _states(files):
                raise UserError(f"{', '.join(files)} changed while it was read: start again when it is complete")
            _publish(unfinished, directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: a copy of {', '.join(files)}, about as large as the table itself without "
                f"compression, is kept in {stores}, from which its rows are read. Make room there"
            ) from error
        raise UserError(f"{stores}, where a copy of the table is kept, cannot be written: {error}") from error
    for old in stores.glob(f"{family}-*"):
        if old.suffix != ".part" and old != directory:  # of the same files, before they were changed
            shutil.rmtree(old, ignore_errors=True)
    return TableStore(directory, files)


def _states(files: Sequence[str]) -> list[tuple[int, str]]:
    with ThreadPoolExecutor(16, "kinema-table") as threads:  # an address may take its time to answer
        return [(found.size, found.stamp) for found in threads.map(status, files)]


def _hash(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _tidy(stores: Path) -> None:
    """Remove what processes that died have left."""
    for part in stores.glob("*.part"):
        try:
            latest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
        except OSError:
            continue
        if latest < time.time() - ABANDONED:
            shutil.rmtree(part, ignore_errors=True)


def _publish(unfinished: Path, directory: Path) -> None:
    try:
        unfinished.rename(directory)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    try:
        TableStore(directory, ())  # another process has made it meanwhile
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(directory)
        unfinished.rename(directory)


def _write(directory: Path, files: Sequence[str], renames: Mapping[str, str]) -> None:
    stretches: list[Stretch] = []
    sinks: dict[str, BinaryIO] = {}
    columns: list[list[str]] = []
    captioned: list[bool] = []
    total = 0
    try:
        sinks = {name: (directory / name).open("wb") for name in ("rows.arrow", *map(_array_file, NUMBERS))}
        for number, file in enumerate(files):
            in_file, seen = 0, dict[str, None]()
            captioned.append(False)
            for rows in _rows_of(file, renames, seen):
                captioned[-1] |= "text" in rows.batch.schema.names
                count = len(rows.batch)
                if count:
                    offset, size = _append_batch(sinks["rows.arrow"], rows.batch)
                    stretches.append(Stretch(number, in_file, total, count, offset, size))
                    for name, array in rows.numbers.items():
                        _append_array(sinks[_array_file(name)], array)
                in_file, total = in_file + count, total + count
            columns.append(list(seen))
        for sink in sinks.values():
            sink.truncate()
    finally:
        for sink in sinks.values():
            sink.close()
    sizes = {name: (directory / name).stat().st_size for name in sinks}
    about = {
        "files": list(files), "columns": columns, "captioned": captioned, "rows": total, "sizes": sizes,
        "stretches": [asdict(one) for one in stretches],
    }  # fmt: skip
    (directory / "store.json").write_text(json.dumps(about), encoding="utf-8")


def _array_file(name: str) -> str:
    return f"{name}.bin"


def _append_batch(sink: BinaryIO, batch: pa.RecordBatch) -> tuple[int, int]:
    import pyarrow as pa

    offset = sink.tell()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return offset, sink.tell() - offset


def _append_array(sink: BinaryIO, array: np.ndarray) -> None:
    if array.any():
        sink.write(array.tobytes())
    else:
        sink.seek(array.nbytes, os.SEEK_CUR)


def _rows_of(file: str, renames: Mapping[str, str], seen: dict[str, None]) -> Iterator[Rows]:
    """The rows of one file. Adds the names of its columns to ``seen``. UserError where they are not those that are
    wanted."""
    same_columns = suffix(file) in (".csv", ".tsv", ".parquet")
    for number, raw in enumerate(_ahead(raw_batches(file))):
        names = raw.schema.names
        seen.update(dict.fromkeys(names))
        found = resolve(names, renames, file)
        if number == 0:
            check_path(found, names, renames, file)
        if number == 0 and same_columns:
            check_renamed(names, renames, file)
        yield normalise(raw, found, file)
    if not same_columns:  # objects need not have every name, but one of them must
        check_renamed(seen, renames, file)


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same, with the next batch parsed in a thread while this one is worked on."""
    with ThreadPoolExecutor(1, "kinema-table") as thread:
        coming = thread.submit(next, batches, None)
        while (current := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield current
