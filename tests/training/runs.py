"""Small real runs for the tests of training: the embedded world, the command line, subprocesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from kinema.shapes.models import write_model
from kinema.shapes.world import training_clips, write_clips

TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}
"""The quickstart's network, made small."""

CONFIG = """
[run]
dir = "{root}/run"
threads = 1
seed = 3

[model]
family = "wan"
path = "{root}/model"
text_length = 32

[data]
sources = [{{ path = "{root}/clips" }}]
cache = "{root}/cache"
buckets = {{ sizes = [[64, 64]], frames = [1, 9, 17], fps = 16 }}

[training]
steps = {steps}
batch_size = 4
precision = "fp32"
caption_dropout = 0.2
ema = {{ decay = 0.9 }}

[optimizer]
lr = 1e-3

[schedule]
warmup_steps = 2
decay = "cosine"

[checkpoint]
every_steps = 3

[monitoring]
tensorboard = false
"""


def make_world(root: Path, clips: int = 14) -> None:
    """A folder of clips (whole ones, and some of nine frames, so that there are two buckets) and a tiny model."""
    chosen = list(training_clips(clips))
    write_clips(root / "clips", chosen[:-5])
    write_clips(root / "clips" / "short", chosen[-5:], frames=9)
    write_model(root / "model", **TINY)


def write_config(root: Path, steps: int = 12, extra: str = "") -> Path:
    path = root / "train.toml"
    path.write_text(CONFIG.format(root=root, steps=steps) + extra)
    return path


def start_training(config: Path, *flags: str, ranks: int = 1) -> subprocess.Popen[str]:
    """``kinema train`` in a process of its own, or under torchrun."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launcher, "kinema", "train", str(config), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for its end; returns what it printed."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, averages, optimiser state."""
    newest = max((run / "checkpoints").glob("step-*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(newest.glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors, newest
    return tensors


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
