"""A whole run on a base in few bits: resumed to the bit, and sampled from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import final_state, finish, make_world, metrics, start_training, write_config


@pytest.mark.slow
def test_resumed_to_the_bit(tmp_path: Path) -> None:
    """With the network in 4 bits and the text encoder in 8."""
    make_world(tmp_path)
    config = write_config(tmp_path, 6, "\n[adapter]\nrank = 4\n")
    flags = ("--model.variant", "t2v-1.3b", "--model.network.dtype", "nf4", "--model.text_encoder.dtype", "int8")
    finish(start_training(config, *flags))
    run_dir = tmp_path / "run"
    expected = final_state(run_dir)
    assert len({row["loss"] for row in metrics(run_dir)}) > 1
    shutil.rmtree(max((run_dir / "checkpoints").glob("step-*")))
    finish(start_training(config, *flags))
    state = final_state(run_dir)
    assert state.keys() == expected.keys()
    assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []
    sample = ["sample", "a red ball", "--run", str(run_dir), "--steps", "2", "--frames", "9", "--height", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "kinema", *sample, "--width", "64", "--fuse-qkv"], check=True, env=environment
    )
    assert list((run_dir / "samples").glob("*.mp4"))
