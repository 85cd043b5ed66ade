"""The files of the cache: open segments that one writer appends to, and the sealed shards that they become.

An **open segment** (``*.open``) is a line of JSON that says who writes it, then frames: magic, payload
length, key, CRC-32 of key and payload, payload. The payload is a safetensors file of its own, so one format
serves both. A frame that is not whole (its writer was killed) ends what can be read; all before it is intact.

A **shard** (``*.safetensors``) holds many entries under the names ``<key in hex>/<tensor>``, ordered by
element size so that every tensor is aligned; its metadata holds the CRC-32 of each entry. It is read by mmap.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEY_BYTES = 20
OPEN, SEALED, TEMPORARY = ".open", ".safetensors", ".tmp"
FORMAT = "kinema cache 1"
MAGIC = b"kfr1"
FRAME = struct.Struct(f"<4sQ{KEY_BYTES}sI")
"""magic, payload bytes, key, CRC-32 of key and payload."""
COPY_BYTES = 1 << 24

Header = dict[str, dict[str, Any]]
"""What a safetensors file says of its tensors: name -> dtype, shape, data_offsets."""
Place = tuple[str, "torch.dtype", tuple[int, ...], tuple[int, ...]]
"""A tensor of an entry: name, type, shape, strides."""


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


def publish(path: Path, write: Callable[[int], None], owner: str) -> None:
    """Write a file under a temporary name and make it visible, whole, by one rename."""
    temporary = path.with_name(f"{path.name}.{owner}{TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            write(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
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
                publish(path, lambda out: _write_shard(file.fileno(), entries, out), owner)
    segment.path.unlink(missing_ok=True)
    return path if path.exists() else None


def _write_shard(source: int, entries: Mapping[bytes, tuple[int, int]], out: int) -> None:
    """Copy the tensors of a segment's entries to a shard, largest elements first."""
    tensors = []  # (-element size, name, dtype, shape, offset in the segment, bytes)
    for key, (offset, length) in entries.items():
        (header_bytes,) = struct.unpack("<Q", os.pread(source, 8, offset))
        header, _, start = parse_header(os.pread(source, min(length, 8 + header_bytes), offset))
        for name, info in header.items():
            first, last = info["data_offsets"]
            place = (
                f"{key.hex()}/{name}",
                info["dtype"],
                info["shape"],
                offset + start + first,
                last - first,
            )
            tensors.append((-torch_dtype(info["dtype"]).itemsize, *place))
    tensors.sort(key=lambda row: row[:2])
    header, checksums, position = {}, dict.fromkeys(sorted(key.hex() for key in entries), 0), 0
    for _, name, dtype, shape, offset, length in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
        key_hex = name[: 2 * KEY_BYTES]
        for piece in _pieces(source, offset, length):
            checksums[key_hex] = zlib.crc32(piece, checksums[key_hex])
    metadata = {"format": FORMAT, "crc32": json.dumps(checksums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_all(out, (struct.pack("<Q", len(text)), text))
    for *_, offset, length in tensors:
        write_all(out, _pieces(source, offset, length))


def _pieces(source: int, offset: int, length: int) -> Iterator[bytes]:
    """A stretch of a file in pieces of at most `COPY_BYTES`."""
    end = offset + length
    while offset < end:
        piece = os.pread(source, min(COPY_BYTES, end - offset), offset)
        assert piece, "the segment became shorter while it was read"
        offset += len(piece)
        yield piece


class Shard:
    """A sealed file of entries, mapped when first read. Tensors are views of the private map, not copies."""

    def __init__(self, path: Path) -> None:
        """Read the header. ValueError where the file is no whole shard."""
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.size
            if 8 + length > self.size:
                raise ValueError("its header is cut short")
            header, metadata, data = parse_header(start + file.read(length))
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is not of the format '{FORMAT}'")
        if max((info["data_offsets"][1] for info in header.values()), default=0) + data != self.size:
            raise ValueError("it is cut short")
        self._index(header, data, json.loads(metadata["crc32"]))
        self._bytes: Tensor | None = None
        self._typed: dict[torch.dtype, Tensor] = {}

    def _index(self, header: Header, data: int, checksums: Mapping[str, int]) -> None:
        """Entries as rows of arrays: a shard may hold many, and a Python object for each would weigh."""
        places: dict[str, list[tuple[Place, int]]] = {key: [] for key in checksums}
        for name, info in header.items():
            key, tensor = name[: 2 * KEY_BYTES], name[2 * KEY_BYTES + 1 :]
            first, _ = info["data_offsets"]
            shape = tuple(info["shape"])
            places[key].append(((tensor, torch_dtype(info["dtype"]), shape, _strides(shape)), data + first))
        self._keys = [bytes.fromhex(key) for key in places]
        self.rows = len(places)
        self._layouts: list[tuple[Place, ...]] = []
        numbers: dict[tuple[Place, ...], int] = {}
        width = max((len(rows) for rows in places.values()), default=0)
        self._offsets = np.zeros((len(places), width), np.int64)
        self._layout = np.zeros(len(places), np.int32)
        for row, tensors in enumerate(places.values()):
            layout = tuple(place for place, _ in tensors)
            if layout not in numbers:
                numbers[layout] = len(self._layouts)
                self._layouts.append(layout)
            self._layout[row] = numbers[layout]
            self._offsets[row, : len(tensors)] = [offset for _, offset in tensors]
        self._checksums = np.array(list(checksums.values()), np.uint32)
        self._verified = np.zeros(len(places), bool)

    def take_keys(self) -> list[bytes]:
        """The keys of the rows, handed over once: the cache's index keeps them."""
        keys, self._keys = self._keys, []
        return keys

    def read(self, row: int) -> dict[str, Tensor] | None:
        """The tensors of an entry; None where its checksum, verified at its first reading, does not hold."""
        result = {}
        layout, offsets = self._layouts[self._layout[row]], self._offsets[row].tolist()
        for (name, dtype, shape, strides), offset in zip(layout, offsets, strict=False):
            elements = self._typed.get(dtype)
            if elements is None:
                elements = self._view(dtype)
            result[name] = elements.as_strided(shape, strides, offset // dtype.itemsize)
        if not self._verified[row]:
            if checksum(_bytes_of(tensor) for tensor in result.values()) != self._checksums[row]:
                return None
            self._verified[row] = True
        return result

    def _view(self, dtype: torch.dtype) -> Tensor:
        """The whole file as elements of a type; one operation then makes a tensor of it, not three."""
        if self._bytes is None:
            self._bytes = _mapped(self.path, self.size)
        whole = self.size // dtype.itemsize * dtype.itemsize
        self._typed[dtype] = self._bytes[:whole].view(dtype)
        return self._typed[dtype]


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides = [1]
    for side in reversed(shape[1:]):
        strides.insert(0, strides[0] * side)
    return tuple(strides[: len(shape)])


def _mapped(path: Path, size: int) -> Tensor:
    """The bytes of a file as a uint8 tensor over a private map: pages are read when touched, the file is
    never changed, and no file descriptor stays open."""
    import torch

    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
