"""Whether the stages of a pipeline could come to wait for one another for ever in what they send."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

import pytest

from kinema.parallel.lanes import communicator, communicators
from kinema.parallel.schedule import Action, Schedule, orders

Way = Callable[[int, int, int], int]
"""(source, target, processes) -> the number of a communicator."""


class Message(NamedTuple):
    sends: bool
    source: int
    target: int
    micro: int


def messages(action: Action, last: int) -> list[Message]:
    """What a pass takes from a stage, and gives to one."""
    kind, stage, micro = action
    if kind == "weights":
        return []
    before, after = (stage - 1, stage + 1) if kind == "forward" else (stage + 1, stage - 1)
    taken = [Message(False, before, stage, micro)] if 0 <= before <= last else []
    return taken + ([Message(True, stage, after, micro)] if 0 <= after <= last else [])


def hangs(schedule: Schedule, ranks: int, per_rank: int, micro_batches: int, way: Way) -> bool:
    """Whether a step ends in all waiting, where every communicator of a process does one thing after the other in the
    order of issue, and a message moves when both of its ends are first in their rows. A process waits for what it
    receives, not for what it sends."""
    lists = orders(schedule, ranks, per_rank, micro_batches).of_rank
    left = [deque(one for action in actions for one in messages(action, ranks * per_rank - 1)) for actions in lists]
    rows: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)
    waits: list[bool] = [False] * ranks
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while left[rank] and not waits[rank]:
                message = left[rank].popleft()
                rows[rank, way(message.source, message.target, ranks)].append(message)
                waits[rank], moved = not message.sends, True
        for (rank, group), row in list(rows.items()):
            sent = rows[row[0].source % ranks, group] if row and not row[0].sends else None
            if sent and sent[0] == row[0]._replace(sends=True):
                sent.popleft()
                row.popleft()
                waits[rank], moved = False, True
    return any(left) or any(rows.values())


def by_direction(source: int, target: int, ranks: int) -> int:
    """What does not do: a communicator for each direction, and for the way from the last process to the first."""
    return 2 * (source > target) + (min(source, target) % ranks == ranks - 1)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_no_order_of_passes_can_hang(ranks: int) -> None:
    every: list[tuple[Schedule, int]] = [("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1)]
    for schedule, per_rank in [*every, ("interleaved", 2), ("interleaved", 3)]:
        for micro_batches in range(1, 3 * ranks + 1):
            assert not hangs(schedule, ranks, per_rank, micro_batches, communicator), (
                schedule,
                per_rank,
                micro_batches,
            )


def test_fewer_communicators_hang_where_micro_batches_are_left_over() -> None:
    """What keeps the test above honest."""
    found = [(p, m) for p in (4, 5, 6) for m in range(1, 13) if hangs("interleaved", p, 2, m, by_direction)]
    assert found == [(4, 9), (5, 6), (5, 11), (5, 12), (6, 7), (6, 8)]


@pytest.mark.parametrize("ranks", range(2, 9))
def test_a_process_has_one_neighbour_on_a_communicator(ranks: int) -> None:
    peers: defaultdict[tuple[int, int], set[tuple[int, bool]]] = defaultdict(set)
    for stage in range(2 * ranks - 1):
        for source, target in ((stage, stage + 1), (stage + 1, stage)):
            number = communicator(source, target, ranks)
            assert 0 <= number < communicators(ranks)
            peers[source % ranks, number].add((target % ranks, True))
            peers[target % ranks, number].add((source % ranks, False))
    assert all(len(one) == 1 for one in peers.values())
