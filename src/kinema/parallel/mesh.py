"""Where this process stands among the others, and the few collectives that the rest of kinema needs.

``torchrun`` tells each process its rank in the environment. One process is the same code with size 1: no process
group exists, and every collective returns what it was given.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from dataclasses import astuple, dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(days=1)
"""How long a collective waits: the others wait while the main rank makes previews or writes exports to a slow disk,
or one rank encodes more than its share, which torch's 10 to 30 minutes would take for a hang. torchrun sees a rank
that died at once."""

Summand = TypeVar("Summand", "Tensor", float)


@dataclass(frozen=True)
class Sizes:
    """How many processes each way of sharing the work takes; their product is all of them."""

    pp: int = 1
    """Pipeline stages: each holds some of the blocks."""
    dp_replicate: int = 1
    """Copies of the network that share the batch."""
    dp_shard: int = 1
    """Processes over which each copy is sharded; they share the batch too."""
    sp: int = 1
    """Processes that share the sequence of each sample."""
    tp: int = 1
    """Processes that share each matrix."""

    @property
    def total(self) -> int:
        return math.prod(astuple(self))

    @property
    def dp(self) -> int:
        """Shares of the global batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def weight_shards(self) -> int:
        """Processes over which FSDP2 shards parameters: those of a sequence hold the same, so they are among them."""
        return self.dp_shard * self.sp if self.dp_shard > 1 else 1

    def place(self, rank: int) -> dict[str, int]:
        """Where a process stands along each dimension; the last one, ``tp``, counts fastest."""
        found = {}
        for field in reversed(fields(self)):
            rank, found[field.name] = divmod(rank, getattr(self, field.name))
        return found


@dataclass(frozen=True)
class World:
    """All processes of a run and this one's place among them.

    ``mesh`` has the dimensions (pp, dp_replicate, dp_shard, sp, tp), each of which may be 1, and is None when ``size``
    is 1. Processes that differ in ``pp``, ``sp`` or ``tp`` alone see the same samples.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    sizes: Sizes = Sizes()
    mesh: DeviceMesh | None = None

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """One process."""
        import torch

        return cls(0, 1, 0, torch.device(device))

    @property
    def place(self) -> dict[str, int]:
        """Where this process stands along each dimension of the mesh."""
        return self.sizes.place(self.rank)

    @property
    def dp_rank(self) -> int:
        """Which of the ``dp_size`` shares of the global batch this process takes."""
        place = self.place
        return place["dp_replicate"] * self.sizes.dp_shard + place["dp_shard"]

    @property
    def dp_size(self) -> int:
        return self.sizes.dp

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded by FSDP2."""
        return self.sizes.dp_shard > 1

    def group(self, *dimensions: str) -> ProcessGroup:
        """The processes that differ from this one along these dimensions of the mesh alone."""
        assert self.mesh is not None, "one process has no groups"
        return self.submesh(*dimensions).get_group()

    def submesh(self, *dimensions: str) -> DeviceMesh:
        """These dimensions of the mesh as one, flattened where they are several."""
        assert self.mesh is not None, "one process has no mesh"
        if len(dimensions) == 1:
            return self.mesh[dimensions[0]]
        flat = self.mesh[dimensions]._flatten("_".join(dimensions))
        _be_patient(flat)
        return flat

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
        """The sum over the samples of all processes: a new tensor on the same device, or a float (summed in float64).

        What peers in ``sp`` and ``tp`` have found of the same samples counts once. Of pipeline stages, those that know
        nothing of the value have to give 0.
        """
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        peers = self.sizes.sp * self.sizes.tp
        if isinstance(value, torch.Tensor):
            total = value.detach().clone()
            dist.all_reduce(total)
            return total if peers == 1 else total / peers
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / peers


def sizes_of(parallel: ParallelConfig, processes: int) -> Sizes:
    """The sizes of the mesh for a number of processes; UserError if they do not fit."""
    of_model = {name: getattr(parallel, name) for name in ("pp", "dp_shard", "sp", "tp")}
    each = math.prod(of_model.values())
    said = " times ".join(f"parallel.{name} = {size}" for name, size in of_model.items() if size > 1)
    if parallel.dp_replicate == "auto":
        if processes % each:
            raise UserError(
                f"{said} does not divide the {processes} processes of this run. Start a multiple of {each} processes "
                f"(torchrun --nproc-per-node {each} -m kinema train ...), or take sizes whose product divides "
                f"{processes}."
            )
        return Sizes(dp_replicate=processes // each, **of_model)
    sizes = Sizes(dp_replicate=parallel.dp_replicate, **of_model)
    if sizes.total != processes:
        said = " times ".join(filter(None, (f"parallel.dp_replicate = {sizes.dp_replicate}", said)))
        raise UserError(
            f"{said} needs {sizes.total} processes, but this run has {processes}. Start it with torchrun "
            f'--nproc-per-node {sizes.total} -m kinema train ..., or set parallel.dp_replicate to "auto".'
        )
    return sizes


def start(parallel: ParallelConfig, device: str | None = None) -> World:
    """Join the other processes of this run. ``device``: "cpu" or "cuda"; default: a GPU where there is one.

    Reads torchrun's RANK, WORLD_SIZE and LOCAL_RANK. Collectives on CPU tensors go through gloo also on GPU machines,
    so that checkpoints can be written while the GPUs compute.
    """
    import torch

    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    sizes = sizes_of(parallel, size)
    where = _device(device, local_rank, size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        bound = where if where.type == "cuda" else None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
            own = dist.PrefixStore(_token(store, rank, size), store)
            dist.init_process_group(backend, timeout=TIMEOUT, store=own, rank=rank, world_size=size, device_id=bound)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
    return lay_out(World(rank, size, local_rank, where), sizes)


def _token(store: Store, rank: int, size: int) -> str:
    """A word that the processes of this try have in common and those of earlier ones had not: torchrun's store outlives
    a restart, and what a dead process has left there would be taken for its successor's. (The number of restarts is
    another on each machine once one was replaced.)

    The first process says a new word; the others answer with one of their own each, and take the first's only once it
    has repeated theirs: who is dead repeats nothing.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("kinema/word", mine)
        for other in range(1, size):
            store.set(f"kinema/{mine}/heard/{other}", store.get(f"kinema/{mine}/{other}"))  # waits for it
        return mine
    while True:
        word = store.get("kinema/word").decode()
        store.set(f"kinema/{word}/{rank}", mine)
        heard = f"kinema/{word}/heard/{rank}"
        if store.check([heard]) and store.get(heard).decode() == mine:
            return word
        time.sleep(0.05)


def lay_out(world: World, sizes: Sizes) -> World:
    """The same processes on a mesh of these sizes. All of them have to call it together."""
    assert sizes.total == world.size, f"{sizes} are not {world.size} processes"
    if world.size == 1:
        return world
    from torch.distributed.device_mesh import init_device_mesh

    names = tuple(field.name for field in fields(Sizes))
    mesh = init_device_mesh(world.device.type, astuple(sizes), mesh_dim_names=names)
    for name in names:
        _be_patient(mesh[name])
    return replace(world, sizes=sizes, mesh=mesh)


def _be_patient(mesh: DeviceMesh) -> None:
    """`TIMEOUT` for the group of a mesh of one dimension: torch gives those that it makes 10 to 30 minutes."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(TIMEOUT, mesh.get_group())


def stop() -> None:
    """Leave the other processes: the last call of a run that ended well. After an error it would wait for them
    (NCCL's communicators end together), who wait for this process: `leave` then."""
    if _joined():
        import torch.distributed as dist

        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code after an error that was said: at once where it is one of several, as Python's
    own end would wait for what the others are in the middle of."""
    if _joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _joined() -> bool:
    """Whether this process has joined others. (One that has never imported torch has not.)"""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


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
