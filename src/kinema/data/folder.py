"""The folder source: pictures and videos, each with its caption in a .txt file of the same name beside it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kinema.errors import UserError

from .records import Kind, LeftOut, Record

IMAGE_EXTENSIONS = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".avif", ".bmp", ".tif",
        ".tiff", ".jp2", ".ppm", ".pgm", ".ico",
    }
)  # fmt: skip
VIDEO_EXTENSIONS = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts",
        ".flv", ".wmv", ".asf", ".ogv", ".3gp", ".y4m", ".mxf", ".nut", ".vob",
    }
)  # fmt: skip
SIDECARS = frozenset(
    {
        ".json", ".jsonl", ".csv", ".parquet", ".toml", ".yaml", ".yml", ".md", ".npz", ".npy",
        ".safetensors", ".xmp", ".srt", ".vtt",
    }
)  # fmt: skip
"""Files that are often beside media and are no media: counted, not listed."""
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))

MissingCaption = Literal["leave_out", "empty"]


def scan(
    folder: Path | str,
    source: str = "",
    missing_caption: MissingCaption = "leave_out",
    recursive: bool = True,
) -> tuple[list[Record], list[LeftOut], dict[str, int]]:
    """Find the media of a folder and their captions, in an order that depends on the names alone.

    Reads captions and no media. ``missing_caption = "empty"`` uses media that have no caption file with "".

    Every file is accounted for: the counts "image", "video", "caption", "hidden", "sidecar" and "left out"
    add up to "files"; "empty caption" and "missing caption" count records used with "". Hidden folders
    count as one file each. Raises UserError where the folder is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise UserError(f"the folder {root} {found}: give the folder of the media and their captions")
    if missing_caption not in ("leave_out", "empty"):
        raise UserError(f'missing_caption is "{missing_caption}": expected "leave_out" or "empty"')
    source = source or root.name
    counts: Counter[str] = Counter()
    records: list[Record] = []
    left_out: list[LeftOut] = []
    for directory, names, trouble in _walk(root, recursive, counts):
        if trouble:
            counts["files"] += 1
            left_out.append(LeftOut(directory, trouble, "unreadable folder", source))
            continue
        _scan_directory(
            directory, names, source=source, missing_caption=missing_caption,
            records=records, left_out=left_out, counts=counts,
        )  # fmt: skip
    records.sort(key=lambda record: record.path.relative_to(root).as_posix())
    left_out.sort(key=lambda entry: entry.path.relative_to(root).as_posix())
    counts["left out"] = len(left_out)
    return records, left_out, dict(counts)


def with_controls(records: Sequence[Record], root: Path, folders: Sequence[Path]) -> tuple[list[Record], list[LeftOut]]:
    """Each record of the folder ``root`` with its control pictures: in each of ``folders``, the picture under the same
    path as the record's, whatever its extension. UserError for a folder that is missing."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"data.sources.controls: there is no folder {folder}; give that of the control pictures")
    pictures = [
        {path.relative_to(folder).with_suffix(""): path for path in sorted(folder.rglob("*")) if kind_of(path.name)}
        for folder in folders
    ]
    kept: list[Record] = []
    left_out: list[LeftOut] = []
    for record in records:
        name = record.path.relative_to(root).with_suffix("")
        found = [by_name.get(name) for by_name in pictures]
        if missing := [str(folder) for folder, path in zip(folders, found, strict=True) if path is None]:
            reason = f"has no control picture: expected {name} with a picture's extension in {', '.join(missing)}"
            left_out.append(LeftOut(record.path, reason, "no control picture", record.source))
        else:
            kept.append(replace(record, controls=tuple(path for path in found if path is not None)))
    return kept, left_out


def _walk(root: Path, recursive: bool, counts: Counter[str]) -> Iterator[tuple[Path, list[str], str]]:
    """(directory, names of its files, why it cannot be read or ""). Follows links, but enters no directory
    twice."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            status = directory.stat()
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            yield directory, [], f"the folder cannot be read: {error.strerror or error}"
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        names = []
        for entry in entries:
            if not entry.is_dir():
                names.append(entry.name)
            elif entry.name.startswith((".", "__MACOSX")):
                counts["files"] += 1
                counts["hidden"] += 1
            elif recursive:
                pending.append(Path(entry.path))
        yield directory, names, ""


def _scan_directory(
    directory: Path,
    names: list[str],
    *,
    source: str,
    missing_caption: MissingCaption,
    records: list[Record],
    left_out: list[LeftOut],
    counts: Counter[str],
) -> None:
    def leave_out(name: str, code: str, reason: str) -> None:
        left_out.append(LeftOut(directory / name, reason, code, source))

    counts["files"] += len(names)
    captions: dict[str, str] = {}
    for stem, suffix, name in map(_split, names):
        if suffix != ".txt" or name.startswith("."):
            continue
        if captions.setdefault(stem, name) != name:
            leave_out(name, "second caption", f"is a second caption beside {captions[stem]}: keep one")
    with_media = set()
    for name in names:
        stem, suffix, _ = _split(name)
        kind = kind_of(name)
        if name.startswith(".") or name.lower() in SYSTEM_FILES:
            counts["hidden"] += 1
        elif kind is not None:
            with_media.add(stem)
            caption, code, problem = _caption_of(directory, stem, captions, missing_caption)
            if problem:
                leave_out(name, code, problem)
                continue
            if code:
                counts[code] += 1
            counts[kind] += 1
            records.append(Record(directory / name, caption, kind, source))
        elif suffix in SIDECARS:
            counts["sidecar"] += 1
        elif suffix != ".txt":
            leave_out(
                name,
                "unknown extension",
                f"{suffix or 'no extension'} is no known picture or video extension",
            )
    for stem, name in captions.items():
        if stem in with_media:
            counts["caption"] += 1
        else:
            leave_out(
                name,
                "caption without media",
                f"is a caption without media: no picture or video is named {stem}",
            )


def _caption_of(
    directory: Path, stem: str, captions: dict[str, str], missing_caption: MissingCaption
) -> tuple[str, str, str]:
    """(caption, what to count it as or why it is left out, the reason why it is left out)."""
    if stem in captions:
        caption, problem = read_caption(directory / captions[stem])
        return caption, "unreadable caption" if problem else "" if caption else "empty caption", problem
    if missing_caption == "empty":
        return "", "missing caption", ""
    expected = f"has no caption: expected {stem}.txt beside it; write one"
    return "", "no caption", f'{expected}, or set missing_caption = "empty" to train on it without'


def _split(name: str) -> tuple[str, str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower(), name


def kind_of(name: str) -> Kind | None:
    """What a file's name promises; None where it promises no media. The content decides later, in `probe`."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in VIDEO_EXTENSIONS:
        return "video"
    return "image" if suffix in IMAGE_EXTENSIONS else None


def read_caption(path: Path) -> tuple[str, str]:
    """(caption without surrounding white space, problem): UTF-8, with or without a byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return "", f"its caption {path.name} cannot be read: {error.strerror or error}"
    try:
        return data.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError as error:
        guess = "it looks like UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        return "", f"its caption {path.name} is not UTF-8 ({where}): {guess}save it as UTF-8"
