"""Encodings that are made when they are needed: the encoders stay on the device, nothing is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .batch import Encoding
from .encode import Encoder, Ranks
from .reading import Decoded, encode_one

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OnlineEncoder:
    """The encoders of some encodings, loaded at their first use; every sample is encoded by itself, so that it is the
    same in any batch and on any number of ranks. Safe to use from several threads."""

    def __init__(self, encoder: Encoder, ranks: Ranks, encodings: Sequence[Encoding], dtype: torch.dtype) -> None:
        """``dtype``: what the run computes in, from which each encoder's own follows."""
        self.encodings = tuple(encodings)
        self._encoder, self._device, self._dtype = encoder, ranks.device, dtype
        self._parts: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, encoding: Encoding) -> bool:
        return encoding in self.encodings

    def encode(self, encoding: Encoding, decoded: Decoded, caption: str) -> dict[str, Tensor]:
        """The tensors of one encoding of one sample, on the CPU."""
        with self._lock:
            for name in encoding.parts:
                if name not in self._parts:
                    dtype = self._encoder.part_dtype(name, self._dtype)
                    self._parts[name] = self._encoder.load(name, self._device, dtype)
            own = {name: self._parts[name] for name in encoding.parts}
            return {name: t.cpu() for name, t in encode_one(self._encoder, encoding, own, decoded, caption).items()}
