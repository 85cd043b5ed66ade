"""What a plan is made for, in numbers: the weights that a network trains, and a micro-batch through it and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

from kinema.parallel.schedule import Schedule

OUTSIDE = -1
"""The number of what is in no block."""


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shards over ``dp_shard``, as ``[parallel]`` says it."""

    zero: int = 3
    offload: bool = False


DEFAULT = Sharding()


@dataclass(frozen=True)
class Offloading:
    """What waits in the host's memory during a step, as ``[memory]`` says it."""

    activations: bool = False
    blocks: int = 0


NOTHING = Offloading()


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
    splits: Literal["rows", "columns"] | None = None
    """What tensor parallel splits of it."""
    adapts: bool = False
    """Whether it belongs to an adapter."""
    cast: int | None = None
    """Bytes that it has whole where it is sharded and travels in the type of computing; None: as it is."""
    stays: bool = False
    """Whether it is small and whole on every device where others are sharded."""
    tensors: int = 1
    """How many tensors this stands for, see `merged`."""

    @property
    def whole(self) -> int:
        """Bytes once it is gathered."""
        return self.bytes if self.cast is None else self.cast


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
    made: float = 0.0
    """What a block hands on to the next."""
    reduced: float = 0.0
    gathered: float = 0.0
    exchanged: float = 0.0
    """What it gives to all-reduces and all-gathers of tensor parallel and to exchanges of sequence parallel."""

    def at(self, other: Segment, samples: int) -> Segment:
        """On the line through this, with one sample, and ``other``, with two."""
        values = {
            field.name: low + (getattr(other, field.name) - low) * (samples - 1)
            for field in fields(self)[1:]
            for low in [getattr(self, field.name)]
        }
        return replace(self, **values)


@dataclass(frozen=True, eq=False)  # what is found of it is kept by identity
class Pass:
    """One micro-batch through the network and back, as one of the devices that share it does it."""

    forward: tuple[Segment, ...]
    backward: tuple[Segment, ...]

    def at(self, other: Pass, samples: int) -> Pass:
        """For ``samples`` samples, where this is for one and ``other`` for two."""
        lines = [
            tuple(one.at(two, samples) for one, two in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.forward, other.forward), (self.backward, other.backward))
        ]
        return Pass(*lines)

    def mixed(self, other: Pass, chosen: Sequence[bool]) -> Pass:
        """With the segments of ``other``, a pass of the same network, for the blocks that are chosen."""
        lines = [
            tuple(
                two if one.block != OUTSIDE and chosen[one.block] else one
                for one, two in zip(mine, theirs, strict=True)
            )
            for mine, theirs in ((self.forward, other.forward), (self.backward, other.backward))
        ]
        return Pass(*lines)

    @cached_property
    def sums(self) -> Segment:
        """Every quantity over all segments."""
        names = [field.name for field in fields(Segment)[1:]]
        return Segment(**{name: sum(getattr(one, name) for one in (*self.forward, *self.backward)) for name in names})

    @property
    def flops(self) -> float:
        return self.sums.flops

    @cached_property
    def handed_on(self) -> float:
        """The most that a block hands on."""
        return max((segment.made for segment in self.forward), default=0.0)

    @cached_property
    def reruns(self) -> bool:
        """Whether blocks run again in the backward pass, which then computes three times what the forward pass does."""
        forward, backward = (sum(segment.flops for segment in part) for part in (self.forward, self.backward))
        return backward > 2.6 * forward


@dataclass(frozen=True, eq=False)
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
    ring: bool = False
    """Whether sequence parallel sends keys and values round while it computes."""
    largest_gradient: float | None = None
    """Bytes of the largest gradient, where each is let go within the backward pass; None: all are there at its end."""
    visiting_state: float | None = None
    """Bytes of the optimiser's state that a device has at once, where the rest waits in the host's memory; None: the
    device has all."""


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
    encoders: float = 0.0
    """Weights of the encoders that stay beside what trains."""
    host: float = 0.0
    """In the machine's own memory, for each of its devices."""
    copies: float = 0.0
    """There too: what checkpoints are written from while training goes on."""

    @property
    def total(self) -> float:
        """On the device."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.lent

    @property
    def lent(self) -> float:
        """In the machine's own memory."""
        return self.host + self.copies


def merged(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """As few as tell the same: those of a block that are sharded alike, as one."""
    groups: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        key = (weight.block, weight.rows, weight.splits, weight.adapts, weight.cast is None, weight.stays)
        groups.setdefault(key, []).append(weight)
    names = ("elements", "bytes", "gradient", "state", "average", "tensors")
    return tuple(
        replace(
            group[0],
            **{name: sum(getattr(one, name) for one in group) for name in names},
            cast=None if group[0].cast is None else sum(one.whole for one in group),
        )
        for group in groups.values()
    )
