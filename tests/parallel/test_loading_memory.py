"""What loading and exporting take of this machine's memory: on two ranks, a process's own share and a block, whatever
its share is of; and the weights are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_cases
import pytest

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc"),
]
BLOCKS, MB = 8, 2**20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    memory_cases.write_model(root / "model", 512, BLOCKS)
    return root


def launch(root: Path, *cases: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank found in each case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # What is freed goes back at once: what is measured is what is held.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, memory_cases.__file__, str(root), *cases],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return {case: json.loads((root / f"{case}.json").read_text()) for case in cases}


def check_loading(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["equal"], "other weights than those of one process"
        assert facts["here"] < 0.55 * facts["plain"]  # a process that loads alone has all of it
        assert facts["peak"] < facts["here"] + facts["plain"] / BLOCKS + 14 * MB


@pytest.mark.slow
def test_loading_takes_a_share_and_a_block_and_exporting_a_tensor(root: Path) -> None:
    ranks = launch(root, "sharded")["sharded"]
    check_loading(ranks)
    for facts in ranks:
        assert facts["files"], "other files than of the whole network at once"
        assert facts["exporting"] < 5 * facts["largest"] + 14 * MB < 0.35 * facts["plain"]


@pytest.mark.slow
def test_every_layout_of_weights_takes_a_share_and_a_block(root: Path) -> None:
    for ranks in launch(root, "matrices", "stages", "lora", "dora", "in_pieces").values():
        check_loading(ranks)
