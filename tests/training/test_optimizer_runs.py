"""Whole runs with other optimisers, from the command line: broken off, they end with the bits of unbroken ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from runs import CONFIG, final_state, finish, make_world, metrics, start_training

TABLES = {
    "schedulefree": '[optimizer]\ntype = "schedulefree"\nlr = 1e-3\n',
    "adamw8bit": '[optimizer]\ntype = "adamw8bit"\nlr = 1e-3\nrounding = "kahan"\n',
    "prodigy": '[optimizer]\ntype = "prodigy"\noptions = { d0 = 1e-4 }\n',
    "automagic": '[optimizer]\ntype = "automagic"\nlr_bump = 1e-5\nrounding = "stochastic"\n'
    '[[optimizer.groups]]\npattern = "ffn"\nlr = 5e-6\n',
}


def write(root: Path, kind: str, stop: str = "") -> Path:
    text = re.sub(r"\[optimizer\]\nlr = 1e-3\n", TABLES[kind], CONFIG.format(root=root, steps=6))
    text = text.replace("{root}", str(root)).replace("ema = { decay = 0.9 }\n", "")
    if "rounding" in TABLES[kind]:
        text = text.replace("text_length = 32", 'text_length = 32\nnetwork = { dtype = "bf16" }')
    path = root / f"{kind}{stop}.toml"
    path.write_text(
        text + "\n[preview]\nprompts = ['a red circle']\nsteps = 2\nevery_steps = 3\nbefore_first_step = false\n"
    )
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optimisers")
    make_world(root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_a_run_goes_on_with_the_same_bits(root: Path, kind: str) -> None:
    config = write(root, kind)
    directory = root / kind
    finish(start_training(config, "--run.dir", str(directory)))
    unbroken, rows = final_state(directory), metrics(directory)
    assert any(name.startswith("ema.") for name in unbroken) == (kind == "schedulefree")
    assert rows[-1]["loss"] == rows[-1]["loss"] and len(rows) == 6
    newest = max((directory / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if it had been killed before the last one was there
    output = finish(start_training(config, "--run.dir", str(directory)))
    assert "Resuming from" in output and "step-00000003" in output
    again = final_state(directory)
    assert again.keys() == unbroken.keys()
    assert [name for name, value in again.items() if not torch.equal(value, unbroken[name])] == []
