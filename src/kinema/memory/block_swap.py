"""Blocks whose weights live in the host's memory and are on the device while they compute.

Of a network's blocks some travel, spread evenly, so that each has the computing of those between to hide behind. They
share two places on the device (`SLOTS`), in turns: while one computes, the next one arrives. What comes next is known:
blocks run in the order of the family's list, and backward in the opposite one.

A frozen weight only ever goes to the device: the host's copy stays valid, and nothing is written there. Weights that
train are updated on the host: they go to the device for each pass, their gradients come back as the backward pass
leaves the block, and ``grad`` is there when it ends; with several micro-batches the host adds them up. Between passes
every such parameter is in the host's memory, so optimisers, averages and checkpoints find plain tensors there.

A block always takes the same place: views of its weights that autograd has saved are of that place, and right again
when the block is back in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from kinema.config.memory import SLOTS
from kinema.memory.around import around_calls, before_backward, blocks_here
from kinema.memory.copy_engine import CopyEngine, Ticket
from kinema.networks.mapped import settle

ALIGNMENT = 256
"""Bytes to which every weight's beginning is rounded up."""


def spread(count: int, travelling: int) -> list[int]:
    """The numbers of the blocks that travel, of ``count``: evenly spread."""
    return [(2 * place + 1) * count // (2 * travelling) for place in range(travelling)]


def blocks_to_offload(fits: Callable[[int], bool], count: int) -> int | None:
    """The fewest blocks of ``count`` that have to travel for a training to fit on the device, None where not even all
    suffice; ``fits``: whether it does with so many, by a forecast that shrinks as they grow."""
    options = [0, *range(SLOTS + 1, count + 1)]
    place = bisect_left(options, True, key=fits)
    return options[place] if place < len(options) else None


def host_weights(network: nn.Module, blocks: Mapping[str, nn.ModuleList], travelling: int) -> list[Home]:
    """Lay the weights of so many blocks of a network out in the host's memory, in place; the network may wait in its
    files. Frozen ones if the network has any in its blocks, else all: what an adapter trains stays on the device."""
    listed = blocks_here(blocks)
    seen = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    frozen = any(not p.requires_grad for block in listed for p in block.parameters())
    homes = []
    for number in spread(len(listed), travelling):
        settle(listed[number])
        mine = [p for p in listed[number].parameters() if seen[id(p)] == 1 and not (frozen and p.requires_grad)]
        homes.append(Home(number, mine))
    return homes


class Home:
    """The weights of block ``number`` one behind the other in the host's memory, of which the parameters are views."""

    def __init__(self, number: int, parameters: Iterable[nn.Parameter]) -> None:
        self.number = number
        self.parameters = list(parameters)
        self.trains = any(parameter.requires_grad for parameter in self.parameters)
        self.flat = torch.empty(0, dtype=torch.uint8)
        self.here: list[Tensor] = []
        self.there: list[Tensor] = []
        """The same on the device, in the block's place."""

    @property
    def size(self) -> int:
        return sum(_rounded(parameter.nbytes) for parameter in self.parameters)

    def settle(self, engine: CopyEngine) -> None:
        """Move in: from here on the parameters are in memory that copies are fast from."""
        self.flat = engine.host((self.size,), torch.uint8, lasting=True)
        self.here = self.views(self.flat)
        for parameter, view in zip(self.parameters, self.here, strict=True):
            view.copy_(parameter.data)
            parameter.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """What lies in ``flat``, in the parameters' types and shapes."""
        found, offset = [], 0
        for parameter in self.parameters:
            piece = flat[offset : offset + parameter.nbytes]
            found.append(piece.view(parameter.dtype).view(parameter.shape))
            offset += _rounded(parameter.nbytes)
        return found

    def place(self, tensors: list[Tensor]) -> None:
        """The parameters are these tensors."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor


class BlockSwap:
    """Around the calls of a network's blocks, of which some are at ``homes``. Call it after all else that changes
    blocks, see `around_calls`; between passes nothing that trains is on the device."""

    def __init__(self, blocks: Mapping[str, nn.ModuleList], homes: list[Home], engine: CopyEngine) -> None:
        self.homes, self.engine = homes, engine
        self.numbers = [home.number for home in homes]
        self.trains = any(home.trains for home in homes)
        sizes = [max((home.size for home in homes[slot::SLOTS]), default=0) for slot in range(SLOTS)]
        self.slots = [engine.on_device((size,), torch.uint8) for size in sizes]
        self.holds: list[int | None] = [None] * SLOTS
        """Which home's weights each place has, or will have."""
        self._tickets: list[Ticket] = [None] * SLOTS
        self._going_back = _GoingBack(engine)
        self._in_backward = False
        for index, home in enumerate(homes):
            home.settle(engine)
            home.there = home.views(self.slots[index % SLOTS][: home.size])
        around_calls(blocks, self)

    def __call__(self, number: int, call: Callable[[], Any], inputs: Any) -> Any:
        """A forward pass through block ``number``."""
        if number == 0:
            self._start()
        first = bisect_left(self.numbers, number)
        self._fetch(first, first + 1)
        if first < len(self.numbers) and self.numbers[first] == number:
            self._arrive(first)
            if self.homes[first].trains and torch.is_grad_enabled():
                self._going_back.enter(self.homes[first])
        output = call()
        if torch.is_grad_enabled():
            before_backward(output, inputs, partial(self._backward, number))
        elif number == self.numbers[-1] and self.trains:
            self._let_go()
        elif number == self.numbers[-1]:
            self._fetch(*range(SLOTS))  # for the next pass
        return output

    def _backward(self, number: int) -> None:
        """The backward pass comes to block ``number``: it has left all that are behind it."""
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._end_of_backward)  # type: ignore[no-untyped-call]
        self._going_back.leave(home for home in self.homes if home.number > number)
        last = bisect_right(self.numbers, number) - 1
        self._fetch(last, last - 1)
        if last >= 0 and self.numbers[last] == number:
            self._arrive(last)
            if self.homes[last].trains:
                self._going_back.enter(self.homes[last])

    def _end_of_backward(self) -> None:
        self._in_backward = False
        self._going_back.leave(self.homes)
        if self.trains:
            self._let_go()
        self._going_back.finish()

    def _start(self) -> None:
        """A forward pass begins. Weights that train may have changed since the last."""
        self._in_backward = False
        if self.trains:
            self._let_go()
            self._going_back.forget()

    def _let_go(self) -> None:
        """Nothing on the device."""
        for slot, index in enumerate(self.holds):
            if index is not None:
                self.engine.wait_here(self._tickets[slot])  # what is still read may not be changed
                self.homes[index].place(self.homes[index].here)
                self.holds[slot] = None

    def _fetch(self, *indices: int) -> None:
        """Begin to copy these homes' weights to their places, where they are not on their way; numbers that no home has
        are passed over."""
        for index in indices:
            slot = index % SLOTS
            if not 0 <= index < len(self.homes) or self.holds[slot] == index:
                continue
            before, home = self.holds[slot], self.homes[index]
            if before is not None:
                self.homes[before].place(self.homes[before].here)
            self.holds[slot] = index
            self._tickets[slot] = self.engine.copy(home.flat, self.slots[slot][: home.size])

    def _arrive(self, index: int) -> None:
        slot = index % SLOTS
        assert self.holds[slot] == index
        self.engine.wait(self._tickets[slot])
        self.homes[index].place(self.homes[index].there)


class _GoingBack:
    """Gradients of weights that train, on their way to the host."""

    def __init__(self, engine: CopyEngine) -> None:
        self.engine = engine
        self._computing: dict[Home, list[Tensor | None]] = {}
        """Homes whose backward pass runs, and the gradients of earlier micro-batches."""
        self._sent: list[tuple[nn.Parameter, Tensor | None, Tensor | None, Ticket]] = []
        self._leaving: list[tuple[Tensor, Ticket]] = []
        """Gradients on the device that are copied from."""

    def forget(self) -> None:
        """Another forward pass begins: what earlier micro-batches have summed is the parameters' again, and what a pass
        that did not end has left is of no step."""
        for home, sums in self._computing.items():
            for parameter, earlier in zip(home.parameters, sums, strict=True):
                parameter.grad = earlier
        self._computing.clear()
        self._sent.clear()
        self._let_go()

    def enter(self, home: Home) -> None:
        """A block is on the device: so will its gradients be, and torch wants none elsewhere."""
        if home not in self._computing:
            self._computing[home] = [parameter.grad for parameter in home.parameters]
            for parameter in home.parameters:
                parameter.grad = None

    def leave(self, homes: Iterable[Home]) -> None:
        """The backward passes of these blocks are over. (Where none of them travels, one of the others is.)"""
        self._let_go()
        for home in homes:
            if home not in self._computing:
                continue
            for parameter, earlier in zip(home.parameters, self._computing.pop(home), strict=True):
                gradient, host, ticket = parameter.grad, None, None
                if gradient is not None:
                    host = self.engine.host(tuple(gradient.shape), gradient.dtype)
                    ticket = self.engine.copy(gradient, host)
                    self._leaving.append((gradient, ticket))
                parameter.grad = None
                self._sent.append((parameter, earlier, host, ticket))

    def _let_go(self) -> None:
        """Let the device go on once the gradients of the last block that travels are copied, and let go of them."""
        for _, ticket in self._leaving:
            self.engine.wait(ticket)
        self._leaving.clear()

    def finish(self) -> None:
        """All gradients are in the host's memory, those of earlier micro-batches added, once this returns."""
        self._let_go()
        for parameter, earlier, host, ticket in self._sent:
            if host is not None:
                self.engine.wait_here(ticket)
            parameter.grad = host if earlier is None else earlier if host is None else earlier.add_(host)
        self._sent.clear()


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
