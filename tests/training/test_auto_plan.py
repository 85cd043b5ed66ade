"""``parallel.auto``: what is searched, what is kept, and a run that does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import finish, make_world, start_training, write_config

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.errors import ConfigError, UserError
from kinema.families.registry import family_class
from kinema.parallel.devices import PROCESSOR, Cluster, memory_of
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan import Candidate, Forecast, search
from kinema.parallel.plan_model import Offloading
from kinema.training.auto_plan import _choose, allowed
from kinema.training.plan import planning_family, prospect, with_offloading

pytestmark = [pytest.mark.timeout(400)]
AUTO = "\n[parallel]\nauto = true\n"


def cluster(count: int, memory: float = 1e12) -> Cluster:
    return Cluster(replace(PROCESSOR, memory=memory), count, count, on_gpu=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto")
    make_world(root)
    return root


def planned(root: Path, extra: str = AUTO, *flags: tuple[str, str]) -> Config:
    return load_config(write_config(root, 3, extra), list(flags))


def needs(config: Config, plan: Candidate) -> float:
    """Bytes of a plan over two processes."""
    known = prospect(config, planning_family(config), Sizes(dp_replicate=2))
    return known.workload.forecast(plan, cluster(2)).memory.total


def test_what_is_given_stays(world: Path) -> None:
    everything = list(allowed(planned(world), cluster(4)))
    assert {one.checkpointing for one in everything} == {False, True, "nested"}
    assert {one.sharding.zero for one in everything if one.sizes.dp_shard == 4} == {1, 2, 3}
    given = list(allowed(planned(world, AUTO + "dp_shard = 2\nzero = 2\n"), cluster(4)))
    assert given and all(one.sizes.dp_shard == 2 and one.sharding.zero == 2 for one in given)
    off = (("training.activation_checkpointing", "false"), ("parallel.dp_shard", "1"), ("parallel.tp", "1"))
    plain = set(allowed(planned(world, AUTO, *off), cluster(2)))
    assert plain == {Candidate(sizes, False) for sizes in (Sizes(pp=2), Sizes(sp=2), Sizes(dp_replicate=2))}
    offloaded = list(allowed(planned(world, AUTO + "cpu_offload = true\n"), cluster(2)))
    assert {one.sizes for one in offloaded} == {Sizes(dp_shard=2)} and all(one.sharding.offload for one in offloaded)


def test_memory_is_said_in_words(world: Path) -> None:
    assert (memory_of("24GB"), memory_of("1.5 GiB"), memory_of("80 MB")) == (24e9, 1.5 * 2**30, 80e6)
    with pytest.raises(ConfigError, match=r"memory\.budget"):
        planned(world, '\n[memory]\nbudget = "much"\n')


def test_replicas_where_they_fit_and_nothing_where_nothing_does(world: Path) -> None:
    chosen = _choose(planned(world), cluster(2), resumes=False)
    assert chosen.parallel["dp_replicate"] == 2 and chosen.training == {"activation_checkpointing": False}
    with pytest.raises(UserError, match=r"no plan fits 2 x 97.7 KiB. The smallest, .* would need .* on a device"):
        _choose(planned(world), cluster(2, 1e5), resumes=False)
    with pytest.raises(UserError, match="no plan over 2 processes is possible"):
        _choose(planned(world, AUTO + "dp_shard = 3\n"), cluster(2), resumes=False)


@pytest.mark.slow
def test_a_run_lays_itself_out_and_goes_on_so(world: Path) -> None:
    config = planned(world)
    replicas = needs(config, Candidate(Sizes(dp_replicate=2), True))
    shards = needs(config, Candidate(Sizes(dp_shard=2), True))
    assert shards < 0.95 * replicas
    memory = f"{(shards + replicas) / 2e6:.3f}MB"
    flags = ["--memory.budget", memory, *(f"--parallel.{name}=1" for name in ("sp", "tp", "pp"))]
    said = finish(start_training(write_config(world, 3, AUTO), *flags, ranks=2))
    assert "parallel.auto: dp_shard = 2" in said
    assert "does not fit: dp_replicate = 2, micro_batch_size = 1 would need" in said
    recorded = load_config(world / "run" / "config.toml")
    assert recorded.parallel.dp_shard == 2 and not recorded.parallel.auto and recorded.memory.budget is None

    again = _choose(config, cluster(2), resumes=True)  # with all the memory there is
    assert again.parallel["dp_shard"] == 2 and "the plan that this run has had, dp_shard = 2" in again.said[0]
    other = _choose(planned(world, AUTO, ("parallel.dp_shard", "1")), cluster(2), resumes=True)
    assert other.parallel["dp_replicate"] == 2 and "another than what is given now; searching anew" in other.said[0]

    said = finish(start_training(write_config(world, 4, AUTO)))
    assert "was for 2 processes; searching anew" in said and "parallel.auto: one device" in said
    assert "Resuming from" in said


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of five blocks, of which some can travel."""
    directory = tmp_path_factory.mktemp("deep") / "wan"
    family_class("wan").tiny(directory, "t2v-1.3b", seed=1)
    path = directory / "transformer" / "config.json"
    larger = {"num_attention_heads": 16, "ffn_dim": 768, "num_layers": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | larger))
    return directory


def budgeted(model: Path, memory: dict[str, Any], **training: Any) -> Config:
    config: dict[str, Any] = {
        "model": {"family": "wan", "variant": "t2v-1.3b", "path": str(model), "random_weights": True},
        "data": {"sources": [{"path": str(model)}], "buckets": {"resolutions": [96], "frames": [9]}},
        "training": {"steps": 2, "precision": "bf16", "batch_size": 1} | training,
        "adapter": {"rank": 4},
        "memory": memory,
    }
    return Config.model_validate(config)


def test_a_budget_takes_what_is_fastest_of_what_fits(deep: Path) -> None:
    """With plenty nothing; with less what runs again or waits in the host's memory; with the least all of it; and what
    is given stays."""
    config = budgeted(deep, {"budget": "80GB"})
    gpu = replace(cluster(1), on_gpu=True, host_memory=1e12)
    known = prospect(config, planning_family(config), Sizes())
    ways = [(kind, Offloading(a, n)) for kind in (False, True, "nested") for a in (False, True) for n in (0, 3, 4, 5)]
    takes = {
        (kind, there): known.workload.forecast(Candidate(Sizes(), kind, offloading=there), gpu) for kind, there in ways
    }

    def choose(memory: float, config: Config = config) -> Forecast:
        there = replace(gpu, device=replace(gpu.device, memory=memory))
        plans = with_offloading(config, known, there, allowed(config, there))
        best = search(known.workload, there, known.refusal, count=1, among=plans).best[0].plan
        return takes[best.checkpointing, best.offloading]

    plain = takes[False, Offloading()]
    assert choose(plain.memory.total) is plain
    needs = sorted(one.memory.total for one in takes.values())
    assert needs[0] < needs[len(needs) // 2] < plain.memory.total
    for memory in (plain.memory.total - 1, needs[len(needs) // 2], needs[0]):
        chosen = choose(memory)
        fitting = [one for one in takes.values() if one.memory.total <= memory]
        assert chosen.memory.total <= memory
        assert chosen.time.total <= 1.03 * min(one.time.total for one in fitting)  # of about equals the plainest
    fixed = budgeted(deep, {"budget": "80GB", "offload_activations": False}, activation_checkpointing=False)
    assert choose(takes[False, Offloading(False, 4)].memory.total, fixed).plan.offloading == Offloading(False, 4)

    least = replace(gpu, device=replace(gpu.device, memory=needs[0]))
    said = _choose(config, least, resumes=False)
    assert said.said[0].startswith("memory.budget: one device, ") and said.memory["offload_blocks"] == 5
    assert said.apply(config).memory.budget is None and said.apply(config).memory.offload_blocks == 5
    with pytest.raises(UserError, match=r"memory\.budget: no plan fits 1 x .*The smallest, .*offload_blocks = 5"):
        _choose(config, replace(least, device=replace(gpu.device, memory=needs[0] - 1)), resumes=False)
