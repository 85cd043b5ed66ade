"""Compiled blocks through Inductor; every family's go through dynamo and AOT autograd in the suite of families."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from kinema.config.schema import ModelConfig
from kinema.families.registry import open_family
from kinema.families.wan import Wan
from kinema.memory.compile import compile_blocks


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
