"""What a run trained, read back: its newest weights, and checkpoints laid over fresh networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.parallel.mesh import start
from kinema.runs import trained
from kinema.runs.checkpoint_list import Checkpoint, checkpoint_at
from kinema.runs.newest import newest
from kinema.runs.trained import averaged, lay_over, named_trainables
from kinema.training.checkpoint import Checkpointer


def make_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    network[1].requires_grad_(False)
    return network


def save(root: Path, step: int, **groups: dict[str, torch.Tensor]) -> Path:
    checkpointer = Checkpointer(root, 9, False, start(ParallelConfig(), "cpu"))
    checkpointer.save(step, groups, {})
    latest = checkpointer.latest()
    checkpointer.close()
    assert latest is not None
    return latest.path


def export(run: Path, step: int) -> Path:
    place = run / "exports" / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "kinema.json").write_text(json.dumps({}))
    return place


def test_the_newest_of_a_run(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    weight = {"networks": {"w": torch.zeros(2)}}
    checkpoint = save(tmp_path / "checkpoints", 10, **weight)
    assert newest(tmp_path) == Checkpoint(checkpoint, 10, 0)
    same = export(tmp_path, 10)
    assert newest(tmp_path) == same, "of one step, the export"
    later = save(tmp_path / "checkpoints", 20, **weight)
    assert newest(tmp_path) == Checkpoint(later, 20, 1)
    last = export(tmp_path, 30)
    (tmp_path / "exports" / "step-00000040").mkdir()  # not described: a kill came between
    assert newest(tmp_path) == last
    assert newest(tmp_path, exports=False) == Checkpoint(later, 20, 1)
    assert checkpoint_at(tmp_path) == checkpoint_at(tmp_path / "checkpoints") == checkpoint_at(later) == later


@pytest.mark.parametrize("piece", [1, 40, trained.PIECE])
def test_trained_weights_are_laid_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(trained, "PIECE", piece)
    source, target = make_network(1), make_network(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    tensors = {name: value.detach().bfloat16() for name, value in named_trainables({"network": source}).items()}
    assert set(tensors) == {f"network.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")}
    ema = {name: value.double() + 1 for name, value in tensors.items()}
    path = save(tmp_path, 3, networks=tensors, ema=ema)
    assert averaged(path)
    for use_ema, group in ((False, tensors), (True, ema)):
        lay_over({"network": target}, path, use_ema)
        for name, value in named_trainables({"network": target}).items():
            assert torch.equal(value, group[name].float()), name
    untouched = target.state_dict()
    assert all(torch.equal(untouched[name], value) for name, value in before.items() if name.startswith("1."))


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    tensors = {name: value.detach() for name, value in named_trainables({"network": make_network(1)}).items()}
    path = save(tmp_path, 3, networks=tensors)
    target = make_network(2)
    assert not averaged(path)
    lay_over({"network": target}, path, ema=True)
    assert torch.equal(target[0].weight, tensors["network.0.weight"])
    with pytest.raises(UserError, match=r"has no 'networks\.other\.0\.weight'"):
        lay_over({"other": target}, path, ema=False)
