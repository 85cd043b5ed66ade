"""The contract of a family: everything particular to one kind of model stands behind these methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kinema.config.schema import Config, ModelConfig, PartConfig
from kinema.data.batch import Batch, Encoding, Sample
from kinema.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Parts = dict[str, Any]
"""Loaded parts by name: ``network``, ``autoencoder``, ``text_encoder``, ``tokenizer``, ``image_encoder``..."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What a sample is like when nobody says otherwise: its size in pixels, its length, and how it is drawn."""

    height: int = 480
    width: int = 832
    frames: int = 81
    fps: float = 16.0
    steps: int = 50
    guidance: float = 5.0


@dataclass(frozen=True)
class Variant:
    """One published model of a family. Its full configuration ships in ``families/configs/<family>/<name>/``."""

    name: str
    modality: Literal["image", "video"]
    parameters: int
    """Parameters of the network."""
    parts: tuple[str, ...]
    """Names of the parts it has, as its diffusers directory names them."""
    hub: str
    """Where the community keeps it, for messages and ``kinema init``."""
    sampling: SamplingDefaults = SamplingDefaults()
    """What its authors sample with."""


@dataclass(frozen=True)
class NoisePath:
    """How data and noise are mixed: on the flow path x_t = (1 - t) x_0 + t eps, and what the network predicts there.

    ``native``: "velocity" (eps - x_0), "negative_velocity" (x_0 - eps), "x0" or "eps".
    """

    native: Literal["velocity", "negative_velocity", "x0", "eps"] = "velocity"
    t_min: float = 0.0
    t_max: float = 1.0


@dataclass
class Prepared:
    """What one forward pass needs of a batch.

    ``latents``: x_0 [B, C, T, H, W], normalised. ``conditioning``: what ``predict`` hands to the network besides x_t
    and t. ``given``: 1 where latents are told to the network and not learnt (first frames), [B, 1, T, H, W], or None:
    there x_t is kept at x_0, time is 0 per token, and the loss is masked.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    given: Tensor | None = None


class Family(ABC):
    """One kind of model. An instance is bound to a model configuration; making one loads no weights.

    The trainer, the cache and the sampler know this class alone.
    """

    name: ClassVar[str]
    variants: ClassVar[Mapping[str, Variant]]
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of the pipeline classes (``_class_name`` of ``model_index.json``) whose directories hold its models."""
    path: ClassVar[NoisePath] = NoisePath()
    grid: int
    """Height and width of a bucket are multiples of this (autoencoder compression times patch)."""
    frame_stride: int
    """Clip lengths are ``frame_stride * k + 1``."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        """Seed of ``model.random_weights``."""

    @property
    @abstractmethod
    def variant(self) -> Variant:
        """The variant of this configuration, read from ``config.variant`` or from the files at ``config.path``."""

    @property
    def from_image(self) -> bool:
        """Whether the variant makes videos from a picture, its first frame."""
        return False

    @property
    def text_length(self) -> int | None:
        """Tokens of text that the network sees; None is the pipeline's own default."""
        return self.config.text_length

    @abstractmethod
    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        """Load one part (eval mode, no gradients) from wherever the configuration says; UserError if it cannot be."""

    def part_dtype(self, part: str, compute: torch.dtype) -> torch.dtype:
        """The type in which a part that does not train is loaded, for encoding, previews and samples alike.

        The configuration's; else ``compute`` for networks and text encoders, and fp32 for the others: they are
        small, and what they lose in a shorter type is seen. So latents do not depend on the type of the training.
        """
        configured = getattr(self.config, part, PartConfig()).dtype
        if configured is not None:
            return torch_dtype(configured)
        return compute if part.startswith(("network", "text_encoder")) else torch_dtype("fp32")

    @abstractmethod
    def fingerprint(self, parts: Sequence[str]) -> str:
        """Identity of the weights and settings of these parts, for cache keys; does not load them."""

    @abstractmethod
    def encodings(self) -> tuple[Encoding, ...]:
        """What has to be encoded (or read from the cache) for training."""

    @abstractmethod
    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Run the encoders: named CPU tensors per sample. ``X`` with ``X_std`` beside it is a posterior."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """Stack a batch (already on the device, posteriors already drawn into ``latents``)."""

    def tokens(self, latents: Tensor) -> int:
        """Length of the sequence that the network makes of one sample of these latents [B, C, T, H, W]."""
        return math.prod(size // patch for size, patch in zip(latents.shape[2:], self.patch, strict=True))

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The network's native prediction. ``t`` in [0, 1], [B] or per latent position [B, 1, T, H, W]."""

    @abstractmethod
    def trainables(self, parts: Parts) -> dict[str, nn.Module]:
        """The networks that training may change, by part name."""

    @abstractmethod
    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        """The network's repeated blocks, lists named, in the order in which they run."""

    @abstractmethod
    def adapter_targets(self) -> tuple[str, ...]:
        """Regular expressions (full match) of the module names that an adapter changes by default."""

    @abstractmethod
    def default_shift(self) -> float:
        """The time shift of training when the configuration names none."""

    @abstractmethod
    def validate(self, config: Config) -> None:
        """Raise UserError for what only this family can know to be wrong, before anything is loaded."""

    @abstractmethod
    def pipeline(self, parts: Parts) -> Any:
        """The diffusers pipeline over these parts."""

    @abstractmethod
    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Network weights, or adapter weights (``*.lora_A.weight``...), from diffusers names to the original
        layout's, without the ``diffusion_model.`` prefix."""

    @abstractmethod
    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``to_original``."""

    @classmethod
    @abstractmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        """Write a diffusers directory with random weights and every structural feature of the variant, for tests."""
