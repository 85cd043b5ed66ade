"""What a search for plans finds, what it says of it, and what is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.registry import open_family
from kinema.parallel.devices import KNOWN, Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan import Batch, Candidate, Found, Workload, candidates, search
from kinema.parallel.plan_model import OUTSIDE, Model, Pass, Segment, Weight
from kinema.parallel.plan_stages import moments_of
from kinema.parallel.plan_time import bubble_of
from kinema.parallel.schedule import orders
from kinema.training.networks import check_networks, check_one_type
from kinema.training.plan import Report
from kinema.training.plan_table import changes


def wan(**tables: Any) -> Config:
    model = {"family": "wan", "variant": "t2v-1.3b", "random_weights": True} | tables.pop("model", {})
    training = {"steps": 10, "batch_size": 8} | tables.pop("training", {})
    return Config.model_validate({"model": model, "data": {"sources": [{"path": "."}]}, "training": training, **tables})


def test_weights_that_would_train_in_two_types_are_refused_before_they_are_loaded() -> None:
    short = {"network": {"dtype": "bf16"}}
    config = wan(model=short, parallel={"dp_shard": 2})
    with pytest.raises(
        ConfigError, match=r'model\.network\.dtype = "bf16" leaves \d+ of its weights in fp32 \(scale_shift_table'
    ):
        check_networks(config, open_family(config.model))
    for other in (wan(model=short, parallel={"dp_replicate": 2}), wan(parallel={"dp_shard": 2})):
        check_networks(other, open_family(other.model))
    adapted = wan(model=short, parallel={"dp_shard": 2}, adapter={"rank": 4})  # what trains has the adapter's type
    check_one_type(adapted, open_family(adapted.model))


# -- what is said of what was found ----------------------------------------------------------------------------------


def workload(micro: int = 1, splits: bool = False, kept: float = 100) -> Workload:
    """Four blocks of a matrix of 8 x 1000 bytes that trains, one as large besides; a sample keeps ``kept`` in each."""
    weight = Weight(block=OUTSIDE, elements=2000, rows=8, bytes=8000, trains=True, gradient=8000, state=16000)
    model = Model((weight, *(replace(weight, block=i, splits="rows") for i in range(4))), buffers=0, blocks=4)

    def passes(_: bool, samples: int, sp: int, tp: int) -> Pass:
        share, flops = kept * samples / (sp * tp), 1e12 * samples / (sp * tp)
        forward = [Segment(i, kept=share, peak=share, flops=flops, made=1) for i in range(4)]
        own = 8000 / tp
        backward = [Segment(i, kept=-share, peak=0, own_peak=own, gradients=own, flops=2 * flops) for i in range(4)]
        return Pass(tuple(forward), tuple(backward[::-1]))

    return Workload(model, passes, lambda sizes: Batch(64, micro, 64 // sizes.dp // micro), splits)


def devices(count: int, memory: float) -> Cluster:
    return Cluster(replace(KNOWN["H100"], flops=1e13, memory=0.7e9 + 1.06 * memory), count, count)


def said(config: Config, sizes: Sizes) -> str:
    """How a plan is to be taken, of a report of nothing else."""
    cluster = devices(sizes.total, 1e6)
    report = Report(config, "", cluster, 0.4, None, "bf16", None, "", Found([], {}, 0, None), {}, ())  # type: ignore[arg-type]
    return changes(report, workload().forecast(Candidate(sizes, False), cluster))


def test_how_to_take_a_plan_names_what_the_configuration_would_refuse_with_it() -> None:
    staged = {"pp": 4, "schedule": "interleaved", "stages_per_rank": 2, "split": [4, 4, 4, 4, 4, 4, 4, 2]}
    one = {"micro_batch_size": 1}
    config = wan(parallel=staged, training=one)
    assert said(config, Sizes(dp_shard=4)) == (
        "--parallel.pp 1 --parallel.dp_shard 4; leave parallel.schedule, parallel.stages_per_rank and parallel.split "
        "out of the configuration"
    )
    assert said(config, Sizes(pp=2)) == "--parallel.pp 2; leave parallel.split out of the configuration"
    assert said(config, Sizes(pp=4)) == "leave the configuration as it is."
    sharded = wan(parallel={"dp_shard": 2, "zero": 2}, training=one)
    assert said(sharded, Sizes(dp_replicate=2)) == (
        "--parallel.dp_shard 1; leave parallel.zero out of the configuration"
    )
    with pytest.raises(ValueError, match="pp = 1 is no pipeline"):  # what is said has to be done
        wan(parallel=staged | {"pp": 1, "dp_shard": 4})


@pytest.mark.parametrize("micro_batches", [1, 3, 5, 6, 7, 10, 41, 42, 43])
def test_the_bubble_of_micro_batches_that_are_left_over(micro_batches: int) -> None:
    """Of an interleaved pipeline whose devices do not divide them: what the schedule itself comes to."""
    simulated = orders("interleaved", 4, 2, micro_batches).bubble
    assert bubble_of("interleaved", 4, 2, micro_batches) == pytest.approx(simulated, abs=1e-9)
    long, short = (moments_of("interleaved", 4, 2, m) for m in (micro_batches + 40, micro_batches % 4 + 16))
    assert long == short


# -- what is found ---------------------------------------------------------------------------------------------------


def four_blocks(plan: Candidate) -> tuple[str, str] | None:
    return ("pp above 4", "there are four blocks") if plan.sizes.pp > 4 else None


@pytest.mark.parametrize(
    ("count", "memory", "kept", "link"),
    [
        pytest.param(8, 140_000, 10_000, 1e3, id="fewer samples at once"),
        pytest.param(8, 60_000, 10_000, 1e5, id="little memory"),
        pytest.param(16, 44_000, 4_000, 1e4, id="hardly any fit"),
    ],
)
def test_a_search_finds_what_looking_at_all_finds(count: int, memory: float, kept: float, link: float) -> None:
    cluster = devices(count, memory)
    cluster = replace(cluster, device=replace(cluster.device, link=link))
    work = workload(micro=2, splits=True, kept=kept)
    every = [work.fitting(plan, cluster) for plan in candidates(cluster) if plan.sizes.pp <= 4]
    fitting = sorted((one for one in every if one.fits(cluster)), key=lambda one: -one.samples_a_second)
    found = search(work, cluster, four_blocks)
    assert 0 < len(fitting) < len(every) and found.tried == len(every)
    assert len(found.best) == min(3, len(fitting))
    for mine, its in zip(found.best, fitting, strict=False):
        assert mine.fits(cluster)
        assert mine.samples_a_second == pytest.approx(its.samples_a_second, rel=0.03)  # alike is as good


def test_a_search_looks_at_all_before_it_says_that_nothing_fits() -> None:
    cluster = devices(64, 0)
    work = workload()
    every = [work.fitting(plan, cluster).memory.total for plan in candidates(cluster) if plan.sizes.pp <= 4]
    least = replace(cluster, device=replace(cluster.device, memory=min(every)), host_memory=0.0)
    found = search(work, least, four_blocks)
    assert len(every) > 600 and found.best and found.best[0].memory.total == min(every)
    below = replace(least, device=replace(least.device, memory=min(every) - 1))
    nothing = search(work, below, four_blocks)
    assert not nothing.best and nothing.smallest is not None and nothing.smallest.memory.total == min(every)
