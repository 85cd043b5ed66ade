"""The identity of files: a hash of their content, found when it is first needed and remembered; or of their location,
where locations are trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .files import absolute
from .media import content_hash, memo_key
from .records import MediaError

if TYPE_CHECKING:
    from .facts import FactStore
    from .records import Record


class Contents:
    """``contents[location]`` identifies the content of a file. Safe to use from several threads.

    Reads a file once, unless ``facts`` know its hash; MediaError where it cannot be read. With ``trust`` no file is
    read, and a file stands for itself as long as its location is the same.
    """

    def __init__(self, facts: FactStore, trust: bool) -> None:
        self._facts, self.trust = facts, trust
        self._known: dict[str, str] = {}

    def __getitem__(self, location: str) -> str:
        if self.trust:
            return "at " + hashlib.blake2b(absolute(location).encode(), digest_size=16).hexdigest()
        found = self._known.get(location)
        if found is None:
            found = self._known[location] = content_hash(location, self._facts)
        return found

    def read(self, record: Record) -> MediaError | None:
        """Find the content of all files of a record; what was wrong with one."""
        try:
            for path in record.files:
                self[path]
        except MediaError as error:
            return error
        return None

    def is_known(self, location: str) -> bool:
        """Whether it can be told without reading the file."""
        if self.trust or location in self._known:
            return True
        try:
            return memo_key(location) in self._facts
        except MediaError:
            return False

    @property
    def found(self) -> Mapping[str, str]:
        """What has been found so far, by location."""
        return self._known

    def update(self, found: Mapping[str, str]) -> None:
        """Learn what other processes found."""
        self._known.update(found)

    def unchanged(self, location: str) -> bool:
        """Whether a file still has the content that was found, if it was; reads it again where its size or time
        changed."""
        if self.trust or location not in self._known:
            return True
        return content_hash(location, self._facts) == self._known[location]
