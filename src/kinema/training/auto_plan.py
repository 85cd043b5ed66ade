"""``parallel.auto`` and ``memory.budget``: the plan of a run, chosen when it starts.

What the configuration gives stays; the rest is searched by the forecast of `kinema plan`, with the memory that the
run's devices have: sizes of the mesh with ``parallel.auto``; with ``memory.budget`` what is computed again and what
waits in the host's memory, none of which changes more than rounding. The main process decides for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.config.write import toml_value
from kinema.errors import UserError
from kinema.machine import memory_left
from kinema.parallel.mesh import Sizes, World, lay_out
from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    from kinema.parallel.devices import Cluster
    from kinema.parallel.plan import Candidate, Forecast, Found

SIZES = tuple(field.name for field in fields(Sizes))
SHOWN = 3
"""Plans that do not fit, of which the first are named."""


@dataclass(frozen=True)
class Chosen:
    """A plan as changes to the configuration."""

    parallel: dict[str, Any]
    training: dict[str, Any]
    memory: dict[str, Any]
    said: tuple[str, ...] = ()
    """What the user is told."""

    def apply(self, config: Config) -> Config:
        """The configuration with this plan in full, as if it had been given."""
        parallel = config.parallel.model_copy(update=self.parallel | {"auto": False})
        training = config.training.model_copy(update=self.training)
        memory = config.memory.model_copy(update=self.memory | {"budget": None})
        return config.model_copy(update={"parallel": parallel, "training": training, "memory": memory})


def lay_out_by_itself(config: Config, world: World, resumes: bool) -> tuple[Config, World, tuple[str, ...]]:
    """The configuration with the plan that was chosen, the processes laid out by it, and what to say.

    ``resumes``: take the plan that the run in ``run.dir`` has had, if it was for as many processes. UserError where no
    plan fits. All processes have to call it together.
    """
    from kinema.parallel.mesh import sizes_of

    cluster = cluster_of(config, world)
    outcome: tuple[Chosen | None, str] = (None, "")
    if world.is_main:
        try:
            outcome = (_choose(config, cluster, resumes), "")
        except UserError as error:
            outcome = (None, str(error))
    chosen, problem = world.broadcast_object(outcome)
    if chosen is None:
        raise UserError(problem)
    searched, config = config.parallel.auto, chosen.apply(config)
    return config, lay_out(world, sizes_of(config.parallel, world.size)) if searched else world, chosen.said


def _choose(config: Config, cluster: Cluster, resumes: bool) -> Chosen:
    key = _key(config)
    before = _plan_of_run(config) if resumes else None
    said: tuple[str, ...] = ()
    if before is not None:
        processes = Sizes(**{name: before.parallel[name] for name in SIZES}).total
        if processes == cluster.count and _agrees(config, before):
            words = _in_words(before)
            return replace(before, said=(f"{key}: the plan that this run has had, {words}.",))
        why = f"for {processes} processes" if processes != cluster.count else "another than what is given now"
        said = (f"{key}: the plan that this run has had was {why}; searching anew.",)
    found, seconds = _search(config, cluster)
    if not found.best:
        raise UserError(_nothing_fits(key, config, cluster, found))
    chosen = _as_changes(config, found.best[0])
    return replace(chosen, said=(*said, *_told(key, config, found, cluster, seconds)))


def _key(config: Config) -> str:
    return "parallel.auto" if config.parallel.auto else "memory.budget"


def _search(config: Config, cluster: Cluster) -> tuple[Found, float]:
    from kinema.parallel.mesh import sizes_of
    from kinema.parallel.plan import search
    from kinema.training.plan import planning_family, prospect, searches_offloading, with_offloading

    started = time.perf_counter()
    family = planning_family(config)
    sizes = Sizes(dp_replicate=cluster.count) if config.parallel.auto else sizes_of(config.parallel, cluster.count)
    known = prospect(config, family, sizes, rules="cuda" if cluster.on_gpu else "cpu")
    plans: Iterable[Candidate] = allowed(config, cluster)
    if searches_offloading(config):
        plans = with_offloading(config, known, cluster, plans)
    found = search(known.workload, cluster, known.refusal, count=1, among=plans)
    return found, time.perf_counter() - started


def allowed(config: Config, cluster: Cluster) -> Iterator[Candidate]:
    """The plans that keep to what the configuration gives."""
    from kinema.parallel.mesh import sizes_of
    from kinema.parallel.plan import Candidate, candidates, kind_of
    from kinema.parallel.plan_model import Sharding
    from kinema.training.plan import kinds, offloading_of

    parallel, training = config.parallel, config.training
    fixed = "activation_checkpointing" in training.model_fields_set
    if not parallel.auto:
        for kind in (kind_of(training.activation_checkpointing),) if fixed else kinds(config):
            yield Candidate(
                sizes_of(parallel, cluster.count), kind, Sharding(parallel.zero, parallel.cpu_offload),
                offloading_of(config),
            )  # fmt: skip
        return
    given = {name for name in (*SIZES, "zero", "cpu_offload") if name in parallel.model_fields_set}
    sizes = {name: getattr(parallel, name) for name in given & set(SIZES) if getattr(parallel, name) != "auto"}
    for plan in candidates(cluster, kinds(config), offloading_of(config)):
        if any(getattr(plan.sizes, name) != size for name, size in sizes.items()):
            continue
        if "zero" in given and plan.sizes.dp_shard > 1 and plan.sharding.zero != parallel.zero:
            continue
        if fixed and plan.checkpointing != kind_of(training.activation_checkpointing):
            continue
        if not (parallel.cpu_offload and "cpu_offload" in given):
            yield plan
        elif plan.sizes.dp_shard > 1:
            yield replace(plan, sharding=replace(plan.sharding, offload=True))


def _as_changes(config: Config, best: Forecast) -> Chosen:
    from kinema.parallel.plan import as_configured

    plan, batch = best.plan, best.batch
    parallel: dict[str, Any] = {name: getattr(plan.sizes, name) for name in SIZES}
    parallel |= {"zero": plan.sharding.zero, "cpu_offload": plan.sharding.offload}
    training: dict[str, Any] = {"activation_checkpointing": as_configured(plan.checkpointing)}
    if batch.micro_batches > 1 and config.training.micro_batch_size is None:
        training["micro_batch_size"] = batch.micro
    memory = {"offload_activations": plan.offloading.activations, "offload_blocks": plan.offloading.blocks}
    return Chosen(parallel, training, memory)


def _in_words(plan: Chosen) -> str:
    parallel, training = plan.parallel, plan.training
    words = [f"{name} = {parallel[name]}" for name in SIZES if parallel[name] > 1] or ["one device"]
    if parallel["dp_shard"] > 1 and parallel["zero"] != 3:
        words.append(f"zero = {parallel['zero']}")
    words += ["cpu_offload"] * parallel["cpu_offload"]
    if kind := training["activation_checkpointing"]:
        words.append("activation_checkpointing" + ("" if kind is True else f" = {toml_value(kind)}"))
    if training.get("micro_batch_size") is not None:
        words.append(f"micro_batch_size = {training['micro_batch_size']}")
    words += ["offload_activations"] * plan.memory["offload_activations"]
    if plan.memory["offload_blocks"]:
        words.append(f"offload_blocks = {plan.memory['offload_blocks']}")
    return ", ".join(words)


def _told(key: str, config: Config, found: Found, cluster: Cluster, seconds: float) -> list[str]:
    best = found.best[0]
    memory = f"{readable_bytes(best.memory.total)} of {readable_bytes(cluster.device.memory)} on a device"
    if best.memory.lent:
        memory += f", {readable_bytes(best.memory.lent)} of its machine's memory"
    lines = [
        f"{key}: {_in_words(_as_changes(config, best))}; forecast: {memory}, about {best.time.total:.2g} s a step, if "
        f"devices compute as docs/scaling.md says ({found.tried} plans looked at in {seconds:.1f} s)."
    ]
    if found.plainer:
        named = "; ".join(
            f"{_in_words(_as_changes(config, one))} would need {readable_bytes(one.memory.total)}"
            for one in found.plainer[:SHOWN]
        )
        more = len(found.plainer) - SHOWN
        lines.append(f"  What comes before it does not fit: {named}{f'; {more} more' if more > 0 else ''}.")
    return lines


def _nothing_fits(key: str, config: Config, cluster: Cluster, found: Found) -> str:
    there = f"{cluster.count} x {readable_bytes(cluster.device.memory)}"
    if found.smallest is None:
        reasons = "".join(f"\n  {what}: {why}" for what, why in found.refused.items())
        return f"{key}: no plan over {cluster.count} processes is possible with what is given:{reasons}"
    needed = f"{readable_bytes(found.smallest.memory.total)} on a device"
    if found.smallest.memory.lent > cluster.host_memory:
        needed += (
            f" and {readable_bytes(found.smallest.memory.lent)} of its machine's memory, which has "
            f"{readable_bytes(cluster.host_memory)} free (without checkpoint.asynchronous "
            f"{readable_bytes(found.smallest.memory.host)})"
        )
    return (
        f"{key}: no plan fits {there}. The smallest, {_in_words(_as_changes(config, found.smallest))}, would need "
        f"{needed}. Take more or larger devices, an [adapter], a network stored in fewer bits (model.network.dtype), "
        "smaller data.buckets, or leave sizes of [parallel], training.activation_checkpointing and "
        "training.micro_batch_size out for the search to choose."
    )


# -- what there is ---------------------------------------------------------------------------------------------------


def cluster_of(config: Config, world: World) -> Cluster:
    """The run's processes and the memory of their devices, the smallest of them."""
    from kinema.parallel.devices import Cluster, memory_of

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _device(world, local)
    if config.memory.budget is not None:
        device = replace(device, memory=memory_of(config.memory.budget))
    smallest = min(world.gather_objects(device.memory))
    on_gpu = world.device.type == "cuda"
    lent = min(world.gather_objects(memory_left() / local)) if on_gpu else float("inf")
    return Cluster(
        replace(device, memory=smallest), world.size, min(local, world.size), host_memory=lent, on_gpu=on_gpu
    )


def _device(world: World, local: int) -> Any:
    from kinema.parallel.devices import KNOWN, PROCESSOR

    if world.device.type != "cuda":
        return replace(PROCESSOR, memory=memory_left() / local)
    import torch

    from kinema.parallel.plan_memory import CONTEXT

    name = torch.cuda.get_device_name(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    known = next((KNOWN[one] for one in sorted(KNOWN, key=len, reverse=True) if one.lower() in name.lower()), None)
    # This process has taken its context already, which every forecast counts.
    return replace(known or KNOWN["A100"], name=name, memory=float(min(total, free + CONTEXT)))


# -- the plan of a run that goes on ----------------------------------------------------------------------------------


def _plan_of_run(config: Config) -> Chosen | None:
    """What the run in ``run.dir`` has recorded, if it has checkpoints to go on from."""
    from kinema.config.load import load_config
    from kinema.runs.checkpoint_list import list_checkpoints

    directory = config.run.dir
    if not list_checkpoints(directory / "checkpoints"):
        return None
    try:
        recorded = load_config(directory / "config.toml")
    except UserError:
        return None
    parallel = {name: getattr(recorded.parallel, name) for name in (*SIZES, "zero", "cpu_offload")}
    if parallel["dp_replicate"] == "auto":
        return None
    names = ("activation_checkpointing", "micro_batch_size")
    memory = {name: getattr(recorded.memory, name) for name in ("offload_activations", "offload_blocks")}
    return Chosen(parallel, {name: getattr(recorded.training, name) for name in names}, memory)


def _agrees(config: Config, before: Chosen) -> bool:
    """Whether a recorded plan is what the configuration gives, as far as it gives anything."""
    pairs = [(config.parallel, before.parallel), (config.training, before.training), (config.memory, before.memory)]
    return all(
        name not in section.model_fields_set or getattr(section, name) in (value, "auto")
        for section, values in pairs
        for name, value in values.items()
    )
