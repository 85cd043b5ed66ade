"""Pipeline parallel: processes hold some of the blocks each, and micro-batches go through them one after the other.

Every stage runs the objective on the whole micro-batch until the network's forward comes to the end of the stage
(`kinema.parallel.pipeline_stages`); the last one runs to the loss. What a stage needs of the one before it receives in
the middle of its forward, when it comes to the place: the message says its types and shapes, so micro-batches may
differ in both. `kinema.parallel.schedule` says who does what when.

torch's own stages (torch.distributed.pipelining) were the other way: they keep buffers for every micro-batch of a step,
want all of one shape, known before, and gradients for all that is sent; and their split backward pass may count
gradients of parameters twice that several blocks use (before torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kinema.errors import UserError
from kinema.parallel.deferred import Later, deferring
from kinema.parallel.fsdp import accumulating_all, backward_comes
from kinema.parallel.lanes import lanes_of
from kinema.parallel.mesh import World
from kinema.parallel.pipeline_stages import Key, NetworkStages, Visit, stages_of
from kinema.parallel.schedule import Schedule, orders


class Result(Protocol):
    """What the forward of a micro-batch gives on the last stage."""

    total: Tensor


AnyResult = TypeVar("AnyResult", bound=Result)


class Pipeline:
    """Runs the networks of a training that are cut into stages; make it after ``parallel.data.shard``.

    ``networks``: what trains, by part name; those that are not cut run whole on every process.
    Outside of ``run``, calling a network (without gradients, on all processes of the pipeline) goes through all stages
    and gives its output on each of them: evaluation and sampling know nothing of stages.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        world: World,
        schedule: Schedule = "1f1b",
        per_rank: int = 1,
    ) -> None:
        self.networks, self.world, self.schedule, self.per_rank = networks, world, schedule, per_rank
        self.ranks, self.rank = world.sizes.pp, world.place["pp"]
        self.last = self.ranks * per_rank - 1
        self.group = world.group("pp")
        self.lanes = lanes_of(world)
        self.running: Visit | None = None
        self.passes: type[Passes[Any]] = Passes
        self._calls = 0
        self._names: list[str] | None = None
        stages = [one for one in map(stages_of, networks.values()) if one is not None]
        for one in stages:
            self._attach(one)
        self._own = {id(p) for one in stages for p in one.unit_parameters()}
        trained = (p for network in networks.values() for p in network.parameters() if p.requires_grad)
        self.shared = [p for p in trained if id(p) not in self._own]
        """Trained parameters that every process has: those beside the blocks."""

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this process counts a parameter in a sum over those of all: one of its own, or a shared one on the
        first."""
        return self.rank == 0 or id(parameter) in self._own

    def count_trained(self, parameters: Iterable[nn.Parameter]) -> int:
        """How many numbers train in all stages."""
        mine = sum(parameter.numel() for parameter in parameters if self.counts(parameter))
        return int(self.add_over_stages([torch.tensor(mine)]).item())

    def describe(self, micro_batch_size: int | None) -> str:
        """The stages, for people."""
        found = next(one for one in map(stages_of, self.networks.values()) if one is not None)
        stages = self.ranks * self.per_rank
        text = f"Pipeline of {stages} stages ({self.schedule}): {found.description}."
        if micro_batch_size is None:
            text += (
                f" Every step is one micro-batch, and {self.ranks - 1} of {self.ranks} devices wait at any time: set "
                "training.micro_batch_size to a part of a device's share of the batch."
            )
        return text

    def run(self, forwards: Sequence[Callable[[], AnyResult]], factor: float = 1.0) -> list[AnyResult]:
        """Forward and backward of all micro-batches; ``forwards`` compute the loss of one each, calling the network
        once. Gradients are those of ``factor`` times the sum of losses, in the process's own parameters complete but
        for other processes' samples, in the shared ones its part (`sum_shared`). Returns the results in their order
        on the process with the last stage, nothing elsewhere."""
        passes = self.passes(self, forwards, factor)
        with ExitStack() as stack:
            for network in self.networks.values():
                stack.enter_context(accumulating_all(network))
            for action in orders(self.schedule, self.ranks, self.per_rank, len(forwards)).of_rank[self.rank]:
                getattr(passes, action.kind)(action.stage, action.micro)
            self.lanes.finish()
        return [passes.results[i] for i in sorted(passes.results)]

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Sum the gradients of the shared parameters over the stages. One that no stage used keeps None."""
        if not self.shared:
            return
        used = torch.tensor([float(p.grad is not None) for p in self.shared], device=self.world.device)
        dist.all_reduce(used, group=self.group)
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, stages in zip(self.shared, used.tolist(), strict=True):
            if stages == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            by_kind.setdefault((local.dtype, local.device), []).append(local)
        for gradients in by_kind.values():
            flat = torch.cat([one.reshape(-1) for one in gradients]).to(self.world.device)
            dist.all_reduce(flat, group=self.group)
            for one, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                one.copy_(summed.view_as(one))

    def add_over_stages(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of what all stages have, each any number of scalars; float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for value in values:
            total += value.to(total)
        dist.all_reduce(total, group=self.group)
        return total

    def with_all_names(self, sums: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Metrics, which the last stage alone has, with zeros for them elsewhere."""
        if self._names is None:
            names = [list(sums)]
            source = dist.get_global_rank(self.group, self.ranks - 1)
            dist.broadcast_object_list(names, src=source, group=self.group, device=torch.device("cpu"))
            self._names = names[0]
        return {name: sums.get(name, torch.zeros_like(like)) for name in self._names}

    def begin(self, visit: Visit) -> None:
        """The next call of a network is this pass."""
        self.running, self._calls = visit, 0

    # -- the networks' forward ---------------------------------------------------------------------------------------

    def _attach(self, stages: NetworkStages) -> None:
        """FSDP2 works around ``forward`` and wants it to return: it does, with what goes to the next stage, and what
        ends the pass for the objective is a hook behind FSDP2's own."""
        inner = stages.network.forward

        def forward(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.running is None:
                return self._run_whole(stages, lambda: inner(*args, **kwargs))
            self._calls += 1
            if self._calls > 1:
                raise UserError(
                    "parallel.pp: this objective calls the network several times for a loss, which stages cannot. "
                    "Set parallel.pp = 1, and parallel.dp_shard instead."
                )
            return stages.run(self.running, lambda: inner(*args, **kwargs))

        def end(network: nn.Module, args: Any, output: Any) -> None:
            if self.running is not None and self.running.stage < self.last:
                raise _Stopped(output)

        stages.network.forward = MethodType(forward, stages.network)
        stages.network.register_forward_hook(end)

    def _run_whole(self, stages: NetworkStages, forward: Callable[[], Any]) -> Any:
        """One stage after the other; all have the output."""
        assert not torch.is_grad_enabled(), "a pipeline trains through Pipeline.run"
        output: Any = None
        for stage in stages.stages:
            output = stages.run(self.visit(stage), forward)
            if stage < self.last:
                self.lanes.send(output, stage, stage + 1)
        self.lanes.finish()
        return self._share(output)

    def visit(self, stage: int) -> Visit:
        """A pass through a stage, which gets what it needs from the one before when it comes to the place."""

        def receive(keys: list[Key]) -> dict[Key, Tensor]:
            values = self.lanes.receive(stage - 1, stage)
            for value in values:
                value.requires_grad_(torch.is_grad_enabled())
            return dict(zip(keys, values, strict=True))

        return Visit(stage, receive)

    def _share(self, output: Any) -> Any:
        """What the last stage returned, on all of them."""
        source = dist.get_global_rank(self.group, self.ranks - 1)
        is_last = self.rank == self.ranks - 1
        described = [tree_map(_Described.of, output) if is_last else None]
        dist.broadcast_object_list(described, src=source, group=self.group, device=torch.device("cpu"))
        leaves, structure = tree_flatten(output if is_last else described[0])
        leaves = [one.empty(self.world.device) if isinstance(one, _Described) else one for one in leaves]
        for i, one in enumerate(leaves):
            if isinstance(one, Tensor):
                leaves[i] = one.contiguous()
                dist.broadcast(leaves[i], src=source, group=self.group)
        return tree_unflatten(leaves, structure)


class _Stopped(BaseException):
    """A stage's forward has ended before the loss; ``outputs`` go to the next stage."""

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        self.outputs = outputs


@dataclass(frozen=True)
class _Described:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass
class Passes(Generic[AnyResult]):
    """The passes of one step, as the actions of a schedule; what goes from a forward to its backward."""

    pipeline: Pipeline
    forwards: Sequence[Callable[[], AnyResult]]
    factor: float
    results: dict[int, AnyResult] = field(default_factory=dict)
    kept: dict[tuple[int, int], tuple[Visit, tuple[Tensor, ...], int]] = field(default_factory=dict)
    later: dict[tuple[int, int], Later] = field(default_factory=dict)

    def forward(self, stage: int, micro: int) -> None:
        pipeline, visit = self.pipeline, self.pipeline.visit(stage)
        split = pipeline.schedule == "zero_bubble"
        later, sent = self.later.setdefault((stage, micro), []), 0
        pipeline.begin(visit)
        try:
            with deferring(later) if split else nullcontext():
                result = self.forwards[micro]()
            self.results[micro] = result
            outputs: tuple[Tensor, ...] = (result.total * self.factor,)
        except _Stopped as stopped:
            outputs = stopped.outputs
            sent = pipeline.lanes.send(outputs, stage, stage + 1)
        finally:
            pipeline.running = None
        self.kept[stage, micro] = visit, outputs, sent

    def backward(self, stage: int, micro: int) -> None:
        lanes, last = self.pipeline.lanes, self.pipeline.last
        visit, outputs, sent = self.kept.pop((stage, micro))
        gradients: Sequence[Tensor | None] = [None] * len(outputs)
        if stage < last:
            gradients = lanes.receive_like(outputs, stage + 1, stage)
            lanes.answered(sent, stage, stage + 1)
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        for network in self.pipeline.networks.values():
            backward_comes(network, last=micro == len(self.forwards) - 1)
        if pairs:
            torch.autograd.backward([one for one, _ in pairs], [gradient for _, gradient in pairs])
        if stage == last:
            self.results[micro].total = self.results[micro].total.detach()  # lets the graph go
        if stage > 0:
            received = (visit.received or {}).values()
            back = [torch.zeros_like(one) if one.grad is None else one.grad for one in received]
            lanes.send_like(back, stage, stage - 1)

    inputs = backward

    def weights(self, stage: int, micro: int) -> None:
        for compute in self.later.pop((stage, micro)):
            compute()
