"""Facts about files that are dear to find and cheap to keep: content hashes, what examining them gave.

They are filed under the file's path, size and modification time, so they need no upkeep, and may be lost at any time.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from .buckets import Bucket, Clip
from .examine import Item
from .records import MediaInfo, Record
from .segments import write_all
from .writer import FULL

EXAMINED = "examined 1"
"""Raise the number whenever probing or examining the same file would give something else."""


class FactStore(MutableMapping[str, str]):
    """A mapping of strings that many processes may add to, each in a file of its own under one directory."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._facts: dict[str, str] = {}
        self._read: dict[str, int] = {}
        self._descriptor = -1
        self._lock = threading.Lock()  # several threads examine files
        self.refresh()

    def refresh(self) -> None:
        """Read what was added since, by any process. A line that is not whole yet is left for the next time."""
        for path in sorted(self.directory.glob("*.facts")):
            done = self._read.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(done)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._read[path.name] = done + whole
            for line in data[:whole].splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue  # damaged: the fact is found anew
                self._facts[key] = value

    def __getitem__(self, key: str) -> str:
        return self._facts[key]

    def __setitem__(self, key: str, value: str) -> None:
        self._facts[key] = value
        with self._lock:
            try:
                if self._descriptor < 0:
                    path = self.directory / f"{secrets.token_hex(6)}.facts"
                    self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                write_all(self._descriptor, (json.dumps([key, value]).encode() + b"\n",))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self.close()  # half a line may have been written: it ends that file

    def __delitem__(self, key: str) -> None:
        del self._facts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def close(self) -> None:
        """Close the file; it is opened anew when something is added."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def items_to_text(items: list[Item]) -> str:
    """What examining one file gave, without its record."""
    rows = [[asdict(i.info), asdict(i.bucket), asdict(i.clip), i.group, list(i.notes)] for i in items]
    return json.dumps(rows, default=str)  # the one value that JSON does not know is a Fraction


def items_from_text(record: Record, text: str) -> list[Item]:
    """The inverse of `items_to_text`. ValueError, TypeError or KeyError where the text is of another version."""
    return [
        Item(replace(record, kind=info["kind"]), _info(info), Bucket(**bucket), Clip(**clip), group, tuple(notes))
        for info, bucket, clip, group, notes in json.loads(text)
    ]  # fmt: skip


def _info(row: dict[str, Any]) -> MediaInfo:
    return MediaInfo(**{**row, "time_base": Fraction(row["time_base"]), "notes": tuple(row["notes"])})
