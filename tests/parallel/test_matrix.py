"""Ways to lay out a training that no other file tries on all of these models: three steps, micro-batches added up,
gradients clipped, equal to one process. `test_sequence`, `test_tensor` and `test_pipeline_parallel` have the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline_cases
import pytest
import replica_cases
import torch
from pipeline_cases import Plan, Result, assert_alike
from ranks import on_ranks, result_of

from kinema.parallel.mesh import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

MODELS = ("wan-t2v-1.3b", "flux-dev", "hunyuan_video-t2v", "qwen_image-base", "open_sora-v2")
KINDS = (False, True)
"""Full, and LoRA."""


def rows(sizes: str, models: tuple[str, ...] = MODELS, steps: int = 3, **settings: Any) -> list[Plan]:
    return [Plan(model, sizes, lora, steps, tuple(settings.items())) for model in models for lora in KINDS]


MATRIX: dict[str, list[Plan]] = {
    "replicas": rows("dp_replicate2"),
    "zero 1": rows("dp_shard2", zero=1),
    "zero 2": rows("dp_shard2", zero=2),
    "zero 3": rows("dp_shard2"),
    "replicas of shards": rows("dp_replicate2-dp_shard2"),
    "replicas of matrices": rows("dp_replicate2-tp2"),
    "shards of matrices": rows("dp_shard2-tp2"),
    "sequences of matrices": rows("sp2-tp2", MODELS[3:]),
    "replicas of sequences": [plan for plan in rows("dp_replicate2-sp2") if plan.lora],
    "on a rounded base": [
        Plan(MODELS[0], sizes, True, settings=(("model.network.dtype", "fp8"),))
        for sizes in ("pp2", "sp2", "dp_replicate2")
    ],
    "three ways": rows("dp_shard2-sp2-tp2", MODELS[:2], 2),
    "three ways in stages": rows("pp2-dp_shard2-tp2", MODELS[:2], 2) + rows("pp2-sp2-tp2", MODELS[1:2], 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module", autouse=True)
def as_there() -> Iterator[None]:
    """One thread, and as many samples as the ranks have: two or more for each of four."""
    threads, samples = torch.get_num_threads(), pipeline_cases.SAMPLES
    torch.set_num_threads(1)
    pipeline_cases.SAMPLES = replica_cases.SAMPLES
    yield
    torch.set_num_threads(threads)
    pipeline_cases.SAMPLES = samples


_ALONE: dict[Plan, Result] = {}


@pytest.mark.parametrize("way", MATRIX)
def test_as_one_process(root: Path, way: str) -> None:
    plans = MATRIX[way]
    for plan in plans:
        pipeline_cases.write_model(plan.model, root)
    on_ranks(plans[0].mesh().total, replica_cases.main, root, (plan.name for plan in plans))
    for plan in plans:
        if plan.alone not in _ALONE:
            _ALONE[plan.alone] = pipeline_cases.train(World.alone(), plan.alone, root)
        assert_alike(result_of(root, plan.name), _ALONE[plan.alone], plan)
