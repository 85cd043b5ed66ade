"""Captions from files: text, ``captions.json``, and what becomes of missing and empty ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kinema.config.data import CaptionConfig
from kinema.data.files import file_name, read_bytes
from kinema.data.records import MediaError
from kinema.errors import UserError

JSON_NAME = "captions.json"


def decode_text(data: bytes, name: str) -> tuple[str, str]:
    """(text without surrounding white space, problem): UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError as error:
        guess = "it looks like UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        return "", f"its caption {name} is not UTF-8 ({where}): {guess}save it as UTF-8"


def read_caption(location: str) -> tuple[str, str]:
    """(caption, problem) of a text file. All of the file is one caption; white space within it is kept."""
    try:
        data = read_bytes(location)
    except MediaError as error:
        detail = str(error).removeprefix(f"{location} ")
        return "", f"its caption {file_name(location)} {detail}"
    return decode_text(data, file_name(location))


@dataclass(frozen=True)
class Settled:
    """The captions of a record, or why it is left out."""

    captions: tuple[str, ...] = ()
    count: str = ""
    """What the record is counted as: "empty caption", "missing caption"."""
    code: str = ""
    """Why it is left out; "" where it is used."""
    reason: str = ""


def settle(captions: Sequence[str] | None, config: CaptionConfig, expected: str) -> Settled:
    """What the policies for missing and empty captions make of those found (None: none). ``expected`` says where a
    caption was looked for. Of several captions, empty ones are kept, or taken out and counted."""
    if not captions:
        if config.missing == "empty":
            return Settled(("",), "missing caption")
        reason = f"has no caption: expected {expected}; write one"
        return Settled(
            code="no caption", reason=f'{reason}, or set captions.missing = "empty" to train on it without one'
        )
    filled = tuple(caption for caption in captions if caption)
    if len(filled) == len(captions):
        return Settled(filled)
    if config.empty == "keep":
        return Settled(tuple(captions) if filled else ("",), "empty caption")
    if filled:
        return Settled(filled, "empty among others")
    reason = 'its caption is empty: write one, or set captions.empty = "keep" to train on it as it is'
    return Settled(code="empty caption", reason=reason)


def caption_list(value: Any) -> tuple[str, ...] | None:
    """The captions in a value of JSON: a string or a list of strings; None where it is neither."""
    if isinstance(value, str):
        return (value.strip(),)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(one.strip() for one in value)
    return None


def read_caption_json(location: str) -> dict[str, tuple[str, ...]]:
    """A ``captions.json``: names or paths of files, relative to it, with a caption or a list of captions.

    UserError, with the line where there is one, for what is not that.
    """
    try:
        text = read_bytes(location).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{location}, line {line}: not UTF-8 ({error.reason}): save it as UTF-8") from error
    try:
        found = json.loads(text, object_pairs_hook=_no_doubles)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}, line {error.lineno}: {error.msg} (column {error.colno}): mend the JSON"
        ) from error
    except _Double as error:
        line = _last_line_of(text, error.key)
        raise UserError(f"{location}, line {line}: {error.key!r} is given twice: give each file once") from error
    except RecursionError as error:
        raise UserError(f"{location}: nested too deeply; {EXPECTED}") from error
    if not isinstance(found, dict):
        raise UserError(f"{location}, line 1: {EXPECTED}, got a {type(found).__name__}")
    captions = {}
    for name, value in found.items():
        texts = caption_list(value)
        if texts is None:
            raise UserError(f"{location}, line {_last_line_of(text, name)}: {name!r}: {EXPECTED}")
        captions[name] = texts
    return captions


EXPECTED = 'expected {"name of a file": "its caption", ...}, or a list of captions for a name'


class _Double(ValueError):
    """A key that an object of JSON has twice: the first value would be lost without a word."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Double(key)
        found[key] = value
    return found


def _last_line_of(text: str, key: str) -> int:
    """The line on which a key stands last, as JSON writes it."""
    places = [text.rfind(json.dumps(key, ensure_ascii=ascii_only)) for ascii_only in (True, False)]
    return text.count("\n", 0, max(0, *places)) + 1
