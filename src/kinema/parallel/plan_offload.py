"""What a plan moves to the host's memory: weights of blocks that travel, and what blocks save for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from kinema.config.memory import SLOTS
from kinema.memory.block_swap import spread
from kinema.parallel.plan_model import OUTSIDE, Model, Offloading, Pass, Segment, Weight


@dataclass(frozen=True)
class Hosted:
    """What is in the host's memory for each device, in bytes, and what goes there and back."""

    model: Model
    one: Pass
    """Both as far as they are on the device."""
    bytes: float = 0.0
    sent: float = 0.0
    """By each micro-batch, in both directions."""
    updated: float = 0.0
    """Read and written in an update on the host."""
    gradients: float = 0.0
    """Of a micro-batch, among ``bytes``."""


def offloaded(model: Model, one: Pass, how: Offloading, micro_batches: int = 1) -> Hosted:
    """A model and a micro-batch through it, with what `[memory]` moves taken off the device."""
    hosted = Hosted(model, one)
    if how.blocks:
        away = _blocks_away(model, how.blocks)
        if micro_batches > 1:  # gradients of one arrive beside the sums of those before it
            away = replace(away, bytes=away.bytes + away.gradients)
        hosted = replace(away, one=_with_gradients_sent(one, model, how.blocks) if away.updated else one)
    if how.activations:
        moved = _with_activations_moved(hosted.one)
        size = sum(s.kept for s in hosted.one.forward) - sum(s.kept for s in moved.forward)
        hosted = replace(hosted, one=moved, bytes=hosted.bytes + size, sent=hosted.sent + 2 * size)
    return hosted


@cache
def _blocks_away(model: Model, count: int) -> Hosted:
    """`memory.block_swap` on paper: frozen weights of the blocks that travel, or all where nothing is frozen."""
    numbers = set(spread(model.blocks, count))
    frozen = any(not weight.trains for weight in model.weights if weight.block != OUTSIDE)
    away = [w for w in model.weights if w.block in numbers and not (frozen and w.trains)]
    gone = set(map(id, away))
    sizes = [sum(w.bytes for w in away if w.block == number) for number in sorted(numbers)]
    places = sum(max(sizes[slot::SLOTS], default=0) for slot in range(SLOTS))
    left = [weight for weight in model.weights if id(weight) not in gone]
    left.append(Weight(OUTSIDE, elements=0, rows=0, bytes=places))
    weights, gradients = sum(sizes), sum(weight.gradient for weight in away)
    return Hosted(
        replace(model, weights=tuple(left)),
        Pass((), ()),
        bytes=sum(weight.bytes + weight.gradient + weight.state + weight.average for weight in away),
        sent=2 * weights + gradients,
        updated=sum(2 * (w.bytes + w.state + w.average) + w.gradient for w in away if w.trains),
        gradients=gradients,
    )


@cache
def _with_gradients_sent(one: Pass, model: Model, count: int) -> Pass:
    """A pass in which the gradients of the blocks that travel are on the device until the next block's pass is over."""
    numbers, leaving, backward = set(spread(model.blocks, count)), 0.0, []
    for segment in one.backward:
        peak, own_peak = segment.peak + leaving, segment.own_peak + leaving
        if segment.block in numbers:
            backward.append(replace(segment, peak=max(peak, own_peak), own_peak=own_peak, gradients=0.0))
            leaving = segment.gradients
        else:
            backward.append(replace(segment, peak=peak, own_peak=own_peak))
            leaving = leaving if segment.block == OUTSIDE else 0.0
    return Pass(one.forward, tuple(backward))


@cache
def _with_activations_moved(one: Pass) -> Pass:
    """`memory.activations` on paper: what a block keeps is there until the next block is done, and comes back while the
    one behind it runs its backward pass."""
    last = max((segment.block for segment in one.forward), default=OUTSIDE)
    kept = {s.block: max(0.0, s.kept) for s in one.forward if s.block not in (OUTSIDE, last)}
    return Pass(_moved(one.forward, kept, 0), _moved(one.backward, kept, 1))


def _moved(segments: Sequence[Segment], kept: dict[int, float], ahead: int) -> tuple[Segment, ...]:
    """``ahead``: 0 in a forward pass, in which that of the block before is still on its way; 1 in a backward pass, in
    which that of the block before is on its way back."""
    found = []
    for segment in segments:
        own, other = kept.get(segment.block, 0.0), kept.get(segment.block - 1, 0.0) if segment.block != OUTSIDE else 0.0
        more = other + own * ahead
        change = own if ahead else -own
        peak, own_peak = segment.peak + more, segment.own_peak + more
        found.append(replace(segment, kept=segment.kept + change, peak=peak, own_peak=own_peak))
    return tuple(found)
