"""Memory of the host that a GPU's copies are fast from and to, for what is kept for the whole run."""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kinema.errors import UserError
from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


LARGER = 1.25
"""How much larger than what is asked for memory may be that is given."""


class Pool:
    """Memory that is given out, comes back, and is given out again: to make it takes longer than to copy to it.

    ``make`` gives a tensor of so many bytes; ``settle`` is called before one is given up, which copies may still be
    under way from. Sizes that change from step to step make it grow to the largest of each.
    """

    def __init__(self, make: Callable[[int], Tensor], settle: Callable[[], None] = lambda: None) -> None:
        self._make, self._settle = make, settle
        self._idle: list[Tensor] = []
        """By size."""
        self._back: deque[Tensor] = deque()
        """Come back since; from a finaliser, which may run at any moment."""

    def take(self, size: int) -> Tensor:
        """So many bytes, which come back when this very tensor is let go of."""
        while self._back:
            insort(self._idle, self._back.popleft(), key=len)
        place = bisect_left(self._idle, size, key=len)
        if place < len(self._idle) and len(self._idle[place]) <= LARGER * size:
            whole = self._idle.pop(place)
        else:
            if place:  # the nearest that is too small: the new one takes its place
                self._settle()
                del self._idle[place - 1]
            whole = self._make(size)
        given = whole[:size]
        weakref.finalize(given, self._back.append, whole).atexit = False
        return given


def pinned(shape: tuple[int, ...], dtype: torch.dtype, key: str) -> Tensor:
    """A tensor in pinned memory of just its size. (torch's own is given out anew at once, but in powers of two: half as
    much again for weights and optimisers' state.) UserError names ``key``, the setting that asks for it, where the host
    will not."""
    import torch

    memory = torch.empty(shape, dtype=dtype)
    if memory.nbytes == 0:
        return memory
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failed:
        raise UserError(
            f"{key}: the host would not pin {readable_bytes(memory.nbytes)} of its memory (CUDA's error {failed}). "
            f"Raise the limit of locked memory (ulimit -l, or --ulimit memlock=-1 of a container), or do without {key}."
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory
