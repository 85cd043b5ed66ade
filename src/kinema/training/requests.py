"""Requests from outside a running training: signals, and files touched in its run directory."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SAVE, QUIT = 1, 2


@dataclass
class Requests:
    """SIGTERM and SIGINT ask for a checkpoint and the end of the run; so does a file ``save_quit`` in the run
    directory; a file ``save`` asks for a checkpoint alone. A second signal ends the process at once."""

    directory: Path
    _pending: int = 0
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
        self._pending |= SAVE | QUIT
        signal.signal(number, self._previous.get(number, signal.SIG_DFL))

    def take(self, main: bool) -> int:
        """What was asked since the last call, as a sum of SAVE and QUIT. The main rank looks at the files."""
        wanted, self._pending = self._pending, 0
        if main:
            for name, meaning in (("save", SAVE), ("save_quit", SAVE | QUIT)):
                path = self.directory / name
                if path.exists():
                    path.unlink(missing_ok=True)
                    wanted |= meaning
        return wanted
