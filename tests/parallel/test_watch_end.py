"""How a run of two processes ends when one of them hangs, dies or fails: by name, with a code that says try again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import watch_cases

from kinema.parallel.watch import EXIT_CODE

End = tuple[int, str]
"""Exit code and standard error of a process."""


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    root = tmp_path_factory.mktemp("watch")
    cases = [f"{case}={_free_port()}" for case in ("hangs", "dies", "fails")]
    command = [sys.executable, watch_cases.__file__, str(root), *cases]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    codes = json.loads((root / "codes.json").read_text())
    return {name: (code, Path(root / f"{name}.txt").read_text()) for name, code in codes.items()}


def test_one_that_hangs_ends_all_and_shows_where_it_stands(ends: dict[str, End]) -> None:
    (first, said), (second, shown) = ends["hangs-0"], ends["hangs-1"]
    assert (first, second) == (EXIT_CODE, EXIT_CODE)
    assert "kinema: process 0 ends with the run: process 1 (" in said
    assert "it hangs in 'step 1: forward' while the others wait" in said
    assert "process 1 stands here:" in shown and "in hangs" in shown  # the function that it sleeps in
    assert "stands here" not in said


def test_one_that_dies_is_named_when_a_collective_fails(ends: dict[str, End]) -> None:
    (first, said), (second, _) = ends["dies-0"], ends["dies-1"]
    assert (first, second) == (EXIT_CODE, 1)
    assert "kinema: process 0 ends with the run: process 1 (" in said
    assert "has been silent for " in said and "Traceback" not in said


def test_one_that_fails_says_why_and_the_others_too(ends: dict[str, End]) -> None:
    (first, said), (second, told) = ends["fails-0"], ends["fails-1"]
    assert (first, second) == (EXIT_CODE, 2)
    assert told == "the disk of this machine is full\n"
    assert "kinema: process 0 ends with the run: process 1 (" in said
    assert "has failed in 'step 1: forward': UserError: the disk of this machine is full" in said
