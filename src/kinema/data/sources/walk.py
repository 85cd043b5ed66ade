"""A folder and those in it, local or remote, one at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from kinema.data.files import join, list_folder, local_path
from kinema.data.records import MediaError

from .kinds import is_hidden


@dataclass(frozen=True)
class Folder:
    prefix: str
    """Path from the root of the walk, with a slash at its end; "" for the root."""
    names: list[str]
    """Names of its files, sorted, the hidden ones too."""
    hidden: int = 0
    """How many hidden folders are in it; they are not entered."""
    trouble: str = ""
    """Why it cannot be read."""


def walk(root: str, skip: Collection[str] = ()) -> Iterator[Folder]:
    """Every folder from ``root`` down. Links are followed, but no folder is entered twice.

    ``skip``: locations of folders and files within that are none of it, as `same_place` writes them.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        here = join(root, prefix.rstrip("/")) if prefix else root
        try:
            if not _is_new(here, seen):
                continue
            entries = list_folder(here)
        except MediaError as error:
            yield Folder(prefix, [], trouble=str(error).removeprefix(f"{here} "))
            continue
        if skip:
            entries = [entry for entry in entries if same_place(entry.location) not in skip]
        folders = [entry.name for entry in entries if entry.is_folder]
        pending += [f"{prefix}{name}/" for name in folders if not is_hidden(name)]
        hidden = sum(is_hidden(name) for name in folders)
        yield Folder(prefix, [entry.name for entry in entries if not entry.is_folder], hidden)


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder was not entered before under another name. Storages have no links."""
    path = local_path(folder)
    if path is None:
        return True
    try:
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{folder} cannot be read: {error.strerror or error}", "missing") from error
    new = (status.st_dev, status.st_ino) not in seen
    seen.add((status.st_dev, status.st_ino))
    return new


def same_place(location: str) -> str:
    """One way to write a location, so that two can be compared."""
    path = local_path(location)
    return location.rstrip("/") if path is None else os.path.realpath(path)
