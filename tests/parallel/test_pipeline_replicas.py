"""Replicas of shards of a pipeline's stages: their gradients are added up once a step, not for every micro-batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline_cases
import pytest
import replica_cases
import torch
from pipeline_cases import Plan
from ranks import on_ranks, result_of
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kinema.errors import UserError
from kinema.parallel import fsdp
from kinema.parallel.fsdp import accumulating_all, backward_comes
from kinema.parallel.mesh import World
from kinema.parallel.pipeline import Passes
from kinema.parallel.pipeline_stages import Visit


class Sharded(nn.Module, FSDPModule):
    """As far as a pipeline knows FSDP2: notes what it is told."""

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, inner: nn.Module) -> None:
        nn.Module.__init__(self)
        self.inner, self.adds_up = inner, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def set_requires_all_reduce(self, requires: bool, recurse: bool = True) -> None:
        for one in self.modules() if recurse else [self]:
            if isinstance(one, Sharded):
                one.adds_up = requires


def test_replicas_add_up_in_the_backward_pass_of_the_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Sharded(nn.Linear(1, 1))
    network = Sharded(block)
    monkeypatch.setitem(fsdp._levels, network, 3)
    pipeline: Any = SimpleNamespace(networks={"network": network}, lanes=None, last=0)
    passes: Passes[Any] = Passes(pipeline, [lambda: None] * 3, 1.0)
    seen = []
    for micro in range(3):
        output = network(torch.ones(1)).sum()
        output.register_hook(lambda _: seen.append((block.adds_up, network.adds_up)))
        passes.kept[0, micro] = Visit(0, lambda _: {}), (output,), 0
        passes.results[micro] = SimpleNamespace(total=output)
    with accumulating_all(network):
        for micro in range(3):
            passes.backward(0, micro)
    assert seen == [(False, True), (False, True), (True, True)]
    with pytest.raises(UserError), accumulating_all(network):
        backward_comes(network, last=False)
        raise UserError("in the next forward pass")
    assert block.adds_up  # whatever happens: what comes next may be no pipeline


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_eight_ranks_as_one_whatever_the_number_of_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, one = "lumina2-image-2.0", "pp2-dp_replicate2-dp_shard2", ("training.micro_batch_size", 1)
    plans = [
        Plan(model, sizes, steps=2, settings=(("training.micro_batch_size", 2),)),
        Plan(model, sizes, steps=2, settings=(one,)),
        Plan(model, sizes, steps=2, settings=(one, ("schedule", "interleaved"), ("stages_per_rank", 2))),
        Plan(model, sizes, steps=2, settings=(one, ("zero", 1))),
    ]
    pipeline_cases.write_model(model, tmp_path)
    on_ranks(8, replica_cases.main, tmp_path, (plan.name for plan in plans))
    results = [result_of(tmp_path, plan.name) for plan in plans]
    whole, in_two, in_stages, at_once = (result["reduced"] for result in results)
    assert at_once == whole > 0
    assert whole < in_two < 1.5 * whole and in_stages < 2 * whole  # the rest beside the blocks, more than once
    monkeypatch.setattr(pipeline_cases, "SAMPLES", replica_cases.SAMPLES)
    want = pipeline_cases.train(World.alone(), plans[0].alone, tmp_path)
    for plan, got in zip(plans, results, strict=True):
        for kind in ("losses", "norms", "held_out"):
            assert got[kind] == pytest.approx(want[kind], rel=1e-5), (plan.name, kind)
        for name, weight in want["weights"].items():
            assert (got["weights"][name] - weight).abs().max().item() < 2e-4, (plan.name, name)
