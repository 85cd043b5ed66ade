"""Random numbers for whole columns of records: a pure function of a key and each record's number.

A hash, not a generator: any part of a column can be drawn on its own, in any order, with the same result.
"""

from __future__ import annotations

import numpy as np

from kinema.randomness import derive_seed


def uniforms(rows: np.ndarray, *key: int | str) -> np.ndarray:
    """float64 [N] in [0, 1), one for each of ``rows`` (integers [N]); other keys give independent numbers."""
    words = rows.astype(np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)  # wraps around, as all arithmetic here
    words += np.uint64(derive_seed(*key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixing steps of SplitMix64
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return (words >> np.uint64(11)) * 2.0**-53
