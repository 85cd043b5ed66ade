"""Patterns of locations: braces written out, and names matched folder by folder, local and remote alike."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from itertools import product

from kinema.errors import UserError

from .files import FolderEntry, exists, join, list_folder, local_path
from .records import MediaError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
MOST = 1_000_000
"""A pattern that writes out more names than this is taken for a slip."""


def braces(pattern: str) -> list[str]:
    """Every way to fill the braces: ``{a,b}`` one of the words, ``{08..11}`` the numbers with as many digits."""
    pieces = _BRACES.split(pattern)
    if any(mark in piece for piece in pieces[::2] for mark in "{}"):
        raise UserError(
            f"{pattern}: braces that are not closed or stand in one another; expected {{a,b}} or {{00..12}}"
        )
    choices = [_choices(pattern, piece) if n % 2 else [piece] for n, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST:
        raise UserError(f"{pattern} stands for {count:,} names: expected at most {MOST:,}")
    return ["".join(parts) for parts in product(*choices)]


def _choices(pattern: str, inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise UserError(f"{pattern}: {{{inside}}} is no choice; expected {{a,b}} or a range such as {{000..012}}")
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= MOST:
        raise UserError(f"{pattern}: {{{inside}}} is no range that can be written out; the smaller number comes first")
    digits = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [str(number).zfill(digits) for number in range(first, last + 1)]


def matches(pattern: str) -> Iterator[str]:
    """The locations that match a pattern without braces; one without wild cards is itself."""
    parts = pattern.split("/")
    first = next((n for n, part in enumerate(parts) if _WILD.search(part)), None)
    if first is None:
        yield pattern
        return
    root = "/".join(parts[:first])
    yield from _descend("/" if root == "" and first > 0 else root, tuple(parts[first:]))


def _descend(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
    part, rest = parts[0], parts[1:]
    if not _WILD.search(part):
        location = join(folder, part)
        if rest:
            yield from _descend(location, rest)
        elif exists(location):
            yield location
        return
    if part == "**":
        if rest:
            yield from _descend(folder, rest)
        for entry in _entries(folder):
            if entry.is_folder:
                if not _is_link(entry.location):  # links may lead in a circle
                    yield from _descend(entry.location, parts)
            elif not rest:
                yield entry.location
        return
    same = re.compile(fnmatch.translate(part)).fullmatch
    for entry in _entries(folder):
        if not same(entry.name):
            continue
        if not rest:
            yield entry.location
        elif entry.is_folder:
            yield from _descend(entry.location, rest)


def _is_link(location: str) -> bool:
    path = local_path(location)
    return path is not None and path.is_symlink()


def _entries(folder: str) -> list[FolderEntry]:
    """What is in a folder, hidden names aside; nothing where there is no such folder."""
    try:
        return [
            FolderEntry(entry.name, join(folder, entry.name), entry.is_folder)  # "a.tar" stays so, without "./"
            for entry in list_folder(folder or ".")
            if not entry.name.startswith(".")
        ]
    except MediaError as error:
        if error.code == "missing":
            return []
        raise
