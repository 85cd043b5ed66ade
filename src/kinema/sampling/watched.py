"""The steps of samples that several processes draw together, as they are told to the watch over these processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.parallel.watch import Watch


class WatchedSteps:
    """What comes between stretches (a decoding, a file, another text) may take as long as it likes, and so may the
    first step of each; every other one has five times the slowest so far (`kinema.parallel.watch`)."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch
        self._before: float | None = None

    def done(self, step: int, steps: int) -> None:
        """Step number ``step`` (from 1, over all stretches of a sample) is done; a stretch has ``steps``."""
        if self.watch is None:
            return
        now = time.monotonic()
        if self._before is not None:
            self.watch.step_took(now - self._before)
        is_last = step % steps == 0
        self._before = None if is_last else now
        self.watch.at("between samples" if is_last else f"step {step + 1} of a sample", patient=is_last)
