"""Compiled blocks through Inductor; every family's go through dynamo and AOT autograd in the suite of families."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from kinema.config.schema import Config, ModelConfig
from kinema.families.registry import open_family
from kinema.families.wan import Wan
from kinema.memory.compile import PAYS_FROM, compile_blocks, settled, telling_when
from kinema.networks.quantized import Kind, quantize
from kinema.training.networks import evaluating


@pytest.mark.slow
def test_inductor_gives_the_same_and_compiles_a_kind_once(tmp_path: Path) -> None:
    directory = Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1)
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    plain = family.load("network", "cpu", torch.float32).requires_grad_(True)
    compiled = copy.deepcopy(plain)
    compile_blocks(family.blocks(compiled))
    torch._dynamo.reset()
    counters.clear()
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(1, 512, 32, generator=draw)
    for rows in (4, 6):  # two buckets
        x_t = torch.randn(1, 16, 3, rows, 6, generator=draw)
        outputs = []
        for network in (plain, compiled):
            network.zero_grad()
            output = family.predict(network, x_t, torch.tensor([0.4]), {"encoder_hidden_states": text})
            output.square().mean().backward()
            outputs.append(output.detach())
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in plain.named_parameters()]
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, f"{graphs} graphs for three equal blocks and two sizes"  # the second one is dynamic


class Block(nn.Module):
    """torch's own modules are not compiled by themselves."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sin()


def test_what_compiles_is_told() -> None:
    """Forward and, later, backward passes; nothing where it is compiled already, nor outside."""
    told: list[bool] = []
    layer = Block()
    layer.compile(backend="aot_eager")
    torch._dynamo.reset()
    with telling_when(told.append, wanted=True):
        layer(torch.randn(2, 1, 4)).sum().backward()
        count = len(told)
        assert count >= 2 and told == [True, False] * (count // 2)
        layer(torch.randn(2, 1, 4)).sum().backward()
        assert len(told) == count
    torch._dynamo.reset()
    layer(torch.randn(2, 1, 4))
    with telling_when(told.append, wanted=False):
        torch._dynamo.reset()
        layer(torch.randn(2, 1, 4))
    assert len(told) == count


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_weights_that_a_quantised_layer_makes_are_made_again(kind: Kind) -> None:
    """By the partitioner that Inductor has too: what is kept for the backward pass is less than a matrix in 16 bits."""
    torch._dynamo.reset()
    block = Block(64)
    quantize([block], kind)
    compile_blocks({"blocks": nn.ModuleList([block])}, "aot_eager_decomp_partition")
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes if tensor.dtype == torch.bfloat16 else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert kept and sum(kept.values()) < 64 * 64 * 2


def test_evaluation_leaves_the_sizes_of_training_alone() -> None:
    """Passes of other sizes between those of a training compile nothing, and do not make its sizes dynamic ones."""
    torch._dynamo.reset()
    counters.clear()
    block = Block()
    compile_blocks({"blocks": nn.ModuleList([block])}, "aot_eager")
    for _ in range(3):
        with evaluating([block]), torch.no_grad():
            block(torch.randn(7, 4))
        block(torch.randn(2, 4)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_sizes_become_dynamic_once(tmp_path: Path) -> None:
    """Four buckets in turn, each twice: the second one compiles for any size, and later ones do not compile again."""
    directory = Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1)
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    network = family.load("network", "cpu", torch.float32).requires_grad_(True)
    compile_blocks(family.blocks(network), "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for samples, frames, rows, columns in [(2, 3, 4, 6), (2, 3, 6, 4), (3, 2, 8, 4), (4, 4, 4, 4)] * 2:
        x_t, text = torch.randn(samples, 16, frames, rows, columns), torch.randn(samples, 512, 32)
        output = family.predict(network, x_t, torch.full((samples,), 0.4), {"encoder_hidden_states": text})
        output.square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 1 and graphs[1] <= 2 and graphs[-1] == graphs[2] <= 3, graphs


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(
        device: str = "cuda", earlier: bool | None = None, parallel: object = None, **training: object
    ) -> bool:
        tables = {"training": {"steps": 1000} | training, "parallel": parallel or {}}
        config = Config.model_validate({"model": {"family": "wan"}, "data": {"sources": [{"path": "."}]}} | tables)
        return settled(config, torch.device(device), earlier)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton")
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert compiles() and not compiles("cpu") and compiles("cpu", compile=True) and not compiles(compile=False)
    assert compiles(steps=PAYS_FROM) and not compiles(steps=PAYS_FROM - 1)
    assert compiles(earlier=True, steps=10) and not compiles(earlier=False), "a run that goes on does as before"
    assert not compiles("cpu", earlier=True) and compiles(earlier=False, compile=True)
    assert not compiles(parallel={"pp": 2, "schedule": "zero_bubble"})
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles(), "Triton needs a C compiler"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not compiles()
