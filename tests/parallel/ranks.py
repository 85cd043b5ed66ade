"""Cases on several processes: how a test starts them, and what the processes do.

A module of cases has a ``main(root, cases)``, mostly `run_cases` with what is its own; a test hands it to `on_ranks`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop

Main = Callable[[Path, list[str]], None]
HERE = Path(__file__).parent
PRELOADED = [path.stem for path in HERE.glob("*_cases.py")]
LIMIT = 1500.0
"""Seconds that a launch may take."""


def on_ranks(ranks: int, main: Main, root: Path, cases: Iterable[str]) -> None:
    """``main(root, cases)`` on so many processes of one thread each. The test fails with what one raises if it does.

    They are forked from a process that has imported all that they need, which would take them longer than most cases.
    """
    _start_server()
    arguments = (ranks, _free_port(), main, root, list(cases))
    launched = start_processes(_rank, arguments, nprocs=ranks, join=False, start_method="forkserver")
    end = time.monotonic() + LIMIT
    try:
        while not launched.join(timeout=5):
            assert time.monotonic() < end, f"{ranks} processes took more than {LIMIT:.0f} s"
    finally:
        for process in launched.processes:
            if process.is_alive():
                process.kill()


def result_of(root: Path, case: str) -> dict[str, Any]:
    """What `run_cases` has left of a case."""
    found: dict[str, Any] = torch.load(root / _file(case), weights_only=True)
    return found


def run_cases(
    root: Path, cases: Sequence[str], sizes_of: Callable[[str, int], Sizes], run: Callable[[World, str, Path], Any]
) -> None:
    """In a process: each case on the mesh that ``sizes_of(case, processes)`` says, one after the other; what ``run``
    returns on the first process is kept for `result_of`."""
    started = start(ParallelConfig(), "cpu")
    worlds: dict[Sizes, World] = {}
    for case in cases:
        sizes = sizes_of(case, started.size)
        if sizes not in worlds:
            worlds[sizes] = lay_out(started, sizes)
        result = run(worlds[sizes], case, root)
        if started.is_main:
            torch.save(result, root / _file(case))
    stop()


def _rank(rank: int, ranks: int, port: int, main: Main, root: Path, cases: list[str]) -> None:
    """What torchrun tells a process, and its work."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    main(root, cases)


def _start_server() -> None:
    """The process that others are forked from, if it does not run yet. It gets modules' places from the environment:
    what is told it otherwise Python 3.11 forgets (python/cpython#126631)."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join([str(HERE), before.get("PYTHONPATH", "")]), CUDA_VISIBLE_DEVICES="")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _file(case: str) -> str:
    return f"{case}.result".replace(" ", "_").replace("/", "_")
