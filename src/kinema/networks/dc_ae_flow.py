"""A clip computed a few frames at a time, with the result of the whole.

A flow is given a clip in chunks of frames, and answers each with the frames that are done, as many later as it looks
ahead; finished, it answers with the rest, a few frames at a time too. It keeps what the next chunk needs of the last:
memory does not grow with the clip, and no frame is computed twice. A flow serves one clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Flow(Protocol):
    def push(self, x: Tensor) -> Tensor | None:
        """The next frames [B, C, n, H, W]; -> the frames that are done by now, None if none."""

    def finish(self) -> Iterator[Tensor]:
        """There are no more; -> the frames that are left."""


class Each:
    """The flow of what acts on every frame alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def push(self, x: Tensor) -> Tensor | None:
        return self.function(x)

    def finish(self) -> Iterator[Tensor]:
        return iter(())


class Chain:
    """One flow after another."""

    def __init__(self, *flows: Flow) -> None:
        self.flows = flows

    def push(self, x: Tensor) -> Tensor | None:
        return _through(self.flows, x)

    def finish(self) -> Iterator[Tensor]:
        # One after another: were all to finish at once, their last frames would add up.
        for i, flow in enumerate(self.flows, start=1):
            for rest in flow.finish():
                answer = _through(self.flows[i:], rest)
                if answer is not None:
                    yield answer


class Windows:
    """The clip with ``halo`` frames of zeros at both ends, in windows that overlap by 2 * halo frames."""

    def __init__(self, halo: int) -> None:
        self.halo = halo
        self.held: Tensor | None = None

    def push(self, x: Tensor) -> Tensor | None:
        if self.halo == 0:
            return x
        window = torch.cat([_blank(x, self.halo) if self.held is None else self.held, x], dim=2)
        self.held = window[:, :, -2 * self.halo :].clone()  # a view would keep the whole window alive
        return window if window.shape[2] > 2 * self.halo else None

    def finish(self) -> Iterator[Tensor]:
        if self.held is not None:
            yield torch.cat([self.held, _blank(self.held, self.halo)], dim=2)


class Sum:
    """``main``, which may answer late, plus ``shortcut``, frame by frame, of the same frames."""

    def __init__(self, main: Flow, shortcut: Callable[[Tensor], Tensor]) -> None:
        self.main, self.shortcut = main, shortcut
        self.waiting: list[Tensor] = []

    def push(self, x: Tensor) -> Tensor | None:
        self.waiting.append(x)
        answer = self.main.push(x)
        return None if answer is None else self._add(answer)

    def finish(self) -> Iterator[Tensor]:
        return map(self._add, self.main.finish())

    def _add(self, answer: Tensor) -> Tensor:
        frames = torch.cat(self.waiting, dim=2)
        self.waiting = [frames[:, :, answer.shape[2] :].clone()]
        return answer + self.shortcut(frames[:, :, : answer.shape[2]])


def run_in_chunks(ops: Iterable[nn.Module], x: Tensor, frames: int) -> Tensor:
    """What ``ops`` one after another make of x [B, C, T, H, W], computed ``frames`` frames at a time."""
    for streams, group in groupby(ops, lambda op: getattr(op, "streams", True)):
        if streams:
            x = torch.cat(list(results(chain_of(list(group)), x, frames)), dim=2)
        else:
            for op in group:
                x = op.in_chunks(x, frames)  # type: ignore[operator]
    return x


def results(flow: Flow, x: Tensor, frames: int) -> Iterator[Tensor]:
    """What the flow answers to x, given ``frames`` frames at a time."""
    for chunk in x.split(frames, dim=2):
        answer = flow.push(chunk)
        if answer is not None:
            yield answer
    yield from flow.finish()


def chain_of(ops: Sequence[nn.Module]) -> Flow:
    """The flow of modules one after another; one without ``flow`` acts on every frame alone."""
    return Chain(*(op.flow() if hasattr(op, "flow") else Each(op) for op in ops))  # type: ignore[operator]


def inner(window: Tensor, halo: int) -> Tensor:
    """Without ``halo`` frames at both ends."""
    return window[:, :, halo : window.shape[2] - halo]


def conv_inside(conv: nn.Conv3d, window: Tensor) -> Tensor:
    """The convolution where its kernel fits in the window in time; height and width are padded as ever."""
    padding = (0, *(int(side) for side in conv.padding[1:]))
    return F.conv3d(window, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def _through(flows: Sequence[Flow], x: Tensor | None) -> Tensor | None:
    for flow in flows:
        if x is None:
            return None
        x = flow.push(x)
    return x


def _blank(like: Tensor, frames: int) -> Tensor:
    shape = list(like.shape)
    shape[2] = frames
    return like.new_zeros(shape)
