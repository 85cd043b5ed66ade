"""Where a run stands, and when something is due."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from kinema.config.schema import Every


@dataclass
class Progress:
    """Counters after a number of optimiser steps; part of every checkpoint.

    ``data_start`` and ``lr_start`` are the steps at which the data order and the learning-rate schedule began: 0, or
    where a resume reset them. ``epochs`` are passes over the data since its order began, as the order counts them.
    """

    step: int = 0
    examples: int = 0
    epochs: float = 0.0
    data_start: int = 0
    lr_start: int = 0

    def after_step(self, examples: int, epochs: float) -> Progress:
        """The counters one optimiser step later: ``examples`` more, and ``epochs`` in all."""
        return replace(self, step=self.step + 1, examples=self.examples + examples, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def due(every: Every, before: Progress, after: Progress) -> bool:
    """Whether one of the intervals of ``every`` ended between two adjacent states. A pure function of the counters, so
    a resumed run does the same things at the same steps."""
    return (
        _passed(every.every_steps, before.step, after.step)
        or _passed(every.every_examples, before.examples, after.examples)
        or _passed(every.every_epochs, before.epochs, after.epochs)
    )


def _passed(interval: float | None, before: float, after: float) -> bool:
    if interval is None:
        return False
    # Epochs are fractions: the small term keeps 3 * (1/3) from counting as less than 1.
    return math.floor(after / interval + 1e-9) > math.floor(before / interval + 1e-9)
