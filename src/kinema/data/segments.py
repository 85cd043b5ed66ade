"""The files of the cache: open segments that one writer appends to, and the sealed shards that they become.

An **open segment** (``*.open``) is a line of JSON that says who writes it, then frames: magic, payload
length, key, CRC-32 of key and payload, payload. The payload is a safetensors file of its own, so one format
serves both. A frame that is not whole (its writer was killed) ends what can be read; all before it is intact.

A **shard** (``*.safetensors``) holds many entries under the names ``<key in hex>/<tensor>``, ordered by
element size so that every tensor is aligned; its metadata holds the checksum of each entry. `kinema.data.shard` reads
it.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEY_BYTES = 20
OPEN, SEALED, INDEX, TEMPORARY = ".open", ".safetensors", ".index", ".tmp"
FORMAT = "kinema cache 2"
MAGIC = b"kfr1"
FRAME = struct.Struct(f"<4sQ{KEY_BYTES}sI")
"""magic, payload bytes, key, CRC-32 of key and payload."""
COPY_BYTES = 1 << 24
"""Tensors are copied, and their checksums taken, in pieces of so much."""
LANES = 1021
"""Lanes of `folded`: a prime, so that pages that changed places fall into other lanes, and show."""

Header = dict[str, dict[str, Any]]
"""What a safetensors file says of its tensors: name -> dtype, shape, data_offsets."""
Stored = tuple[str, str, Sequence[int], int, int]
"""A tensor in a file: ``<key in hex>/<name>``, safetensors type, shape, offset in the file, bytes."""


@lru_cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors type name."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
        "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }[name]  # fmt: skip


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors as the bytes of a safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def unpack(payload: bytes) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    from safetensors.torch import load

    return load(payload)


def parse_header(data: bytes | memoryview) -> tuple[Header, dict[str, str], int]:
    """(tensors, metadata, where the data starts) of a safetensors file's first bytes."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(bytes(data[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    return header, metadata, 8 + length


def checksum(pieces: Iterable[bytes | memoryview]) -> int:
    """CRC-32 of pieces laid end to end."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def entry_checksum(pieces: Iterable[Any]) -> int:
    """The checksum of an entry of a shard: CRC-32 of the folded pieces of its tensors, laid end to end."""
    return checksum(map(folded, pieces))


def folded(piece: Any) -> bytes:
    """Bytes made short for a checksum: their 64-bit words added up in `LANES` lanes. As fast as memory is read, where
    CRC-32 of everything would be most of the time that reading an entry takes. Few bytes stay as they are."""
    words = np.frombuffer(piece, "<u8", len(piece) // 8)
    rows = len(words) // LANES
    if rows < 4:
        return bytes(piece)
    lanes = words[: rows * LANES].reshape(rows, LANES).sum(0, np.uint64)
    rest = words[rows * LANES :]
    lanes[: len(rest)] += rest
    return lanes.tobytes() + bytes(piece[8 * len(words) :])


def write_all(descriptor: int, pieces: Iterable[bytes]) -> None:
    """Write all the bytes, however many calls it takes; OSError where the disk refuses."""
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]


def sync_directory(directory: Path) -> None:
    """Make a rename in a directory survive a power cut, where the file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync a directory; they order renames themselves
    finally:
        os.close(descriptor)


def publish(path: Path, write: Callable[[int], object], owner: str, durable: bool = True) -> None:
    """Write a file under a temporary name and make it visible, whole, by one rename.

    ``durable``: a power cut afterwards does not harm it. What can be made again need not be.
    """
    temporary = path.with_name(f"{path.name}.{owner}{TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            write(descriptor)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def frame(key: bytes, payload: bytes) -> tuple[bytes, bytes]:
    """The two pieces of a frame: its head and its payload."""
    assert len(key) == KEY_BYTES
    return FRAME.pack(MAGIC, len(payload), key, checksum((key, payload))), payload


@dataclass(eq=False)
class OpenSegment:
    """A segment that may still grow, as a reader sees it. Never changed by a reader."""

    path: Path
    owner: dict[str, Any] = field(default_factory=dict)
    """Who writes it: see `kinema.data.cache`. Empty until the first line is whole."""
    end: int = 0
    """Bytes that were read and found whole."""
    torn: bool = False
    """Something after ``end`` is not a whole frame (yet)."""

    def scan(self) -> Iterator[tuple[bytes, int, int]]:
        """(key, payload offset, payload bytes) of the whole frames since the last scan, checksums verified.

        FileNotFoundError where the segment has been sealed in the meantime.
        """
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.torn = False
            if self.end == 0:
                line = file.readline(1 << 16)
                if not line.endswith(b"\n"):
                    self.torn = size > 0
                    return
                self.owner, self.end = json.loads(line), len(line)
            while self.end < size:
                file.seek(self.end)
                head = file.read(FRAME.size)
                found = self._whole(file, head, size)
                if found is None:
                    self.torn = True
                    return
                key, length = found
                offset = self.end + FRAME.size
                self.end = offset + length
                yield key, offset, length

    def _whole(self, file: Any, head: bytes, size: int) -> tuple[bytes, int] | None:
        if len(head) < FRAME.size:
            return None
        magic, length, key, crc = FRAME.unpack(head)
        if magic != MAGIC or self.end + FRAME.size + length > size:
            return None
        return (key, length) if checksum((key, file.read(length))) == crc else None

    def read(self, offset: int, length: int) -> bytes | None:
        """A payload and nothing else; None where it no longer matches its checksum."""
        with self.path.open("rb") as file:
            file.seek(offset - FRAME.size)
            head, payload = file.read(FRAME.size), file.read(length)
        if len(head) < FRAME.size or len(payload) < length:
            return None
        magic, _, key, crc = FRAME.unpack(head)
        return payload if magic == MAGIC and checksum((key, payload)) == crc else None


def seal(segment: OpenSegment, owner: str) -> Path | None:
    """Turn the whole frames of a segment into a shard beside it, and remove the segment.

    Gives the shard's path, or None where the segment held no entry. Any number of processes may do it at the
    same time: the result has the same name and the same bytes. Where the disk refuses, OSError, and the
    segment stays.
    """
    path = segment.path.with_suffix(SEALED)
    if not path.exists():
        entries = {key: (offset, length) for key, offset, length in OpenSegment(segment.path).scan()}
        if entries:
            with segment.path.open("rb") as file:
                tensors = [row for key, place in entries.items() for row in _stored(file.fileno(), key, *place)]
                keys = {key.hex(): None for key in entries}
                publish(path, lambda out: write_shard(file.fileno(), keys, tensors, out), owner)
    segment.path.unlink(missing_ok=True)
    return path if path.exists() else None


def _stored(source: int, key: bytes, offset: int, length: int) -> Iterator[Stored]:
    """The tensors of one payload of a segment."""
    (header_bytes,) = struct.unpack("<Q", os.pread(source, 8, offset))
    header, _, start = parse_header(os.pread(source, min(length, 8 + header_bytes), offset))
    for name, info in header.items():
        first, last = info["data_offsets"]
        yield f"{key.hex()}/{name}", info["dtype"], info["shape"], offset + start + first, last - first


def write_shard(source: int, keys: Mapping[str, int | None], tensors: Iterable[Stored], out: int) -> list[str]:
    """Copy the tensors of entries from one file to another, which becomes a shard; largest elements first.

    ``keys``: the entries in hex, each with the checksum that it must have, where that is known. Entries that do not
    match theirs are damaged: they are left out, and given back.
    """
    rows = sorted(tensors, key=lambda row: (-torch_dtype(row[1]).itemsize, row[0]))
    checksums = dict.fromkeys(sorted(keys), 0)
    for name, _, _, offset, length in rows:
        key = name[: 2 * KEY_BYTES]
        for piece in pieces(source, offset, length):
            checksums[key] = zlib.crc32(folded(piece), checksums[key])
    damaged = [key for key, crc in checksums.items() if keys[key] not in (None, crc)]
    for key in damaged:
        del checksums[key]
    rows = [row for row in rows if row[0][: 2 * KEY_BYTES] in checksums]
    header, position = {}, 0
    for name, dtype, shape, _, length in rows:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    metadata = {"format": FORMAT, "checksums": json.dumps(checksums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_all(out, (struct.pack("<Q", len(text)), text))
    for *_, offset, length in rows:
        write_all(out, pieces(source, offset, length))
    return damaged


def pieces(source: int, offset: int, length: int) -> Iterator[bytes]:
    """A stretch of a file in pieces of at most `COPY_BYTES`."""
    end = offset + length
    while offset < end:
        piece = os.pread(source, min(COPY_BYTES, end - offset), offset)
        assert piece, "the file became shorter while it was read"
        offset += len(piece)
        yield piece
