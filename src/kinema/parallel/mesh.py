"""Where this process stands among the others, and the few collectives that the rest of kinema needs.

``torchrun`` tells each process its rank in the environment. One process is the same code with size 1: no process
group exists, and every collective returns what it was given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(days=1)
"""How long a collective waits: the others wait while the main rank makes previews or writes exports to a slow disk,
or one rank encodes more than its share, which torch's 10 to 30 minutes would take for a hang. torchrun sees a rank
that died at once."""

Summand = TypeVar("Summand", "Tensor", float)


@dataclass(frozen=True)
class World:
    """All processes of a run and this one's place among them.

    ``mesh`` has the dimensions (dp_replicate, dp_shard) and is None when ``size`` is 1. ``dp_rank`` of ``dp_size``
    says which share of the global batch this process takes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    dp_rank: int
    dp_size: int
    dp_replicate: int
    dp_shard: int
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank (pickled between processes of this run)."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, value: Summand) -> Summand:
        """The sum over all data-parallel ranks: a new tensor on the same device, or a float (summed in float64)."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        if isinstance(value, torch.Tensor):
            total = value.detach().clone()
            dist.all_reduce(total)
            return total
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()


def data_parallel_sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for a number of processes; UserError if they do not fit."""
    shard = parallel.dp_shard
    if parallel.dp_replicate == "auto":
        if world_size % shard:
            raise UserError(
                f"parallel.dp_shard = {shard} does not divide the {world_size} processes of this run. "
                f"Start a multiple of {shard} processes (torchrun --nproc-per-node {shard} -m kinema train ...) or "
                f"set parallel.dp_shard to a divisor of {world_size}."
            )
        return world_size // shard, shard
    replicate = parallel.dp_replicate
    if replicate * shard != world_size:
        raise UserError(
            f"parallel.dp_replicate = {replicate} times parallel.dp_shard = {shard} needs {replicate * shard} "
            f"processes, but this run has {world_size}. Start it with torchrun --nproc-per-node "
            f'{replicate * shard} -m kinema train ..., or set parallel.dp_replicate to "auto".'
        )
    return replicate, shard


def start(parallel: ParallelConfig, device: str | None = None) -> World:
    """Join the other processes of this run. ``device``: "cpu" or "cuda"; default: a GPU where there is one.

    Reads torchrun's RANK, WORLD_SIZE and LOCAL_RANK. Collectives on CPU tensors go through gloo also on GPU machines,
    so that checkpoints can be written while the GPUs compute.
    """
    import torch

    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    replicate, shard = data_parallel_sizes(parallel, size)
    where = _device(device, local_rank, size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    mesh = None
    if size > 1:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=where if where.type == "cuda" else None)
        mesh = init_device_mesh(where.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return World(rank, size, local_rank, where, rank, size, replicate, shard, mesh)


def stop() -> None:
    """Leave the other processes: the last call of a run that ended well."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str | None, local_rank: int, size: int) -> torch.device:
    import torch

    where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda":
        return where
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"this machine runs process {local_rank + 1} of this run but has {count} GPU(s): each process needs its "
            f"own. Start at most {count} processes on it (torchrun --nproc-per-node {count})."
        )
    return torch.device("cuda", local_rank) if size > 1 or where.index is None else where
