"""How much of the memory that is left a piece of work takes: on a GPU, or in the process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kinema.machine import memory_left

if TYPE_CHECKING:
    import torch

USABLE = {"cuda": 0.92, "cpu": 0.8}
"""Share of the memory left that may be taken: allocators scatter, and a CPU's memory is everybody's."""
SAMPLING_SECONDS = 0.002
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""What torch's RuntimeError says where it is no class of its own."""


class TrialMemory:
    """The memory of one device, for trials: what was left when this was made, less a margin, is the budget.

    ``budget``: bytes; default: measured. ``processes``: how many on this machine share the CPU's memory.
    """

    def __init__(self, device: torch.device, budget: int | None = None, processes: int = 1) -> None:
        self.device = device
        self.release()
        left = USABLE[device.type] * self._left() / (processes if device.type == "cpu" else 1)
        self.budget = max(1, int(left) if budget is None else budget)

    def share_of(self, work: Callable[[], None]) -> float:
        """Peak of what ``work`` takes, as a share of the budget; infinity where an allocation failed.

        A GPU counts everything that this process holds on it, a CPU what is added while ``work`` runs.
        """
        self.release()
        with self._peak() as peak:
            fits = allocates(work)
        return peak[0] / self.budget if fits else float("inf")

    def held(self) -> int:
        """What already counts before any work: on a GPU all that this process has there."""
        if self.device.type == "cpu":
            return 0
        import torch

        return torch.cuda.memory_allocated(self.device)

    def _left(self) -> int:
        if self.device.type == "cpu":
            return memory_left()
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        lent = torch.cuda.get_per_process_memory_fraction(self.device) * total  # all, or what `memory.budget` lends
        return min(free + torch.cuda.memory_reserved(self.device), int(lent))

    def release(self) -> None:
        """Give back what is held and not used, so that it does not count for what comes."""
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        else:
            with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
                ctypes.CDLL(None).malloc_trim(0)

    def forget_peak(self) -> None:
        """What the display shows as the peak is of what comes."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def _peak(self) -> Iterator[list[int]]:
        """A list with the peak in bytes, there on leaving."""
        if self.device.type == "cpu":
            with _peak_of_process() as peak:
                yield peak
            return
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        peak = [0]
        yield peak
        torch.cuda.synchronize(self.device)
        peak[0] = torch.cuda.max_memory_reserved(self.device)


def allocates(work: Callable[[], None]) -> bool:
    """Whether the work's allocations succeed. The error is gone on return, and what its frames held with it."""
    import torch

    try:
        work()
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return False
    return True


@contextlib.contextmanager
def _peak_of_process() -> Iterator[list[int]]:
    """By a thread that looks every two milliseconds: what torch computes, it computes without Python's lock."""
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = [0], threading.Event()

    def watch() -> None:
        while True:
            finished = done.wait(SAMPLING_SECONDS)
            peak[0] = max(peak[0], process.memory_info().rss - before)
            if finished:
                return

    thread = threading.Thread(target=watch, name="trial memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def processes_here() -> int:
    """Processes of this run on this machine, as torchrun tells them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
