"""One process of several that share sequences or matrices, without the others: what `kinema plan` runs a step in.

It does what the first peer would do, on tensors without values. Collectives return at once and count their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from kinema.parallel.mesh import Sizes, World

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@dataclass
class Exchanged:
    """Bytes that collectives were given: whole tensors of all-reduces, results of all-gathers, what goes into
    all-to-alls."""

    reduced: int = 0
    gathered: int = 0
    exchanged: int = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.reduced, self.gathered, self.exchanged


@dataclass(eq=False)
class PaperGroup:
    """What `torch.distributed` asks of a process group, for the collectives that networks call."""

    given: Exchanged

    def allreduce(self, tensors: list[Tensor], _: Any = None) -> None:
        self.given.reduced += sum(one.nbytes for one in tensors)

    def allgather(self, outputs: list[list[Tensor]], _: Any, __: Any = None) -> None:
        self.given.gathered += sum(one.nbytes for one in outputs[0])

    def alltoall_base(self, _: Tensor, sent: Tensor, *__: Any) -> None:
        self.given.exchanged += sent.nbytes

    all_to_all_single = alltoall_base  # what newer versions of torch call it


@dataclass(eq=False)
class PaperMesh:
    """One dimension of a mesh, seen by its first process."""

    group: PaperGroup
    count: int

    def get_group(self) -> PaperGroup:
        return self.group

    def get_local_rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class PaperWorld(World):
    """The first process of a mesh of ``sp`` and ``tp`` alone; ``given`` counts."""

    given: Exchanged = field(default_factory=Exchanged)

    @classmethod
    def of(cls, sp: int, tp: int) -> PaperWorld:
        import torch

        given = Exchanged()
        sizes = Sizes(sp=sp, tp=tp)
        meshes: Any = {name: PaperMesh(PaperGroup(given), getattr(sizes, name)) for name in ("sp", "tp")}
        return cls(0, sizes.total, 0, torch.device("meta"), sizes, meshes, given)

    def group(self, *dimensions: str) -> ProcessGroup:
        (dimension,) = dimensions
        assert self.mesh is not None
        return cast("ProcessGroup", self.mesh[dimension].get_group())
