"""The records of tars as they are kept: a batch of rows for each tar, in memory or in a file that is memory-mapped.

A row is a record as JSON, a few hundred bytes, beside the numbers that placing it in a bucket asks for.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.data.files import FileStatus
from kinema.data.records import NO_EXTRAS, LeftOut, Record
from kinema.errors import UserError

from .base import MediaColumns, columns_of
from .tar_samples import Shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT = 1
"""Of kept rows: another number makes them anew."""
IN_TAR = "::"
"""Before the names of members of the record's own tar."""


@dataclass(frozen=True)
class TarRows:
    """What is kept of a tar."""

    tar: str
    state: FileStatus | None
    """Of the tar when it was read; None where it could not be."""
    batch: pa.RecordBatch
    """A column "row", and one for each field of MediaColumns."""
    left_out: list[LeftOut]
    counts: Counter[str]

    def record(self, row: int, source: str) -> Record:
        return _unpack(self.batch.column(0)[row].as_py(), self.tar, source)

    def column(self, name: str) -> np.ndarray:
        return self.batch.column(self.batch.schema.names.index(name)).to_numpy(zero_copy_only=False)


def rows_of(shard: Shard, state: FileStatus | None) -> TarRows:
    """The rows of a tar that was read."""
    infos = [meta.info(record.kind) for meta, record in zip(shard.metas, shard.records, strict=True)]
    batch = _batch([_pack(record, shard.tar) for record in shard.records], columns_of(infos, shard.records))
    return TarRows(shard.tar, state, batch, shard.left_out, +shard.counts)


def replaced(rows: TarRows, kept: Sequence[int], records: Sequence[Record]) -> TarRows:
    """The rows with the numbers ``kept`` alone, made of ``records`` instead."""
    columns = MediaColumns(*(rows.column(one.name)[list(kept)] for one in fields(MediaColumns)))
    batch = _batch([_pack(record, rows.tar) for record in records], columns)
    return TarRows(rows.tar, rows.state, batch, rows.left_out, rows.counts)


def _batch(packed: list[bytes], columns: MediaColumns) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = {"row": pa.array(packed, pa.large_binary())}
    arrays |= {one.name: pa.array(getattr(columns, one.name)) for one in fields(MediaColumns)}
    return pa.RecordBatch.from_pydict(arrays)


def _pack(record: Record, tar: str) -> bytes:
    def short(location: str | None) -> str | None:
        return location and location.removeprefix(tar)

    row = [
        short(record.path), record.captions, record.kind, [short(control) for control in record.controls],
        short(record.mask), record.cut, record.crop, dict(record.scores), dict(record.extras),
    ]  # fmt: skip
    return json.dumps(row, separators=(",", ":")).encode()


def _unpack(row: bytes, tar: str, source: str) -> Record:
    path, captions, kind, controls, mask, cut, crop, scores, extras = json.loads(row)

    def whole(location: Any) -> Any:
        return tar + location if location is not None and location.startswith(IN_TAR) else location

    return Record(
        whole(path), tuple(captions), kind, source, tuple(map(whole, controls)), whole(mask), cut and tuple(cut),
        crop and tuple(crop), scores or NO_EXTRAS, extras or NO_EXTRAS,
    )  # fmt: skip


def store_file(directory: Path, *key: object) -> Path:
    """The file in which rows are kept that follow from ``key``."""
    digest = hashlib.blake2b(json.dumps([FORMAT, *key]).encode(), digest_size=8).hexdigest()
    return directory / f"{digest}.arrow"


def read_store(path: Path) -> list[TarRows]:
    """The rows that are kept; none where there are none or the file is not whole."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        numbers = range(reader.num_record_batches)
        batches = [reader.get_batch_with_custom_metadata(number) for number in numbers]
        return [_with_notes(batch, json.loads(notes[b"tar"])) for batch, notes in batches]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return []


def write_store(path: Path, tars: Iterable[TarRows]) -> None:
    """Keep rows, one tar after the other as they come; the file appears whole, by one rename. UserError where it cannot
    be written."""
    import pyarrow as pa

    from kinema.data.segments import publish

    schema = _batch([], columns_of([], [])).schema

    def write(descriptor: int) -> None:
        with open(descriptor, "wb", closefd=False) as file, pa.ipc.new_file(file, schema) as writer:
            for rows in tars:
                writer.write_batch(rows.batch, custom_metadata={"tar": json.dumps(_notes(rows))})

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, write, secrets.token_hex(6), durable=False)
    except OSError as error:
        raise UserError(
            f"{path.parent}, where the captions of tar files are kept, cannot be written ({error.strerror or error}): "
            "make room there"
        ) from error


def _notes(rows: TarRows) -> dict[str, Any]:
    left_out = [(entry.path.removeprefix(rows.tar), entry.reason, entry.code) for entry in rows.left_out]
    state = None if rows.state is None else (rows.state.size, rows.state.stamp)
    return {"tar": rows.tar, "state": state, "left_out": left_out, "counts": rows.counts}


def _with_notes(batch: pa.RecordBatch, notes: Mapping[str, Any]) -> TarRows:
    left_out = [LeftOut(notes["tar"] + path, reason, code) for path, reason, code in notes["left_out"]]
    state = None if notes["state"] is None else FileStatus(*notes["state"])
    return TarRows(notes["tar"], state, batch, left_out, Counter(notes["counts"]))
