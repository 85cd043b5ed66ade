"""Pipelines on paper: which blocks each stage has, and what waits in it while another micro-batch goes through."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from kinema.parallel.pipeline_stages import partition
from kinema.parallel.plan_model import OUTSIDE, Model, Pass
from kinema.parallel.schedule import Schedule, orders

Stage = frozenset[int]
"""Numbers of blocks."""
LONG = 4
"""Micro-batches a stage after which a pipeline is in its stride: more change nothing but its length."""


@dataclass(frozen=True)
class Moment:
    """A pass that a process runs, and what waits in its stages for their backward passes."""

    backward: bool
    stage: int
    """Which of its stages runs."""
    waiting: tuple[int, ...]
    """Micro-batches that wait in each of them, without the one that runs."""


def in_short(micro_batches: int, pp: int) -> int:
    """As few micro-batches as tell the same of a pipeline: as many may be left over of whole rounds."""
    return min(micro_batches, LONG * pp + micro_batches % pp)


@cache
def stages_of(model: Model, pp: int) -> list[Stage]:
    """The blocks of each stage; stage s is with process s mod ``pp``. ConfigError for a partition that cannot be."""
    if pp == 1:
        return [frozenset(range(model.blocks))]
    units = model.units or tuple(str(number) for number in range(model.blocks))
    unit_of = model.unit_of or range(model.blocks)
    sizes = [0] * len(units)
    for weight in model.weights:
        if weight.block != OUTSIDE and not weight.adapts:
            sizes[unit_of[weight.block]] += weight.elements
    count = pp * model.stages_per_rank
    starts = partition(units, sizes, count, model.partition, model.split if len(model.split) == count else ())
    stages = [range(low, high) for low, high in itertools.pairwise(starts)]
    return [frozenset(block for block, unit in enumerate(unit_of) if unit in stage) for stage in stages]


@cache
def moments_of(schedule: Schedule, pp: int, per_rank: int, micro_batches: int) -> list[frozenset[Moment]]:
    """What can be the case while each process of a pipeline runs a pass. What a backward pass leaves over for the
    gradients of weights (``zero_bubble``) waits on."""
    if pp == 1:
        return [frozenset((Moment(False, 0, (0,)), Moment(True, 0, (0,))))]
    found = []
    simulated = micro_batches if schedule == "gpipe" else in_short(micro_batches, pp)
    for actions in orders(schedule, pp, per_rank, simulated).of_rank:
        waiting = [0] * per_rank
        moments = set()
        for action in actions:
            stage = action.stage // pp
            backward = action.kind in ("backward", "inputs")
            waiting[stage] -= backward
            if action.kind != "weights":
                moments.add(Moment(backward, stage, tuple(waiting)))
            waiting[stage] += {"forward": 1, "inputs": 1, "backward": 0, "weights": -1}[action.kind]
        found.append(frozenset(moments))
    return found


@cache
def through(one: Pass, stage: Stage, is_last: bool) -> Pass:
    """What a stage runs of a pass: its blocks, and what lies outside of blocks up to its end."""
    mine = [place for place, segment in enumerate(one.forward) if segment.block in stage]
    forward = one.forward if is_last else one.forward[: mine[-1] + 1]
    first = next((place for place, segment in enumerate(one.backward) if segment.block in stage), len(one.backward))
    backward = one.backward if is_last else one.backward[first:]
    return Pass(
        tuple(segment for segment in forward if segment.block == OUTSIDE or segment.block in stage),
        tuple(segment for segment in backward if segment.block == OUTSIDE or segment.block in stage),
    )


@cache
def passes_of(model: Model, one: Pass, pp: int, rank: int) -> tuple[Pass, ...]:
    """What a process of a pipeline runs of a pass, stage by stage."""
    stages = stages_of(model, pp)[rank::pp]
    last = len(stages) - 1 if rank == pp - 1 else None
    return tuple(through(one, stage, turn == last) for turn, stage in enumerate(stages))
