"""How much of the memory that is left a piece of work takes: on a GPU, or in the process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

USABLE = {"cuda": 0.92, "cpu": 0.8}
"""Share of the memory left that may be taken: allocators scatter, and a CPU's memory is everybody's."""
SAMPLING_SECONDS = 0.002
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
"""What torch's RuntimeError says where it is no class of its own."""
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}
"""Versions 2 and 1 of Linux's control groups: where they lie, and the names that `left_in` takes."""


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

        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

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


def memory_left() -> int:
    """Bytes that this process may still take: of the machine's, or less where a control group limits it."""
    import psutil

    own = [left for folder, files in _own_cgroups() if (left := left_in(folder, files)) is not None]
    return max(0, min(psutil.virtual_memory().available, *own))


def left_in(folder: Path, files: tuple[str, str, str]) -> int | None:
    """What a control group leaves, by its files of the limit, of the use, and the line of ``memory.stat`` with what of
    the use the system takes back by itself; None where it sets no limit."""
    limit_name, used_name, spare_name = files
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no limit reads as "max", and the topmost folder has no such files
        return None
    spare = next((int(line.split()[1]) for line in lines if line.startswith(f"{spare_name} ")), 0)
    return limit - used + spare


def _own_cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of this process' memory group and those above it, each with the names of its files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in CGROUPS:
            root, files = CGROUPS[controllers]
            own = root / name.lstrip("/")
            yield from ((folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root))


def processes_here() -> int:
    """Processes of this run on this machine, as torchrun tells them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
