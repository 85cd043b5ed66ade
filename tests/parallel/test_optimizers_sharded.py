"""Each optimiser that may run over shards: as one process, and its checkpoint goes on in one process."""

from __future__ import annotations

from pathlib import Path

import optimizer_cases
import pytest
import torch
from optimizer_cases import CASES, HALF, STEPS, network, optimizers_over, resumed, steps, train, whole
from ranks import on_ranks, result_of

from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import Sizes, start
from kinema.training.optimizer_checks import why_not_laid_out

TO_ROUNDING = {"automagic": 1e-6}
"""Whose sums are taken over ranks; all others take the same steps to the bit."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded optimisers")
    on_ranks(2, optimizer_cases.main, root, CASES)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(root: Path, case: str) -> None:
    world = start(ParallelConfig(), "cpu")
    begin, alone = whole(network(case)), train(world, case, root)
    net = network(case)
    optimizers = optimizers_over(net, case)
    resumed(world, root / f"{case} of 2", net, optimizers)
    steps(net, optimizers, HALF, STEPS)
    for found in (result_of(root, case), whole(net)):
        for name, weight in alone.items():
            assert not torch.equal(weight, begin[name])
            torch.testing.assert_close(found[name], weight, atol=TO_ROUNDING.get(case, 0.0), rtol=0.0)


def test_what_is_refused() -> None:
    from kinema.config.schema import Config

    def reason(kind: str, **sizes: int) -> str | None:
        tables = {"model": {"family": "wan"}, "data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
        return why_not_laid_out(Config.model_validate(tables | {"optimizer": {"type": kind}}), Sizes(**sizes))

    assert "which cuts rows" in (reason("adamw8bit", tp=2) or "")
    assert "whole rows and columns" in (reason("automagic", tp=2) or "")
    assert "made for whole weights" in (reason("prodigy", dp_shard=2) or "")
    assert "made for whole weights" in (reason("pytorch_optimizer.CAME", dp_shard=2) or "")
    assert "stages of a pipeline" in (reason("lion", pp=2) or "")
    shards = [(kind, "dp_shard") for kind in ("adamw8bit", "automagic", "torch.SGD")]
    for kind, sizes in (*shards, ("lion", "tp"), ("prodigy", "dp_replicate"), ("muon", "tp"), ("adamw", "pp")):
        assert reason(kind, **{sizes: 2}) is None
