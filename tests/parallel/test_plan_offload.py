"""What `[memory]` and the kinds of activation checkpointing change in a forecast, on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kinema.memory.checkpointing import chosen_blocks
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_memory import forecast
from kinema.parallel.plan_model import OUTSIDE, Model, Offloading, Pass, Segment, Weight
from kinema.parallel.plan_offload import offloaded

BLOCKS = 8


def model(trains: bool) -> Model:
    """A matrix of 8 x 1000 bytes in each block and outside; what trains has a gradient and AdamW's state. Frozen blocks
    have a small adapter each."""
    base = Weight(OUTSIDE, elements=2000, rows=8, bytes=8000)
    full = replace(base, trains=True, gradient=8000, state=16000)
    adapter = Weight(OUTSIDE, elements=25, rows=1, bytes=100, trains=True, gradient=100, state=200, adapts=True)
    blocks = [replace(full if trains else base, block=number) for number in range(BLOCKS)]
    adapters = [] if trains else [replace(adapter, block=number) for number in range(BLOCKS)]
    return Model((full if trains else base, *blocks, *adapters), buffers=0, blocks=BLOCKS)


def step(gradients: float = 0.0) -> Pass:
    """Every block keeps 1000 bytes, and takes 500 more while it computes."""
    forward = [Segment(number, kept=1000, peak=1500, flops=1e12) for number in range(BLOCKS)]
    backward = [
        Segment(number, kept=-1000, peak=500, own_peak=500 + gradients, gradients=gradients, flops=2e12)
        for number in reversed(range(BLOCKS))
    ]
    return Pass(tuple(forward), tuple(backward))


def test_activations() -> None:
    """The last block's stay, those of two blocks are there while one computes."""
    plain = forecast(model(False), step(), Sizes(), 1, on_gpu=False)
    hosted = offloaded(model(False), step(), Offloading(activations=True))
    moved = forecast(hosted.model, hosted.one, Sizes(), 1, on_gpu=False)
    assert plain.activations == BLOCKS * 1000 + 500
    assert moved.activations == 2 * 1000 + 500 and hosted.bytes == (BLOCKS - 1) * 1000
    assert hosted.sent == 2 * hosted.bytes and moved.weights == plain.weights
    assert sum(s.kept for s in (*hosted.one.forward, *hosted.one.backward)) == 0  # nothing is left after a step


@pytest.mark.parametrize("count", [3, 5, 8])
def test_frozen_blocks(count: int) -> None:
    """Two places for those that travel; adapters stay. To the device twice in a step, nothing back."""
    hosted = offloaded(model(False), step(), Offloading(blocks=count))
    memory = forecast(hosted.model, hosted.one, Sizes(), 1, on_gpu=False)
    assert memory.weights == 8000 + (BLOCKS - count + 2) * 8000 + BLOCKS * 100
    assert (hosted.bytes, hosted.sent, hosted.updated) == (count * 8000, 2 * count * 8000, 0)
    assert memory.optimizer == BLOCKS * 200


def test_blocks_that_train() -> None:
    """Their state is updated on the host, where their gradients go."""
    plain = forecast(model(True), step(8000), Sizes(), 1, on_gpu=False)
    hosted = offloaded(model(True), step(8000), Offloading(blocks=BLOCKS))
    memory = forecast(hosted.model, hosted.one, Sizes(), 1, on_gpu=False)
    assert (plain.weights, plain.gradients, plain.optimizer) == (72000, 72000, 144000)
    assert (memory.weights, memory.optimizer) == (8000 + 2 * 8000, 16000)
    # Of the last block and of the one before it, whose gradients are on their way.
    assert memory.activations + memory.gradients == BLOCKS * 1000 - 1000 + 500 + 2 * 8000
    assert hosted.bytes == BLOCKS * (8000 + 8000 + 16000) and hosted.sent == 3 * BLOCKS * 8000
    summed = offloaded(model(True), step(8000), Offloading(blocks=BLOCKS), micro_batches=4)
    assert summed.bytes == hosted.bytes + BLOCKS * 8000  # those of a micro-batch beside their sums
    assert hosted.updated == BLOCKS * (2 * (8000 + 16000) + 8000)


def test_the_more_travel_the_less_memory() -> None:
    totals = []
    for count in (0, *range(3, BLOCKS + 1)):
        hosted = offloaded(model(True), step(8000), Offloading(blocks=count))
        totals.append(forecast(hosted.model, hosted.one, Sizes(), 1, on_gpu=False).total)
    assert totals == sorted(totals, reverse=True) and totals[-1] < 0.4 * totals[0]


def test_some_blocks_run_again() -> None:
    """Their segments are those of a pass in which all do."""
    plain = step()
    again = Pass(
        tuple(replace(segment, kept=100) for segment in plain.forward),
        tuple(replace(segment, kept=-100, peak=1400, flops=3e12) for segment in plain.backward),
    )
    mixed = plain.mixed(again, chosen_blocks({"blocks": BLOCKS}, {"blocks": 0.25}))
    assert [segment.kept for segment in mixed.forward] == [100, 100] + [1000] * 6
    assert mixed.flops == plain.flops + 2e12
    taken = [forecast(model(False), one, Sizes(), 1, on_gpu=False).activations for one in (plain, mixed, again)]
    assert taken == [8500, 6700, 2200]
