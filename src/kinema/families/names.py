"""Names of weights in different layouts, as tables that read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")


class NameMap:
    """A one-to-one table of module or parameter paths between two layouts.

    A pair such as ``("blocks.{}.attn1.to_q", "blocks.{}.self_attn.q")`` renames everything at or below that
    path, so that ``.weight``, ``.lora_A.weight`` and ``.alpha`` all follow; ``{}`` stands for an index. Where
    several pairs match, the longest wins.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = sorted(pairs, key=lambda pair: -len(pair[0]))
        self._to = [(PathPattern(ours), theirs) for ours, theirs in pairs]
        pairs.sort(key=lambda pair: -len(pair[1]))
        self._from = [(PathPattern(theirs), ours) for ours, theirs in pairs]

    def rename(self, name: str) -> str | None:
        """The name in the second layout; None if the table does not know it."""
        return _rename(name, self._to)

    def restore(self, name: str) -> str | None:
        """The name in the first layout; None if the table does not know it."""
        return _rename(name, self._from)

    def rename_all(self, state: Mapping[str, T]) -> dict[str, T]:
        """Values under their names in the second layout; KeyError for a name that the table does not know."""
        renamed = {name: self.rename(name) for name in state}
        unknown = [name for name, new in renamed.items() if new is None]
        if unknown:
            raise KeyError(f"no name in the other layout for {', '.join(unknown[:3])}")
        return {new: state[name] for name, new in renamed.items() if new is not None}

    def restore_all(self, state: Mapping[str, T]) -> dict[str, T]:
        """Values under their names in the first layout; a name that the table does not know is kept."""
        return {self.restore(name) or name: value for name, value in state.items()}


class PathPattern:
    """Everything at or below a path; groups are its indices and the rest.

    Compiled when it is first asked: the tables of all families are made at import, and a process uses few of them.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.path).replace(r"\{\}", r"(\d+)") + r"(\..*)?", re.DOTALL)

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """As of a regular expression."""
        return self._compiled.fullmatch(name)


def _rename(name: str, rules: list[tuple[PathPattern, str]]) -> str | None:
    for pattern, new in rules:
        if match := pattern.fullmatch(name):
            *indices, rest = match.groups()
            return new.format(*indices) + (rest or "")
    return None
