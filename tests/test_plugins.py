"""Another package adds a family, an optimiser and an objective: a real one, installed, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.registry import family_class
from kinema.families.wan import Wan
from kinema.plugins import OBJECTIVES, OPTIMIZERS, Catalog

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "kinema-extra"
version = "1.0"
[tool.setuptools]
py-modules = ["kinema_extra"]
[project.entry-points."kinema.families"]
wandering = "kinema_extra:Wandering"
[project.entry-points."kinema.optimizers"]
signs = "kinema_extra:signs"
[project.entry-points."kinema.objectives"]
halved = "kinema_extra:halved"
"""
MODULE = '''
from dataclasses import dataclass, replace
from kinema.families.wan import Wan


class Wandering(Wan):
    """Wan under another name."""

    name = "wandering"
    encoding_version = "wandering-1"


def signs(parameters, block_matrices, config):
    import torch

    class Signs(torch.optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.add_(p.grad.sign(), alpha=-group["lr"] * group["strength"])

    assert all(name.startswith("network.") for name in parameters)
    lr = {"lr": config.lr, "peak_lr": config.lr, "strength": config.options["strength"]}
    return [Signs([{"params": list(parameters.values()), **lr}], {})]


@dataclass(frozen=True)
class Halved:
    inner: object
    factor: float
    roles = ("student",)

    def __call__(self, batch, networks, draws):
        loss = self.inner(batch, networks, draws)
        return replace(loss, total=loss.total * self.factor, metrics={"factor": loss.total.new_tensor(self.factor)})


def halved(config, family):
    from kinema.objectives.flow import flow_matching

    return Halved(flow_matching(config, family), config.options["factor"])
'''
TRAIN = """
import json, sys
from pathlib import Path
from kinema.config.schema import Config
from kinema.families.registry import family_names
from kinema.training.train import train

assert "wandering" in family_names()
train(Config.model_validate(json.loads(Path(sys.argv[1]).read_text())))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package installed in it by pip, as its users would."""
    root = tmp_path_factory.mktemp("extra")
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "kinema_extra.py").write_text(MODULE)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(root)], check=True, timeout=120)
    return root / "site"


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_one_of_each_trains(site: Path, tmp_path: Path) -> None:
    import json

    import numpy as np
    from PIL import Image

    for name, level in (("a", 40), ("b", 200)):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 48, 3), level, np.uint8)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    base = Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1)
    config = {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"family": "wandering", "variant": "t2v-1.3b", "path": str(base)},
        "data": {"sources": [{"path": str(tmp_path / "data")}], "buckets": {"sizes": [[32, 48]], "frames": [1]}},
        "training": {"steps": 2, "batch_size": 2, "precision": "fp32"},
        "adapter": {"rank": 2},
        "optimizer": {"type": "signs", "options": {"strength": 0.5}, "lr": 1e-3},
        "objective": {"type": "halved", "options": {"factor": 0.25}},
        "monitoring": {"every_steps": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    done = run(site, str(tmp_path / "train.py"), str(tmp_path / "config.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["factor"] for row in rows if "factor" in row] == [0.25, 0.25]
    from safetensors.torch import load_file

    (file,) = (tmp_path / "run" / "exports").rglob("pytorch_lora_weights.safetensors")
    moved = [abs(v) for n, w in load_file(file).items() if "lora_B" in n for v in w.float().flatten().tolist()]
    # B starts at zero and takes two steps of half the learning rate, by sign.
    assert all(min(abs(v - k * 0.0005) for k in range(3)) < 1e-5 for v in moved) and max(moved) > 9e-4


def test_it_is_listed(site: Path) -> None:
    done = run(site, "-m", "kinema", "models", "--json")
    assert done.returncode == 0 and '"wandering"' in done.stdout


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizer": {"type": "adamv"}}, "there is no optimiser 'adamv'; did you mean 'adamw'"),
        ({"objective": {"type": "flaw"}}, "there is no objective 'flaw'; did you mean 'flow'"),
        ({"optimizer": {"options": {"a": 1}}}, "'adamw' comes with kinema"),
    ],
)
def test_names_and_options_are_checked_with_the_configuration(table: dict[str, object], message: str) -> None:
    whole = {"model": {"family": "wan"}, "data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(whole | table)


def test_catalogs() -> None:
    assert OPTIMIZERS.names() == ["adamw", "muon"] and OBJECTIVES.names() == ["flow"]
    with pytest.raises(ConfigError, match="did you mean 'wan'"):
        family_class("wam")
    broken = Catalog("thing", "some.key", "kinema.families", {"there": "json:dumps"})
    assert broken.load("there") is __import__("json").dumps
