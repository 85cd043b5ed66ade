"""Reading shards: each has an index file beside it, so that a cache of millions of entries opens in seconds.

The **index** (``*.index``) says where the tensors of each entry lie: a head, then offsets, layouts, checksums and
keys of all rows, sorted by key, then the distinct layouts as JSON. It is made from the shard's own header by whoever
opens the shard first, is mapped rather than kept in memory, and may be lost at any time.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .segments import (
    COPY_BYTES,
    FORMAT,
    INDEX,
    KEY_BYTES,
    Header,
    Stored,
    entry_checksum,
    parse_header,
    publish,
    torch_dtype,
    write_all,
    write_shard,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX_HEAD = struct.Struct("<8sQIIII")
"""magic, bytes of the shard, rows, tensors of an entry at most, bytes of the layouts, CRC-32 of all that follows."""
INDEX_MAGIC = b"kindex 2"


class Place(NamedTuple):
    """A tensor of an entry."""

    name: str
    type_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    """Bytes."""


class Shard:
    """A sealed file of entries, mapped when first read. Tensors are views of the private map, not copies."""

    def __init__(self, path: Path, table: bytes | None = None) -> None:
        """Read the index, made anew where it is missing, or take ``table`` for it. ValueError where the file is no
        whole shard."""
        self.path = path
        self.size = path.stat().st_size
        index = path.with_suffix(INDEX)
        given, table = table is not None, table or _read_index(index, self.size)
        if table is None:
            table = build_index(path)
            with suppress(OSError):  # no space, or not ours to write: then it stays in memory
                publish(index, lambda out: write_all(out, (table,)), secrets.token_hex(4), durable=False)
        _, _, self.rows, self._width, self._layouts_size, _ = INDEX_HEAD.unpack_from(table)
        self._prefixes: np.ndarray | None = prefixes_of(self._columns(np.frombuffer(table, np.uint8))[3])
        self._table = np.frombuffer(table, np.uint8)
        if not given:
            with suppress(OSError, RuntimeError):
                self._table = _mapped(index, len(table)).numpy()
        self._offsets, self._layout, self.checksums, self.keys = self._columns(self._table)
        self._offset_views, self._layout_views = self._offsets.ravel().data, self._layout.data
        self._key_bytes = self.keys.ravel().data
        self._layouts: list[tuple[Place, ...]] = []
        self._verified = bytearray()
        self._bytes: Tensor | None = None
        self._typed: dict[torch.dtype, Tensor] = {}

    def key(self, row: int) -> bytes:
        """The key of an entry."""
        return bytes(self._key_bytes[row * KEY_BYTES : (row + 1) * KEY_BYTES])

    def _columns(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(offsets [rows, width], layouts [rows], checksums [rows], keys [rows, 20]), all views."""
        widths = (8 * self._width, 4, 4, KEY_BYTES)
        ends = list(accumulate((self.rows * width for width in widths), initial=INDEX_HEAD.size))
        parts = [table[first:last] for first, last in pairwise(ends)]
        offsets = parts[0].view("<i8").reshape(self.rows, self._width)
        return offsets, parts[1].view("<u4"), parts[2].view("<u4"), parts[3].reshape(self.rows, KEY_BYTES)

    def prefixes(self) -> np.ndarray:
        """uint64 [rows], ascending: the first 8 bytes of each key. Kept for the first caller alone."""
        prefixes, self._prefixes = self._prefixes, None
        return prefixes_of(self.keys) if prefixes is None else prefixes

    @property
    def layouts(self) -> list[tuple[Place, ...]]:
        """The distinct shapes of entries; read when the first entry is."""
        if not self._layouts and self.rows:
            text = self._table[len(self._table) - self._layouts_size :].tobytes()
            layouts = [
                _layout(tuple((name, dtype, tuple(shape)) for name, dtype, shape in row)) for row in json.loads(text)
            ]
            self._verified = bytearray(self.rows)
            self._layouts = layouts  # last: another thread may be reading
        return self._layouts

    def sizes(self) -> np.ndarray:
        """int64 [rows]: bytes of each entry."""
        each = np.array([sum(place.size for place in layout) for layout in self.layouts], np.int64)
        return each[self._layout] if self.rows else np.zeros(0, np.int64)

    def read(self, row: int) -> dict[str, Tensor] | None:
        """The tensors of an entry; None where its checksum, verified at its first reading, does not hold."""
        layout = (self._layouts or self.layouts)[self._layout_views[row]]
        first = row * self._width
        result = {}
        for name, _, dtype, shape, strides, _ in layout:
            elements = self._typed.get(dtype)
            if elements is None:
                elements = self._view(dtype)
            result[name] = elements.as_strided(shape, strides, self._offset_views[first] // dtype.itemsize)
            first += 1
        if not self._verified[row]:
            if entry_checksum(self._pieces(row, layout)) != self.checksums[row]:
                return None
            self._verified[row] = True
        return result

    def _view(self, dtype: torch.dtype) -> Tensor:
        """The whole file as elements of a type; one operation then makes a tensor of it, not three."""
        whole = self.size // dtype.itemsize * dtype.itemsize
        self._typed[dtype] = self._file[:whole].view(dtype)
        return self._typed[dtype]

    @property
    def _file(self) -> Tensor:
        if self._bytes is None:
            self._bytes = _mapped(self.path, self.size)
        return self._bytes

    def _pieces(self, row: int, layout: tuple[Place, ...]) -> Iterator[np.ndarray]:
        """The bytes of an entry, cut as its checksum was taken."""
        data = self._file.numpy()
        for place, start in zip(layout, self._offsets[row].tolist(), strict=False):
            for first in range(start, start + place.size, COPY_BYTES):
                yield data[first : min(first + COPY_BYTES, start + place.size)]

    def stored(self, rows: Iterable[int]) -> Iterator[Stored]:
        """Where the tensors of some entries lie in the file."""
        for row in rows:
            key = self.key(row).hex()
            for place, offset in zip(self.layouts[self._layout[row]], self._offsets[row].tolist(), strict=False):
                yield f"{key}/{place.name}", place.type_name, place.shape, offset, place.size

    def copy(self, kept: np.ndarray, path: Path) -> int:
        """Write a shard of the rows that bool [rows] ``kept`` names; how many were damaged and are not in it."""
        rows = np.flatnonzero(kept).tolist()
        keys: dict[str, int | None] = {self.key(row).hex(): int(self.checksums[row]) for row in rows}
        damaged: list[str] = []
        with self.path.open("rb") as file:

            def write(out: int) -> None:
                damaged.extend(write_shard(file.fileno(), keys, self.stored(rows), out))

            publish(path, write, secrets.token_hex(4))
        return len(damaged)


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """uint64 [n]: the first 8 bytes of the keys uint8 [n, 20], in the order of the keys."""
    return keys[:, :8].copy().view(">u8").ravel().astype(np.uint64)


def build_index(path: Path) -> bytes:
    """The index of a shard, from its own header. ValueError where the file is no whole shard."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError("its header is cut short")
        collects = gc.isenabled()
        gc.disable()  # a hundred thousand small objects that hold no cycles: looking for some doubles the time
        try:
            header, metadata, data = parse_header(start + file.read(length))
            if metadata.get("format") != FORMAT:
                raise ValueError(f"it is not of the format '{FORMAT}'")
            if max((info["data_offsets"][1] for info in header.values()), default=0) + data != size:
                raise ValueError("it is cut short")
            return _index_of(header, data, json.loads(metadata["checksums"]), size)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error) as error:
            raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
        finally:
            if collects:
                gc.enable()


def _index_of(header: Header, data: int, checksums: Mapping[str, int], size: int) -> bytes:
    places: dict[str, list[tuple[str, str, tuple[int, ...], int]]] = {key: [] for key in sorted(checksums)}
    for name, info in header.items():
        key, tensor = name[: 2 * KEY_BYTES], name[2 * KEY_BYTES + 1 :]
        if name[2 * KEY_BYTES] != "/":
            raise ValueError(f"the tensor {name} belongs to no entry")
        dtype, shape, (first, last) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        if torch_dtype(dtype).itemsize * prod(shape) != last - first:
            raise ValueError(f"the shape and the size of {name} do not agree")
        places[key].append((tensor, dtype, shape, data + first))
    width = max((len(tensors) for tensors in places.values()), default=0)
    offsets, layout = np.zeros((len(places), width), "<i8"), np.zeros(len(places), "<u4")
    numbers: dict[tuple[Any, ...], int] = {}
    for row, tensors in enumerate(places.values()):
        offsets[row, : len(tensors)] = [offset for *_, offset in tensors]
        layout[row] = numbers.setdefault(tuple(tensor[:3] for tensor in tensors), len(numbers))
    crc = np.array([checksums[key] for key in places], "<u4")
    keys, text = bytes.fromhex("".join(places)), json.dumps(list(numbers), separators=(",", ":")).encode()
    if len(keys) != KEY_BYTES * len(places):
        raise ValueError("a key is not of the expected length")
    body = b"".join((offsets.tobytes(), layout.tobytes(), crc.tobytes(), keys, text))
    return INDEX_HEAD.pack(INDEX_MAGIC, size, len(places), width, len(text), zlib.crc32(body)) + body


def _read_index(path: Path, shard_size: int) -> bytes | None:
    """An index file; None where there is none, it is damaged, or it belongs to another file."""
    try:
        table = path.read_bytes()
    except OSError:
        return None
    if len(table) < INDEX_HEAD.size:
        return None
    magic, size, _, _, _, crc = INDEX_HEAD.unpack_from(table)
    whole = magic == INDEX_MAGIC and size == shard_size and zlib.crc32(memoryview(table)[INDEX_HEAD.size :]) == crc
    return table if whole else None


@lru_cache(maxsize=1 << 16)
def _layout(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[Place, ...]:
    """Shared by all shards: there are few layouts and many shards."""
    result = []
    for name, type_name, shape in tensors:
        dtype = torch_dtype(type_name)
        strides = tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()
        result.append(Place(name, type_name, dtype, shape, strides, dtype.itemsize * prod(shape)))
    return tuple(result)


def _mapped(path: Path, size: int) -> Tensor:
    """The bytes of a file as a uint8 tensor over a private map: pages are read when touched, the file is
    never changed, and no file descriptor stays open."""
    import torch

    path.stat()  # FileNotFoundError where it is gone; torch would raise another
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
