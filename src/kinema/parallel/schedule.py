"""In which order each process of a pipeline runs its passes: one list of actions a process, made once, by all alike.

The lists come from a simulation of the whole pipeline in ticks (forward 1, backward 2, of which 1 for the inputs and 1
for the weights; sending takes none). So an order that exists can be run without processes waiting for one another in a
circle, and its length says which share of the time they stand idle.

- ``gpipe`` (Huang et al. 2019): all forwards, then all backwards. Idle (p - 1) / (m + p - 1) of the time; a stage keeps
  the activations of all m micro-batches.
- ``1f1b`` (Narayanan et al. 2019): a backward as soon as there is one. As idle; a stage keeps at most p micro-batches.
- ``interleaved`` (Narayanan et al. 2021): several stages a process, in turns. Idle (p - 1) / (v m + p - 1) with v
  stages a process; activations of more micro-batches are kept.
- ``zero_bubble`` (Qi et al. 2023): the gradients of weights wait until there is nothing more urgent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Literal, NamedTuple

Schedule = Literal["1f1b", "gpipe", "interleaved", "zero_bubble"]
TICKS = {"forward": 1, "backward": 2, "inputs": 1, "weights": 1}


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Literal["forward", "backward", "inputs", "weights"]
    """``inputs`` and ``weights``: the two halves of a backward pass, by what gradients are for."""
    stage: int
    micro: int


@dataclass(frozen=True)
class Orders:
    """What each process does, and how long that takes in ticks."""

    of_rank: tuple[tuple[Action, ...], ...]
    ticks: int

    @property
    def bubble(self) -> float:
        """The share of the time that processes stand idle."""
        busy = sum(TICKS[action.kind] for actions in self.of_rank for action in actions)
        return 1 - busy / (len(self.of_rank) * self.ticks)


@cache
def orders(schedule: Schedule, ranks: int, per_rank: int, micro_batches: int) -> Orders:
    """The orders for ``ranks`` processes with ``per_rank`` stages each: stage s is with process s mod ``ranks``."""
    assert per_rank == 1 or schedule == "interleaved", f"{schedule} has one stage a process"
    for spare in count():
        found = _Simulation(schedule, ranks, per_rank, micro_batches, spare).run()
        if found is not None:  # else too few micro-batches were let in for the last stage to begin
            return found
    raise AssertionError("unreachable")


class _Simulation:
    def __init__(self, schedule: Schedule, ranks: int, per_rank: int, micro_batches: int, spare: int) -> None:
        self.schedule, self.ranks, self.per_rank, self.micro_batches = schedule, ranks, per_rank, micro_batches
        self.backward: Literal["backward", "inputs"] = "inputs" if schedule == "zero_bubble" else "backward"
        self.finished: dict[Action, int] = {}
        self.limits = [self._limit(rank) + spare for rank in range(ranks)]
        self.forwards = [list(self._turns(rank, reverse=False)) for rank in range(ranks)]
        self.backwards = [list(self._turns(rank, reverse=True)) for rank in range(ranks)]
        self.weights: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        self.kept = [0] * ranks
        """Micro-batches whose activations each process keeps."""

    def _limit(self, rank: int) -> int:
        """How many a process may keep."""
        behind = self.ranks - 1 - rank
        if self.schedule == "gpipe":
            return self.micro_batches
        if self.schedule == "zero_bubble":
            return self.ranks
        if self.per_rank == 1:
            return behind + 1
        return 2 * behind + (self.per_rank - 1) * self.ranks + 1

    def _turns(self, rank: int, reverse: bool) -> Iterator[tuple[int, int]]:
        """(stage, micro-batch) in the order in which a process takes them: as many micro-batches as there are
        processes through one of its stages, then through the next."""
        stages = [rank + turn * self.ranks for turn in range(self.per_rank)]
        for start in range(0, self.micro_batches, self.ranks):
            for stage in reversed(stages) if reverse else stages:
                for micro in range(start, min(start + self.ranks, self.micro_batches)):
                    yield stage, micro

    def run(self) -> Orders | None:
        """None: all wait for one another."""
        orders: list[list[Action]] = [[] for _ in range(self.ranks)]
        free = [0] * self.ranks
        total = self.ranks * self.per_rank * self.micro_batches * (3 if self.backward == "inputs" else 2)
        now = 0
        while len(self.finished) < total:
            for rank in range(self.ranks):
                if free[rank] > now:
                    continue
                action = self._choose(rank, now)
                if action is not None:
                    orders[rank].append(action)
                    self.finished[action] = free[rank] = now + TICKS[action.kind]
            if len(self.finished) < total and max(self.finished.values(), default=0) <= now:
                return None
            now += 1
        return Orders(tuple(map(tuple, orders)), max(free))

    def _choose(self, rank: int, now: int) -> Action | None:
        """What a process begins now; None: it waits."""
        if self.backward == "inputs":
            return self._choose_eagerly(rank, now)
        forwards, backwards = self.forwards[rank], self.backwards[rank]
        forward = bool(forwards) and self.kept[rank] < self.limits[rank]
        if not forward and not backwards:
            return None
        action = Action("forward", *forwards[0]) if forward else Action("backward", *backwards[0])
        if not self._can_run(action, now):
            return None
        (forwards if forward else backwards).pop(0)
        self.kept[rank] += 1 if forward else -1
        return action

    def _choose_eagerly(self, rank: int, now: int) -> Action | None:
        """What others wait for first, and weights when there is nothing else."""
        forwards, backwards, weights = self.forwards[rank], self.backwards[rank], self.weights[rank]
        if backwards and self._can_run(action := Action("inputs", *backwards[0]), now):
            weights.append(backwards.pop(0))
            return action
        room = self.kept[rank] < self.limits[rank]
        if forwards and room and self._can_run(action := Action("forward", *forwards[0]), now):
            forwards.pop(0)
            self.kept[rank] += 1
            return action
        if not weights:
            return None
        self.kept[rank] -= 1
        return Action("weights", *weights.pop(0))

    def _can_run(self, action: Action, now: int) -> bool:
        """Whether what it needs is finished: the same pass of the neighbouring stage, and its own forward."""
        kind, stage, micro = action
        if kind == "forward":
            needed = [Action(kind, stage - 1, micro)] if stage else []
        else:
            needed = [Action("forward", stage, micro)]
            if stage + 1 < self.ranks * self.per_rank:
                needed.append(Action(kind, stage + 1, micro))
        return all(self.finished.get(one, now + 1) <= now for one in needed)
