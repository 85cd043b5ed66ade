"""Several processes write one cache and are killed: what was finished is there, whole, and others go on."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.data import writer
from kinema.data.cache import Cache, entry_key
from kinema.data.cache_tools import verify

FORK = multiprocessing.get_context("fork")
WORK_LOST = 5.0
"""Seconds of work that a crash may cost."""


def key_of(number: int) -> bytes:
    return entry_key("writers", number)


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    """Known from the number alone; of sizes from nothing to a megabyte."""
    generator = torch.Generator().manual_seed(number)
    floats = int(4 ** torch.randint(0, 10, (), generator=generator).item())
    drawn = torch.randn(floats, generator=generator)
    return {"latents": drawn, "text": drawn[: number % 9].half()}


def is_whole(cache: Cache, number: int) -> bool:
    found, expected = cache.get(key_of(number)), tensors_of(number)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def put_and_log(folder: Path, log: Path, numbers: range, segment_entries: int) -> None:
    """What a writer does: each number is logged after its entry has been put."""
    torch.set_num_threads(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cache = Cache(folder, segment_entries=segment_entries)
    for number in numbers:
        cache.put(key_of(number), tensors_of(number))
        os.write(out, number.to_bytes(8, "little"))
        if number % 5 == 0:
            cache.adopt()  # as every start of a run does
    cache.close()


def logged(log: Path) -> list[int]:
    data = log.read_bytes() if log.exists() else b""
    assert len(data) % 8 == 0
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def start(work: Callable[..., Any], *arguments: Any) -> Any:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def kill_two_writers(folder: Path, rng: random.Random) -> int:
    """One try; gives the number of entries that were finished."""
    ranges = [range(0, 10_000), range(20_000, 30_000)]
    logs = [folder.with_name(f"{folder.name}-{n}.log") for n in range(2)]
    processes = [start(put_and_log, folder, *one, 4) for one in zip(logs, ranges, strict=True)]
    wanted = rng.randint(2, 30)
    patience = time.monotonic() + 60
    while sum(len(logged(log)) for log in logs if log.exists()) < wanted and time.monotonic() < patience:
        pass
    time.sleep(rng.uniform(0, 0.01))  # anywhere in an entry, a sealing, an adoption
    for process in rng.sample(processes, 2):
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(rng.choice((0, 0, 0.005)))
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL

    finished = [number for log in logs for number in logged(log)]
    cache = Cache(folder)
    assert not cache.damaged
    assert all(is_whole(cache, number) for number in finished)
    by_key = {key_of(number): number for numbers in ranges for number in numbers[:200]}
    there = [by_key[key] for key in list(cache.keys())]
    assert all(is_whole(cache, number) for number in there), "something torn can be read"
    assert len(there) - len(finished) <= 2  # one of each: put, and not yet logged

    # a third goes on with the work of both
    third = start(put_and_log, folder, folder.with_name(f"{folder.name}-2.log"), range(0, max(there) % 20_000 + 5), 4)
    third.join(60)
    assert third.exitcode == 0
    cache.refresh()
    everything = {*there, *range(0, max(there) % 20_000 + 5)}
    assert set(cache.keys()) == {key_of(number) for number in everything}
    assert all(is_whole(cache, number) for number in everything)
    cache.adopt()
    report = verify(folder)
    assert not report.damaged and not report.unfinished and not list(folder.glob("*.open"))
    assert report.entries == len(everything)
    return len(finished)


@pytest.mark.parametrize("tries", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_two_writers_killed_at_random_moments_lose_and_tear_nothing(tmp_path: Path, tries: int):
    rng = random.Random(tries)
    assert sum(kill_two_writers(tmp_path / str(number), rng) for number in range(tries)) >= 2 * tries


def encode_slowly(folder: Path, log: Path) -> None:
    """Work that takes a known time for each entry, and a log of when each began."""
    torch.set_num_threads(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cache = Cache(folder, segment_entries=7)
    for number in range(1000):
        os.write(out, time.monotonic_ns().to_bytes(8, "little"))
        time.sleep(0.05)  # the encoder
        cache.put(key_of(number), tensors_of(number))


def test_a_kill_costs_the_entry_in_hand_alone(tmp_path: Path):
    log = tmp_path / "log"
    process = start(encode_slowly, tmp_path / "cache", log)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic_ns()
    process.join()
    began, kept = logged(log), len(Cache(tmp_path / "cache"))
    assert kept >= len(began) - 1 >= 1
    lost = (killed - began[kept]) / 1e9 if kept < len(began) else 0.0
    assert lost < WORK_LOST  # in fact one entry: 0.05 s, or what the machine makes of it


@pytest.mark.parametrize("pause", [0.05, 1.0, 1.99, 2.0])
def test_a_power_cut_costs_less_than_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float):
    """What the system was made to write to the disk is compared with what was put, at every moment: the clock runs
    faster than the real one, the calls are real."""
    now, unsynced, worst, synced = 0.0, [], [], os.fsync

    def fsync(descriptor: int) -> None:
        synced(descriptor)
        if descriptor == cache._writer._descriptor:
            unsynced.clear()

    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    monkeypatch.setattr(writer.os, "fsync", fsync)
    cache = Cache(tmp_path, segment_entries=100)
    for number in range(int(30 / pause) if pause < 1 else 30):
        began = now
        now += pause  # the encoder
        unsynced.append(began)  # work that would be lost, until it is on the disk
        cache.put(key_of(number % 3 + 3 * number), {"x": torch.ones(3)})
        worst.append(now + pause - unsynced[0] if unsynced else pause)  # a cut just before the next put
    assert max(worst) < WORK_LOST
    assert max(worst) >= pause


def test_writers_of_two_machines_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other machine's process has the same number as one that is gone here: only its age counts."""
    here = Cache(tmp_path)
    with monkeypatch.context() as there:
        there.setattr(writer, "_machine", lambda: ("another machine", "its namespace"))
        there.setattr(writer.os, "getpid", lambda: 2**22 + 1)  # no such process here
        other = Cache(tmp_path)
        for number in range(3):
            other.put(key_of(number), tensors_of(number))
    for number in range(3, 6):
        here.put(key_of(number), tensors_of(number))
    assert len({path.name.split("-")[0] for path in tmp_path.glob("*.open")}) == 2
    third = Cache(tmp_path)
    assert third.adopt() == 0  # both may be alive
    other.put(key_of(6), tensors_of(6))  # goes on undisturbed
    (foreign,) = [path for path in tmp_path.glob("*.open") if path != here._writer.segment.path]
    os.utime(foreign, (time.time() - writer.STALE_SECONDS - 10,) * 2)
    assert third.adopt() == 1 and not foreign.exists()
    other.put(key_of(7), tensors_of(7))  # alive after all: it notices, and begins a new segment
    other.close(), here.close()
    third.refresh()
    assert len(third) == 8 and all(is_whole(third, number) for number in range(8))
    assert verify(tmp_path).entries == 8
