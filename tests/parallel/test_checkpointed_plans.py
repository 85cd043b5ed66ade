"""Every kind of activation checkpointing in every plan of two, compiled too: equal to one process without any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpointing_cases
import pipeline_cases
import pytest
import torch
from pipeline_cases import Plan, Result, assert_alike
from ranks import on_ranks, result_of

from kinema.parallel.mesh import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

MODEL = "wan-t2v-1.3b"
PLANS = ("dp_shard2", "tp2", "sp2", "pp2")
ASKED = "training.activation_checkpointing"
KINDS: dict[str, tuple[str, Any]] = {
    "selective": (ASKED, "selective"),
    "every second": (ASKED, 2),
    "share of a list": (f"{ASKED}.blocks", 0.5),
    "nested": (ASKED, "nested"),
}
BLOCKS = {"selective": 3, "every second": 2, "share of a list": 2, "nested": 3}
"""That run again, of three."""
COMPILED = ("training.compile", True)


def plan_of(sizes: str, kind: str, compiled: bool) -> Plan:
    return Plan(MODEL, sizes, steps=2, settings=(KINDS[kind], COMPILED) if compiled else (KINDS[kind],))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpointed")
    pipeline_cases.write_model(MODEL, root)
    return root


@pytest.fixture(scope="module")
def without(root: Path) -> Result:
    return pipeline_cases.train(World.alone(), Plan(MODEL, steps=2), root)


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("sizes", PLANS)
def test_as_one_process_without(root: Path, without: Result, sizes: str, compiled: bool) -> None:
    plans = {kind: plan_of(sizes, kind, compiled) for kind in KINDS}
    on_ranks(2, checkpointing_cases.main, root, (plan.name for plan in plans.values()))
    for kind, plan in plans.items():
        result = result_of(root, plan.name)
        assert result["again"] == [BLOCKS[kind]] * 2, "a stage is cut off afterwards"
        assert_alike(result, without, plan)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_process(root: Path, without: Result, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(`tests/memory/test_checkpointing.py` has them as they are.)"""
    for patch in checkpointing_cases.PATCHES:
        monkeypatch.setattr(*patch)
    plan = plan_of("", kind, True)
    result = checkpointing_cases.run(World.alone(), plan.name, root)
    assert result["again"] == [BLOCKS[kind]]
    assert_alike(result, without, plan)
