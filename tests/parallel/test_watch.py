"""Which process is to blame, from what all of them tell."""

from __future__ import annotations

import pytest

from kinema.parallel.mesh import World
from kinema.parallel.watch import DEAD_AFTER, FIRST, LEAST, Seen, Watch, find_culprit


def processes(counts: list[int], *, moved: float = 0.0, lived: dict[int, float] | None = None, now: float = 100.0):
    """Processes that came to these points at ``moved`` and show life still, but for those in ``lived``."""
    return [
        Seen(rank, f"host{rank}, pid {rank}", "step 3: forward", count, False, 5, moved, (lived or {}).get(rank, now))
        for rank, count in enumerate(counts)
    ]


def test_nobody_is_to_blame_in_time() -> None:
    assert find_culprit(processes([7, 8, 8], moved=60), 100, 45) is None


def test_who_is_behind_hangs() -> None:
    ranks, text = find_culprit(processes([8, 7, 8], moved=40), 100, 45)
    assert ranks == [1] and "process 1 (host1, pid 1)" in text and "60 s" in text and "step 3: forward" in text


def test_all_at_one_point() -> None:
    ranks, text = find_culprit(processes([8, 8], moved=40), 100, 45)
    assert ranks == [0, 1] and "all 2 processes" in text


def test_the_silent_one_is_named_though_others_are_behind() -> None:
    ranks, text = find_culprit(processes([7, 9, 7], moved=99, lived={1: 100 - DEAD_AFTER - 1}), 100, 45)
    assert ranks == [1] and f"silent for {DEAD_AFTER + 1:.0f} s" in text


def test_patience_covers_waiting_but_not_death() -> None:
    waiting = processes([7, 8], moved=0)
    waiting[0].patient = True
    for one in waiting:
        one.lived_at = 10_000
    assert find_culprit(waiting, 10_000, 45) is None
    waiting[1].lived_at = 9_000
    assert find_culprit(waiting, 10_000, 45)[0] == [1]


def test_what_is_told_moves_the_clocks() -> None:
    one = Seen(0)
    told = {"alive": 1, "count": 4, "phase": "a", "patient": False, "where": "here"}
    one.update(told, 10.0)
    one.update({**told, "alive": 2}, 20.0)
    assert (one.moved_at, one.lived_at) == (10.0, 20.0)
    one.update({**told, "alive": 3, "count": 5}, 30.0)
    assert (one.moved_at, one.lived_at) == (30.0, 30.0)


def test_the_limit_follows_the_slowest_step() -> None:
    watch = Watch(World.alone())
    assert watch.limit == FIRST
    watch.step_took(2.0)
    assert watch.limit == LEAST
    watch.step_took(60.0)
    watch.step_took(20.0)
    assert watch.limit == pytest.approx(300.0)
    assert Watch(World.alone(), 7.0).limit == 7.0


def test_one_process_is_not_watched() -> None:
    with Watch(World.alone()) as watch:
        watch.at("step 1: forward")
        assert watch._thread is None
