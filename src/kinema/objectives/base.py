"""What an objective gets and gives. It knows no family, no optimiser and no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kinema.data.batch import Batch
from kinema.families.base import Prepared
from kinema.families.noise_path import NoisePath
from kinema.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Denoiser(Protocol):
    """A network in its role, behind its family's habits."""

    @property
    def path(self) -> NoisePath:
        """The family's path and native prediction."""

    def prepare(self, batch: Batch) -> Prepared:
        """Stack a batch."""

    def tokens(self, latents: Tensor) -> int:
        """Length of the sequence that the network makes of one sample of these latents [B, C, T, H, W]."""

    @property
    def time_range(self) -> tuple[float, float]:
        """The times at which it works."""

    def at(self, t: float) -> Denoiser:
        """The network that works at this time: itself, but for a team of experts."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The native prediction."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, keyed by the sample's place in the global batch: the same on any number of ranks.

    They go to a GPU without waiting for it: memory that is not pinned is read before the copy returns."""

    seed: int
    step: int | str

    def normal(self, batch: Batch, like: Tensor, purpose: str) -> Tensor:
        """Standard normal noise of the shape of ``like`` [B, ...], one generator a sample."""
        import torch

        rows = [
            torch.randn(like.shape[1:], generator=generator(self.seed, self.step, index, purpose))
            for index in batch.indices
        ]
        return torch.stack(rows).to(like.device, like.dtype, non_blocking=True)

    def shared(self, purpose: str) -> Tensor:
        """One uniform number in [0, 1) for the whole step, float64: the same for all samples, on all ranks."""
        import torch

        return torch.rand((), generator=generator(self.seed, self.step, purpose), dtype=torch.float64)

    def uniform(self, batch: Batch, device: torch.device, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), [B], in float64 so that none of them rounds to 1."""
        import torch

        rows = [
            torch.rand((), generator=generator(self.seed, self.step, index, purpose), dtype=torch.float64)
            for index in batch.indices
        ]
        return torch.stack(rows).to(device, non_blocking=True)


@dataclass
class Loss:
    """``total``: the share of the global loss that this batch carries (weights applied), to call backward on.
    ``per_sample``: [B], detached. ``metrics``: scalars to log."""

    total: Tensor
    per_sample: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """What is minimised."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The networks that it needs."""

    def __call__(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws) -> Loss:
        """The loss of one (micro-)batch."""

    def at_quantile(self, batch: Batch, networks: Mapping[str, Denoiser], draws: Draws, quantile: float) -> Loss:
        """The loss with every sample's time at this quantile of the time law, for evaluation."""
