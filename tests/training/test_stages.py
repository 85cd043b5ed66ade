"""A training that starts where another one ended: a run or an export in the place of the network's path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import BASE, configured, network_of, tensors_of

from kinema.config.schema import Config, ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.registry import open_family
from kinema.networks.open_sora import pack, positions
from kinema.runs.checkpoint_list import list_checkpoints
from kinema.runs.exports import list_exports
from kinema.training.train import train


def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 12, 64, generator=draw),
        "timestep": torch.tensor([0.3, 0.9]),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=draw),
        "pooled_projections": torch.randn(2, 24, generator=draw),
        "img_ids": positions((3, 4, 4), 2),
    }


def test_what_a_network_is_told_grows_without_a_change(first: Path) -> None:
    """Bit for bit, whether frames are given or not."""
    before = network_of(first, network={"path": str(first / "first")})
    after = network_of(first, network={"path": str(first / "first")}, cond_embed=True)
    assert before.cond_in is None and before.config.cond_embed is False
    assert after.cond_in is not None and after.config.cond_embed is True
    cond = pack(torch.ones(2, 17, 3, 4, 4), 2)
    with torch.no_grad():
        known = before(**inputs()).sample
        assert torch.equal(after(**inputs()).sample, known)
        assert torch.equal(after(**inputs(), cond=cond).sample, known)
    exported = load_file(next(list_exports(first / "first" / "exports")[-1].rglob("diffusion*.safetensors")))
    assert torch.equal(after.img_in.weight, exported["img_in.weight"])
    assert not any(name.startswith("cond_in") for name in exported)


def test_a_network_can_be_kept_from_being_told(first: Path) -> None:
    whole, without = network_of(first), network_of(first, cond_embed=False)
    assert whole.cond_in is not None and without.cond_in is None
    assert whole.state_dict().keys() - without.state_dict().keys() == {"cond_in.weight", "cond_in.bias"}


@pytest.mark.parametrize(("variant", "patch", "width"), [("v2", 2, 68), ("v2-dc", 1, 129)])
def test_the_layer_that_is_added_is_as_wide_as_the_published_one(variant: str, patch: int, width: int) -> None:
    """A mask for each latent of a token besides what a token holds."""
    family = open_family(ModelConfig(family="open_sora", variant=variant, cond_embed=True))
    weights = {"img_in.weight": torch.ones(6, width - patch**2), "img_in.bias": torch.ones(6)}
    added = family.spec("network").to_ours(weights)  # type: ignore[attr-defined]
    assert added["cond_in.weight"].shape == (6, width) and added["cond_in.bias"].shape == (6,)
    assert not added["cond_in.weight"].any() and weights.keys() == {"img_in.weight", "img_in.bias"}


def second(root: Path, name: str, **training: Any) -> Config:
    model = {
        "network": {"path": str(root / "first")},
        "cond_embed": True,
        "conditions": {"t2v": 1, "i2v_head": 2, "i2v_loop": 1, "v2v_head_5": 1},
    }
    settings = {**BASE["training"], "steps": 4, **training}
    return configured(root, name, model=model, training=settings, checkpoint={"every_steps": 2})


def test_the_next_stage_learns_from_given_frames_and_resumes_to_the_bit(first: Path) -> None:
    directory = train(second(first, "second"))
    export = list_exports(directory / "exports")[-1]
    learnt = load_file(next(export.rglob("diffusion*.safetensors")))
    assert learnt["cond_in.weight"].abs().max() > 0
    assert json.loads(next(export.rglob("transformer/config.json")).read_text())["cond_embed"] is True
    middle, last = list_checkpoints(directory / "checkpoints")
    unbroken = tensors_of(last.path)
    shutil.rmtree(last.path)
    shutil.rmtree(export)
    train(second(first, "second"))
    resumed = tensors_of(list_checkpoints(directory / "checkpoints")[-1].path)
    assert middle.step == 2 and resumed.keys() == unbroken.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], unbroken[name])] == []


def test_a_run_without_an_export_gives_its_averaged_weights(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    shutil.copytree(first / "first", run, ignore=shutil.ignore_patterns("exports"))
    averaged = tensors_of(list_checkpoints(run / "checkpoints")[-1].path)
    network = network_of(first, network={"path": str(run)}, cond_embed=True)
    state = network.state_dict()
    for name in (name for name in state if not name.startswith("cond_in.")):
        assert torch.equal(state[name], averaged[f"ema.network.{name}"])
    assert not torch.equal(state["img_in.weight"], averaged["networks.network.img_in.weight"])
    assert not state["cond_in.weight"].any() and not state["cond_in.bias"].any()
    exported = network_of(first, network={"path": str(list_exports(first / "first" / "exports")[-1])})
    assert torch.equal(exported.img_in.weight, network.img_in.weight)


def test_a_run_that_was_stopped_after_its_export_gives_what_is_newer(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(first / "first", run)
    export = list_exports(run / "exports")[-1]
    export.rename(export.with_name("step-00000001"))
    newest = tensors_of(list_checkpoints(run / "checkpoints")[-1].path)
    network = network_of(first, network={"path": str(run)})
    assert torch.equal(network.img_in.weight, newest["ema.network.img_in.weight"])


def test_what_cannot_be_gone_on_from_is_said_before_anything_is_loaded(first: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(first / "first", empty, ignore=shutil.ignore_patterns("exports", "checkpoints"))
    with pytest.raises(UserError, match=r"model\.network\.path: .*empty holds neither an export nor a checkpoint"):
        network_of(first, network={"path": str(empty)})
    with pytest.raises(UserError, match=r"first did not train the text_encoder\."):
        open_family(
            ModelConfig(family="open_sora", path=str(first / "model"), text_encoder={"path": str(first / "first")})
        ).load("text_encoder", "cpu", None)
    with pytest.raises(UserError, match=r"is of the family open_sora, and model\.family is wan"):
        open_family(
            ModelConfig(family="wan", variant="t2v-1.3b", network={"path": str(first / "first")}),
        ).load("network", "meta", None)
    adapter = {"rank": 2, "targets": ["img_in"]}
    run = train(configured(first, "adapter", adapter=adapter, training={**BASE["training"], "steps": 1, "ema": None}))
    with pytest.raises(UserError, match=r"trained an adapter, which is no whole network.*adapter\.init_from"):
        network_of(first, network={"path": str(run)})


def test_frames_for_a_network_that_is_told_none_are_refused(first: Path) -> None:
    config = configured(first, "x", model={"cond_embed": False, "conditions": {"i2v_head": 1}})
    with pytest.raises(ConfigError, match="told no frames"):
        open_family(config.model).validate(config)
