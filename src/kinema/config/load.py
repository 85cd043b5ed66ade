"""A TOML file and dotted flags in, a ``Config`` out; every mistake in one message with key, file and line.

    config = load_config("lora.toml", [("optimizer.lr", "2e-5"), ("training.ema.decay", "0.99")])

Paths in a configuration are relative to the current directory, and ``~`` is the home directory.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kinema.config.expect import Slot, expected, slot_at
from kinema.config.locate import KeyPath, key_lines
from kinema.config.schema import Config
from kinema.config.unknown import unknown_key
from kinema.config.write import to_toml, toml_value
from kinema.errors import ConfigError, UserError
from kinema.suggest import did_you_mean, nearest

__all__ = ["load_config", "parse_overrides", "take_overrides", "to_toml"]

_FLAG = re.compile(r"--(?P<key>[A-Za-z_][\w-]*(?:\.[\w-]*)*)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass
class _Origins:
    """Where each value came from, and what is wrong so far."""

    file: str
    lines: dict[KeyPath, int]
    order: list[str]
    """Keys of the flags, in the order in which they were given."""
    flags: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)

    def report(self, path: KeyPath, text: str) -> None:
        """Add a problem of the value at ``path``, at its line or that of the nearest table around it."""
        flag = self.flag(path)
        if flag is not None:
            self.report_flag(flag, text)
            return
        parts = [path[:count] for count in range(len(path), 0, -1)]
        line = next((self.lines[part] for part in parts if part in self.lines), None)
        if line is None:
            self._add((1, 0), f"{self.file}: {text}")
        else:
            self._add((0, line), f"{self.file}:{line}: {text}")

    def report_flag(self, key: str, text: str) -> None:
        """Add a problem of the flag ``--key``."""
        self._add((2, self.order.index(key)), f"command line: {text}")

    def _add(self, order: tuple[int, int], text: str) -> None:
        if (order, text) not in self.problems:
            self.problems.append((order, text))

    def flag(self, path: KeyPath) -> str | None:
        """The flag that set the value at ``path``, if one did."""
        return next((self.flags[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.flags), None)

    def name(self, path: KeyPath) -> str:
        dotted = ".".join(str(key) for key in path)
        return f"--{dotted}" if self.flag(path) is not None else dotted


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read a configuration file, lay the overrides over it and check the whole.

    ``overrides`` are pairs (dotted key, text of the value) as ``parse_overrides`` makes them.
    ConfigError: all mistakes, a line each, sorted by their place.
    """
    text = _read(Path(path))
    data = _parse(text, str(path))
    origins = _Origins(str(path), key_lines(text), [key for key, _ in overrides])
    for key, value in overrides:
        _override(data, key, value, origins)
    return _build(data, origins)


def take_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Split arguments into dotted flags, as (key, text) pairs, and all others in their order.

    Dotted flags: ``--optimizer.lr 2e-5``, ``--optimizer.lr=2e-5``, ``--adapter none`` (a table's own name).
    """
    pairs: list[tuple[str, str]] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        match = _FLAG.fullmatch(argument)
        if match is None or not ("." in match["key"] or match["key"] in Config.model_fields):
            rest.append(argument)
            continue
        value = match["value"] if match["value"] is not None else next(arguments, None)
        if value is None or (match["value"] is None and value.startswith("--")):
            raise UserError(f"--{match['key']} needs a value, such as --{match['key']}=...")
        pairs.append((match["key"], value))
    return pairs, rest


def parse_overrides(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Dotted flags as (key, text) pairs; UserError if there is anything else among the arguments."""
    pairs, rest = take_overrides(argv)
    if rest:
        raise UserError(f"'{rest[0]}' is no option; options of the configuration look like --optimizer.lr 2e-5")
    return pairs


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        there = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no file '{path}'{did_you_mean(str(path), there)}") from None
    except IsADirectoryError:
        raise ConfigError(f"'{path}' is a directory; expected a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None


def _parse(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax(str(error), text, file)) from None


_PLAIN_WORDS = (
    ("Invalid value", "this is no TOML value; text needs quotes around it"),
    ("Cannot overwrite", "this key or table is already there further up"),
    ("Cannot declare", "this table is already there further up"),
    ("Cannot mutate", "this table was closed further up and takes no more keys"),
    ("Expected newline", "there is more on the line after the value; text needs quotes around it"),
    ("Unclosed array", "a list is not closed; a ']' is missing"),
    ("Unclosed inline", "an inline table is not closed; a '}' is missing"),
    ("Unterminated string", "text is not closed; a quote is missing"),
    ("Expected '='", "expected key = value; the '=' is missing"),
    ("Unescaped", "a backslash begins an escape in double quotes; use single quotes, or two backslashes"),
    ("Illegal character", "text in single quotes of one kind must end on its line; a quote is missing"),
)


def _syntax(message: str, text: str, file: str) -> str:
    """tomllib's syntax error in plain words, with its place and the line itself."""
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    reason = message[: found.start()] if found else message
    lines = text.split("\n")
    if found and found[1]:
        line, column = int(found[1]), int(found[2])
    else:
        line = len(text.rstrip("\n").split("\n"))
        column = len(lines[line - 1]) + 1
    plain = next((words for start, words in _PLAIN_WORDS if reason.startswith(start)), reason)
    return f"{file}:{line}:{column}: not valid TOML: {plain}\n    {lines[line - 1].strip()}"


def _build(data: dict[str, Any], origins: _Origins) -> Config:
    dates = [path for path, value in _leaves(data) if isinstance(value, date | time)]
    for path in dates:
        origins.report(path, f"{origins.name(path)}: no option takes a date or time; put text in quotes")
    config = None
    try:
        config = Config.model_validate_json(json.dumps(_resolved(data, ())), strict=True)
    except ValidationError as error:
        _explain(error, data, dates, origins)
    if config is None or origins.problems:
        raise ConfigError("\n".join(text for _, text in sorted(origins.problems)))
    return config


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _resolved(value: Any, path: KeyPath) -> Any:
    """The data with the word "none" as None where that is allowed, and dates (reported already) as None."""
    if isinstance(value, dict):
        return {key: _resolved(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, (*path, index)) for index, inner in enumerate(value)]
    slot = slot_at(path)
    is_none = value == "none" and slot is not None and slot.optional and "none" not in slot.choices
    return None if is_none or isinstance(value, date | time) else value


def _override(data: dict[str, Any], key: str, text: str, origins: _Origins) -> None:
    """Set one value that a flag gave."""
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    slot = slot_at(path)
    if slot is None:
        origins.report_flag(key, unknown_key(path, is_flag=True)[0])
        return
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        origins.report_flag(key, f"--{key}: the value is not UTF-8 text")
        return
    container: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(container, list) and isinstance(part, int):
            if part > len(container):
                entries = f"{len(container)} {'entry' if len(container) == 1 else 'entries'}"
                name = ".".join(str(one) for one in path[:depth])
                origins.report_flag(key, f"--{key}: {name} has {entries}; the next one is number {len(container)}")
                return
            if part == len(container):
                container.append(None)
        elif not (isinstance(container, dict) and isinstance(part, str)):
            return  # the file has something else where a table belongs: its own error is reported
        elif part not in container:
            container[part] = None
        if last:
            origins.flags[path] = key
            container[part] = from_text(slot, text)
        elif container[part] is None or container[part] == "none":
            container[part] = [] if isinstance(path[depth + 1], int) else {}
        container = container[part]


def from_text(slot: Slot, text: str) -> Any:
    """The value of a flag: text stands for itself, everything else is written as in TOML.

    What cannot be read as the slot's type comes back as it is, for the check to refuse.
    """
    if slot.optional and text == "none":
        return text
    if text in slot.choices:
        return text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if (slot.accepts(str) or slot.accepts(Path)) and not quoted:
        return text
    if slot.accepts(bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if slot.accepts(int) or slot.accepts(float):
            try:
                return number(text)
            except ValueError:
                continue
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if set(values) == {"value"} else text


def _explain(error: ValidationError, data: Any, dates: list[KeyPath], origins: _Origins) -> None:
    """Report each of pydantic's errors in the words of the schema."""
    details = error.errors(include_url=False, include_input=False)
    places = [detail["loc"] for detail in details]
    meant: set[KeyPath] = set()  # keys that a misspelt one was meant to be: they are not missing as well
    for detail in details:
        if detail["type"] == "extra_forbidden":
            text, suggestion = unknown_key(detail["loc"])
            origins.report(detail["loc"], text)
            meant.add(suggestion)
    for detail in details:
        loc, kind = detail["loc"], detail["type"]
        if kind == "extra_forbidden":
            continue
        path = next(loc[:count] for count in range(len(loc), -1, -1) if slot_at(loc[:count]) is not None)
        if kind == "contradiction":
            key = detail["ctx"]["key"]
            path = (*path, *key.split(".")) if key else path
            origins.report(path, f"{origins.name(path)}: {detail['ctx']['message']}")
        elif kind == "missing" and isinstance(path[-1], str):
            if path not in meant:
                origins.report(path, _missing(path))
        elif not any(path[: len(one)] == one or one[: len(path)] == path for one in dates):
            if kind == "missing":  # an entry of a list of fixed length
                path = path[:-1]
            if kind == "too_short" and any(place != path and place[: len(path)] == path for place in places):
                continue  # entries that are wrong were not counted; they have their own message
            _wrong_value(path, data, origins)


def _missing(path: KeyPath) -> str:
    slot = slot_at(path)
    assert slot is not None
    dotted = ".".join(str(key) for key in path)
    names = ".".join(key for key in path if isinstance(key, str))
    if slot.is_table:
        return f"the table [{dotted}] is missing"
    if slot.is_list and (entry := slot.entry(0)) is not None and entry.is_table:
        return f"the table [[{names}]] is missing; at least one is needed"
    return f"'{dotted}' is missing; expected {expected(slot)}"


def _wrong_value(path: KeyPath, data: Any, origins: _Origins) -> None:
    value = data
    for key in path:
        value = value[key]
    slot = slot_at(path)
    assert slot is not None
    shown = toml_value(value) if not isinstance(value, dict) else "a table"
    if len(shown) > 60:
        shown = shown[:57] + "..."
    origins.report(path, f"{origins.name(path)}: expected {expected(slot)}, got {shown}{_hint(slot, value, path)}")


def _hint(slot: Slot, value: Any, path: KeyPath) -> str:
    """How to mend a value, where that can be guessed."""
    dotted = ".".join(str(key) for key in path)
    number = slot.accepts(int) or slot.accepts(float)
    if isinstance(value, str):
        if near := nearest(value, slot.choices):
            return f'; did you mean "{near}"?'
        plain = from_text(slot, value)
        return "; write it without quotes" if not isinstance(plain, str) and (number or slot.accepts(bool)) else ""
    if slot.is_list and isinstance(value, dict):
        return f"; write [[{dotted}]], one for each entry"
    if slot.is_list and not isinstance(value, list):
        return f"; put it in brackets: [{toml_value(value)}]"
    if slot.is_table and not isinstance(value, dict):
        return f"; its keys go under [{dotted}]"
    if isinstance(value, float) and slot.accepts(int) and not slot.accepts(float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, bool | int | float) and (slot.accepts(str) or slot.accepts(Path)):
        return "; text needs quotes around it"
    return ""
