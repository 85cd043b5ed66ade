"""The folder source: pictures and videos, with captions in a .txt of the same name beside each or in captions.json."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.data.files import exists, is_folder, is_remote, join
from kinema.data.records import Kind, LeftOut, Record
from kinema.errors import UserError

from .base import RecordList
from .caption_files import JSON_NAME, Settled, read_caption, read_caption_json, settle
from .kinds import BAD_NAME, SIDECARS, is_hidden, kind_of, shown_if_bad
from .partners import add_partners, partner_places
from .walk import Folder, walk

REMOTE_READERS = 32
"""Captions that are fetched at once from a storage: each takes a round trip, and hardly any bytes."""


def open_folder(config: SourceConfig, name: str) -> RecordList:
    """The media of a folder and of those in it, with their captions, by name. Reads captions and no media.

    Every file is accounted for: the counts "image", "video", "caption", "hidden", "sidecar" and "left out" add up to
    "files"; "empty caption" and "missing caption" count records that are used with "". Hidden folders count as one file
    each. Names in a captions.json that are no file are in `left_out` too, and counted as "caption without file".
    Raises UserError where the folder, or one of its control pictures or masks, is missing.
    """
    root = config.path.rstrip("/") or "/"
    if not is_folder(root):
        lies = "is a file" if exists(root) else "does not exist"
        raise UserError(f"the folder {root} {lies}: give the folder of the media and their captions")
    found = _look(root, name, config)
    records = _with_captions(found, _captions_of_all(found), config.captions or CaptionConfig())
    stems = {_stem(path) for path, _ in found.media}
    kept, missed, alone = add_partners(records, config, stems)
    for record in kept:
        found.counts[record.kind] += 1
    found.counts["left out"] += len(missed)
    found.counts.update(alone)
    left_out = sorted((*found.left_out, *missed), key=lambda entry: entry.path)
    return RecordList(config, name, kept, left_out, +found.counts)


@dataclass
class _Found:
    """What lies in the folder, by path from its root."""

    root: str
    source: str
    media: list[tuple[str, Kind]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Caption files by their path without extension."""
    tables: list[str] = field(default_factory=list)
    """Every captions.json."""
    others: set[str] = field(default_factory=set)
    """Files that are no media."""
    left_out: list[LeftOut] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def leave_out(self, path: str, code: str, reason: str, *, counted: str = "left out") -> None:
        self.left_out.append(LeftOut(join(self.root, path), reason, code, self.source))
        self.counts[counted] += 1


def _look(root: str, source: str, config: SourceConfig) -> _Found:
    """Walk the folder and sort its files; nothing is read."""
    found = _Found(root, source)
    for folder in walk(root, partner_places(config)):
        found.counts["files"] += len(folder.names) + folder.hidden + bool(folder.trouble)
        found.counts["hidden"] += folder.hidden
        if folder.trouble and not folder.prefix:
            raise UserError(f"the folder {root} {folder.trouble}")
        if folder.trouble:
            found.leave_out(folder.prefix.rstrip("/"), "unreadable folder", f"the folder {folder.trouble}")
        _sort_files(found, folder)
    found.media.sort()
    stems = {_stem(path) for path, _ in found.media}
    for stem, path in found.texts.items():
        if stem in stems:
            found.counts["caption"] += 1
        else:
            name = posixpath.basename(stem)
            reason = f"is a caption without media: no picture or video is named {name}"
            found.leave_out(path, "caption without media", reason)
    return found


def _sort_files(found: _Found, folder: Folder) -> None:
    for name in folder.names:
        path, suffix = folder.prefix + name, os.path.splitext(name)[1].lower()
        kind = kind_of(name)
        if is_hidden(name):
            found.counts["hidden"] += 1
        elif (shown := shown_if_bad(path)) is not None:
            found.leave_out(shown, "bad name", BAD_NAME)
        elif kind is not None:
            found.media.append((path, kind))
        elif suffix == ".txt":
            first = found.texts.setdefault(_stem(path), path)
            if first != path:
                reason = f"is a second caption beside {posixpath.basename(first)}: keep one"
                found.leave_out(path, "second caption", reason)
        elif name.lower() == JSON_NAME:
            found.tables.append(path)
            found.counts["caption"] += 1
        else:
            found.others.add(path)
            if suffix in SIDECARS:
                found.counts["sidecar"] += 1
            elif suffix == ".tar":
                reason = "is a tar file among other files: give it as a source of its own"
                found.leave_out(path, "unknown extension", reason)
            else:
                reason = f"{suffix or 'no extension'} is no known picture or video extension"
                found.leave_out(path, "unknown extension", reason)


@dataclass(frozen=True)
class _Captions:
    texts: dict[str, tuple[str, str]]
    """(caption, problem) of each media that has a caption file."""
    listed: dict[str, list[tuple[str, tuple[str, ...]]]]
    """(the captions.json, captions in it) of each media that one names."""


def _captions_of_all(found: _Found) -> _Captions:
    paths = [(path, found.texts[_stem(path)]) for path, _ in found.media if _stem(path) in found.texts]
    locations = [join(found.root, text) for _, text in paths]
    if is_remote(found.root):
        with ThreadPoolExecutor(REMOTE_READERS, thread_name_prefix="captions") as pool:
            read = list(pool.map(read_caption, locations))
    else:
        read = [read_caption(location) for location in locations]
    media = {path for path, _ in found.media}
    texts = set(found.texts.values())
    by_name: dict[str, list[str]] = {}
    for path in sorted(media) if found.tables else ():
        by_name.setdefault(posixpath.basename(path), []).append(path)
    listed: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for table in sorted(found.tables):
        for name, captions in read_caption_json(join(found.root, table)).items():
            path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
            if path in media:
                listed.setdefault(path, []).append((table, captions))
                continue
            reason = f"is named in {table} and does not exist"
            if path in found.others or path in texts:
                reason = f"is named in {table} and is no picture or video"
            elif len(same := by_name.get(posixpath.basename(path), [])) == 1:
                reason += f"; there is {same[0]}: names there are paths from the folder of that file"
            found.leave_out(path, "caption without media", reason, counted="caption without file")
    return _Captions(dict(zip((path for path, _ in paths), read, strict=True)), listed)


def _with_captions(found: _Found, captions: _Captions, config: CaptionConfig) -> list[tuple[str, Record]]:
    """The records that have a caption or need none, by their path without extension."""
    records: list[tuple[str, Record]] = []
    for path, kind in found.media:
        text = captions.texts.get(path)
        listed = captions.listed.get(path, [])
        places = [*([] if text is None else [found.texts[_stem(path)]]), *(table for table, _ in listed)]
        if len(places) > 1:
            reason = f"has its caption in {' and in '.join(places)}: keep one of them"
            settled = Settled(code="two captions", reason=reason)
        elif text is not None and text[1]:
            settled = Settled(code="unreadable caption", reason=text[1])
        else:
            given = (text[0],) if text is not None else listed[0][1] if listed else None
            settled = settle(given, config, f"{posixpath.basename(_stem(path))}.txt beside it")
        if settled.code:
            found.leave_out(path, settled.code, settled.reason)
            continue
        if settled.count:
            found.counts[settled.count] += 1
        records.append((_stem(path), Record(join(found.root, path), settled.captions, kind, found.source)))
    return records


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]
