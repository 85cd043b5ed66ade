"""An optimiser's state in the host's memory: it comes to the device for a few parameters at a time.

While some parameters are updated, the state of the next is on its way, and that of the last on its way back, each on a
stream of its own. What an optimiser computes does not change, only where its state is in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinema.optim.apart import Part, parts
from kinema.optim.gradients import local_part
from kinema.optim.stepping import Stepping
from kinema.pinned import pinned

PART_BYTES = 2**26
"""Parameters whose state travels together, in bytes of the parameters."""
ON_DEVICE = 3
"""Such parts whose state is on the device at once: one arrives, one is used, one leaves."""


class Copies(Protocol):
    """What copies state between the host and a device, beside the device's work."""

    def fetch(self, away: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to copy to the device; what is returned gives the copies once what uses them may be queued."""

    def send(self, here: Sequence[Tensor], away: Sequence[Tensor | None]) -> list[Tensor]:
        """Begin to copy back what the device's work so far leaves in ``here``, into ``away`` or new memory."""

    def finish(self) -> None:
        """Return when all that was sent has arrived."""


class CudaCopies:
    """Copies over a GPU's two copy engines, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.sent: deque[torch.cuda.Event] = deque()

    def fetch(self, away: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        while len(self.sent) > ON_DEVICE - 2:  # the host would run ahead, and everything be on the device at once
            self.sent.popleft().synchronize()
        with torch.cuda.stream(self.incoming):
            here = [one.to(self.device, non_blocking=True) for one in away]
        arrived = self.incoming.record_event()

        def take() -> list[Tensor]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for one in here:
                one.record_stream(current)
            return here

        return take

    def send(self, here: Sequence[Tensor], away: Sequence[Tensor | None]) -> list[Tensor]:
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        back: list[Tensor] = []
        with torch.cuda.stream(self.outgoing):
            for one, place in zip(here, away, strict=True):
                host = pinned(tuple(one.shape), one.dtype, "optimizer.state_on_cpu") if place is None else place
                back.append(host.copy_(one, non_blocking=True))
                one.record_stream(self.outgoing)
        self.sent.append(self.outgoing.record_event())
        return back

    def finish(self) -> None:
        self.outgoing.synchronize()
        self.sent.clear()


class HostState(Stepping):
    """An optimiser whose state is in the host's memory between its steps.

    The groups and the state are the optimiser's own. Single numbers of the state, such as counts of steps, stay where
    it keeps them. Parameters must be such that they can be updated one after the other
    (`kinema.optim.apart.steps_apart`).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, copies: Copies, part_bytes: int = PART_BYTES) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.copies, self.part_bytes = optimizer, copies, part_bytes
        self.state = optimizer.state
        self._away: dict[tuple[Tensor, str], Tensor] = {}
        """The place in the host's memory of each tensor of the state."""

    def update(self) -> None:
        work = [part for group in self.param_groups for part in self._parts(group)]
        arriving = [self._fetch(part) for part in work[:1]]
        for number, part in enumerate(work):
            arriving.extend(self._fetch(following) for following in work[number + 1 : number + 2])
            arriving.pop(0)()
            part.step()
            self._send(part)
        self.copies.finish()

    def _parts(self, group: dict[str, Any]) -> list[Part]:
        """Those of a group that have gradients."""
        found = []
        for part in parts(self.optimizer, group, self.part_bytes):
            if any(parameter.grad is not None for parameter in part.parameters):
                found.append(part)
        return found

    def _entries(self, part: Part) -> list[tuple[Tensor, str, Tensor]]:
        return [
            (parameter, key, value)
            for parameter in part.parameters
            if parameter.grad is not None and parameter in self.state
            for key, value in self.state[parameter].items()
            if isinstance(value, Tensor) and value.numel() > 1
        ]

    def _fetch(self, part: Part) -> Callable[[], None]:
        """Begin to bring a part's state; what is returned puts it where the optimiser finds it."""
        entries = [entry for entry in self._entries(part) if entry[:2] in self._away]
        take = self.copies.fetch([local_part(value) for _, _, value in entries])

        def put() -> None:
            for (parameter, key, value), local in zip(entries, take(), strict=True):
                self.state[parameter][key] = _around(value, local)

        return put

    def _send(self, part: Part) -> None:
        entries = self._entries(part)
        here = [local_part(value) for _, _, value in entries]
        places = [self._away.get((parameter, key)) for parameter, key, _ in entries]
        fits = [
            place if place is not None and place.shape == one.shape and place.dtype == one.dtype else None
            for place, one in zip(places, here, strict=True)
        ]
        for (parameter, key, value), local in zip(entries, self.copies.send(here, fits), strict=True):
            self._away[parameter, key] = local
            self.state[parameter][key] = _around(value, local)


def _around(value: Tensor, local: Tensor) -> Tensor:
    """``local`` as what ``value`` is: a shard, if it is one, wherever its memory lies."""
    if isinstance(value, DTensor):
        return DTensor(local, value._spec, requires_grad=False)  # type: ignore[call-arg, no-any-return]
    return local


def at_once(sizes: Iterable[tuple[float, float]], one_by_one: bool = False) -> float:
    """The most bytes of state that a device has, of parameters of so many (bytes, bytes of state). ``one_by_one``: each
    parameter takes its step by itself, and nothing comes ahead (`GradientRelease`)."""
    if one_by_one:
        return max((state for _, state in sizes), default=0.0)
    parts = [max(state, PART_BYTES * state / size) for size, state in sizes if size]
    return ON_DEVICE * max(parts, default=0.0)


def on_host(optimizers: list[torch.optim.Optimizer], device: torch.device) -> list[torch.optim.Optimizer]:
    """The optimisers with their state in the host's memory; as they are where the device's memory is the host's."""
    if device.type == "cpu":
        return optimizers
    return [HostState(optimizer, CudaCopies(device)) for optimizer in optimizers]
