"""Requests to a running training from outside its steps: signals, files touched in its run directory, the clock."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SAVE, QUIT = 1, 2
REPEAT_SECONDS = 5.0
"""torchrun forwards a signal that a scheduler has sent to its processes too: so soon after the first, it is the same
one again."""


@dataclass
class Requests:
    """SIGTERM and SIGINT ask for a checkpoint and the end of the run; so does a file ``save_quit`` in the run
    directory; a file ``save`` asks for a checkpoint alone, and so does the clock when ``minutes`` have passed since
    ``saved`` was called. A signal more than ``REPEAT_SECONDS`` after the first ends the process at once."""

    directory: Path
    minutes: float | None = None
    _pending: int = 0
    _signalled_at: float | None = None
    _saved_at: float = field(default_factory=time.monotonic)
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._pending |= SAVE | QUIT
        elif now - self._signalled_at > REPEAT_SECONDS:
            signal.signal(number, self._previous.get(number, signal.SIG_DFL))
            signal.raise_signal(number)

    def saved(self) -> None:
        """A checkpoint was made: the minutes count from now."""
        self._saved_at = time.monotonic()

    def take(self, main: bool) -> int:
        """What was asked since the last call, as a sum of SAVE and QUIT. The main rank looks at the files
        and at its clock."""
        wanted, self._pending = self._pending, 0
        if main:
            for name, meaning in (("save", SAVE), ("save_quit", SAVE | QUIT)):
                path = self.directory / name
                if path.exists():
                    path.unlink(missing_ok=True)
                    wanted |= meaning
            if self.minutes is not None and time.monotonic() - self._saved_at > 60 * self.minutes:
                wanted |= SAVE
        return wanted
