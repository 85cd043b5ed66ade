"""Where each member of a tar file lies, so that one can be read without the others and without unpacking.

The headers of a tar are read once per process; what stays in memory is 24 bytes a member.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from kinema.errors import UserError

from .files import FileStatus, is_remote, open_binary, status
from .records import MediaError

if TYPE_CHECKING:
    import numpy as np

KEPT_MEMBERS = 50_000_000
"""The indices of the tars that were used last are kept, as many as hold so many members together: 1.2 GB at most."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""How compressed files begin."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarContents:
    """What the headers of a tar say."""

    members: list[Member]
    """Regular files, in their order in the tar."""
    others: list[str]
    """Names of what is neither a regular file nor a folder: links, devices, files with holes."""
    damage: str = ""
    """Why what comes after the last member cannot be read; "" where the tar is whole."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Contents of the members that were asked for, by name."""


def read_contents(location: str, wanted: Callable[[str], bool] | None = None) -> TarContents:
    """Read the headers of a tar, front to back, and remember where its members lie.

    ``wanted`` says by the name whether a member's contents are kept on the way: captions and the like, so that
    a remote tar is gone through once. Raises MediaError where the tar is missing or no tar, UserError where it is
    compressed.
    """
    found = _status(location)
    contents = _read(location, found, wanted)
    _remember(location, found, contents.members)
    return contents


def _read(location: str, found: FileStatus, wanted: Callable[[str], bool] | None = None) -> TarContents:
    contents = TarContents([], [])
    try:
        with open_binary(location) as file:
            damage = _walk(_open_tar(location, file), file, found.size, contents, wanted)
    except OSError as error:
        raise MediaError(f"{location} cannot be read: {error.strerror or error}", "unreachable") from error
    return replace(contents, damage=damage)


def _open_tar(location: str, file: BinaryIO) -> tarfile.TarFile:
    head = file.read(8)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{location} is compressed ({name}): single members of it cannot be read. Unpack it to a plain .tar; "
                "pictures and videos are compressed already"
            )
    file.seek(0)
    try:
        return tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise MediaError(f"{location} is no tar file, or its beginning is damaged ({error})", "damaged tar") from error


def _walk(
    tar: tarfile.TarFile, file: BinaryIO, size: int, contents: TarContents, wanted: Callable[[str], bool] | None
) -> str:
    """Add the members of a tar to ``contents``; the damage at which they end, or ""."""
    ended = False
    tar.offset = 0
    while True:  # not TarFile.next, which takes a damaged header for the end
        start = tar.offset
        try:
            member, special = _next_member(tar, file)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            ended = True  # what comes after the end mark is looked at too: tars are put together with cat
            tar.offset += tarfile.BLOCKSIZE
            continue
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            return "" if ended else "it has no end mark: it was cut short, or never finished"
        except (tarfile.TarError, ValueError) as error:
            return f"the header at byte {start:,} is damaged ({error})"
        ended = False
        if special:
            contents.others.append(special)
        if member is None:
            continue
        if 0 <= size < member.offset + member.size:
            return f"it ends within {member.name}, at byte {size:,} of {member.offset + member.size:,}"
        contents.members.append(member)
        if wanted is not None and wanted(member.name):
            file.seek(member.offset)
            contents.texts[member.name] = file.read(member.size)


def _next_member(tar: tarfile.TarFile, file: BinaryIO) -> tuple[Member | None, str]:
    """The member whose header is at ``tar.offset``, which moves on; or the name of a special one; or, for a folder,
    neither. Raises tarfile's errors."""
    file.seek(tar.offset)
    if not tar.pax_headers:
        member = _plain_member(file.read(tarfile.BLOCKSIZE), tar.offset + tarfile.BLOCKSIZE)
        if member is not None:
            tar.offset = member.offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            return member, ""
        file.seek(tar.offset)
    info = tarfile.TarInfo.fromtarfile(tar)
    if info.isreg() and info.sparse is None:
        return Member(info.name, info.offset_data, info.size), ""
    return None, "" if info.isdir() else info.name


def _plain_member(header: bytes, offset: int) -> Member | None:
    """The member of a header that holds nothing out of the ordinary, as nearly all do, and in a tenth of the time that
    tarfile takes; None where tarfile has to look."""
    if len(header) < tarfile.BLOCKSIZE or header[156] not in b"0\0" or header[124] & 0x80 or header[345]:
        return None
    field = header[148:156]
    try:
        if int(field.strip(b"\0 "), 8) != sum(header) - sum(field) + 8 * ord(" "):
            return None
        size = int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None
    name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return None if name.endswith("/") else Member(name, offset, size)


@dataclass(frozen=True)
class _Index:
    """Spans of members by the hashes of their names. Of two members of one name the later counts, as in tar itself."""

    keys: np.ndarray
    """uint64 [N], sorted."""
    spans: np.ndarray
    """int64 [N, 2]: offset, size."""

    def find(self, name: str) -> tuple[int, int] | None:
        key = _key(name)
        place = int(self.keys.searchsorted(key))
        if place == len(self.keys) or int(self.keys[place]) != key:
            return None
        offset, size = self.spans[place].tolist()
        return offset, size


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class _Kept(OrderedDict[tuple[str, FileStatus], _Index]):
    """Indices by tar, the one that was used last at the end."""

    members = 0

    def keep(self, tar: tuple[str, FileStatus], index: _Index) -> None:
        replaced = self.pop(tar, None)
        self.members += len(index.keys) - (0 if replaced is None else len(replaced.keys))
        self[tar] = index
        while len(self) > 1 and self.members > KEPT_MEMBERS:
            self.members -= len(self.popitem(last=False)[1].keys)


_indices = _Kept()
_lock = threading.Lock()


def _remember(location: str, found: FileStatus, members: list[Member]) -> _Index:
    import numpy as np

    latest = {_key(member.name): (member.offset, member.size) for member in members}
    keys = np.array(sorted(latest), np.uint64)
    spans = np.array([latest[key] for key in keys.tolist()], np.int64).reshape(-1, 2)
    index = _Index(keys, spans)
    with _lock:
        _indices.keep((location, found), index)
    return index


def member_span(tar: str, name: str) -> tuple[int, int]:
    """(offset, size) of a member in its tar. MediaError, with the code "missing", where there is none."""
    found = _status(tar)
    with _lock:
        index = _indices.get((tar, found))
        if index is not None:
            _indices.move_to_end((tar, found))
    if index is None:
        index = _remember(tar, found, _read(tar, found).members)
    span = index.find(name)
    if span is None:
        raise MediaError(f"{tar}::{name} cannot be read: the tar has no member of this name", "missing")
    return span


def _status(tar: str) -> FileStatus:
    return _remote_status(tar) if is_remote(tar) else status(tar)


@lru_cache(maxsize=2**16)
def _remote_status(tar: str) -> FileStatus:
    """A remote tar is asked once per process: a question costs as much as reading a member."""
    return status(tar)


def open_member(tar: str, name: str) -> BinaryIO:
    """A member of a tar as a file to read and seek; nothing else of the tar is read."""
    offset, size = member_span(tar, name)
    return cast(BinaryIO, io.BufferedReader(_Span(open_binary(tar), offset, size), 2**16))


class _Span(io.RawIOBase):
    """A stretch of an open file as a file of its own. Closes the file with itself."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._place))
        if wanted == 0:
            return 0
        self._file.seek(self._offset + self._place)
        data = self._file.read(wanted)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
