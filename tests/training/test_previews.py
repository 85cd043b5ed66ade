"""Previews are what the sampler makes of the network in training, and leave no trace in the training."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinema.config.schema import Config
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.parallel.mesh import Sizes, World
from kinema.sampling.pipeline import sample_many
from kinema.sampling.weights import Weights, load_parts
from kinema.sampling.writing import read_metadata, to_uint8
from kinema.training.previews import Previewer

ALONE = World.alone()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("base"), "t2v-1.3b")


def make_config(base: Path, root: Path, precision: str = "fp32", **preview: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(root / "run")},
            "model": {"family": "wan", "path": str(base)},
            "data": {"sources": [{"path": "clips"}], "buckets": {"sizes": [[32, 48]], "frames": [1, 5], "fps": 8}},
            "training": {"steps": 4, "precision": precision},
            "preview": {"prompts": ["A red ball", "green"], "steps": 2, "guidance": 2.0, "seed": 5, **preview},
        }
    )


def expected(config: Config, network: Any, index: int) -> torch.Tensor:
    """The preview by the sampler alone, over freshly loaded parts."""
    family = open_family(config.model)
    parts = {**load_parts(Weights(family, "base"), "cpu", torch.float32), "network": network}
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return next(sample_many(family, pipeline, [Previewer(config, family, ALONE).settings[index]]))


def test_a_preview_is_the_sampler_s_and_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    from kinema.adapters.inject import add_adapter
    from kinema.config.schema import AdapterConfig

    config = make_config(base, tmp_path, frames=1)
    family = open_family(config.model)
    network = family.load("network", "cpu", torch.float32)
    add_adapter(network, AdapterConfig(rank=4, dropout=0.9), family.adapter_targets(), 0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.05)
    network.train()
    network.blocks[1].eval()  # a mixture of modes has to come back
    modes = {name: module.training for name, module in network.named_modules()}
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    generators = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]

    previewer = Previewer(config, family, ALONE)
    paths = previewer.preview(120, {"network": network})

    assert random.getstate() == generators[0]
    assert np.array_equal(np.random.get_state()[1], generators[1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert "forward" not in network.__dict__
    assert all(parameter.grad is None for parameter in network.parameters())
    assert any(parameter.requires_grad for parameter in network.parameters())

    folder = tmp_path / "run" / "previews" / "step-00000120"
    assert paths == [folder / "00-a-red-ball.png", folder / "01-green.png"]
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [(one["file"], one["prompt"], one["seed"], one["step"]) for one in index] == [
        ("00-a-red-ball.png", "A red ball", 5, 120),
        ("01-green.png", "green", 6, 120),
    ]
    assert read_metadata(paths[1]) == {key: value for key, value in index[1].items() if key != "file"}
    from PIL import Image

    network.eval()
    for i, path in enumerate(paths):
        want = to_uint8(expected(config, network, i))[0].astype(int)
        # two pictures share a call, which moves the last bits of a float
        assert np.abs(np.asarray(Image.open(path)).astype(int) - want).max() <= 1
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    later = previewer.preview(240, {"network": network})
    assert later[0].read_bytes() != paths[0].read_bytes()
    want = to_uint8(expected(config, network, 0))[0].astype(int)
    assert np.abs(np.asarray(Image.open(later[0])).astype(int) - want).max() <= 1


def test_text_is_encoded_once_and_its_encoder_let_go(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = make_config(base, tmp_path, frames=1)
    family = open_family(config.model)
    loaded: list[str] = []
    own = family.load
    monkeypatch.setattr(family, "load", lambda part, *rest: (loaded.append(part), own(part, *rest))[1])
    previewer = Previewer(config, family, ALONE)
    assert loaded == []
    network = own("network", "cpu", torch.float32)
    first = previewer.preview(0, {"network": network})
    assert sorted(loaded) == sorted(part for part in family.variant.parts if part != "network")
    assert "text_encoder" not in previewer.parts
    again = previewer.preview(1, {"network": network})
    assert len(loaded) == len(family.variant.parts) - 1
    from PIL import Image

    for a, b in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def of_sdxl(root: Path, **model: Any) -> Config:
    path = family_class("sdxl").tiny(root / "base", "base-eps")
    return Config.model_validate(
        {
            "run": {"dir": str(root / "run")},
            "model": {"family": "sdxl", "path": str(path), **model},
            "data": {"sources": [{"path": "pictures"}], "buckets": {"sizes": [[32, 32]]}},
            "training": {"steps": 4, "precision": "fp32"},
            "preview": {"prompts": ["green"], "steps": 2, "guidance": 2.0},
        }
    )


def test_two_text_encoders_are_let_go(tmp_path: Path) -> None:
    config = of_sdxl(tmp_path)
    family = open_family(config.model)
    network = family.load("network", "cpu", torch.float32)
    previewer = Previewer(config, family, ALONE)
    (path,) = previewer.preview(0, {"network": network})
    assert {"autoencoder", "tokenizer", "tokenizer_2"} <= previewer.parts.keys()
    assert not set(previewer.parts) & {"text_encoder", "text_encoder_2"}
    from PIL import Image

    want = to_uint8(expected(config, network, 0))[0]
    assert np.array_equal(np.asarray(Image.open(path)), want)


def test_a_text_encoder_that_trains_reads_the_texts_of_every_preview(tmp_path: Path) -> None:
    config = of_sdxl(tmp_path, train=["network", "text_encoder_2"])
    family = open_family(config.model)
    networks = {part: family.load(part, "cpu", torch.float32) for part in ("network", "text_encoder_2")}
    previewer = Previewer(config, family, ALONE)
    (first,) = previewer.preview(0, networks)
    assert "text_encoder" in previewer.parts, "what does not train beside it is needed again"
    with torch.no_grad():
        for parameter in networks["text_encoder_2"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    (later,) = previewer.preview(1, networks)
    from PIL import Image

    assert not np.array_equal(np.asarray(Image.open(later)), np.asarray(Image.open(first)))


def test_the_network_computes_in_the_precision_of_the_training(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path, "bf16", prompts=["green"])
    family = open_family(config.model)
    network = family.load("network", "cpu", torch.float32)
    seen: set[torch.dtype] = set()
    network.blocks[0].attn1.to_q.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    (path,) = Previewer(config, family, ALONE).preview(0, {"network": network})
    assert seen == {torch.bfloat16}
    assert path.suffix == ".mp4"
    assert next(network.parameters()).dtype == torch.float32


def test_other_ranks_write_nothing(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path, frames=1, prompts=["green"])
    family = open_family(config.model)
    network = family.load("network", "cpu", torch.float32)
    ran: list[int] = []
    network.register_forward_hook(lambda *_: ran.append(1))
    replica = replace(ALONE, rank=1, size=2, sizes=Sizes(dp_replicate=2))
    assert Previewer(config, family, replica).preview(0, {"network": network}) == [] and not ran
    part = replace(ALONE, rank=1, size=2, sizes=Sizes(dp_shard=2))
    assert Previewer(config, family, part).preview(0, {"network": network}) == [] and len(ran) == 4
    assert not (tmp_path / "run").exists()


def test_previews_that_cannot_be_made_are_refused(base: Path, tmp_path: Path) -> None:
    family = open_family(make_config(base, tmp_path).model)
    with pytest.raises(UserError, match=r"preview\.height 40.*nearest: 32 or 48"):
        Previewer(make_config(base, tmp_path, height=40), family, ALONE)
    with pytest.raises(UserError, match=r"preview\.frames 4.*nearest: 1 or 5"):
        Previewer(make_config(base, tmp_path, frames=4), family, ALONE)
    config = make_config(base, tmp_path, height=40, prompts=[])
    assert Previewer(config, family, ALONE).preview(0, {"network": torch.nn.Identity()}) == []


SHARDED = """
import sys, torch
from pathlib import Path
from kinema.config.load import load_config
from kinema.families.registry import open_family
from kinema.parallel.data import shard
from kinema.parallel.mesh import start, stop
from kinema.training.previews import Previewer
torch.set_num_threads(1)
config = load_config(sys.argv[1])
world = start(config.parallel)
family = open_family(config.model)
network = family.load("network", "cpu", torch.float32).requires_grad_(True)
shard(network, family.blocks(network), world)
paths = Previewer(config, family, world).preview(7, {"network": network})
assert bool(paths) == world.is_main
world.barrier()
stop()
"""


@pytest.mark.slow
def test_sharded_ranks_sample_together(base: Path, tmp_path: Path) -> None:
    from PIL import Image

    from kinema.config.load import to_toml

    config = make_config(base, tmp_path, frames=1, prompts=["green"])
    sharded = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp_shard": 2})})
    (tmp_path / "config.toml").write_text(to_toml(sharded))
    (tmp_path / "script.py").write_text(SHARDED)
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.toml")]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
    (path,) = (tmp_path / "run" / "previews" / "step-00000007").glob("*.png")
    network = open_family(config.model).load("network", "cpu", torch.float32)
    want = to_uint8(expected(config, network, 0))[0].astype(int)
    assert np.abs(np.asarray(Image.open(path)).astype(int) - want).max() <= 1
