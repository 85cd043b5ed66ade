"""Ranks that share the work or draw together: who speaks, who writes, who notices that another one is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.errors import ConfigError, UserError
from kinema.families.registry import family_class
from kinema.parallel.mesh import World
from kinema.parallel.watch import LEAST, Watch
from kinema.sampling import command
from kinema.sampling.command import sample
from kinema.sampling.index import read_index
from kinema.sampling.together import Together
from kinema.sampling.watched import WatchedSteps

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("ranks"), "t2v-1.3b")


def be_rank(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def test_a_rank_whose_device_cannot_be_used_says_so_itself(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line keeps a ConfigError of the others to itself: the first rank says it."""

    def no_such_device(*_: Any, device: torch.device, **__: Any) -> None:
        assert device == torch.device("cuda:5")
        raise RuntimeError("CUDA error: invalid device ordinal\nmore")

    be_rank(monkeypatch, 5, 8)
    with pytest.raises(ConfigError, match=r"--device warp: cannot be used here"):
        sample(["x"], model=str(base), device="warp", out=tmp_path, **SMALL)
    monkeypatch.setattr(torch, "empty", no_such_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError) as caught:
        sample(["x"], model=str(base), device="cuda", out=tmp_path, **SMALL)
    assert not isinstance(caught.value, ConfigError)
    assert str(caught.value) == (
        "--device cuda: rank 5 cannot use cuda:5 (CUDA error: invalid device ordinal). This machine has 4 GPU(s): "
        "start at most as many processes on it (--nproc-per-node 4)."
    )


def test_of_those_that_draw_together_the_first_alone_mends_the_index(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is there and its line is gone: one line is added, not one by each rank."""
    options: dict[str, Any] = {"model": str(base), "out": tmp_path, "device": "cpu", **SMALL}
    (path,) = sample(["a ball"], **options)
    (tmp_path / "index.jsonl").unlink()
    said: list[Any] = []

    class Peer(Together):
        def agreed(self, value: Any) -> Any:
            said.append(value)
            return {0} if isinstance(value, set) else value  # what the first one has found

    @contextmanager
    def peers(*_: Any) -> Iterator[Together]:
        yield Peer()

    monkeypatch.setattr(command, "together", peers)
    be_rank(monkeypatch, 1, 2)
    assert sample(["a ball"], sp=2, **options) == []
    assert said[0] == set() and not (tmp_path / "index.jsonl").exists()
    be_rank(monkeypatch, 0, 2)
    assert sample(["a ball"], sp=2, **options) == [path]
    assert said[2] == {0} and list(read_index(tmp_path)) == ["a-ball-0.mp4"]


def test_steps_are_told_to_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stretches of three steps: between them, and before the first, a process may take its time."""
    now = [0.0]
    monkeypatch.setattr("kinema.parallel.watch.time.monotonic", lambda: now[0])
    watch = Watch(World.alone())
    steps = WatchedSteps(watch)
    assert watch._patient
    found = []
    for step, at in enumerate([100.0, 120.0, 145.0, 900.0, 905.0, 906.0], 1):
        now[0] = at
        steps.done(step, 3)
        found.append((watch._phase, watch._patient, watch.limit))
    second, third, between = "step 2 of a sample", "step 3 of a sample", "between samples"
    assert [one[:2] for one in found] == [
        (second, False), (third, False), (between, True), ("step 5 of a sample", False), ("step 6 of a sample", False),
        (between, True),
    ]  # fmt: skip
    limits = [one[2] for one in found]
    assert limits[0] > 1000 and limits[1:] == [100.0] + [125.0] * 4, "five times the slowest: 20 s, then 25 s"
    assert LEAST < 100
    WatchedSteps().done(1, 3)  # of one process: nobody watches


STOPPED = """
import os, signal, time, torch
from kinema.parallel import watch
from kinema.sampling.together import together
watch.DEAD_AFTER, watch.INTERVAL, watch.HEARD_WITHIN = 4.0, 0.2, 0.5
with together(2, torch.device("cpu")) as others:
    for step in range(1, 9):
        others.steps.done(step, 9)
        if step == 3 and os.environ["RANK"] == "1":
            time.sleep(1)  # it has told where it stands
            os.kill(os.getpid(), signal.SIGSTOP)
        others.agreed(step)
"""


@pytest.mark.slow
def test_a_process_that_stops_ends_those_that_draw_with_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", STOPPED], env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        _, said = ranks[0].communicate(timeout=100)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[0].returncode == 75
    assert f"process 1 ({os.uname().nodename}, pid {ranks[1].pid}) has been silent" in said, said
    assert "'step 4 of a sample'" in said
