"""The cache of encodings: content-addressed, written by many, never locked.

An entry's key is a hash of everything that its value depends on, so that a changed file, caption, bucket,
transform or encoder is a miss and never a stale hit. Each writer appends to segment files of its own
(`kinema.data.segments`) and seals them as safetensors shards; readers merge what they find. A crash at any
moment loses the entry that was being written; a power cut loses what the last seconds wrote.
`kinema.data.cache_tools` verifies, prunes and measures it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError
from kinema.sizes import readable_bytes

from .cache_index import KeyIndex, chunks
from .segments import FRAME, INDEX, KEY_BYTES, OPEN, SEALED, TEMPORARY, OpenSegment, seal, unpack
from .shard import Shard
from .writer import FULL, STALE_SECONDS, CacheFull, SegmentWriter, abandoned, full_message

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cache", "CacheFull", "entry_key"]

SEGMENT_BYTES = 512 << 20
"""A segment is sealed when it has grown to so much."""
SEGMENT_ENTRIES = 16384
"""... or holds so many entries."""


def entry_key(*parts: str | float | tuple[Any, ...] | None) -> bytes:
    """The key of an entry: a hash of everything that its value depends on."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES, person=b"kinema cache").digest()


class Cache:
    """Entries by key, each a dict of named CPU tensors. One object serves as reader and as one writer.

    >>> with Cache(directory) as cache:
    ...     key = entry_key("latents", file_hash, encoder)
    ...     if key not in cache:
    ...         cache.put(key, {"latents": latents})
    ...     latents = cache.get(key)["latents"]
    """

    def __init__(
        self,
        directory: Path | str,
        segment_bytes: int = SEGMENT_BYTES,
        segment_entries: int = SEGMENT_ENTRIES,
    ) -> None:
        """Open a cache and read its indices; makes the directory. UserError where it cannot be used."""
        self.directory = Path(directory)
        self.segment_bytes, self.segment_entries = segment_bytes, segment_entries
        self.damaged: dict[str, str] = {}
        """Files that cannot be read, and why: what they held counts as missing."""
        self._writer = SegmentWriter(self.directory)
        self.index = KeyIndex()
        """The entries of the sealed shards."""
        self._known: set[str] = set()
        self._lock = threading.RLock()  # several threads may look for entries while one adds them
        self._segments: dict[str, OpenSegment] = {}
        self._loose: dict[bytes, tuple[OpenSegment, int, int]] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.refresh()
        except OSError as error:
            raise UserError(
                f"the cache directory {self.directory} cannot be used ({error.strerror or error}): "
                "set data.cache to a directory that you may write to"
            ) from error

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._loose or key in self.index

    def __len__(self) -> int:
        return len(self.index) + len(self._unsealed())

    def keys(self) -> Iterator[bytes]:
        """The keys of all entries that were there at the last `refresh` or were put since."""
        yield from self.index.keys()
        yield from self._unsealed()

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of ``keys`` that are not there, in their order; many times faster than asking for each."""
        result: list[bytes] = []
        for chunk in chunks(keys):
            absent = chunk[self.index.numbers(chunk) < 0].tobytes()
            rest = (absent[i : i + KEY_BYTES] for i in range(0, len(absent), KEY_BYTES))
            result += [key for key in rest if key not in self._loose]
        return result

    def loose(self) -> dict[bytes, int]:
        """Entries of open segments and their bytes."""
        return {key: length for key, (_, _, length) in dict(self._loose).items()}

    def _unsealed(self) -> list[bytes]:
        return [key for key in list(self._loose) if key not in self.index]

    def refresh(self) -> None:
        """See what other writers have added, or pruned, since."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        for _ in range(3):
            names = set(os.listdir(self.directory))
            if self._known - names:
                left = [shard for shard in self.index.shards if shard.path.name in names]
                self.index = KeyIndex().with_shards(left)
                self._known &= names
            new = sorted(name for name in names - self._known if name.endswith(SEALED))
            shards = [shard for name in new if (shard := self._open_shard(name)) is not None]
            self.index = self.index.with_shards(shards)
            self._known.update(shard.path.name for shard in shards)
            if not self._scan_open({n for n in names if n.endswith(OPEN)}):
                return  # otherwise a segment has just been sealed: look again

    def _open_shard(self, name: str) -> Shard | None:
        try:
            shard = Shard(self.directory / name)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self.damaged[name] = str(error)
            return None
        self.damaged.pop(name, None)
        return shard

    def _scan_open(self, names: set[str]) -> bool:
        """Read what is new in open segments; whether one vanished meanwhile."""
        vanished = False
        names = {n for n in names if Path(n).with_suffix(SEALED).name not in self._known}
        gone = [self._segments.pop(name) for name in self._segments.keys() - names]
        if gone:
            self._loose = {k: place for k, place in self._loose.items() if place[0] not in gone}
        for name in sorted(names):
            segment = self._segments.setdefault(name, OpenSegment(self.directory / name))
            try:
                for key, offset, length in segment.scan():
                    self._loose[key] = (segment, offset, length)
            except FileNotFoundError:
                vanished = True
            except (ValueError, OSError) as error:
                self.damaged[name] = str(error)
        return vanished

    def get(self, key: bytes) -> dict[str, Tensor]:
        """The tensors of an entry; KeyError where there is none, UserError where its file is damaged.

        Tensors of sealed shards are views of a private memory map: nothing is copied. Changing one in place
        would not reach the file, but later readers in this process: clone before you change.
        """
        for _ in range(3):
            damaged: Path | None = None
            try:
                for shard, row in self.index.find(key):
                    if (tensors := shard.read(row)) is not None:
                        return tensors
                    damaged = shard.path
                if (place := self._loose.get(key)) is not None:
                    segment, offset, length = place
                    if (payload := segment.read(offset, length)) is not None:
                        return unpack(payload)
                    damaged = segment.path
            except FileNotFoundError:
                pass  # sealed or pruned since: look where it is now
            else:
                if damaged is not None:
                    raise _damaged(damaged)
            self.refresh()
        raise KeyError(key.hex())

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> int:
        """Add an entry (nothing happens if its key is there already); gives the bytes written.

        `CacheFull` where the disk is full: the entries before are intact.
        """
        with self._lock:
            if key in self:
                return 0
            segment, offset, length = self._writer.append(key, tensors)
            self._segments[segment.path.name] = segment
            self._loose[key] = (segment, offset, length)
            if segment.end >= self.segment_bytes or self._writer.entries >= self.segment_entries:
                self.seal()
        return FRAME.size + length

    def seal(self) -> None:
        """Turn this writer's open segment into a shard. On a full disk it stays open, and readable."""
        with self._lock:
            if self._writer.finish():
                self.refresh()

    def adopt(self) -> int:
        """Seal the segments of writers that are gone, and clear away what they left; how many there were."""
        count = 0
        for segment in list(self._segments.values()):
            try:
                if abandoned(segment):
                    seal(segment, self._writer.name)
                    count += 1
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                if error.errno not in FULL:
                    raise
        for path in self.directory.glob(f"*{OPEN}"):
            if path.with_suffix(SEALED).name in self._known:  # its writer was killed between sealing and removing
                path.unlink(missing_ok=True)
                count += 1
        for path in self.directory.glob(f"*{TEMPORARY}"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:
                pass  # gone already, or not ours to remove
        for path in self.directory.glob(f"*{INDEX}"):
            if not path.with_suffix(SEALED).exists():
                path.unlink(missing_ok=True)
        if count:
            self.refresh()
        return count

    def writers(self) -> list[Path]:
        """Open segments of writers that live, or may live on another machine; not those of this object."""
        own = self._writer.segment
        return [path for path in sorted(self.directory.glob(f"*{OPEN}")) if own is None or path != own.path]

    def require_space(self, needed: int) -> None:
        """`CacheFull` if the disk has less than ``needed`` bytes left."""
        if needed > shutil.disk_usage(self.directory).free:
            what = f"about {needed} bytes ({readable_bytes(needed)}) are still to be written"
            raise CacheFull(full_message(self.directory, what))

    def close(self) -> None:
        """Seal what this writer has written. The object can be read, and written to, afterwards."""
        self.seal()


def _damaged(path: Path) -> UserError:
    return UserError(
        f"the cache file {path} is damaged: an entry does not match its checksum. "
        "Delete this file and start again: only what it held is encoded anew"
    )
