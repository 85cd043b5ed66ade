"""Lists of what is to be sampled: a row for each prompt, with references and settings of its own.

csv, tsv, jsonl, json and parquet tables, or a text file with a prompt a line; local or at an address.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kinema.data.files import absolute, join, parent, read_bytes, suffix
from kinema.errors import UserError
from kinema.sampling.settings import COLUMNS
from kinema.suggest import did_you_mean

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
NAMES = {
    "text": ("text", "prompt", "caption"),
    "images": ("ref", "image"),
    "name": ("name",),
    "negative": ("neg", "negative"),
}
"""What a row holds besides settings, and what its column may be called."""
MOST_MISTAKES = 100
"""Lines of one message, so that a list of thousands of rows does not flood a terminal."""


@dataclass(frozen=True)
class Ask:
    """One prompt, and what is asked for with it."""

    prompt: str
    images: tuple[str, ...] = ()
    """Locations of its references."""
    name: str | None = None
    """What its file is to be called, without an extension."""
    row: int | None = None
    """Its row in a list, from 0."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its own, by name; those of the command hold for the others."""
    told: Mapping[str, str] = field(default_factory=dict)
    """What is kept of the prompt as it was ``asked``, where a chat model wrote another."""


@dataclass(frozen=True)
class Mistake:
    row: int
    text: str


@dataclass(frozen=True)
class PromptList:
    """The rows of a list that can be read, and what is wrong with the others."""

    location: str
    asks: tuple[Ask, ...]
    mistakes: tuple[Mistake, ...]
    rows: int

    def chosen(self, rows: str | None) -> range:
        """The numbers of the rows that ``--rows`` means: a slice as Python writes it, or one number."""
        if rows is None:
            return range(self.rows)
        match = re.fullmatch(r"\s*(-?\d+)?\s*(?:(:)\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?)?", rows)
        if match is None or not rows.strip() or match[4] == "0":
            raise UserError(f"--rows {rows}: expected rows such as 10:20, :5, -3: or 7; the first row is 0.")
        first, colon, last, step = match.groups()
        if colon is None:
            number = int(first)
            picked = range(self.rows)[number : number + 1 or None]
        else:
            picked = range(self.rows)[slice(*(None if part is None else int(part) for part in (first, last, step)))]
        if not picked:
            raise UserError(
                f"--rows {rows}: {self.location} has {self.rows} rows, 0 to {self.rows - 1}; none of these."
            )
        return picked


def read_list(location: str, ignore: Sequence[str] = ()) -> PromptList:
    """All rows of a list. UserError where it cannot be read, or has columns that are not known and not among
    ``ignore``; what is wrong in single rows is kept, to be said at once."""
    kind = suffix(location)
    if kind == ".txt":
        lines = [line.strip() for line in _text(location).splitlines()]
        rows: list[dict[str, Any]] = [{"text": line} for line in lines if line]
    elif kind in TABLES:
        rows = _table(location)
    else:
        raise UserError(
            f"--list {location}: '{kind or 'no extension'}' is no list; expected {', '.join(TABLES)}, .txt."
        )
    if not rows:
        raise UserError(f"--list {location} has no rows.")
    columns = _columns(location, dict.fromkeys(name for row in rows for name in row), ignore)
    asks, mistakes = [], []
    for number, row in enumerate(rows):
        found, wrong = _ask(number, {columns[name]: value for name, value in row.items() if name in columns}, location)
        asks.append(found)
        mistakes += [Mistake(number, text) for text in wrong]
    bad = {mistake.row for mistake in mistakes}
    return PromptList(location, tuple(one for one in asks if one.row not in bad), tuple(mistakes), len(rows))


def _text(location: str) -> str:
    try:
        return read_bytes(location).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--list {location} is not UTF-8 ({error.reason} at byte {error.start}): save it so.") from None


def _table(location: str) -> list[dict[str, Any]]:
    """The rows, with every column in each; cells without a value are None."""
    from kinema.data.sources.table_read import raw_batches
    from kinema.data.sources.table_rows import value_of

    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for batch in raw_batches(location, derived=True):
        fields = [batch.schema.field(i) for i in range(batch.num_columns)]
        names.update(dict.fromkeys(one.name for one in fields))
        for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            pairs = zip(fields, cells, strict=True)
            rows.append({one.name: None if cell is None else value_of(one, cell) for one, cell in pairs})
    return [dict.fromkeys(names) | row for row in rows]


def _columns(location: str, names: Iterable[str], ignore: Sequence[str]) -> dict[str, str]:
    """{a column's name: what it is to kinema}; UserError for names that say nothing, or two that say the same."""
    there = [name for name in names if name and not name.startswith("__index_level_")]  # the index of pandas
    known = {alias: key for key, aliases in NAMES.items() for alias in aliases} | {name: name for name in COLUMNS}
    for name in ignore:
        if name not in there:
            raise UserError(f"--ignore-columns {name}: {location} has no such column{did_you_mean(name, there)}")
    there = [name for name in there if name not in ignore]
    unknown = [name for name in there if name not in known]
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise UserError(
            f"--list {location}: kinema has no column '{unknown[0]}'{near} Its columns are {', '.join(known)}. Rename "
            f"it, or leave it unread with --ignore-columns {','.join(unknown)}."
        )
    found = {name: known[name] for name in there}
    for key in set(found.values()):
        same = [name for name in there if found[name] == key]
        if len(same) > 1:
            raise UserError(
                f"--list {location}: the columns {' and '.join(same)} could each be the {key}: leave one unread with "
                f"--ignore-columns {same[-1]}."
            )
    if "text" not in found.values():
        raise UserError(f"--list {location} has no column 'text'{did_you_mean('text', there)} It holds the prompts.")
    return found


def _ask(number: int, row: Mapping[str, Any], location: str) -> tuple[Ask, list[str]]:
    """A row, and what is wrong with it."""
    wrong: list[str] = []

    def take(key: str, read: Callable[[Any], Any]) -> Any:
        value = row.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, float) and math.isnan(value):  # how pandas writes an empty cell
            return None
        try:
            return read(value)
        except UserError as error:
            wrong.append(f"{key}: {error}")
            return None

    prompt = take("text", _words)
    if prompt is None and not wrong:
        wrong.append("text: there is no prompt")
    images = take("images", lambda value: _references(value, location)) or ()
    name = take("name", file_stem)
    options = {key: take(key, one.read) for key, one in COLUMNS.items()} | {"negative": take("negative", _words)}
    given = {key: value for key, value in options.items() if value is not None}
    return Ask(prompt or "", images, name, number, given), wrong


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{value!r} is no text")
    return value.strip()


def _references(value: Any, location: str) -> tuple[str, ...]:
    """Relative ones begin at the list's folder."""
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{value!r} is no path or address, or several with ';' between them")
    return tuple(absolute(join(parent(location), part.strip())) for part in parts if part.strip())


def file_stem(value: Any) -> str:
    """A file's name without the extension that kinema gives it; UserError for what is no plain name."""
    name = re.sub(r"\.(mp4|png)$", "", str(value).strip(), flags=re.IGNORECASE)
    if not name or name.startswith(".") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name) or len(name.encode()) > 200:
        raise UserError(f"'{value}' is no plain file name: leave out folders, signs such as : and a leading dot")
    return name


def mistakes_message(location: str, mistakes: Sequence[Mistake], rows: int) -> str:
    """All that is wrong with the rows of a list, the same mistake of several rows said once."""
    by_text: dict[str, list[int]] = {}
    for one in mistakes:
        by_text.setdefault(one.text, []).append(one.row)
    bad = len({one.row for one in mistakes})
    lines = [f"{location}: {bad} of {rows} rows cannot be made; nothing was drawn. The first row is 0, as in --rows."]
    for text, numbers in sorted(by_text.items(), key=lambda pair: pair[1]):
        shown = ", ".join(map(str, numbers[:5]))
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        lines.append(f"row{'s' if len(numbers) > 1 else ''} {shown}{more}: {text}")
    if len(lines) > MOST_MISTAKES:
        lines[MOST_MISTAKES:] = [f"... and {len(lines) - MOST_MISTAKES} more kinds of mistakes"]
    return "\n".join(lines)
