"""What a person sees while a run trains: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    import torch

LINE_SECONDS = 15.0


class TrainingDisplay:
    """Loss, speed, time left and memory of the main rank's process."""

    def __init__(self, total: int, start: int, device: torch.device, main: bool) -> None:
        self.console = Console(stderr=True, quiet=not main)
        self._device, self._total = device, total
        self._smoothed: float | None = None
        self._seconds: float | None = None
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if main and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total, completed=start, state="")

    def __enter__(self) -> TrainingDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, seconds: float) -> None:
        """Show the state after a step; the loss shown is smoothed over about 20 steps."""
        self._smoothed = loss if self._smoothed is None else 0.95 * self._smoothed + 0.05 * loss
        self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        state = f"loss {self._smoothed:.4f}  {self._seconds:.2f} s/step  {memory_gib(self._device):.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
        elif time.monotonic() - self._last_line > LINE_SECONDS or step == self._total:
            self._last_line = time.monotonic()
            left = (self._total - step) * self._seconds
            self.say(f"step {step}/{self._total}  {state}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
