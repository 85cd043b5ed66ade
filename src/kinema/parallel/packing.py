"""Which part of a matrix each tensor-parallel peer holds, and the way back to the whole.

A matrix that is several in one (queries, keys and values; a gate and what it gates; attention's output and that of a
feed-forward layer) is cut block by block, so that a peer has the same share of each. To torch its part is a plain
``Shard``, of a matrix whose rows or columns are in another order: optimisers, averages and FSDP2 do not mind. What
leaves the run (checkpoints, exports) is put in the original order here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from kinema.networks.mapped import taken
from kinema.parallel.paper import PaperMesh
from kinema.runs.pieces import Piece, Pieces

DIMENSION = "tp"
"""The peers' dimension of the mesh."""


@dataclass(frozen=True)
class Packing:
    """How a parameter is shared: each of its ``blocks`` along ``dim`` is cut into ``parts`` equal ones."""

    dim: int
    blocks: tuple[int, ...]
    """Their sizes, which add up to the dimension's."""
    parts: int

    def intervals(self, rank: int) -> list[tuple[int, int]]:
        """What a peer has of the whole's dimension, in the order of its part: (begin, size)."""
        found, offset = [], 0
        for block in self.blocks:
            size = block // self.parts
            found.append((offset + rank * size, size))
            offset += block
        return found

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A peer's part, a tensor of its own."""
        slices = [whole.narrow(self.dim, begin, size) for begin, size in self.intervals(rank)]
        return torch.cat(slices, dim=self.dim)

    def original(self, parts: Tensor) -> Tensor:
        """The whole in its own order, of the peers' parts one behind the other."""
        if len(self.blocks) == 1:
            return parts
        sizes = [block // self.parts for _ in range(self.parts) for block in self.blocks]
        pieces = parts.split(sizes, dim=self.dim)
        count = len(self.blocks)
        return torch.cat([piece for block in range(count) for piece in pieces[block::count]], dim=self.dim)


_packings: WeakKeyDictionary[nn.Module, dict[str, Packing]] = WeakKeyDictionary()
"""Of each layer that is shared, how its parameters are, by their names in the layer: FSDP2 replaces parameters."""


def set_part(layer: nn.Module, name: str, packing: Packing, mesh: DeviceMesh | PaperMesh) -> None:
    """Replace a parameter of a layer by this process's part of it, a DTensor over the peers."""
    whole: nn.Parameter = getattr(layer, name)
    local = packing.part(taken(layer, name), mesh.get_local_rank())
    shared = local  # on paper there are no others, and nothing is put together again
    if not isinstance(mesh, PaperMesh):
        shared = DTensor.from_local(local, mesh, [Shard(packing.dim)], run_check=False)
    setattr(layer, name, nn.Parameter(shared, requires_grad=whole.requires_grad))
    _packings.setdefault(layer, {})[name] = packing


def packings(network: nn.Module) -> dict[str, Packing]:
    """How the parameters that peers share are packed, by their names in the network; {} without peers."""
    return {
        f"{module}.{name}" if module else name: packing
        for module, layer in network.named_modules()
        for name, packing in _packings.get(layer, {}).items()
    }


def pieces(tensor: DTensor, packing: Packing) -> Pieces:
    """A parameter, or what is laid out like it (its average, an optimiser's moments), for a checkpoint."""
    mesh, local = tensor.device_mesh, tensor.detach().to_local()
    intervals = packing.intervals(mesh.get_local_rank(DIMENSION))
    rows = tensor.shape[0] // packing.parts if packing.dim == 0 else tensor.shape[0]
    begin, end = _rows_here(tensor, rows)
    found = []
    if packing.dim == 0:
        position = 0  # in the rows of the peers' part, of which FSDP2 may have left some here
        for start, size in intervals:
            low, high = max(begin, position), min(end, position + size)
            if low < high:
                found.append(_piece(local, start + low - position, high - low, low - begin))
            position += size
    elif begin < end:
        column = 0
        for start, size in intervals:
            found.append(Piece((begin, start), (end - begin, size), (0, column)))
            column += size
    return Pieces(local, tensor.shape, tuple(found))


def _piece(local: Tensor, row: int, rows: int, start: int) -> Piece:
    """Some rows of a matrix, or elements of a vector, at their whole width."""
    rest = tuple(local.shape[1:])
    return Piece((row, *(0 for _ in rest)), (rows, *rest), (start, *(0 for _ in rest)))


def _rows_here(tensor: DTensor, rows: int) -> tuple[int, int]:
    """From where to where FSDP2 has left rows of this peer's part on this process, as ``torch.chunk`` cuts them."""
    mesh = tensor.device_mesh
    for dimension, placement in enumerate(tensor.placements):
        if not placement.is_replicate() and (mesh.mesh_dim_names or ())[dimension] != DIMENSION:
            size = -(-rows // mesh.size(dimension))
            begin = min(mesh.get_local_rank(dimension) * size, rows)
            return begin, min(begin + size, rows)
    return 0, rows


def whole(tensor: Tensor, packing: Packing | None) -> Tensor:
    """A tensor gathered from all processes that share it, in its own order; called by all of them together."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.to(tensor.device_mesh.device_type).full_tensor()  # shards may be in the host's memory
    return gathered if packing is None else packing.original(gathered)


def for_checkpoint(networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Pieces]:
    """Tensors by ``{network}.{parameter}``, or with an optimiser's key behind that, as a checkpoint takes them."""
    packed = {f"{part}.{name}": packing for part, one in networks.items() for name, packing in packings(one).items()}
    found: dict[str, Tensor | Pieces] = dict(tensors)
    for name, tensor in tensors.items() if packed else ():
        packing = packed.get(name) or packed.get(name.rpartition(".")[0])
        if packing is not None and isinstance(tensor, DTensor):
            found[name] = pieces(tensor, packing)
    return found
