"""What `[memory]` and activation checkpointing can do for a run: checked before anything expensive, and settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family
from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    import torch

    from kinema.parallel.devices import Cluster
    from kinema.parallel.mesh import Sizes, World


def check_memory(config: Config, family: Family, sizes: Sizes, device: torch.device) -> None:
    """ConfigError for shares of blocks that are not there, and for what cannot wait in the host's memory here. Reads no
    weights."""
    from kinema.memory.checkpointing import check_lists

    memory, kind = config.memory, config.training.activation_checkpointing
    asked = {"offload_activations": memory.offload_activations, "offload_blocks": memory.offload_blocks}
    for key in [key for key, value in asked.items() if value and device.type != "cuda"]:
        raise ConfigError(
            f"memory.{key}: this run is on a {device.type.upper()}, whose memory is the host's: there is nothing to "
            f"move, and nothing to gain. Leave it out here (--memory.{key} {'false' if asked[key] is True else 0})."
        )
    if not isinstance(kind, dict) and not memory.offload_blocks:
        return
    networks = {part: family.load(part, "meta", None) for part in family.trained_parts()}
    lists = {part: family.blocks(network) for part, network in networks.items()}
    check_lists(kind, list(dict.fromkeys(name for one in lists.values() for name in one)))
    for part, groups in lists.items():
        if part.startswith("network"):
            check_block_swap(config, int(memory.offload_blocks), sum(map(len, groups.values())), sizes)


def check_block_swap(config: Config, travelling: int, count: int, sizes: Sizes) -> None:
    """ConfigError unless so many of the network's ``count`` blocks can travel under this plan."""
    if not travelling:
        return
    if travelling > count:
        raise ConfigError(
            f'memory.offload_blocks = {travelling}: the network has {count} blocks. Give {count} or fewer, or "auto".'
        )
    for refused, what, why in _block_swap_refusals(config, sizes):
        if refused:
            raise ConfigError(f"memory.offload_blocks = {travelling}: not with {what}: {why}")


def _block_swap_refusals(config: Config, sizes: Sizes) -> list[tuple[bool, str, str]]:
    """(Whether this configuration asks for it, its name, the reason and what to do). The table of
    docs/guides/memory.md."""
    whole, optimizer = config.adapter is None, config.optimizer
    return [
        (
            sizes.dp_shard > 1,
            f"parallel.dp_shard = {sizes.dp_shard}",
            "a shard is gathered from all processes each time. Use parallel.cpu_offload, which keeps the shards in the "
            "host's memory.",
        ),
        (
            sizes.tp > 1,
            f"parallel.tp = {sizes.tp}",
            "each device has but a part of each block. Use parallel.dp_shard with parallel.cpu_offload.",
        ),
        (
            sizes.pp > 1,
            f"parallel.pp = {sizes.pp}",
            "micro-batches come to a stage's blocks in both directions by turns, and would fetch them over and over. "
            "Use parallel.dp_shard with parallel.cpu_offload.",
        ),
        (
            whole and sizes.dp_replicate * sizes.sp > 1,
            f"the whole network trained on {sizes.dp_replicate * sizes.sp} devices",
            "gradients are summed on the devices, and these go to each process' host. Use parallel.dp_shard with "
            "parallel.cpu_offload, or an [adapter].",
        ),
        (
            whole and optimizer.gradient_release,
            "optimizer.gradient_release = true",
            "blocks that travel are updated on the host once their gradients are there. Use one of the two.",
        ),
        (
            whole and optimizer.state_on_cpu,
            "optimizer.state_on_cpu = true",
            "the state of blocks that travel is on the host already, where they are updated. Leave state_on_cpu out.",
        ),
    ]


def settle_offload(config: Config, family: Family, world: World, resumes: bool) -> tuple[Config, tuple[str, ...]]:
    """The configuration with ``memory.offload_blocks`` as a number, and what to say of it; all processes call it
    together. UserError where not even all blocks suffice."""
    if config.memory.offload_blocks != "auto":
        return config, ()
    from kinema.training.auto_plan import cluster_of

    outcome: tuple[int, str, str | None] = (0, "", None)
    cluster = cluster_of(config, world) if world.device.type == "cuda" else None  # asks every process
    if world.is_main:
        try:
            outcome = (*_choose(config, family, world, cluster, resumes), None)
        except UserError as error:
            outcome = (0, "", str(error))
    number, said, problem = world.broadcast_object(outcome)
    if problem is not None:
        raise UserError(problem)
    memory = config.memory.model_copy(update={"offload_blocks": number})
    return config.model_copy(update={"memory": memory}), (said,)


def _choose(config: Config, family: Family, world: World, cluster: Cluster | None, resumes: bool) -> tuple[int, str]:
    from kinema.memory.block_swap import blocks_to_offload
    from kinema.parallel.plan import Candidate, Forecast, kind_of
    from kinema.parallel.plan_model import Offloading, Sharding
    from kinema.training.plan import planning_family, prospect

    key = 'memory.offload_blocks = "auto"'
    if cluster is None:
        return 0, f"{key}: a {world.device.type.upper()}'s memory is the host's; nothing is moved."
    if resumes and config.adapter is None and (before := _recorded(config)) is not None:
        return before, f"{key}: {before}, as this run has had it: what is updated on the host is rounded as there."
    known = prospect(config, planning_family(config), world.sizes)
    parallel, kind = config.parallel, kind_of(config.training.activation_checkpointing)
    sharding = Sharding(parallel.zero, parallel.cpu_offload)

    def forecast(number: int) -> Forecast:
        offloading = Offloading(config.memory.offload_activations, number)
        return known.workload.forecast(Candidate(world.sizes, kind, sharding, offloading), cluster)

    count = known.workload.model.blocks
    number = blocks_to_offload(lambda one: forecast(one).memory.total <= cluster.device.memory, count)
    room = f"{readable_bytes(cluster.device.memory)} on a device"
    if number is None:
        needs = readable_bytes(forecast(count).memory.total)
        raise UserError(
            f"{key}: with all {count} blocks in the host's memory the forecast is still {needs}, and there are {room}. "
            "Set training.activation_checkpointing = true, memory.offload_activations = true, smaller data.buckets or "
            "a smaller training.micro_batch_size, or store the network in fewer bits (model.network.dtype)."
        )
    check_block_swap(config, number, count, world.sizes)
    chosen = forecast(number)
    said = f"{key}: {number} of {count} blocks; forecast: {readable_bytes(chosen.memory.total)} of {room}"
    if not number:
        return 0, f"{said}, so none has to travel."
    without = readable_bytes(forecast(0).memory.total)
    return number, f"{said} ({without} without), {readable_bytes(chosen.memory.host)} of the host's memory."


def _recorded(config: Config) -> int | None:
    """What the run in ``run.dir`` has had, if it has checkpoints to go on from."""
    from kinema.config.load import load_config
    from kinema.runs.checkpoint_list import list_checkpoints

    if not list_checkpoints(config.run.dir / "checkpoints"):
        return None
    try:
        recorded = load_config(config.run.dir / "config.toml").memory.offload_blocks
    except UserError:
        return None
    return None if recorded == "auto" else recorded
