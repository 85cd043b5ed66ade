"""Facts about files that are dear to find and cheap to keep: content hashes, what probing and examining gave.

They are filed under the file's location, size and modification time, so they need no upkeep, and may be lost at any
time.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from dataclasses import astuple, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import MediaInfo
from .segments import TEMPORARY, write_all
from .writer import FULL

if TYPE_CHECKING:
    from .examine import Looked

EXAMINED = "examined 2"
PROBED = "probed 1"
"""Raise the numbers whenever examining or probing the same file would give something else."""
OPEN_FILES = 64
"""So many files of facts are kept open for reading."""
OFFSET_BITS = 40
"""A place is the number of a file, and after it so many bits of offset."""
SEPARATOR = b'", "'
"""Between a key and its value, as JSON writes them; inside either, the quotation mark would be escaped."""


class FactStore(MutableMapping[str, str]):
    """A mapping of strings that many processes may add to, each in a file of its own under one directory.

    In memory it holds where each fact is, not the fact: about 100 bytes each.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._lock = threading.Lock()  # several threads examine files
        self._begin()

    def _begin(self) -> None:
        self._places: dict[int, int] = {}  # by a hash of the key
        self._unwritten: dict[str, str] = {}
        self._numbers: dict[str, int] = {}  # of files, by name
        self._names: list[str] = []
        self._ends: list[int] = []  # how far each file is known
        self._own = -1
        self._descriptor = -1
        self._readers: OrderedDict[int, int] = OrderedDict()
        self._unread: set[int] = set()  # files that could not be read just now
        self.refresh()

    def refresh(self) -> None:
        """Find what was added since, by any process. A line that is not whole yet is left for the next time."""
        for path in sorted(self.directory.glob("*.facts"), key=_changed):  # what was found last counts
            number = self._number(path.name)
            if number == self._own:
                continue
            try:
                with path.open("rb") as file:
                    self._ends[number] = self._index(number, file, self._ends[number])
                self._unread.discard(number)
            except OSError:  # gone, or storage that does not answer: its facts are found anew
                self._unread.add(number)

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
            self._ends.append(0)
        return self._numbers[name]

    def _index(self, number: int, file: Any, offset: int) -> int:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            key, found, _ = line.partition(SEPARATOR)
            if found and key.startswith(b'["'):  # else damaged: the fact is found anew
                self._places[_hashed(key[2:])] = number << OFFSET_BITS | offset
            offset += len(line)
        return offset

    def __getitem__(self, key: str) -> str:
        if key in self._unwritten:
            return self._unwritten[key]
        found = self._read(self._places[_hashed(_encoded(key))])
        if found is None or found[0] != key:  # damaged, or another key of the same hash
            raise KeyError(key)
        return found[1]

    def __setitem__(self, key: str, value: str) -> None:
        line = json.dumps([key, value]).encode() + b"\n"
        with self._lock:
            try:
                if self._descriptor < 0:
                    self._create()
                write_all(self._descriptor, (line,))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._finish()  # half a line may have been written: it ends that file
                self._unwritten[key] = value
                return
            self._places[_hashed(_encoded(key))] = self._own << OFFSET_BITS | self._ends[self._own]
            self._ends[self._own] += len(line)
            self._unwritten.pop(key, None)

    def _create(self) -> None:
        name = f"{secrets.token_hex(6)}.facts"
        self._descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._own = self._number(name)

    def __delitem__(self, key: str) -> None:
        """Forget a fact in this process."""
        self[key]
        if self._unwritten.pop(key, None) is None:
            del self._places[_hashed(_encoded(key))]

    def __iter__(self) -> Iterator[str]:
        for place in list(self._places.values()):
            if (found := self._read(place)) is not None and found[0] not in self._unwritten:
                yield found[0]
        yield from list(self._unwritten)

    def __len__(self) -> int:
        return len(self._places) + sum(_hashed(_encoded(key)) not in self._places for key in self._unwritten)

    def _read(self, place: int) -> tuple[str, str] | None:
        """The (key, value) there; None where the file is gone, damaged, or cannot be read now."""
        number, offset = place >> OFFSET_BITS, place & (1 << OFFSET_BITS) - 1
        with self._lock:
            try:
                descriptor = self._reader(number)
                line, size = b"", 512
                while b"\n" not in line:
                    line = os.pread(descriptor, size, offset)
                    if len(line) < size and b"\n" not in line:
                        return None
                    size *= 4
            except OSError:
                self._unread.add(number)
                return None
        try:
            key, value = json.loads(line[: line.index(b"\n")])
        except ValueError:
            return None
        return key, value

    def _reader(self, number: int) -> int:
        if number in self._readers:
            self._readers.move_to_end(number)
            return self._readers[number]
        if len(self._readers) >= OPEN_FILES:
            os.close(self._readers.popitem(last=False)[1])
        self._readers[number] = os.open(self.directory / self._names[number], os.O_RDONLY)
        return self._readers[number]

    def compact(self) -> int:
        """Put all facts into one file, without those of other versions; how many files fewer there are.

        Each process that found something left a file, which every start reads. What another process adds to one
        meanwhile is lost, as facts may be; where the disk is full all stays as it is, and so does a file that cannot be
        read now.
        """
        self.close()
        self.refresh()
        old = [path for path in map(self.directory.joinpath, self._names) if path.exists()]
        if len(old) < 2:
            return 0
        name = secrets.token_hex(6)
        new, unfinished = self.directory / f"{name}.facts", self.directory / f"{name}-0000{TEMPORARY}"
        try:
            with unfinished.open("wb") as file:
                for place in sorted(self._places.values()):
                    if (found := self._read(place)) is not None and _of_this_version(found[0]):
                        file.write(json.dumps(found).encode() + b"\n")
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise
            return 0
        unfinished.replace(new)
        read = [path for path in old if self._numbers[path.name] not in self._unread]
        for path in read:
            path.unlink(missing_ok=True)
        self.close()
        self._begin()
        return max(0, len(read) - 1)

    def _finish(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = self._own = -1

    def close(self) -> None:
        """Close the files; they are opened anew when something is added or read."""
        with self._lock:
            self._finish()
            while self._readers:
                os.close(self._readers.popitem()[1])


def _changed(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name


def _of_this_version(key: str) -> bool:
    """False for what was found by an examination or a probe that would give something else today."""
    kind = key.partition(" ")[0]
    return key.startswith((EXAMINED, PROBED)) or kind not in {one.partition(" ")[0] for one in (EXAMINED, PROBED)}


def _encoded(key: str) -> bytes:
    """The key as it stands in a line, without its quotation marks."""
    return json.dumps(key)[1:-1].encode()


def _hashed(encoded: bytes) -> int:
    """60 bits, so that the integer takes 32 bytes; of this process alone."""
    return hash(encoded) & (1 << 60) - 1


def info_to_text(info: MediaInfo) -> str:
    """What a file holds, as a short text."""
    return json.dumps(_info_row(info), separators=(",", ":"))


def info_from_text(text: str) -> MediaInfo:
    """The inverse of `info_to_text`. ValueError, TypeError or KeyError where the text is of another version."""
    return _info(json.loads(text))


def looked_to_text(looked: Looked) -> str:
    """What looking into the files of a record gave, where nothing was left out."""
    assert looked.info is not None and not looked.left_out
    return json.dumps([_info_row(looked.info), list(looked.notes)], separators=(",", ":"))


def looked_from_text(text: str) -> Looked:
    """The inverse of `looked_to_text`. ValueError, TypeError or KeyError where the text is of another version."""
    from .examine import Looked

    info, notes = json.loads(text)
    return Looked(_info(info), tuple(notes))


def _info_row(info: MediaInfo) -> list[Any]:
    return [str(value) if isinstance(value, Fraction) else value for value in astuple(info)]


def _info(row: list[Any]) -> MediaInfo:
    names = [field.name for field in fields(MediaInfo)]
    values = dict(zip(names, row, strict=True))
    return MediaInfo(**{**values, "time_base": Fraction(values["time_base"]), "notes": tuple(values["notes"])})
