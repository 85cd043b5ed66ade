"""The nearest valid word, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid word nearest to ``word``, case aside; None if none is as near as ``cutoff`` (1 is equal)."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid word nearest to ``word``, or ``"."`` if none is near."""
    near = nearest(word, valid)
    return f"; did you mean '{near}'?" if near else "."
