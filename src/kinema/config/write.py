"""A configuration as TOML text, every value in full."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from kinema.config.schema import Config, Section


def toml_value(value: Any) -> str:
    """A value as TOML writes it. None, which TOML lacks, is the word ``"none"``."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | PurePath):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {toml_value(one)}" for key, one in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(one) for one in value) + "]"
    return str(value)  # dates and times: only messages show them, no option takes one


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def to_toml(config: Config) -> str:
    """The resolved configuration; ``load_config`` makes an equal one of it.

    A value that is None by default is left out, since TOML has no word for it.
    """
    blocks: list[str] = []
    _write_table(config, "", "", True, blocks)
    return "# The configuration as it was resolved: every value in full.\n\n" + "\n\n".join(blocks) + "\n"


def _write_table(section: Section, path: str, header: str, needed: bool, blocks: list[str]) -> None:
    """Append the block of a table and those of the tables in it; an empty one only if it is ``needed``."""
    lines: list[str] = []
    tables: list[tuple[Section, str, str, bool]] = []
    unread = section.unread()
    for name, field in type(section).model_fields.items():
        if name in unread:
            continue
        value = getattr(section, name)
        inner = f"{path}.{name}" if path else name
        if isinstance(value, Section):
            tables.append((value, inner, f"[{inner}]", value != field.default))
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            tables.extend((entry, inner, f"[[{inner}]]", True) for entry in value)
        elif value is not None or field.is_required() or field.default is not None:
            lines.append(f"{name} = {toml_value(value)}")
    if lines or (needed and header):
        blocks.append("\n".join([header, *lines] if header else lines))
    for table in tables:
        _write_table(*table, blocks)
