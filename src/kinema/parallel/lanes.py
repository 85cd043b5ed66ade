"""Messages between the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kinema.parallel.mesh import TIMEOUT, World

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""What can be sent."""
HEADER = 256
"""Numbers in the message that describes the ones behind it."""

_lanes: WeakKeyDictionary[DeviceMesh, Lanes] = WeakKeyDictionary()


class _Sent(NamedTuple):
    number: int
    way: tuple[int, int]
    work: dist.Work
    tensor: Tensor


class Lanes:
    """Messages between neighbouring stages.

    Communicators run their operations in the order of issue (NCCL's do, where they are made at once): one that waits
    for its peer holds up all behind it, and processes that wait for one another so would do it for ever. Hence on each
    communicator a process has one neighbour and one direction, and messages between two come in one order on both.
    """

    def __init__(self, world: World) -> None:
        assert world.mesh is not None
        self.device = world.device
        lines = world.mesh.mesh.flatten(1).T.tolist()  # processes that differ in their place in the pipeline alone
        self.line = next(line for line in lines if world.rank in line)
        self._groups = [
            dist.new_subgroups_by_enumeration(lines, timeout=TIMEOUT)[0] for _ in range(communicators(len(self.line)))
        ]
        self._counts: dict[tuple[int, int, str], int] = {}
        self._sent: list[_Sent] = []
        self._number = 0

    def send(self, tensors: Sequence[Tensor], source: int, target: int) -> int:
        """Tensors of any types and shapes from stage ``source`` to ``target``; returns at once, with a number for
        `answered`."""
        numbers = [len(tensors)]
        for one in tensors:
            numbers += [DTYPES.index(one.dtype), one.ndim, *one.shape]
        assert len(numbers) <= HEADER, "a message of this many tensors"
        return self.send_like([torch.tensor(numbers + [0] * (HEADER - len(numbers))), *tensors], source, target)

    def receive(self, source: int, target: int) -> list[Tensor]:
        """What ``send`` sent."""
        (header,) = self.receive_like([torch.empty(HEADER, dtype=torch.int64)], source, target)
        numbers = iter(header.tolist())
        empty = []
        for _ in range(next(numbers)):
            dtype, ndim = DTYPES[next(numbers)], next(numbers)
            shape = [next(numbers) for _ in range(ndim)]
            empty.append(torch.empty(shape, dtype=dtype, device=self.device))
        return self.receive_like(empty, source, target)

    def send_like(self, tensors: Iterable[Tensor], source: int, target: int) -> int:
        """Tensors of which the other stage knows types and shapes."""
        group, peer = self._way(source, target, target)
        self._number += 1
        self._sent = [one for one in self._sent if not one.work.is_completed()]
        for tensor in (one.detach().contiguous() for one in tensors):
            work = dist.isend(tensor, peer, group=self._groups[group], tag=self._count(group, peer, "sent"))
            assert work is not None
            self._sent.append(_Sent(self._number, (source, target), work, tensor))
        return self._number

    def answered(self, number: int, source: int, target: int) -> None:
        """The other stage has come to the message of this number, and to all before it: they are needed no more. gloo
        would not say so before it is asked to wait."""
        for one in self._sent:
            if one.way == (source, target) and one.number <= number:
                one.work.wait()
        self._sent = [one for one in self._sent if not one.work.is_completed()]

    def receive_like(self, tensors: Iterable[Tensor], source: int, target: int) -> list[Tensor]:
        """Tensors of these types and shapes."""
        group, peer = self._way(source, target, source)
        received = []
        for tensor in tensors:
            received.append(torch.empty_like(tensor, requires_grad=False, memory_format=torch.contiguous_format))
            tag = self._count(group, peer, "received")
            dist.recv(received[-1], peer, group=self._groups[group], tag=tag)
        return received

    def finish(self) -> None:
        """Return when everything that was sent has left."""
        for one in self._sent:
            one.work.wait()
        self._sent = []

    def _way(self, source: int, target: int, peer: int) -> tuple[int, int]:
        """The communicator between two stages, and the global rank of one."""
        ranks = len(self.line)
        return communicator(source, target, ranks), self.line[peer % ranks]

    def _count(self, group: int, peer: int, kind: str) -> int:
        """gloo tells messages by their tags."""
        count = self._counts.get((group, peer, kind), 0)
        self._counts[group, peer, kind] = (count + 1) % 2**30
        return count


def communicators(ranks: int) -> int:
    """How many a pipeline of ``ranks`` processes has."""
    return 2 * (2 + ranks % 2)


def communicator(source: int, target: int, ranks: int) -> int:
    """The number of the one between two neighbouring stages. Processes stand in a ring (a process with several stages
    sends from the last back to the first), whose sides alternate between two, with a third where their number is odd;
    and each direction has its own."""
    side = min(source, target) % ranks
    closes = ranks % 2 == 1 and side == ranks - 1
    return 2 * (2 if closes else side % 2) + (source > target)


def collected(
    state: Mapping[str, Tensor], whole: Callable[[str, Tensor], Tensor], world: World
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name, one at a time: on the main process those of all stages, what several have once; on the
    others some. All processes have to go through it together. ``whole`` gathers a tensor over those of a stage."""
    if world.sizes.pp == 1:
        for name, tensor in state.items():
            yield name, whole(name, tensor)
        return
    stage, lanes, group = world.place["pp"], lanes_of(world), world.group("pp")
    in_line = world.rank % (world.size // world.sizes.pp) == 0  # with the main process, as its stage
    seen: set[str] = set()
    for source in range(world.sizes.pp):
        names = [[name for name in state if name not in seen]]
        origin = dist.get_global_rank(group, source)
        dist.broadcast_object_list(names, src=origin, group=group, device=torch.device("cpu"))
        seen.update(names[0])
        for name in names[0]:
            if stage == source:
                tensor = whole(name, state[name])
                yield name, tensor
                if in_line and source:
                    lanes.send([tensor], source, 0)
                    lanes.finish()
            elif world.is_main:
                yield name, lanes.receive(source, 0)[0]


def lanes_of(world: World) -> Lanes:
    """The lanes of a mesh, made once; all processes have to call it together."""
    assert world.mesh is not None
    if world.mesh not in _lanes:
        _lanes[world.mesh] = Lanes(world)
    return _lanes[world.mesh]
