"""A network as the stages of a pipeline: which of its units each stage runs, and what stands in for the others.

Every stage runs the network's own forward, from its beginning. A unit (mostly a block) of an earlier stage is passed
through: it returns some of its arguments as they are, or, where it is the last one before the stage, what the stage
before has sent. At the first unit of the next stage the forward ends. So what a network computes beside its blocks
(embeddings of time and text, rotary angles, masks, offsets by the length of a list) is computed by each stage for
itself, and no stage needs to know how.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.schema import ParallelConfig
from kinema.errors import ConfigError
from kinema.families.pipeline_plans import Unit
from kinema.parallel.ulysses import LAYOUT

_STAGES = "_pipeline_stages"
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
Key = tuple[int, int]
"""A value that crosses stages: (index of the unit that made it, which of its outputs it is)."""


class EndOfStage(BaseException):
    """The forward has come to a unit of the next stage. No error: nothing may take it for one."""


@dataclass
class Visit:
    """One pass of a stage: what came in, and what is to go out."""

    stage: int
    receive: Callable[[list[Key]], dict[Key, Tensor]]
    received: dict[Key, Tensor] | None = None
    made: dict[Key, Tensor] = field(default_factory=dict)


class PassThrough(nn.Module):
    """In the place of an absent unit; no parameters. Networks look at plain attributes of their blocks, and at how many
    blocks are in one: it has those too."""

    def __init__(self, stages: NetworkStages, index: int, block: nn.Module) -> None:
        super().__init__()
        self._index = index
        self._signature = inspect.signature(type(block).forward)
        object.__setattr__(self, "_stages", stages)  # it has the network, which is no part of this
        for hooks in _HOOKS:  # of sequence parallel: what passes is split and put together as in the block
            getattr(self, hooks).update(getattr(block, hooks))
        for name, value in vars(block).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in block.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(self, name, nn.ModuleList(nn.Identity() for _ in child))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stages: NetworkStages = self._stages
        visit = stages.visit
        assert visit is not None, "a network in stages runs as one: call the network itself"
        if self._index >= stages.starts[visit.stage + 1]:
            raise EndOfStage
        if visit.received is None:
            visit.received = visit.receive(stages.crossing(visit.stage))
        kwargs.pop(LAYOUT, None)
        arguments = self._signature.bind(self, *args, **kwargs).arguments
        unit = stages.units[self._index]
        stand_ins = [arguments[name] for name in unit.outputs]
        return unit.returned([visit.received.get((self._index, i), one) for i, one in enumerate(stand_ins)])


class NetworkStages:
    """A network of which this process runs some stages: ``stages``, of those that begin with the units ``starts``
    (one more: the number of units). The blocks of the others are let go at once."""

    def __init__(self, network: nn.Module, units: Sequence[Unit], starts: Sequence[int], stages: Sequence[int]) -> None:
        self.network, self.units, self.starts, self.stages = network, tuple(units), tuple(starts), tuple(stages)
        self.description = described(network, units, starts)
        self.visit: Visit | None = None
        blocks = [network.get_submodule(unit.name) for unit in units]
        self._instead = [PassThrough(self, index, block) for index, block in enumerate(blocks)]
        self._here = {i: blocks[i] for stage in stages for i in range(starts[stage], starts[stage + 1])}
        for index, block in self._here.items():
            record = self._recorder(index)
            compiled = block._compiled_call_impl is not None  # which takes in the hooks too
            # Before what sequence parallel puts together: processes send their own tokens.
            block.register_forward_hook(torch.compiler.disable(record) if compiled else record, prepend=True)
        self._place({i: one for i, one in enumerate(self._instead) if i not in self._here})

    @property
    def last(self) -> int:
        """The last stage."""
        return len(self.starts) - 2

    def crossing(self, stage: int) -> list[Key]:
        """What goes from the stage before into this one."""
        start = self.starts[stage]
        return [
            (index, i)
            for index, unit in enumerate(self.units[:start])
            for i, last in enumerate(unit.last_use)
            if last >= start
        ]

    def run(self, visit: Visit, forward: Callable[[], Any]) -> Any:
        """The network's forward as its pass through a stage: what it returns, or what is for the next stage."""
        others = [i for i in self._here if not self.starts[visit.stage] <= i < self.starts[visit.stage + 1]]
        self._place({i: self._instead[i] for i in others})
        self.visit = visit
        try:
            output = forward()
            assert visit.stage == self.last, f"the network ended before stage {visit.stage} did"
        except EndOfStage:
            passed_on = {**(visit.received or {}), **visit.made}
            output = tuple(passed_on[key] for key in self.crossing(visit.stage + 1))
        finally:
            self.visit = None
            self._place({i: self._here[i] for i in others})
        return output

    def unit_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that no other process of the pipeline has."""
        for block in self._here.values():
            yield from block.parameters()

    def _recorder(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(block: nn.Module, args: Any, output: Any) -> None:
            if self.visit is None:
                return
            end = self.starts[self.visit.stage + 1]
            for i, last in enumerate(self.units[index].last_use):
                if last >= end > index:
                    self.visit.made[index, i] = self.units[index].flat(output)[i]

        return record

    def _place(self, modules: Mapping[int, nn.Module]) -> None:
        for index, module in modules.items():
            parent, _, name = self.units[index].name.rpartition(".")
            self.network.get_submodule(parent)._modules[name] = module


def cut(network: nn.Module, units: Sequence[Unit], starts: Sequence[int], rank: int, ranks: int) -> None:
    """Leave a network the stages of process ``rank`` of ``ranks``: every ``ranks``-th. Call it before
    ``parallel.data.shard``."""
    stages = NetworkStages(network, units, starts, range(rank, len(starts) - 1, ranks))
    object.__setattr__(network, _STAGES, stages)


def stages_of(network: nn.Module) -> NetworkStages | None:
    """The stages of a network that is cut."""
    return vars(network).get(_STAGES)


def starts_of(network: nn.Module, units: Sequence[Unit], config: ParallelConfig) -> list[int]:
    """`partition` of a network as its configuration says."""
    weights = [sum(p.numel() for p in network.get_submodule(unit.name).parameters()) for unit in units]
    stages = config.pp * config.stages_per_rank
    return partition([unit.name for unit in units], weights, stages, config.partition, config.split)


# -- which units each stage gets -------------------------------------------------------------------------------------


def partition(
    names: Sequence[str], weights: Sequence[int], stages: int, how: str, split: Sequence[int] = ()
) -> list[int]:
    """The first unit of each stage, and the number of units behind them.

    ``how``: "parameters" (``weights``, how many each unit has), "uniform", or "regex:..." (as many units whose name the
    expression finds). The heaviest stage is made as light as can be. ``split`` counts by hand instead. ConfigError,
    with the counts, for what cannot be.
    """
    if split:
        return _by_hand(split, len(names), stages)
    if stages > len(names):
        raise ConfigError(
            f"parallel.pp: {stages} pipeline stages need as many blocks, and the network has {len(names)}. Take fewer "
            "stages, and parallel.dp_shard for the other devices."
        )
    if how.startswith("regex:"):
        pattern = how.removeprefix("regex:")
        weights = [int(re.search(pattern, name) is not None) for name in names]
        if sum(weights) < stages:
            raise ConfigError(
                f'parallel.partition: "{pattern}" finds {sum(weights)} of the {len(names)} blocks, and there are '
                f"{stages} stages. Blocks are called {names[0]} to {names[-1]}."
            )
    elif how == "uniform":
        weights = [1] * len(names)
    return [*_lightest(weights, stages), len(names)]


def _by_hand(split: Sequence[int], count: int, stages: int) -> list[int]:
    if len(split) != stages or sum(split) != count or min(split) < 1:
        raise ConfigError(
            f"parallel.split: {list(split)} gives {len(split)} stages {sum(split)} blocks; there are {stages} stages "
            f"(parallel.pp times parallel.stages_per_rank), and the network has {count} blocks, of which each stage "
            "needs one."
        )
    starts = [0]
    for size in split:
        starts.append(starts[-1] + size)
    return starts


def _lightest(weights: Sequence[int], stages: int) -> list[int]:
    """Where each stage begins, such that the heaviest is lightest (and, of such, the sum of squares smallest)."""
    count = len(weights)
    before = [0]
    for weight in weights:
        before.append(before[-1] + weight)
    best: dict[tuple[int, int], tuple[tuple[int, int], list[int]]] = {(0, 0): ((0, 0), [])}
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            options = []
            for start in range(stage - 1, end):
                if (stage - 1, start) in best:
                    (heaviest, squares), starts = best[stage - 1, start]
                    weight = before[end] - before[start]
                    options.append(((max(heaviest, weight), squares + weight**2), [*starts, start]))
            best[stage, end] = min(options)
    return best[stages, count][1]


def described(network: nn.Module, units: Sequence[Unit], starts: Sequence[int]) -> str:
    """The stages of a network that is whole, in words: which units, and how many parameters."""
    stages = []
    for start, end in pairwise(starts):
        parameters = sum(p.numel() for unit in units[start:end] for p in network.get_submodule(unit.name).parameters())
        names = dict.fromkeys((units[start].name, units[end - 1].name))
        stages.append(f"{' to '.join(names)} ({parameters / 1e6:.2f}M)")
    return ", ".join(stages)
