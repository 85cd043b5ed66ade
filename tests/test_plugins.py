"""Another package adds a family, an optimiser and an objective: a real one, installed, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.registry import family_class
from kinema.families.wan import Wan
from kinema.plugins import OBJECTIVES, OPTIMIZERS, Catalog

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
PROJECT, EXAMPLE = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
(MODULE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
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


@pytest.mark.slow
def test_one_of_each_trains(site: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name, level in (("a", 40), ("b", 200)):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 48, 3), level, np.uint8)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    base = Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1)
    config = tomllib.loads(EXAMPLE) | {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "data": {"sources": [{"path": str(tmp_path / "data")}], "buckets": {"sizes": [[32, 48]], "frames": [1]}},
        "training": {"steps": 2, "batch_size": 2, "precision": "fp32"},
        "evaluation": {"sets": [{"name": "same", "sources": [{"path": str(tmp_path / "data")}]}], "every_steps": 2},
        "adapter": {"rank": 2},
        "monitoring": {"every_steps": 1},
    }
    config["model"]["path"] = str(base)
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
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout) if row["name"] == "wandering"]
    assert row["variant"] == "t2v-1.3b" and row["hub"] == "someone/wandering" and "dora" in row["supports"]
    assert row["parameters"] == 1_418_996_800
    counts = {part["part"]: part["parameters"] for part in row["parts"]}  # nobody has counted but the network
    assert counts["network"] == 1_418_996_800 and counts["text_encoder"] is None and counts["tokenizer"] == 0
    assert "unknown" in run(site, "-m", "kinema", "models").stdout


@pytest.mark.slow
def test_its_configurations_are_found(site: Path) -> None:
    code = """
    from kinema.config.schema import ModelConfig
    from kinema.families.registry import open_family
    family = open_family(ModelConfig(family="wandering", variant="t2v-1.3b"))
    print(sum(parameter.numel() for parameter in family.empty("network").parameters()), family.default_shift())
    """
    assert run(site, "-c", textwrap.dedent(code)).stdout.split() == ["1418996800", "5.0"]


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
    assert {"adamw", "adamw8bit", "muon", "prodigy"} < set(OPTIMIZERS.names()) and OBJECTIVES.names() == ["flow"]
    with pytest.raises(ConfigError, match="did you mean 'wan'"):
        family_class("wam")
    broken = Catalog("thing", "some.key", "kinema.families", {"there": "json:dumps"})
    assert broken.load("there") is __import__("json").dumps
