"""The nearest valid word, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid word nearest to ``word``, or ``"."`` if none is near."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else "."
