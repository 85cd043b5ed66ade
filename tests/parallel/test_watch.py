"""Which process is to blame, from what all of them tell."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from kinema.parallel.mesh import World
from kinema.parallel.watch import DEAD_AFTER, FAILED_AFTER, FIRST, LEAST, Seen, Watch, find_culprit


def processes(counts: list[int], *, moved: float = 0.0, lived: dict[int, float] | None = None, now: float = 100.0):
    """Processes that came to these points at ``moved`` and show life still, but for those in ``lived``."""
    return [
        Seen(
            rank, f"host{rank}, pid {rank}", "step 3: forward", count, False, "", 5, moved, (lived or {}).get(rank, now)
        )
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
    told = {"alive": 1, "count": 4, "phase": "a", "patient": False, "error": "", "where": "here"}
    one.update(told, 10.0)
    one.update({**told, "alive": 2}, 20.0)
    assert (one.moved_at, one.lived_at) == (10.0, 20.0)
    one.update({**told, "alive": 3, "count": 5}, 30.0)
    assert (one.moved_at, one.lived_at) == (30.0, 30.0)
    one.update({**told, "alive": 4, "count": 5, "patient": True}, 40.0)  # it compiles, in the same place
    one.update({**told, "alive": 5, "count": 5, "patient": True}, 90.0)
    assert one.moved_at == 30.0
    one.update({**told, "alive": 6, "count": 5}, 91.0)
    assert one.moved_at == 91.0, "what it took to compile is not held against it"


def test_one_that_failed_is_named_unless_the_others_fail_alike() -> None:
    some = processes([7, 8, 8], moved=95)
    some[1].error, some[1].moved_at = "OSError: no space", 98
    assert find_culprit(some, 100, 45) is None, "the others may be about to say the same"
    some[1].lived_at = 98
    for one in (some[0], some[2]):
        one.lived_at = 98 + FAILED_AFTER
    found = find_culprit(some, 98.5 + FAILED_AFTER, 45)
    assert found == ([], "process 1 (host1, pid 1) has failed in 'step 3: forward': OSError: no space")


def test_the_limit_follows_the_slowest_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first step, once there are others, nor what lies between steps, nor what torch compiles."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step(*seconds: float) -> float:
        for number, one in enumerate(seconds):
            watch.at(f"place {number}")
            now[0] += one
        watch.step_done()
        now[0] += 1000.0
        return watch.limit

    watch = Watch(World.alone())
    assert watch.limit == FIRST
    assert step(2.0, 200.0) == 1000.0
    assert step(2.0, 8.0) == LEAST
    assert step(20.0, 60.0, 30.0) == 300.0
    assert step(1.0, 1.0) == 300.0
    watch.at("forward")
    watch.compiles(True)
    now[0] += 500.0
    watch.compiles(False)
    assert step(1.0) == 300.0
    assert Watch(World.alone(), 7.0).limit == 7.0


def test_a_long_wait_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(replace(World.alone(), size=2))
    watch._processes = processes([3, 3], moved=time.monotonic() - FIRST - 60)
    watch._note()
    assert not capsys.readouterr().err
    for one in watch._processes:
        one.patient, one.phase = True, "previews"
    watch._note()
    watch._note()
    (line,) = capsys.readouterr().err.splitlines()
    assert "process 0 (host0, pid 0), 1 (host1, pid 1) has been in 'previews' for 31 minutes" in line


def test_one_process_is_not_watched() -> None:
    with Watch(World.alone()) as watch:
        watch.at("step 1: forward")
        assert watch._thread is None
