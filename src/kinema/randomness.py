"""Every draw comes from a generator keyed by (seed, step, index in the global batch, purpose), never by rank.

So two runs with one seed agree, a resumed run agrees with one that never stopped, and four ranks agree with one.
Draws are made on the CPU and moved, so that the device does not matter either.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and words; distinct keys give independent streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one key, for instance ``generator(seed, step, index, "noise")``."""
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(*key))
