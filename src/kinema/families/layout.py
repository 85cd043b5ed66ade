"""The original layout of a family's weights, as rules that read both ways: names, layers that the original keeps as
one, values that it stores in another order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.errors import UserError
from kinema.families.names import NameMap, PathPattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank update of one layer: (alpha / rank) B A, with A [rank, in, ...] and B [out, rank, ...].

    ``magnitude`` [out] makes it DoRA (https://arxiv.org/abs/2402.09353).
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Fused:
    """One original layer that holds several of ours, stacked along its output.

    ``shares`` are their proportions of its rows; by default all have as many. ``{}`` in names stands for an index.
    """

    theirs: str
    ours: tuple[str, ...]
    shares: tuple[float, ...] = ()

    def cut(self, rows: int) -> list[int]:
        """Rows of each part, of ``rows`` in all."""
        shares = self.shares or (1.0,) * len(self.ours)
        sizes = [round(rows * share / sum(shares)) for share in shares]
        assert sum(sizes) == rows, f"{self.theirs}: {rows} rows do not divide as {shares}"
        return sizes


@dataclass(frozen=True)
class Changed:
    """A layer or parameter whose values the original stores differently.

    ``to_original`` and ``from_original`` turn a tensor of one layout into the other's. ``rows``: they reorder the
    first dimension alone, so that they apply to B of an adapter (and to a bias) as they do to the weight.
    """

    ours: str
    theirs: str
    to_original: Callable[[Tensor], Tensor]
    from_original: Callable[[Tensor], Tensor]
    rows: bool = True


def swapped_halves(ours: str, theirs: str) -> Changed:
    """A modulation whose output is (scale, shift) in diffusers and (shift, scale) in the original."""

    def swap(value: Tensor) -> Tensor:
        import torch

        first, second = value.chunk(2)
        return torch.cat([second, first])

    return Changed(ours, theirs, swap, swap)


class Layout:
    """How one network's weights are named and stored in the original layout.

    ``rename``: pairs of paths (ours, theirs), as in `NameMap`. ``dropped``: regular expressions (full match) of tensors
    in original files that the network computes itself. ``same``: names that no rule knows are the same in both
    layouts; else there is no original name for them, which is a KeyError.
    """

    def __init__(
        self,
        rename: Iterable[tuple[str, str]],
        *,
        fused: Sequence[Fused] = (),
        changed: Sequence[Changed] = (),
        dropped: Sequence[str] = (),
        same: bool = False,
    ) -> None:
        self._same = same
        self.names = NameMap([*rename, *((one.ours, one.theirs) for one in changed)])
        self._fused = [(PathPattern(one.theirs), [PathPattern(part) for part in one.ours], one) for one in fused]
        self._changed = [(PathPattern(one.ours), PathPattern(one.theirs), one) for one in changed]
        self._dropped = [re.compile(pattern) for pattern in dropped]

    # -- weights ---------------------------------------------------------------------------------------------------

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights from diffusers names to the original's. UserError for a part of a fused layer without the rest."""
        import torch

        result: dict[str, Tensor] = {}
        groups: dict[str, dict[int, Tensor]] = {}
        rules: dict[str, Fused] = {}
        for name, value in state.items():
            if (place := self._part_of(name)) is not None:
                theirs, index, rule = place
                groups.setdefault(theirs, {})[index] = value
                rules[theirs] = rule
                result.setdefault(theirs, value)  # keeps the order; filled below
            else:
                change = self._change(name, ours=True)
                result[self._theirs(name)] = value if change is None else change.to_original(value)
        for theirs, parts in groups.items():
            if len(parts) != len(rules[theirs].ours):
                absent = [part for i, part in enumerate(rules[theirs].ours) if i not in parts]
                raise UserError(f"{theirs} of the original layout also needs {', '.join(absent)}, which is not there.")
            result[theirs] = torch.cat([parts[i] for i in sorted(parts)])
        return result

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse; a state that has diffusers names already is returned as it is."""
        if not self.is_original(state):
            return dict(state)
        result: dict[str, Tensor] = {}
        for name, value in state.items():
            if any(pattern.fullmatch(name) for pattern in self._dropped):
                continue
            if (whole := self._whole(name)) is not None:
                ours, rule = whole
                result.update(zip(ours, value.split(rule.cut(value.shape[0])), strict=True))
            else:
                change = self._change(name, ours=False)
                result[self._ours(name)] = value if change is None else change.from_original(value)
        return result

    def is_original(self, names: Iterable[str]) -> bool:
        """Whether these are names of the original layout: more of them are the original's alone than diffusers'."""
        theirs = ours = 0
        for name in names:
            known_theirs = self._whole(name) is not None or self._ours(name) != name
            known_ours = self._part_of(name) is not None or self.names.rename(name) not in (None, name)
            theirs += known_theirs and not known_ours
            ours += known_ours and not known_theirs
        return theirs > ours

    # -- adapters --------------------------------------------------------------------------------------------------

    def original_layer(self, layer: str) -> str:
        """The original name of one of our layers; that of the layer it is a part of, where layers are fused."""
        part = self._part_of(layer)
        return self._theirs(layer) if part is None else part[0]

    def adapter_to_original(self, layers: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        """Updates by original layer. Those of a fused layer become one, of the sum of their ranks: A stacked, B
        block-diagonal, zero for parts without an update. UserError for DoRA on some parts only: the norms of the
        others are not known here."""
        result: dict[str, LoraFactors] = {}
        groups: dict[str, dict[int, LoraFactors]] = {}
        rules: dict[str, Fused] = {}
        for layer, factors in layers.items():
            if (place := self._part_of(layer)) is not None:
                groups.setdefault(place[0], {})[place[1]] = factors
                rules[place[0]] = place[2]
                result.setdefault(place[0], factors)
            else:
                result[self._theirs(layer)] = _with_rows(factors, self._change(layer, ours=True), layer, back=False)
        for theirs, parts in groups.items():
            result[theirs] = _fuse(theirs, parts, rules[theirs])
        return result

    def adapter_from_original(self, layers: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        """The inverse. Updates of a fused layer are cut by rows of B; where each column of B serves one part alone
        (as `adapter_to_original` writes them), each part gets back its own rank. Other names are kept."""
        result: dict[str, LoraFactors] = {}
        for layer, factors in layers.items():
            if (whole := self._whole(layer)) is not None:
                result.update(_unfuse(whole[0], factors, whole[1]))
            else:
                result[self._ours(layer)] = _with_rows(factors, self._change(layer, ours=False), layer, back=True)
        return result

    # -- rules -----------------------------------------------------------------------------------------------------

    def _theirs(self, name: str) -> str:
        renamed = self.names.rename(name)
        if renamed is None and not self._same:
            raise KeyError(f"no name in the original layout for {name}")
        return renamed or name

    def _ours(self, name: str) -> str:
        return self.names.restore(name) or name

    def _part_of(self, name: str) -> tuple[str, int, Fused] | None:
        """(original name, which part, rule) of one of our names, if the original keeps it in a fused layer."""
        for _, parts, rule in self._fused:
            for index, pattern in enumerate(parts):
                if match := pattern.fullmatch(name):
                    *indices, rest = match.groups()
                    return rule.theirs.format(*indices) + (rest or ""), index, rule
        return None

    def _whole(self, name: str) -> tuple[list[str], Fused] | None:
        """(our names, rule) of the original's name of a fused layer."""
        for pattern, _, rule in self._fused:
            if match := pattern.fullmatch(name):
                *indices, rest = match.groups()
                return [part.format(*indices) + (rest or "") for part in rule.ours], rule
        return None

    def _change(self, name: str, *, ours: bool) -> Changed | None:
        for our_pattern, their_pattern, rule in self._changed:
            if (our_pattern if ours else their_pattern).fullmatch(name):
                return rule
        return None


def _with_rows(factors: LoraFactors, change: Changed | None, layer: str, *, back: bool) -> LoraFactors:
    if change is None:
        return factors
    if not change.rows:
        raise UserError(
            f"{layer}: the original layout stores this layer in another shape, in which an adapter cannot be written. "
            "Leave it out of adapter.targets, or use the diffusers layout."
        )
    turn = change.from_original if back else change.to_original
    magnitude = None if factors.magnitude is None else turn(factors.magnitude)
    return LoraFactors(factors.A, turn(factors.B), factors.alpha, magnitude)


def _fuse(theirs: str, parts: Mapping[int, LoraFactors], rule: Fused) -> LoraFactors:
    import torch

    shares = rule.shares or (1.0,) * len(rule.ours)
    first = min(parts)
    sizes = rule.cut(round(parts[first].B.shape[0] * sum(shares) / shares[first]))
    magnitudes = [factors.magnitude for factors in parts.values()]
    if any(magnitude is not None for magnitude in magnitudes) and (
        len(parts) < len(sizes) or any(magnitude is None for magnitude in magnitudes)
    ):
        raise UserError(
            f"{theirs} of the original layout is one layer, and DoRA changes only some of its parts "
            f"({', '.join(rule.ours)}). Adapt all of them, or use the diffusers layout."
        )
    scales = {factors.scale for factors in parts.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = sum(factors.rank for factors in parts.values())
    template = parts[first].B
    whole = template.new_zeros(sum(sizes), rank, *template.shape[2:])
    row = column = 0
    for index, size in enumerate(sizes):
        if (factors := parts.get(index)) is not None:
            own = factors.B if factors.scale == scale else factors.B * (factors.scale / scale)
            whole[row : row + size, column : column + factors.rank] = own
            column += factors.rank
        row += size
    magnitude = None
    if magnitudes[0] is not None:
        magnitude = torch.cat([m for i in sorted(parts) if (m := parts[i].magnitude) is not None])
    return LoraFactors(torch.cat([parts[i].A for i in sorted(parts)]), whole, scale * rank, magnitude)


def _unfuse(ours: Sequence[str], factors: LoraFactors, rule: Fused) -> dict[str, LoraFactors]:
    import torch

    sizes = rule.cut(factors.B.shape[0])
    pieces = factors.B.split(sizes)
    magnitudes = [None] * len(sizes) if factors.magnitude is None else list(factors.magnitude.split(sizes))
    used = torch.stack([piece.flatten(2).any(-1).any(0) if piece.ndim > 2 else piece.any(0) for piece in pieces])
    if bool((used.sum(0) > 1).any()) or len(pieces) == 1:
        shared = zip(ours, pieces, magnitudes, strict=True)
        return {name: LoraFactors(factors.A, piece, factors.alpha, m) for name, piece, m in shared}
    if not used.any():  # a fresh adapter: B is zero everywhere
        if factors.rank % len(pieces):
            shared = zip(ours, pieces, magnitudes, strict=True)
            return {name: LoraFactors(factors.A, piece, factors.alpha, m) for name, piece, m in shared}
        own_rank = factors.rank // len(pieces)
        used = torch.eye(len(pieces), dtype=torch.bool).repeat_interleave(own_rank, dim=1).to(used.device)
    result = {}
    for name, piece, columns, magnitude in zip(ours, pieces, _runs(used), magnitudes, strict=True):
        if columns.any():
            a, b = factors.A[columns], piece[:, columns]
            result[name] = LoraFactors(a, b, factors.scale * a.shape[0], magnitude)
    return result


def _runs(used: Tensor) -> Tensor:
    """Columns by part; one that no part uses (zero in B by chance) goes with its left neighbour."""
    owner = used.int().argmax(0)
    known = used.any(0)
    last = int(owner[known][0])
    for column in range(used.shape[1]):
        if known[column]:
            last = int(owner[column])
        owner[column] = last
    import torch

    return torch.stack([owner == part for part in range(used.shape[0])])
