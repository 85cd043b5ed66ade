"""How often the items of each source are drawn: repeats as given, or as weights and regularisation ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from kinema.errors import ConfigError

from .epochs import MOST_DRAWS

if TYPE_CHECKING:
    from kinema.config.data import SourceConfig


def repeats_of(sources: Sequence[SourceConfig], items: Sequence[int]) -> tuple[Fraction, ...]:
    """How often each source's items are drawn in an epoch, exactly; ``items``: how many each source has.

    - ``repeats``: as given, or 1.
    - ``weight``: an epoch draws as many items as all weighted sources have, shared by weight.
    - ``regularization``: these together draw as many as all others together, all of their items equally often.

    A source without items gets 0 and no share. `ConfigError` where an epoch would have more than 2^31 draws.
    """
    assert len(sources) == len(items)
    present = [s for s, n in enumerate(items) if n]
    learnt = [s for s in present if not sources[s].regularization]
    kept = [s for s in present if sources[s].regularization]
    weights = {s: Fraction(str(sources[s].weight)) for s in learnt if sources[s].weight is not None}
    weighted = sum(items[s] for s in weights)
    found = {s: Fraction(str(sources[s].repeats or 1)) for s in learnt}
    found |= {s: weight / sum(weights.values()) * weighted / items[s] for s, weight in weights.items()}
    drawn = sum((found[s] * items[s] for s in learnt), Fraction(0))
    found |= {s: (drawn / sum(items[k] for k in kept)) or Fraction(1) for s in kept}
    if sum((found[s] * items[s] for s in present), Fraction(0)) > MOST_DRAWS:
        most = max(learnt or kept, key=lambda s: found[s] * items[s])
        raise ConfigError(
            f"data.sources: an epoch would have more than 2^31 draws, most of them from "
            f"'{sources[most].name or sources[most].path}' with its {items[most]:,} records. Lower its repeats."
        )
    return tuple(_bounded(found[s]) if s in found else Fraction(0) for s in range(len(items)))


def _bounded(repeats: Fraction) -> Fraction:
    """The nearest fraction that the order of batches can count with: for any set of items that it can hold less than
    one draw an epoch away."""
    return repeats.limit_denominator(MOST_DRAWS) or Fraction(1, MOST_DRAWS)
