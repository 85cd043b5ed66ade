"""A pass on the meta device in segments: recorded at the blocks of a shortened network, and put together again for the
whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kinema.memory.dry_arithmetic import DryArithmetic
from kinema.memory.dry_run import DryRun
from kinema.parallel.paper import Exchanged
from kinema.parallel.plan_model import OUTSIDE, Pass, Segment


@dataclass(frozen=True)
class Run:
    """One block of a shortened network, and the numbers of the blocks of the whole one that it stands for."""

    path: str
    numbers: range


class Recorder:
    """Cuts a forward and a backward pass into segments, at the calls of blocks and where gradients reach them."""

    def __init__(self, run: DryRun, arithmetic: DryArithmetic, given: Exchanged) -> None:
        self.run, self.arithmetic, self.given = run, arithmetic, given
        self.forward: list[Segment] = []
        self.backward: list[Segment] = []
        self._into = self.forward
        self._block = OUTSIDE
        self._start = (0, 0, 0, 0)
        self._given = (0, 0, 0)
        self._made = 0
        self._outputs: set[int] = set()

    def start(self) -> None:
        """Begin; what is alive already counts as kept from the start."""
        self._open(OUTSIDE)
        self._start = (0, *self._start[1:])

    def turn(self) -> None:
        """The forward pass is over."""
        self.cut(OUTSIDE)
        self._into = self.backward

    def cut(self, block: int) -> None:
        """End the segment, begin another."""
        run, (live, flops, casts, attention) = self.run, self._start
        sent = [now - then for now, then in zip(self.given.counts, self._given, strict=True)]
        self._into.append(
            Segment(
                self._block,
                kept=run.live - live,
                peak=run.peak - live,
                own_peak=run.peak_with_aside - live,
                gradients=run.set_aside,
                casts=self.arithmetic.casts - casts,
                flops=run.flops - flops,
                attention=self.arithmetic.attention - attention if self._into is self.forward else 0,
                made=self._made,
                reduced=sent[0],
                gathered=sent[1],
                exchanged=sent[2],
            )
        )
        self._made = 0
        self._open(block)

    def _open(self, block: int) -> None:
        self._block = block
        self._start = (self.run.live, self.run.flops, self.arithmetic.casts, self.arithmetic.attention)
        self._given = self.given.counts
        self.run.mark()

    @contextmanager
    def watching(self, network: nn.Module, paths: list[str]) -> Iterator[None]:
        """Inside, calls of these blocks of the network are segments, and gradients of weights are set aside."""
        handles: list[Any] = []
        for number, path in enumerate(paths):
            block = network.get_submodule(path)
            handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
            # What sequence parallel puts together after the last block is none of the block's own.
            handles.append(block.register_forward_hook(self._after(number), prepend=True))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        handles += [p.register_post_accumulate_grad_hook(self._gradient) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.grad = None

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.run.release(parameter.grad)

    def _before(self, number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.grad_fn is not None and id(value.grad_fn) not in self._outputs:
                    self._outputs.add(id(value.grad_fn))
                    value.register_hook(lambda _: self._reached(OUTSIDE))
            self.cut(number)

        return hook

    def _after(self, number: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    self._outputs.add(id(value.grad_fn))
                    value.register_hook(lambda _: self._reached(number))
            self._made = sum(value.nbytes for value in tree_leaves(output) if isinstance(value, Tensor))
            self.cut(OUTSIDE)

        return hook

    def _reached(self, block: int) -> None:
        if self._block != block:
            self.cut(block)


def expanded(short: Pass, runs: list[Run]) -> Pass:
    """The pass of the whole network, from that of the shortened one."""
    return Pass(_expanded(short.forward, runs, 1), _expanded(short.backward, runs, -1))


def _expanded(segments: tuple[Segment, ...], runs: list[Run], step: int) -> tuple[Segment, ...]:
    """Where a block stands for several, its segment as often, and with it what lies between it and one like it."""
    found: list[Segment] = []
    for place, segment in enumerate(segments):
        if segment.block == OUTSIDE:
            found.append(segment)
            continue
        run = runs[segment.block]
        between = _between(segments, place, _like(segment.block, runs), step) if len(run.numbers) > 1 else []
        for count, number in enumerate(run.numbers[::step]):
            if count:
                found += between
            found.append(replace(segment, block=number))
    return tuple(found)


def _like(block: int, runs: list[Run]) -> int:
    """The block after it in its list, or, at the end of that, the one before. Not the one before where there is a
    choice: between a network's first two blocks goes, once, what only the first one takes, such as the whole sequence
    that is shared out there."""
    lists = [run.path.rpartition(".")[0] for run in runs[block : block + 2]]
    return block + 1 if len(lists) == 2 and lists[0] == lists[1] else block - 1


def _between(segments: tuple[Segment, ...], place: int, other: int, step: int) -> list[Segment]:
    """What lies between the block at this place and another one beside it, in the order of the pass."""
    after = (other > segments[place].block) == (step == 1)
    found: list[Segment] = []
    for segment in segments[place + 1 :] if after else segments[:place][::-1]:
        if segment.block == other:
            return found if after else found[::-1]
        if segment.block != OUTSIDE:
            break
        found.append(segment)
    return []
