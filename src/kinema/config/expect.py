"""What may stand at each place of the configuration, in words; read from the models of ``schema``."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic.fields import FieldInfo

from kinema.config.locate import KeyPath
from kinema.config.schema import Config, Section

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_PLURAL = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


@dataclass(frozen=True)
class Slot:
    """One place for a value: its type without Annotated and None, the bounds on it, whether it may be none.

    A union of several types has them as ``alternatives`` and no ``kind`` of its own.
    """

    kind: Any
    bounds: tuple[Any, ...] = ()
    optional: bool = False
    alternatives: tuple[Slot, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that may stand here."""
        if get_origin(self.kind) is Literal:
            return get_args(self.kind)
        return tuple(word for alternative in self.alternatives for word in alternative.choices)

    @property
    def is_table(self) -> bool:
        return isinstance(self.kind, type) and issubclass(self.kind, Section)

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def is_mapping(self) -> bool:
        """Whether this is a table whose keys the user chooses."""
        return get_origin(self.kind) is dict

    def value(self) -> Slot:
        """The place of a mapping's values."""
        return slot_of(get_args(self.kind)[1])

    def accepts(self, kind: type) -> bool:
        """Whether a value of this plain type may stand here."""
        return self.kind is kind or any(alternative.accepts(kind) for alternative in self.alternatives)

    def entry(self, index: int) -> Slot | None:
        """The place of a list's entry."""
        kinds = get_args(self.kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return slot_of(kinds[0])
        return slot_of(kinds[index]) if index < len(kinds) else None


def slot_of(annotation: Any, found: tuple[Any, ...] = ()) -> Slot:
    """The slot of a type annotation with the bounds found around it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        for extra in extras:
            found += tuple(extra.metadata) if isinstance(extra, FieldInfo) else (extra,)
        return slot_of(inner, found)
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        optional = len(members) < len(get_args(annotation))
        slots = tuple(slot_of(member, found) for member in members)
        if len(slots) == 1:
            return Slot(slots[0].kind, slots[0].bounds, optional)
        return Slot(None, found, optional, slots)
    return Slot(annotation, found)


@cache
def slot_at(path: KeyPath) -> Slot | None:
    """The slot at a path, or None if the schema has no such place."""
    slot: Slot | None = Slot(Config)
    for key in path:
        if slot is not None and slot.is_table and isinstance(key, str):
            field = slot.kind.model_fields.get(key)
            slot = slot_of(field.annotation, tuple(field.metadata)) if field else None
        elif slot is not None and slot.is_list and isinstance(key, int):
            slot = slot.entry(key)
        elif slot is not None and slot.is_mapping and isinstance(key, str):
            slot = slot.value()
        else:
            return None
    return slot


def all_keys(section: type[Section] = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the schema, tables included, as its path without positions in lists."""
    for name, field in section.model_fields.items():
        inner = (*path, name)
        yield inner
        slot = slot_of(field.annotation)
        if slot.is_list:
            slot = slot.entry(0) or slot
        if slot.is_table:
            yield from all_keys(slot.kind, inner)


def expected(slot: Slot) -> str:
    """What may stand in the slot, in words: "a whole number greater than 0"."""
    words = " or ".join(expected(alternative) for alternative in slot.alternatives) or _kind(slot)
    return words + (' or "none"' if slot.optional else "")


def _kind(slot: Slot) -> str:
    if slot.is_table:
        return "a table"
    if slot.is_list:
        return _list(slot)
    if slot.is_mapping:
        value = slot.value()
        if value.is_mapping or value.is_list:
            return "a table of tables" if value.is_mapping else "a table of lists"
        if value.alternatives:
            return "a table of values"
        return f"a table of {_PLURAL[value.kind]}{_range(value.bounds)}"
    if choices := slot.choices:
        quoted = [f'"{choice}"' for choice in choices]
        return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)
    return _PLAIN[slot.kind] + _range(slot.bounds)


def _list(slot: Slot) -> str:
    kinds = get_args(slot.kind)
    open_ended = len(kinds) == 2 and kinds[1] is Ellipsis
    entry = slot_of(kinds[0])
    if entry.kind in _PLURAL:
        entries = _PLURAL[entry.kind] + _range(entry.bounds)
    elif entry.is_table:
        entries = "tables"
    elif entry.is_list:
        entries = f"lists, each {_list(entry)}"
    else:
        entries = f"entries, each {expected(entry)}"
    at_least = [bound.min_length for bound in slot.bounds if isinstance(bound, bounds.MinLen)]
    return f"a list of {'' if open_ended else f'{len(kinds)} '}{entries}" + (
        f", at least {at_least[0]} of them" if at_least else ""
    )


def _range(found: tuple[Any, ...]) -> str:
    words = []
    for bound in found:
        if isinstance(bound, bounds.Gt):
            words.append(f"greater than {bound.gt}")
        elif isinstance(bound, bounds.Ge):
            words.append(f"at least {bound.ge}")
        elif isinstance(bound, bounds.Lt):
            words.append(f"less than {bound.lt}")
        elif isinstance(bound, bounds.Le):
            words.append(f"at most {bound.le}")
        elif isinstance(bound, bounds.MinLen):
            words.append("that is not empty")
    return " " + " and ".join(words) if words else ""
