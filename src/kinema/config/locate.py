"""Where each key of a TOML text stands.

tomllib gives values without positions, and tomlkit keeps the layout but tells no line either. This scanner
reads a text that tomllib has accepted, so it looks only for where keys and values begin and end; syntax is
tomllib's business.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

KeyPath = tuple[str | int, ...]
"""Keys from the root down; positions in arrays are integers: ``("data", "sources", 0, "path")``."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_STRINGS = (  # long and short ones; a long one may end in up to five quotes
    re.compile(r'"""(?:[^\\]|\\.)*?"""(?!")', re.DOTALL),
    re.compile(r"'''.*?'''(?!')", re.DOTALL),
    re.compile(r'"(?:[^"\\]|\\.)*"'),
    re.compile(r"'[^']*'"),
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of every key, table header and array entry of a well-formed TOML text.

    A key that is only implied (``a`` in ``a.b = 1`` or ``[a.b]``) has the line of its first mention, unless
    it has a header of its own.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        self.lines: dict[KeyPath, int] = {}
        self.entries: dict[KeyPath, int] = {}  # how many [[headers]] each array of tables has had so far

    def line(self) -> int:
        return bisect_right(self.starts, self.at)

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"TOML that tomllib accepted does not match {pattern.pattern} at {self.at}"
        self.at = match.end()
        return match.group()

    def document(self) -> None:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)

    def header(self) -> KeyPath:
        """``[a.b]`` or ``[[a.b]]``: the path that the pairs after it belong to."""
        line, brackets = self.line(), 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        keys = self.dotted_key()
        self.at += brackets
        path: KeyPath = ()
        for key in keys[:-1]:
            path += (key,)
            self.lines.setdefault(path, line)
            if path in self.entries:
                path += (self.entries[path] - 1,)
        path += (keys[-1],)
        if brackets == 1:
            self.lines[path] = line
            return path
        self.lines.setdefault(path, line)
        index = self.entries.get(path, 0)
        self.entries[path] = index + 1
        self.lines[(*path, index)] = line
        return (*path, index)

    def pair(self, table: KeyPath) -> None:
        line, path = self.line(), table
        for key in self.dotted_key():
            path += (key,)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(path)

    def dotted_key(self) -> list[str]:
        keys = []
        while True:
            self.skip(_SPACE)
            if self.text[self.at] in "\"'":
                quoted = self.skip(_STRINGS[2] if self.text[self.at] == '"' else _STRINGS[3])
                keys.append(tomllib.loads(f"key = {quoted}")["key"])
            else:
                keys.append(self.skip(_BARE_KEY))
            self.skip(_SPACE)
            if self.text[self.at] != ".":
                return keys
            self.at += 1

    def value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            long = self.text.startswith(first * 3, self.at)
            self.skip(_STRINGS[(0 if long else 2) + (first == "'")])
        elif first in "[{":
            self.container(path, is_array=first == "[")
        else:
            self.skip(_SCALAR)

    def container(self, path: KeyPath, is_array: bool) -> None:
        """An array or an inline table, its entries with their own positions."""
        self.at += 1
        index = 0
        while True:
            self.skip(_BLANK)
            mark = self.text[self.at]
            if mark in "]}":
                self.at += 1
                return
            if mark == ",":
                self.at += 1
            elif is_array:
                self.lines[(*path, index)] = self.line()
                self.value((*path, index))
                index += 1
            else:
                self.pair(path)
