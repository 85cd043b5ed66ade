"""A small honest family for the data layer: real torch modules with a posterior, and a count of what they did."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kinema.data.batch import Encoding, Sample
from kinema.data.lengths import ClipLengths

CHANNELS = 4
LOADING = threading.Lock()


class SmallEncoder:
    """Latents: a strided 3-D convolution with a posterior. Text: embedded bytes through a GRU. Joint: of both."""

    grid = 8
    lengths = ClipLengths(4)
    text_encoders = ("text_encoder",)

    def __init__(self, seed: int = 0, joint: bool = False) -> None:
        self.seed, self.joint = seed, joint
        self.calls: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.alive: dict[str, Any] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self.fail_at: int | None = None

    def encodings(self) -> tuple[Encoding, ...]:
        both = (Encoding("joint", "both", ("autoencoder", "text_encoder")),) if self.joint else ()
        return (
            Encoding("text", "caption", ("text_encoder",), "bytes"),
            Encoding("latents", "media", ("autoencoder",)),
            *both,
        )

    def load(self, part: str, device: Any, dtype: torch.dtype | None) -> nn.Module:
        import weakref

        with LOADING, torch.random.fork_rng():  # ranks are threads here, and the generator is the process's
            torch.manual_seed(self.seed)
            if part == "autoencoder":
                module: nn.Module = nn.Conv3d(3, 2 * CHANNELS, (1, 8, 8), stride=(4, 8, 8))
            else:
                module = nn.ModuleDict({"embed": nn.Embedding(256, 6), "mix": nn.GRU(6, 6, batch_first=True)})
        self.loaded[part] += 1
        self.dtypes[part] = dtype
        self.alive[part] = weakref.ref(module)
        return module.to(device, dtype).eval().requires_grad_(False)

    def part_dtype(self, part: str, compute: torch.dtype) -> torch.dtype:
        return torch.float32 if part == "autoencoder" else compute

    def fingerprint(self, parts: Sequence[str]) -> str:
        return hashlib.blake2b(f"{self.seed} {list(parts)}".encode(), digest_size=8).hexdigest()

    def encode(self, encoding: Encoding, parts: dict[str, Any], samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        assert set(parts) == set(encoding.parts)
        self.calls[encoding.name] += len(samples)
        if self.fail_at is not None and sum(self.calls.values()) > self.fail_at:
            raise RuntimeError("the device is on fire")
        return [getattr(self, f"_{encoding.name}")(parts, sample) for sample in samples]

    def _text(self, parts: dict[str, Any], sample: Sample) -> dict[str, Tensor]:
        assert sample.pixels is None
        text = parts["text_encoder"]
        tokens = torch.tensor([[1, *sample.caption.encode()]])
        return {"text": text["mix"](text["embed"](tokens))[0][0]}

    def _latents(self, parts: dict[str, Any], sample: Sample) -> dict[str, Tensor]:
        assert sample.pixels is not None and sample.pixels.dtype == torch.uint8
        autoencoder = parts["autoencoder"]
        moments = autoencoder((sample.pixels.float()[None] / 127.5 - 1).to(autoencoder.weight.dtype))[0]
        mean, log_std = moments.chunk(2)
        return {"latents": mean, "latents_std": log_std.exp()}

    def _joint(self, parts: dict[str, Any], sample: Sample) -> dict[str, Tensor]:
        text = self._text(parts, Sample(sample.caption))["text"]
        return {"joint": text.sum() + self._latents(parts, sample)["latents"].mean().reshape(1)}


@dataclass
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class ThreadRanks:
    """Ranks as threads of one process, gathering through a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size

    def rank(self, number: int) -> _ThreadRank:
        return _ThreadRank(self, number)


class _ThreadRank(Alone):
    def __init__(self, ranks: ThreadRanks, number: int) -> None:
        super().__init__(number, ranks.size)
        self.ranks = ranks

    def gather_objects(self, value: Any) -> list[Any]:
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        values = list(self.ranks.values)
        self.ranks.barrier.wait()
        return values
