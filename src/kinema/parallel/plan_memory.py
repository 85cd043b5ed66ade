"""How much memory of one device a plan takes, from what a step without values has shown.

A step is a walk through segments: each block, and what lies between blocks, forward and then backward. At every moment
there are the weights with what belongs to them, what the backward pass still needs, what the segment itself takes, and
the gradients so far. The largest sum counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from kinema.parallel.mesh import Sizes
from kinema.parallel.pipeline_stages import partition
from kinema.parallel.schedule import Schedule, orders

Stage = frozenset[int]
"""Numbers of blocks."""
OUTSIDE = -1
"""The number of what is in no block."""
SPLIT_SHARE = 0.6
"""Tensor parallel: of what a block keeps, what lies inside its split layers (queries, keys, values, attention's output,
the inner width of the feed-forward network); the rest is whole on every device."""
MARGIN = 0.06
"""Share of the whole that an allocator loses to fragments and libraries take as workspace."""
LONG = 4
"""Micro-batches a stage after which a pipeline is in its stride: more change nothing but its length."""
BUCKET_BYTES = 25 * 2**20
"""Of `kinema.parallel.data`."""
CONTEXT = 0.7e9
"""Bytes that CUDA and NCCL take for themselves."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a network that trains, or of its adapter."""

    block: int
    """Number of its block in the order of execution, or OUTSIDE."""
    elements: int
    rows: int
    """Its first dimension, along which it is sharded."""
    bytes: int
    trains: bool = False
    gradient: int = 0
    """Bytes of its gradient: 0 where it gets none in a step."""
    state: int = 0
    """Bytes of the optimiser's state."""
    average: int = 0
    """Bytes of its moving average."""
    splits: bool = False
    """Whether tensor parallel splits it."""
    adapts: bool = False
    """Whether it belongs to an adapter."""
    tensors: int = 1
    """How many tensors this stands for, see `merged`."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a pass: a block, or what lies between two. Bytes, and floating point operations."""

    block: int = OUTSIDE
    kept: float = 0.0
    """What it leaves behind more than it found; negative in the backward pass."""
    peak: float = 0.0
    """Its largest need above what it found, without gradients of weights that are complete."""
    own_peak: float = 0.0
    """With those of its own weights."""
    gradients: float = 0.0
    """Gradients of its own weights."""
    casts: float = 0.0
    """Weights that train, cast for autocast."""
    flops: float = 0.0
    attention: float = 0.0
    """Queries, keys, values and results of its attention, in the forward pass."""
    carried: float = 0.0
    """The largest tensor that comes in: the sequence that passes from block to block."""

    def at(self, other: Segment, samples: int) -> Segment:
        """On the line through this, with one sample, and ``other``, with two."""
        values = {
            field.name: low + (getattr(other, field.name) - low) * (samples - 1)
            for field in fields(self)[1:]
            for low in [getattr(self, field.name)]
        }
        return replace(self, **values)


@dataclass(frozen=True)
class Pass:
    """One micro-batch through the network and back."""

    forward: tuple[Segment, ...]
    backward: tuple[Segment, ...]

    def at(self, other: Pass, samples: int) -> Pass:
        """For ``samples`` samples, where this is for one and ``other`` for two."""
        lines = [
            tuple(one.at(two, samples) for one, two in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.forward, other.forward), (self.backward, other.backward))
        ]
        return Pass(*lines)

    @property
    def flops(self) -> float:
        return self.sum("flops")

    def sum(self, name: str) -> float:
        """Of one quantity over all segments."""
        return sum(getattr(one, name) for one in (*self.forward, *self.backward))


@dataclass(frozen=True)
class Model:
    """What trains."""

    weights: tuple[Weight, ...]
    buffers: int
    blocks: int
    """How many there are."""
    schedule: Schedule = "1f1b"
    stages_per_rank: int = 1
    """Of an interleaved pipeline."""
    partition: str = "parameters"
    split: tuple[int, ...] = ()
    """Both as in ``[parallel]``: which blocks each stage of a pipeline has."""
    units: tuple[str, ...] = ()
    """What a pipeline can be cut between, by name; empty: the blocks."""
    unit_of: tuple[int, ...] = ()
    """Of each block, the unit that it belongs to."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device at the fullest moment."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    gathered: float
    """Whole weights and gradients of sharded blocks, and what is being sent."""
    margin: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@cache
def blocks_of(model: Model, pp: int) -> list[frozenset[int]]:
    """The blocks that each rank of a pipeline has. ConfigError for a partition that cannot be."""
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
    ranks = [set(itertools.chain.from_iterable(stages[rank::pp])) for rank in range(pp)]
    return [frozenset(block for block, unit in enumerate(unit_of) if unit in rank) for rank in ranks]


@cache
def waiting(schedule: Schedule, pp: int, per_rank: int, micro_batches: int) -> list[float]:
    """How many micro-batches each rank of a pipeline keeps at most for their backward pass, counted in its share of the
    network."""
    if schedule == "gpipe":
        return [float(micro_batches)] * pp
    found = []
    for actions in orders(schedule, pp, per_rank, min(micro_batches, LONG * pp)).of_rank:
        kept = most = 0
        for action in actions:
            kept += {"forward": 1, "inputs": 0}.get(action.kind, -1)
            most = max(most, kept)
        found.append(most / per_rank)
    return found


def local(weight: Weight, sizes: Sizes) -> float:
    """The share of a weight that one device has. FSDP2 pads the first dimension."""
    share = 1 / (sizes.tp if weight.splits else 1)
    shards = sizes.weight_shards
    return share * -(-weight.rows // shards) / weight.rows if weight.rows else share / shards


def merged(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """As few as tell the same: those of a block that are sharded alike, as one."""
    groups: dict[tuple[int, int, bool, bool], list[Weight]] = {}
    for weight in weights:
        groups.setdefault((weight.block, weight.rows, weight.splits, weight.adapts), []).append(weight)
    names = ("elements", "bytes", "gradient", "state", "average", "tensors")
    return tuple(
        replace(group[0], **{name: sum(getattr(one, name) for one in group) for name in names})
        for group in groups.values()
    )


def forecast(model: Model, one: Pass, sizes: Sizes, micro_batches: int, on_gpu: bool = True) -> Memory:
    """The memory that a plan takes on its fullest device.

    ``one``: a micro-batch of the size that one device takes, on one device alone. With ``on_gpu``, the margins of an
    allocator and of the libraries, and weights that are fetched ahead, count too.
    """
    begun = [1.0] if sizes.pp == 1 else waiting(model.schedule, sizes.pp, model.stages_per_rank, micro_batches)
    found = [
        _of_rank(model, one, sizes, micro_batches, stage, number, on_gpu)
        for stage, number in zip(blocks_of(model, sizes.pp), begun, strict=True)
    ]
    fullest = max(found, key=lambda memory: memory.total)
    if not on_gpu:
        return fullest
    return replace(fullest, margin=CONTEXT + MARGIN * fullest.total)


def _of_rank(
    model: Model, one: Pass, sizes: Sizes, micro_batches: int, stage: Stage, begun: float, on_gpu: bool
) -> Memory:
    sums = _sums(model, sizes, stage)
    kept_for_later = 0.0
    if begun > 1:
        kept_for_later = (begun - 1) * sum(max(0.0, s.kept) for s in _of(one.forward, stage)) / _divisor(sizes)
    moments = _moments(model, one, sizes, micro_batches, stage, on_gpu)
    activations, gradients, gathered = max(moments, key=sum)
    return Memory(
        weights=sums["bytes"] + model.buffers,
        gradients=gradients,
        optimizer=sums["state"],
        average=sums["average"],
        activations=activations + kept_for_later,
        gathered=gathered,
    )


@cache
def _sums(model: Model, sizes: Sizes, stage: Stage) -> dict[str, float]:
    """Bytes on one device of all weights of a stage, and of what belongs to them."""
    found = dict.fromkeys(("bytes", "gradient", "state", "average"), 0.0)
    for weight in model.weights:
        if weight.block == OUTSIDE or weight.block in stage:
            share = local(weight, sizes)
            for name in found:
                found[name] += share * getattr(weight, name)
    return found


@cache
def _whole(model: Model, tp: int) -> list[float]:
    """Bytes of each block's weights where they are not sharded; the last is OUTSIDE."""
    found = [0.0] * (model.blocks + 1)
    for weight in model.weights:
        found[weight.block] += weight.bytes / (tp if weight.splits else 1)
    return found


def _moments(
    model: Model, one: Pass, sizes: Sizes, micro_batches: int, stage: Stage, on_gpu: bool
) -> list[tuple[float, float, float]]:
    """(activations, gradients, gathered) of every segment, and of the update."""
    sharded, divisor = sizes.weight_shards > 1, _divisor(sizes)
    shards, whole = sizes.weight_shards, _whole(model, sizes.tp)
    total = _sums(model, sizes, stage)["gradient"]
    accumulating = micro_batches > 1
    # Gradients of replicas are put together in buckets before they are sent: the last one when all are there.
    reduced = min(BUCKET_BYTES, total) if sizes.dp_replicate * sizes.sp > 1 and not sharded else 0.0
    along = reduced if total > BUCKET_BYTES else 0.0
    moments = []
    level = casts = 0.0
    for segment in _of(one.forward, stage):
        casts += 0.0 if sharded else segment.casts / sizes.tp
        kept_casts = casts if _frees_casts(one) else 0.0
        gathered = _gathered(whole, segment.block, 1, on_gpu) if sharded else 0.0
        moments.append((level + segment.peak / divisor + kept_casts, total if accumulating else 0.0, gathered))
        level += segment.kept / divisor
    done = 0.0
    for segment in _of(one.backward, stage):
        own = segment.gradients / sizes.tp
        if sharded:
            # The weights before it are fetched ahead; then whole gradients, and once more in the order of sending.
            here, before = _gathered(whole, segment.block, -1, True), _gathered(whole, segment.block, -1, False)
            extra = max(here + own, before + 2 * own)
            moments.append((level + segment.peak / divisor, total if accumulating else done, extra))
        elif accumulating:
            moments.append((level + segment.peak / divisor, total, along))
        else:
            above = segment.own_peak - segment.peak
            moments.append((level + segment.peak / divisor, done + above, along))
        done = min(total, done + own / shards)
        level += segment.kept / divisor
    moments.append((0.0, total, reduced))
    return moments


def _of(segments: Sequence[Segment], stage: Stage) -> list[Segment]:
    return [segment for segment in segments if segment.block == OUTSIDE or segment.block in stage]


def _frees_casts(one: Pass) -> bool:
    """Whether cast weights are freed before the backward pass: where blocks run again, autocast alone holds them."""
    forward, backward = (sum(segment.casts for segment in part) for part in (one.forward, one.backward))
    return backward > 0.5 * forward > 0


def _gathered(whole: Sequence[float], block: int, step: int, on_gpu: bool) -> float:
    """Whole weights on the device while a block computes: those outside of blocks stay for the whole pass."""
    blocks = [block] if block != OUTSIDE else []
    if on_gpu and blocks and 0 <= block + step < len(whole) - 1:
        blocks.append(block + step)
    return whole[OUTSIDE] + sum(whole[number] for number in blocks)


def _divisor(sizes: Sizes) -> float:
    """What activations of one device are divided by."""
    return sizes.sp / (SPLIT_SHARE / sizes.tp + 1 - SPLIT_SHARE)
