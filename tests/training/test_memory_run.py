"""Whole runs whose blocks and activations wait in the host's memory: the same numbers as without, to the bit."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import TINY, final_state, metrics, write_config

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.parallel.devices import KNOWN, Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan import Candidate
from kinema.parallel.plan_model import Offloading
from kinema.shapes.models import write_model
from kinema.shapes.world import training_clips, write_clips
from kinema.training.memory_checks import check_memory, settle_offload
from kinema.training.plan import planning_family, prospect
from kinema.training.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))
from lagging import late_copies

BLOCKS = 5
MEMORY = {"memory.offload_blocks": "4", "memory.offload_activations": "true"}
EXTRA = """
[preview]
prompts = ["a red circle"]
steps = 2
every_steps = 2
before_first_step = false
height = 32
width = 32
frames = 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    write_clips(root / "clips", list(training_clips(6)))
    write_model(root / "model", **TINY | {"num_layers": BLOCKS})
    write_config(root, steps=4, extra=EXTRA)
    return root


def config(root: Path, **flags: Any) -> Config:
    return load_config(root / "train.toml", list(flags.items()))


@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_run_is_the_same_to_the_bit(root: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Two micro-batches a step, clipping, EMA, previews; then resumed from the middle."""
    made = late_copies(monkeypatch)
    common = {
        "run.dir": str(root / f"{what}-plain"), "checkpoint.every_steps": "2", "checkpoint.keep": "9",
        "training.micro_batch_size": "2", "training.activation_checkpointing": "2",
    }  # fmt: skip
    if what == "lora":
        common["adapter.rank"] = "2"
    plain = train(config(root, **common))
    assert not made
    moving = train(config(root, **common | MEMORY | {"run.dir": str(root / f"{what}-moving")}))
    assert len(made) == 2 and all(engine.peak > 0 and not engine.pending for engine in made[1:])
    expected, losses = final_state(plain), [(row["loss"], row["grad_norm"]) for row in metrics(plain)]
    for again in (False, True):
        if again:
            shutil.rmtree(max((moving / "checkpoints").glob("step-*")))
            train(config(root, **common | MEMORY | {"run.dir": str(moving)}))
        assert [(row["loss"], row["grad_norm"]) for row in metrics(moving)] == losses
        got = final_state(moving)
        assert got.keys() == expected.keys()
        assert [name for name, value in got.items() if not torch.equal(value, expected[name])] == []


def refused(config: Config, sizes: Sizes | None = None, device: str = "cuda") -> str:
    with pytest.raises(ConfigError) as caught:
        check_memory(config, open_family(config.model), sizes or Sizes(), torch.device(device))
    return str(caught.value)


def test_what_is_refused_and_why(root: Path) -> None:
    asked = config(root, **{"memory.offload_blocks": "4"})
    assert "on a CPU, whose memory is the host's" in refused(asked, device="cpu")
    assert "--memory.offload_activations false" in refused(
        config(root, **{"memory.offload_activations": "true"}), device="cpu"
    )
    assert "the network has 5 blocks" in refused(config(root, **{"memory.offload_blocks": "6"}))
    assert "Use parallel.cpu_offload" in refused(asked, Sizes(dp_shard=2))
    assert "not with parallel.tp = 2" in refused(asked, Sizes(tp=2))
    assert "not with parallel.pp = 2" in refused(asked, Sizes(pp=2))
    assert "the whole network trained on 2 devices" in refused(asked, Sizes(dp_replicate=2))
    lora = config(root, **{"memory.offload_blocks": "4", "adapter.rank": "2"})
    check_memory(lora, open_family(lora.model), Sizes(dp_replicate=2), torch.device("cuda"))
    check_memory(asked, open_family(asked.model), Sizes(), torch.device("cuda"))
    shares = config(root, **{"training.activation_checkpointing": "{ block = 0.5 }"})
    assert "no list of blocks is called 'block'; did you mean 'blocks'?" in refused(shares, device="cpu")
    with pytest.raises(ConfigError, match="offload_blocks: 2 saves nothing"):
        config(root, **{"memory.offload_blocks": "2"})


def test_auto_takes_the_fewest_that_fit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(root, **{"memory.offload_blocks": "auto", "adapter.rank": "2", "training.precision": "bf16"})
    family: Family = planning_family(asked)
    known = prospect(asked, family, Sizes())
    world: Any = SimpleNamespace(
        is_main=True, size=1, sizes=Sizes(), device=torch.device("cuda"), broadcast_object=lambda value: value
    )

    def cluster(memory: float) -> Cluster:
        return Cluster(replace(KNOWN["4090"], memory=memory), 1, 1)

    def needs(number: int) -> float:
        plan = Candidate(Sizes(), False, offloading=Offloading(blocks=number))
        return known.workload.forecast(plan, cluster(24e9)).memory.total

    def settled(memory: float) -> tuple[int, str]:
        monkeypatch.setattr("kinema.training.auto_plan.cluster_of", lambda *_: cluster(memory))
        chosen, said = settle_offload(asked, family, world, resumes=False)
        assert isinstance(chosen.memory.offload_blocks, int)
        return chosen.memory.offload_blocks, said[0]

    assert needs(0) > needs(3) > needs(4) > needs(5)
    assert settled(24e9)[0] == 0
    number, said = settled(needs(4))
    assert number == 4 and "4 of 5 blocks" in said and "without" in said
    with pytest.raises(UserError, match="with all 5 blocks in the host's memory the forecast is still"):
        settled(0.9 * needs(5))
    world.device = torch.device("cpu")
    assert settle_offload(asked, family, world, resumes=False)[0].memory.offload_blocks == 0
