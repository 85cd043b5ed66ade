"""The JSON schema for editors and the reference page, both made from the models of ``schema``.

python -m kinema.config.reference docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from kinema.config.expect import expected, slot_of
from kinema.config.schema import Config, Section
from kinema.config.write import toml_value

INTRODUCTION = """\
# Configuration

*Made from the code by `make docs`; edit `src/kinema/config/schema.py` and its neighbours instead.*

A run is one TOML file. `kinema init FAMILY --card 24 -o lora.toml` writes a commented one. Every key has a
default unless it says *needed*, so a LoRA takes a handful of lines:

```toml
[model]
family = "NAME"            # kinema models lists them
path = "models/NAME"       # a diffusers directory, a hub id or a single file

[[data.sources]]
path = "clips"             # pictures and videos with .txt captions beside them

[adapter]                  # without this table the whole network trains

[training]
steps = 2000
```

**Paths** are relative to the directory in which `kinema` is started, not to the file; `~` is the home
directory.

**Flags.** Every value can be given on the command line of `kinema train` and `kinema cache` too, where it
wins over the file: `--optimizer.lr 2e-5`, `--optimizer.lr=2e-5`. Text needs no quotes there. Lists are
written as in TOML: `--data.buckets.frames '[1, 17]'`; entries of a list of tables have numbers:
`--data.sources.0.path clips`. A flag makes the table it needs: `--training.ema.decay 0.99` turns the
average on.

**None.** An optional value is unset with the word `none`: `--training.clip_norm none`, and a file says
`clip_norm = "none"`. A table that may be absent is taken out with `--adapter none`.

**Mistakes.** A key that does not exist, a value of the wrong type or out of range, and values that
contradict each other end the command with exit code 2 before anything is loaded; all of them are listed at
once, each with its line.

**Editors.** `kinema schema > kinema.schema.json` writes a JSON schema. With this as the first line of a
configuration, editors with taplo (in VS Code: Even Better TOML) complete keys, show their documentation and
check values:

```toml
#:schema ./kinema.schema.json
```
"""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file. Optional values take the word ``"none"``, as in the file."""
    schema = _without_null(_with_meanings(Config.model_json_schema()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "kinema configuration",
    }


def _with_meanings(schema: dict[str, Any]) -> dict[str, Any]:
    tables = {section.__name__: section for section in _homes()}
    for name, table in {**schema["$defs"], Config.__name__: schema}.items():
        for key, words in meanings(tables[name]).items():
            table["properties"][key]["description"] = words
    return schema


@cache
def meanings(section: type[Section]) -> dict[str, str]:
    """What stands below each key of a table in its source. Read when it is asked for: pydantic would read it at every
    start of the program."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not issubclass(kind, Section):
            continue
        (definition,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for key, below in pairwise(definition.body):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


def _without_null(node: Any) -> Any:
    """The schema for TOML, which has no null: the word "none" takes its place.

    Defaults of null go, and those of whole tables, whose keys have their own.
    """
    if isinstance(node, list):
        return [_without_null(one) for one in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "null"}:
        return {"const": "none"}
    return {key: _without_null(one) for key, one in node.items() if key != "default" or not _is_table(one)}


def _is_table(default: Any) -> bool:
    return default is None or isinstance(default, dict)


def reference() -> str:
    """The page ``docs/configuration.md``: every table and key, its type, default and meaning."""
    return "\n".join([INTRODUCTION, *_table(Config, (), False, "")]).rstrip() + "\n"


def _table(section: type[Section], path: tuple[str, ...], is_list: bool, text: str) -> Iterator[str]:
    """The lines of one table and of the tables in it."""
    inner: list[tuple[type[Section], tuple[str, ...], bool, str]] = []
    rows: list[str] = []
    for name, field in section.model_fields.items():
        slot = slot_of(field.annotation, tuple(field.metadata))
        entry = slot.entry(0) if slot.is_list else None
        words = " ".join(meanings(section).get(name, "").split())
        if slot.is_table:
            absent = " *Absent by default.*" if field.default is None else ""
            needed = " *Needed.*" if field.is_required() else ""
            inner.append((slot.kind, (*path, name), False, words + absent + needed))
        elif entry is not None and entry.is_table:
            needed = " *At least one is needed.*" if field.is_required() else ""
            inner.append((entry.kind, (*path, name), True, f"{words} One such table for each.{needed}"))
        else:
            default = "*needed*" if field.is_required() else _code(field.default)
            rows.append(f"| `{name}` | {_cell(expected(slot))} | {default} | {_cell(words)} |")
    if path:
        dotted = ".".join(path)
        yield f"## `[[{dotted}]]`" if is_list else f"## `[{dotted}]`"
        yield ""
        home = _homes()[section]
        shorter = home != path
        yield f"{text} The keys are those of `{'.'.join(home)}`." if shorter else text
        yield ""
        if shorter:
            return
    if rows:
        yield "| key | value | default | meaning |"
        yield "|---|---|---|---|"
        yield from rows
        yield ""
    for table in inner:
        yield from _table(*table)


@cache
def _homes() -> dict[type[Section], tuple[str, ...]]:
    """Where each kind of table stands highest, which is where its keys are described."""
    homes: dict[type[Section], tuple[str, ...]] = {}

    def visit(section: type[Section], path: tuple[str, ...]) -> None:
        if section not in homes or len(path) < len(homes[section]):
            homes[section] = path
        for name, field in section.model_fields.items():
            slot = slot_of(field.annotation)
            slot = (slot.entry(0) or slot) if slot.is_list else slot
            if slot.is_table:
                visit(slot.kind, (*path, name))

    visit(Config, ())
    return homes


def _code(default: Any) -> str:
    return "none" if default is None else f"`{_cell(toml_value(default))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page to the file named on the command line."""
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
