"""Which tensors of one layout of weights each of another's is made of, so that a network is converted a few tensors at
a time and never has to be whole in one process's memory.

A layout's conversion is a function of named tensors, and it alone knows what it does with them. Run once on tensors
without values, it tells: each operation's result is made of what its arguments were made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Conversion:
    """A conversion, and what has to be given to it together."""

    convert: Convert
    results: dict[str, Tensor]
    """What it makes of all tensors, on the meta device, in its order."""
    groups: tuple[tuple[str, ...], ...]
    """Names that are converted together; each stands in one group."""


def traced(convert: Convert, entries: Mapping[str, Tensor]) -> Conversion:
    """The conversion of tensors like ``entries``, whose values are not read.

    Where it makes something else of a group alone than of all (it looks at what else there is), all are one group.
    """
    empty = {name: _like(value) for name, value in entries.items()}
    with _Sources() as sources:
        for name, value in empty.items():
            sources.mark(value, name)
        made = dict(convert(dict(empty)))
        origins = {result: sources.of(value) for result, value in made.items()}
    results = {name: _like(value) for name, value in made.items()}
    groups = _connected(empty, origins.values())
    group_of = {name: group for group in groups for name in group}
    wanted: dict[tuple[str, ...], set[str]] = {group: set() for group in groups}
    for result, names in origins.items():
        for group in {group_of[name] for name in names} or groups:  # what is made of no tensor is made every time
            wanted[group].add(result)
    if not all(_fits(convert, {name: empty[name] for name in group}, wanted[group], results) for group in groups):
        groups = (tuple(empty),)
    return Conversion(convert, results, groups)


class Stream:
    """Tensors that arrive one by one, converted as soon as those of a group are there. ``write`` gets the results."""

    def __init__(self, conversion: Conversion, write: Callable[[str, Tensor], None]) -> None:
        self._conversion, self._write = conversion, write
        self._group_of = {name: group for group in conversion.groups for name in group}
        self._here: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def put(self, name: str, value: Tensor) -> None:
        """Take the next tensor."""
        self._here[name] = value
        group = self._group_of[name]
        if all(one in self._here for one in group):
            made = self._conversion.convert({one: self._here.pop(one) for one in group})
            for result in list(made):
                if result not in self._written:  # what is made of no tensor is made every time
                    self._written.add(result)
                    self._write(result, made[result])


class _Sources(TorchDispatchMode):
    """Follows the named tensors that each storage's content comes from."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, frozenset[str]] = {}
        self._kept: list[Tensor] = []  # an address names a storage as long as it lives

    def mark(self, tensor: Tensor, name: str) -> None:
        self._names[_storage(tensor)] = frozenset([name])

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._names.get(_storage(tensor), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = frozenset[str]().union(*map(self.of, read))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._names[_storage(leaf)] = self.of(leaf) | names
                self._kept.append(leaf)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _like(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _connected(names: Iterable[str], together: Iterable[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """Names in groups, such that those of each set are in one."""
    group_of = {name: [name] for name in names}
    for some in together:
        for one, other in pairwise(some):
            mine, theirs = group_of[one], group_of[other]
            if mine is not theirs:
                mine += theirs
                group_of.update(dict.fromkeys(theirs, mine))
    order = {name: number for number, name in enumerate(group_of)}
    groups = {id(group): group for group in group_of.values()}
    return tuple(tuple(sorted(group, key=order.__getitem__)) for group in groups.values())


def _fits(convert: Convert, group: dict[str, Tensor], wanted: set[str], results: Mapping[str, Tensor]) -> bool:
    """Whether a group alone gives what comes of it among all."""
    try:
        made = convert(group)
    except Exception:  # it may say in any way that it misses the others
        return False
    return set(made) == wanted and all(
        value.shape == results[name].shape and value.dtype == results[name].dtype for name, value in made.items()
    )
