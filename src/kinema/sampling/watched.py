"""The steps of samples that several processes draw together, as they are told to the watch over these processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.parallel.watch import Watch


class WatchedSteps:
    """What comes between stretches (a decoding, a file, another text) may take as long as it likes, and so may the
    first step of each; every other one has five times the slowest so far (`kinema.parallel.watch`)."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch
        self._is_first = True

    def done(self, step: int, steps: int) -> None:
        """Step number ``step`` (from 1, over all stretches of a sample) is done; a stretch has ``steps``."""
        if self.watch is None:
            return
        if not self._is_first:
            self.watch.step_done()
        self._is_first = is_last = step % steps == 0
        self.watch.at("between samples" if is_last else f"step {step + 1} of a sample", patient=is_last)
