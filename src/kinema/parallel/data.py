"""Data parallel training: every rank takes its slice of the global batch, gradients are summed over ranks.

The weights of the samples in the loss already sum to 1 over all ranks, hence sums and never means. Peers in ``sp`` see
parts of the same samples: each takes its share 1 / sp of the loss, so that for the sums they are as other ranks.

``dp_shard`` > 1: torch's FSDP2 (`kinema.parallel.fsdp`).

``dp_shard`` == 1: parameters are replicated, and gradients all-reduced in buckets as the last backward pass completes
them. DDP would do the same, but it prefixes every parameter's name, wants each forward pass to go through its
wrapper and be followed by one backward pass (distillation and adapters break both), and has rules for activation
checkpointing; hooks on the parameters have none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kinema.errors import UserError
from kinema.networks.mapped import settle, tensors
from kinema.optim.gradients import local_part
from kinema.parallel.fsdp import Sharding, accumulating, move, shard_fully
from kinema.parallel.mesh import World

BUCKET_BYTES = 25 * 2**20
"""Gradients are reduced in pieces of about this size (DDP's default)."""

Summed = Callable[[Sequence[nn.Parameter]], None]

_reducers: WeakKeyDictionary[nn.Module, GradientReducer] = WeakKeyDictionary()


def shard(
    network: nn.Module,
    blocks: Mapping[str, nn.ModuleList],
    world: World,
    sharding: Sharding | None = None,
    elsewhere: Collection[nn.Parameter] = (),
) -> None:
    """Lay a network over the ranks, in place; afterwards it is on ``world.device``, but for the parameters that stay
    ``elsewhere``.

    Call it after adapters and activation checkpointing, before the optimiser and the EMA are made: with
    ``dp_shard`` > 1 its parameters become DTensors, laid out as ``sharding`` says. It may still be on the CPU: blocks
    move one at a time. ``blocks`` are the family's; frozen parameters, of any dtype, are sharded with the others.
    UserError if the ranks hold different weights, or if parameters that train and are to be sharded have several
    dtypes.
    """
    if world.size > 1 and world.sizes.pp * world.sizes.tp == 1:  # others were compared while they were whole
        check_equal_weights(network, world)
    if world.is_sharded:
        replicated = shard_fully(network, blocks, world, sharding or Sharding())
    else:
        settle(network)
        replicated = list(network.parameters())
        away = set(elsewhere)
        move(network, [p for p in replicated if p not in away], world.device)
    if world.sizes.dp * world.sizes.sp == 1:
        return
    group = world.group("dp_replicate", "dp_shard", "sp")  # made by all together: by stages where nothing trains too
    trained = [p for p in replicated if p.requires_grad]
    if trained:
        _reducers[network] = GradientReducer(trained, group)


@contextmanager
def accumulate(network: nn.Module, last: bool = True, summed: Summed | None = None) -> Iterator[None]:
    """Run one micro-batch, forward and backward, inside this context; ``last`` is True for the last one of a step.

    After the last, every parameter's ``grad`` is the sum over micro-batches and ranks. One backward pass a context.
    ``summed``: is given replicated parameters within the last backward pass, as soon as their gradients are summed.
    """
    reducer = _reducers.get(network)
    with ExitStack() as stack:
        if isinstance(network, FSDPModule):
            stack.enter_context(accumulating(network, last))
        if reducer is not None and last:
            stack.enter_context(reducer.reducing(summed))
        yield


class GradientReducer:
    """Sums the gradients of replicated parameters over the ranks of a group, overlapping with the backward pass.

    Parameters are bucketed in reverse order of definition, about the order in which gradients appear. A bucket is
    sent when its last gradient is there and all buckets before it are sent, so all ranks send in the same order. Each
    bucket ends with one flag a parameter, whether this rank has a gradient: a parameter that no rank used keeps
    ``grad`` None, one that some ranks used counts as zero on the others.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.group = group
        self.buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._active = False
        self._missing: list[set[nn.Parameter]] = []
        self._sent: list[tuple[Tensor, Any] | None] = []
        self._taken = 0
        self._summed: Summed | None = None
        filled: dict[Any, tuple[int, int]] = {}  # (dtype, device) -> its open bucket and that one's bytes
        for parameter in reversed(list(parameters)):
            kind, size = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
            index, used = filled.get(kind, (-1, bucket_bytes))
            if used + size > bucket_bytes:
                index, used = len(self.buckets), 0
                self.buckets.append([])
            self.buckets[index].append(parameter)
            self._bucket_of[parameter] = index
            filled[kind] = (index, used + size)
            parameter.register_post_accumulate_grad_hook(self._gradient_ready)

    @contextmanager
    def reducing(self, summed: Summed | None = None) -> Iterator[None]:
        """Reduce during the one backward pass inside; on leaving, all gradients are summed.

        ``summed`` is given each bucket when it is and the next one is on its way; it may take the gradients away.
        """
        self._missing = [set(bucket) for bucket in self.buckets]
        self._sent, self._taken, self._summed = [], 0, summed
        self._active = True
        try:
            yield
        finally:
            self._active = False
        while len(self._sent) < len(self.buckets):
            self._send()
        self._take(len(self.buckets))
        self._sent, self._summed = [], None

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        index = self._bucket_of[parameter]
        assert index >= len(self._sent), "a second backward pass inside one accumulate() context"
        self._missing[index].discard(parameter)
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """Start the next bucket's all-reduce; its gradients become views of the flat buffer that is reduced."""
        bucket = self.buckets[len(self._sent)]
        flags = torch.tensor([float(p.grad is not None) for p in bucket], dtype=bucket[0].dtype)
        pieces = [local_part(p if p.grad is None else p.grad).reshape(-1) for p in bucket]
        pieces = [torch.zeros_like(x) if p.grad is None else x for p, x in zip(bucket, pieces, strict=True)]
        flat = torch.cat([*pieces, flags.to(bucket[0].device, non_blocking=True)])
        offset = 0
        for parameter, piece in zip(bucket, pieces, strict=True):
            if parameter.grad is not None:
                parameter.grad = _gradient(parameter, flat[offset : offset + piece.numel()])
            offset += piece.numel()
        self._sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        if self._summed is not None:
            del flat, pieces, piece  # what is taken is to be free
            self._take(len(self._sent) - 1)

    def _take(self, count: int) -> None:
        """Wait until the first buckets are summed."""
        while self._taken < count:
            bucket, sent = self.buckets[self._taken], self._sent[self._taken]
            assert sent is not None
            sent[1].wait()
            self._drop_unused(bucket, sent[0])
            self._sent[self._taken] = sent = None
            self._taken += 1
            if self._summed is not None:
                self._summed(bucket)

    def _drop_unused(self, bucket: list[nn.Parameter], flat: Tensor) -> None:
        """Give gradients to parameters that only other ranks used."""
        if all(parameter.grad is not None for parameter in bucket):
            return
        used = flat[-len(bucket) :].tolist()
        offset = 0
        for parameter, ranks in zip(bucket, used, strict=True):
            size = local_part(parameter).numel()
            if parameter.grad is None and ranks > 0:
                parameter.grad = _gradient(parameter, flat[offset : offset + size])
            offset += size


def _gradient(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """A view of a buffer as the parameter's gradient."""
    if not isinstance(parameter, DTensor):
        return flat.view_as(parameter)
    local, mesh, placements = flat.view_as(parameter.to_local()), parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def check_equal_weights(network: nn.Module, world: World) -> None:
    """UserError unless all ranks hold the same bits, by the sum of each tensor's bit patterns."""
    names, sums = [], []
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in tensors(network):
        names.append(name)
        bits = tensor.reshape(-1).view(whole[tensor.element_size()])
        # In pieces: torch copies what it sums in another type.
        sums.append(sum(piece.sum(dtype=torch.int64).item() for piece in bits.split(2**22)))
    main = world.broadcast_object((names, sums))
    if main[0] != names:
        different: str | None = "(other tensor names)"
    else:
        different = next((n for n, mine, its in zip(names, sums, main[1], strict=True) if mine != its), None)
    for rank, name in enumerate(world.gather_objects(different)):
        if name is not None:
            raise UserError(
                f"process {rank} holds other weights than process 0, first in '{name}'. Every process must start "
                "from the same files with the same run.seed: check that model paths lead to the same files on every "
                "machine."
            )
