"""Open a source: by its type, or by what lies at its path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from kinema.config.data import SourceConfig
from kinema.data.files import exists, expand, file_name, is_folder, is_pattern, is_remote, join, suffix
from kinema.errors import UserError

from .base import Source
from .folder import open_folder
from .kinds import is_hidden, kind_of
from .partners import partner_places
from .table import TABLE_EXTENSIONS, open_table
from .tar import open_tar
from .walk import walk

Type = Literal["folder", "table", "tar"]
TABLES = (*TABLE_EXTENSIONS, ".json")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
EXPECTED = "give a folder of media with captions, a table (.csv, .tsv, .parquet, .jsonl) or tar files (.tar)"


def open_source(config: SourceConfig, number: int, store: Path | None = None) -> Source:
    """The source that a configuration describes. Opens no media.

    ``number``: its place among the sources, from 0, for messages. ``store``: directory in which the rows of tables and
    tars are kept in the form that they are read in. UserError where nothing lies at its path, or no source.
    """
    name = config.name or source_name(config.path)
    kind: Type = config.type or _type_of(config, f"data.sources, number {number + 1}")
    opened: dict[Type, Callable[[], Source]] = {
        "folder": lambda: open_folder(config, name),
        "table": lambda: open_table(config, name, store),
        "tar": lambda: open_tar(config, name, store),
    }
    if kind != "folder":
        _require_path(config.path)
    return opened[kind]()


def source_name(path: str) -> str:
    """What a source without a name is called: the last part of its path."""
    name = file_name(path)
    if name in ("", ".", "..") and not is_remote(path):
        name = os.path.basename(os.path.realpath(path))
    return name or path


def _require_path(path: str) -> None:
    if not is_pattern(path) and not exists(path):
        raise UserError(f"{path} does not exist: {EXPECTED}")


def _type_of(config: SourceConfig, where: str) -> Type:
    path = config.path
    if is_pattern(path):
        return _type_of_pattern(path, where)
    if is_folder(path):
        return _type_of_folder(config, where)
    if path.lower().endswith(COMPRESSED_TARS):
        raise UserError(f"{where}: {path} is compressed: unpack it to a plain .tar, media are compressed already")
    kind = _type_by_suffix(path)
    if not exists(path):
        if kind is None:
            raise UserError(
                f"{where}: the folder {path} does not exist: give the folder of the media and their captions"
            )
        raise UserError(f"{where}: {path} does not exist: {EXPECTED}")
    if kind is None:
        raise UserError(f"{where}: {path} is a file, not a folder: {EXPECTED}")
    return kind


def _type_by_suffix(path: str) -> Type | None:
    return "tar" if suffix(path) == ".tar" else "table" if suffix(path) in TABLES else None


def _type_of_pattern(path: str, where: str) -> Type:
    kind = _type_by_suffix(path)
    if kind is not None:
        return kind
    found = expand(path)
    if not found:
        raise UserError(f"{where}: nothing matches {path}: {EXPECTED}")
    kinds = {_type_by_suffix(location) for location in found}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    raise UserError(
        f"{where}: {path} matches {found[0]}{' and others' if len(found) > 1 else ''}: patterns stand for tar files or "
        f"tables, all of one type; give each folder of media as a source of its own"
    )


def _type_of_folder(config: SourceConfig, where: str) -> Type:
    """A folder with tars and no media is one of shards, one with tables and no media is a table. The walk ends at the
    first media."""
    found: dict[str, str] = {}
    for folder in walk(config.path, partner_places(config)):
        if folder.trouble and not folder.prefix:
            raise UserError(f"{where}: the folder {config.path} {folder.trouble}")
        for name in folder.names:
            if is_hidden(name):
                continue
            if kind_of(name) is not None:
                return "folder"
            found.setdefault(suffix(name), folder.prefix + name)  # the root comes first
    if ".tar" in found:
        return "tar"
    tables = [found[ending] for ending in TABLE_EXTENSIONS if ending in found]
    if tables and all("/" in table for table in tables):
        pattern = join(config.path, f"**/*{suffix(tables[0])}")
        raise UserError(f"{where}: there are tables in folders of {config.path}, but no media: give {pattern}")
    return "table" if tables else "folder"
