"""Cases on several processes: how a test launches them, and what the processes do.

A test calls `torchrun` with a script of its own, whose main program is `run_cases`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop


def torchrun(script: str | None, root: Path, ranks: int, cases: Iterable[str], **environment: str) -> None:
    """Run ``script ROOT CASE...`` on so many processes of one thread each. The test fails with what they said if they
    do."""
    assert script is not None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, script, str(root), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


def result_of(root: Path, case: str) -> dict[str, Any]:
    """What `run_cases` has left of a case."""
    found: dict[str, Any] = torch.load(root / _file(case), weights_only=True)
    return found


def run_cases(sizes_of: Callable[[str, int], Sizes], run: Callable[[World, str, Path], Any]) -> None:
    """The main program of a process: each case on the mesh that ``sizes_of(case, processes)`` says, one after the
    other; what ``run`` returns on the first process is kept for `result_of`."""
    root, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    started = start(ParallelConfig(), "cpu")
    worlds: dict[Sizes, World] = {}
    for case in cases:
        sizes = sizes_of(case, started.size)
        if sizes not in worlds:
            worlds[sizes] = lay_out(started, sizes)
        result = run(worlds[sizes], case, root)
        if started.is_main:
            torch.save(result, root / _file(case))
            print("done", case, flush=True)
    stop()


def _file(case: str) -> str:
    return f"{case}.result".replace(" ", "_").replace("/", "_")
