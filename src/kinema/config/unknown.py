"""What to say about a key that the schema does not have."""

from __future__ import annotations

from kinema.config.expect import Slot, all_keys, slot_at
from kinema.config.locate import KeyPath
from kinema.suggest import nearest

_SURE = 0.8  # a spelling this near is taken for a slip even if another table has the very word


def unknown_key(path: KeyPath, is_flag: bool = False) -> tuple[str, KeyPath]:
    """The message, and the path of the key that was probably meant (empty if there is no guess).

    In order: a slip of a key of the same table, the same key in another table, a near key of the same table,
    a near key elsewhere, the list of keys that the table takes.
    """
    depth = next(count for count in range(len(path)) if slot_at(path[: count + 1]) is None)
    table, word = path[:depth], str(path[depth])
    parent = slot_at(table)
    assert parent is not None
    said = _said(path, is_flag)
    if parent.is_list and not isinstance(path[depth], int):
        example = ".".join(str(key) for key in (*table, 0, *path[depth:]))
        return f"{said}; '{_dotted(table)}' is a list, say which entry: --{example}", ()
    siblings = list(parent.kind.model_fields) if parent.is_table else []
    rest = path[depth + 1 :]

    def mean(key: KeyPath) -> tuple[str, KeyPath]:
        shown = f"--{_dotted((*key, *rest))}" if is_flag else f"'{_dotted(key)}'"
        return f"{said}; did you mean {shown}?", key

    if near := nearest(word, siblings, _SURE):
        return mean((*table, near)) if is_flag else (f"{said}; did you mean '{near}'?", (*table, near))
    if homes := _homes(word, table):
        if is_flag and len(homes) == 1 and not rest:
            return mean((*homes[0], word))
        belongs = "it belongs to" if len(homes) == 1 else "it belongs to one of"
        return f"{said}; {belongs} {', '.join(_header(home) for home in homes)}.", (*homes[0], word)
    if near := nearest(word, siblings):
        return mean((*table, near)) if is_flag else (f"{said}; did you mean '{near}'?", (*table, near))
    if near := nearest(word, (key[-1] for key in all_keys()), 0.75):
        home = _homes(near, table)[0]
        return mean((*home, near))
    if not siblings:
        return f"{said}; '{_dotted(table)}' is not a table.", ()
    return f"{said}; {_header(table)} takes {', '.join(siblings)}.", ()


def _said(path: KeyPath, is_flag: bool) -> str:
    return f"unknown option --{_dotted(path)}" if is_flag else f"unknown key '{_dotted(path)}'"


def _dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def _homes(word: str, table: KeyPath) -> list[tuple[str, ...]]:
    """Tables that have this key, those nearest to ``table`` first, at most four. Of a table and one inside it that has
    the key for exceptions (``[optimizer]`` and ``[[optimizer.groups]]``), the outer one."""
    names = [key for key in table if isinstance(key, str)]

    def shared(home: tuple[str, ...]) -> int:
        return sum(1 for ours, theirs in zip(names, home, strict=False) if ours == theirs)

    having = [key[:-1] for key in all_keys() if key[-1] == word]
    homes = [home for home in having if not any(home[:depth] in having for depth in range(len(home)))]
    return sorted(homes, key=lambda home: (-shared(home), len(home)))[:4]


def _header(table: KeyPath) -> str:
    """``[a.b]``, ``[[a.b]]`` for a list of tables, or "the top of the file"."""
    names = tuple(key for key in table if isinstance(key, str))
    if not names:
        return "the top level"
    slot: Slot | None = slot_at(names)
    return f"[[{_dotted(names)}]]" if slot is not None and slot.is_list else f"[{_dotted(names)}]"
