"""The contract of a family: everything particular to one kind of model stands behind these methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kinema.config.model import PartConfig
from kinema.config.schema import Config, ModelConfig
from kinema.config.section import QUANTIZED
from kinema.data.batch import Batch, Encoding, Sample
from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.families.layout import Layout
from kinema.families.noise_path import NoisePath, ResolutionShift
from kinema.families.steering import Cut, Steering, check_usual, usual_cuts, usual_overlap

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
    image_guidance: float | None = None
    """How far guidance goes towards the control pictures; None where the pipeline has no such scale."""


Condition = Literal["text", "first_frame", "last_frame", "controls", "references"]
"""What a variant is told besides x_t and t: text, frames of the video itself, control pictures to edit from."""


@dataclass(frozen=True)
class Variant:
    """One published model of a family. Its configuration ships in ``families/configs/<family>/<name>/``."""

    name: str
    modality: Literal["image", "video"]
    parameters: int
    """Parameters of the network (of one, where there are two experts)."""
    parts: tuple[str, ...]
    """Names of the parts it has: keys of the family's table of parts."""
    hub: str
    """Where the community keeps it, for messages, ``kinema download`` and ``kinema init``."""
    sampling: SamplingDefaults = SamplingDefaults()
    """What its authors sample with."""
    pipeline: str = ""
    """Its pipeline class in diffusers."""
    conditions: tuple[Condition, ...] = ("text",)
    grid: int = 16
    """Height and width of a bucket are multiples of this (autoencoder compression times patch)."""
    lengths: ClipLengths = CAUSAL
    """How many frames its clips may have."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    shift: float | Literal["resolution"] = 1.0
    """The time shift of its training; "resolution" follows the family's `ResolutionShift`."""
    revision: str | None = None
    """Commit of ``hub`` that ``kinema download`` fetches; None is the newest."""
    gated: bool = False
    """Whether the hub asks for consent to its terms."""
    elsewhere: tuple[tuple[str, str], ...] = ()
    """Parts that its repository lacks, and repositories that have them."""
    sampling_needs: str = ""
    """A package that its pipeline asks for and kinema does not install."""
    longest_side: int | None = None
    """The longest side in pixels that the network has positions for; None if it has no limit that matters."""
    least_pictures: int = 1
    """How many control pictures an edit variant needs; with 0 it makes pictures from text alone too."""
    most_pictures: int = 1
    """How many it takes at most, of control pictures or of frames that may be given and need not ("references")."""

    @property
    def pictures(self) -> tuple[int, int]:
        """The least and the largest number of pictures that a sample is made from."""
        if "references" in self.conditions:
            return 0, self.most_pictures
        frames = sum(condition in ("first_frame", "last_frame") for condition in self.conditions)
        return (self.least_pictures, self.most_pictures) if "controls" in self.conditions else (frames, frames)


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

    The trainer, the cache and the sampler know this class alone. `kinema.families.standard.StandardFamily` does what
    is the same for every family whose models are laid out as a diffusers pipeline.
    """

    name: ClassVar[str]
    variants: ClassVar[Mapping[str, Variant]]
    resolution_shift: ClassVar[ResolutionShift] = ResolutionShift()
    default_time: ClassVar[Literal["uniform", "logit_normal", "native"]] = "logit_normal"
    """The time law of training when the configuration names none; "native" is `native_time`."""
    default_weighting: ClassVar[Literal["none", "min_snr", "debiased", "edm"]] = "none"
    """The loss weight when the configuration names none."""
    options: ClassVar[tuple[str, ...]] = ()
    """Keys of ``[model]`` that not every family reads (`kinema.families.checks.OPTIONS`), and this one does."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        """Seed of ``model.random_weights``."""

    @property
    @abstractmethod
    def variant(self) -> Variant:
        """The variant of this configuration, read from ``config.variant`` or from the files at ``config.path``."""

    @property
    def path(self) -> NoisePath:
        """What the network predicts, and its range of times."""
        return NoisePath()

    @property
    def grid(self) -> int:
        """Height and width of a bucket are multiples of this."""
        return self.variant.grid

    @property
    def lengths(self) -> ClipLengths:
        """How many frames a clip may have."""
        return self.variant.lengths

    @property
    def from_image(self) -> bool:
        """Whether the variant makes videos from a picture, its first frame."""
        return "first_frame" in self.variant.conditions

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The parts that read captions."""
        return tuple(part for part in self.variant.parts if part.startswith("text_encoder"))

    @property
    def text_length(self) -> int | None:
        """Tokens of text that the network sees; None is the pipeline's own default."""
        return self.config.text_length

    # -- parts -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        """Load one part (eval mode, no gradients) from wherever the configuration says; UserError if it cannot be."""

    @abstractmethod
    def empty(self, part: str) -> nn.Module:
        """A part's model on the meta device, for its names and shapes: no weights are looked for. UserError where its
        configuration neither ships with kinema nor lies at the model's path."""

    def known_config(self, part: str) -> Mapping[str, Any]:
        """A part's configuration as far as it is known without fetching anything; empty where it is not."""
        return {}

    def is_here(self, part: str) -> bool:
        """Whether the weights of a part lie on this machine, where the configuration says; nothing is fetched."""
        return False

    def part_dtype(self, part: str, compute: torch.dtype) -> torch.dtype:
        """The type in which a part that does not train is loaded, for encoding, previews and samples alike.

        The configuration's; else ``compute`` for networks and text encoders, and fp32 for the others: they are
        small, and what they lose in a shorter type is seen. So latents do not depend on the type of the training.
        """
        configured = getattr(self.config, part, PartConfig()).dtype
        if configured is not None and configured not in QUANTIZED:  # those say how it is stored alone
            return torch_dtype(configured)
        return compute if part.startswith(("network", "text_encoder")) else torch_dtype("fp32")

    @abstractmethod
    def fingerprint(self, parts: Sequence[str]) -> str:
        """Identity of the weights and settings of these parts, for cache keys; does not load them."""

    # -- data ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encodings(self) -> tuple[Encoding, ...]:
        """What has to be encoded (or read from the cache) for training."""

    @abstractmethod
    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Run the encoders: named CPU tensors per sample. ``X`` with ``X_std`` beside it is a posterior."""

    @abstractmethod
    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        """Stack a batch (already on the device, posteriors already drawn into ``latents``).

        ``networks``: what trains, by part name, for families whose text encoders train and so run in every step.
        """

    # -- the network -----------------------------------------------------------------------------------------------

    def tokens(self, latents: Tensor) -> int:
        """Length of the sequence that the network makes of one sample of these latents [B, C, T, H, W]."""
        return math.prod(size // patch for size, patch in zip(latents.shape[2:], self.variant.patch, strict=True))

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The network's native prediction [B, C, T, H, W]. ``t`` in [0, 1], [B] or per latent position
        [B, 1, T, H, W]."""

    def trainable_parts(self) -> tuple[str, ...]:
        """Parts that may train: its networks, and text encoders where the family trains them."""
        return tuple(part for part in self.variant.parts if part.startswith("network"))

    def trained_parts(self) -> tuple[str, ...]:
        """The parts that this configuration trains: those of ``model.train``, by default the networks."""
        if self.config.train is not None:
            return tuple(dict.fromkeys(self.config.train))
        return tuple(part for part in self.trainable_parts() if part.startswith("network"))

    def time_range(self, part: str) -> tuple[float, float]:
        """The times at which this network works: a part of the range, where experts share it."""
        return self.path.t_min, self.path.t_max

    def native_time(self, u: Tensor) -> Tensor:
        """Quantile function of the family's own law of t (float64, monotone), for the time law "native"."""
        return self.path.t_min + (self.path.t_max - self.path.t_min) * u

    @abstractmethod
    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        """The network's repeated blocks, lists named, in the order in which they run."""

    @abstractmethod
    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Regular expressions (full match) of the module names that an adapter changes by default."""

    def default_shift(self) -> float | Literal["resolution"]:
        """The time shift of training when the configuration names none."""
        return self.variant.shift

    @abstractmethod
    def validate(self, config: Config) -> None:
        """Raise UserError for what only this family can know to be wrong, before anything is loaded."""

    # -- other tools -----------------------------------------------------------------------------------------------

    @abstractmethod
    def pipeline(self, parts: Parts) -> Any:
        """The diffusers pipeline over these parts."""

    batched_sampling: ClassVar[bool] = True
    """Whether one call of the pipeline draws several samples with prompts of their own."""
    encoded_text: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    """What the pipeline's ``encode_prompt`` returns, by the names that its call takes it under; "" for what the call
    does not take. Where these are not all embeddings and masks of text that the call takes, it is given the words, and
    the text encoders stay on the device while it samples."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """What the pipeline calls classifier-free guidance, or the guidance that its network is told."""

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for what is called differently from pipeline to pipeline: guidance, the
        pictures that a sample starts from or edits (PIL at its size, or uint8 [T, H, W, 3] where ``reference_cuts``
        asks for several frames), the length of the text."""
        arguments: dict[str, Any] = {self.guidance_argument: guidance}
        if pictures:
            arguments["image"] = pictures[0] if len(pictures) == 1 else list(pictures)
        if "last_frame" in self.variant.conditions:
            arguments["image"], arguments["last_image"] = pictures
        if text_length is not None:
            arguments["max_sequence_length"] = text_length
        return arguments

    @property
    def has_image_guidance(self) -> bool:
        """Whether the pipeline has a scale of its own for the pictures that a sample is made from."""
        return self.variant.sampling.image_guidance is not None

    low_guidance: ClassVar[float | None] = None
    """The scale of the pipeline in the low steps of an oscillation; None where it reads its scale once, before the
    first step."""

    def check_steering(self, asked: Steering, frames: int, guidance: float, references: Sequence[int]) -> None:
        """UserError for what a sample of ``frames`` cannot be told, before anything is loaded. ``references``: how many
        frames each of them has, 1 of a picture."""
        check_usual(self, asked, guidance)

    def oscillates(self, asked: Steering, guidance: float, references: int) -> bool:
        """Whether a scale of such a sample oscillates, so that `Steering.full_steps` says something."""
        return bool(asked.text_osci)

    def reference_cuts(self, condition: str | None, references: int) -> tuple[Cut, ...]:
        """What is read of the references of a sample, for ``sampling_arguments`` in this order."""
        return usual_cuts(references)

    def stretch_overlap(self, frames: int, overlap: int | None) -> int:
        """Frames that a further stretch of ``frames`` is told of the video before it; UserError where it cannot be."""
        return usual_overlap(self.variant, overlap)

    def steering_arguments(self, asked: Steering) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return {}

    def layout(self, part: str = "network") -> Layout:
        """The original layout of a part's weights; UserError where the family knows none."""
        raise UserError(
            f"{self.name} has no original layout of {part}: only the layouts diffusers and peft can hold it."
        )

    @abstractmethod
    def folder(self, part: str) -> str:
        """A part's name in a diffusers directory and pipeline: ``transformer``, ``unet``, ``text_encoder``..."""

    def expert(self, part: str) -> str:
        """What tells the files of one expert from those of the other; empty where there is one network."""
        return "" if "network_2" not in self.variant.parts else part.replace("network", "expert")

    def to_original(self, state: Mapping[str, Tensor], part: str = "network") -> dict[str, Tensor]:
        """A part's whole weights from diffusers names to the original layout's."""
        return self.layout(part).to_original(state)

    def from_original(self, state: Mapping[str, Tensor], part: str = "network") -> dict[str, Tensor]:
        """The inverse of ``to_original``."""
        return self.layout(part).from_original(state)

    def kohya_prefix(self, part: str) -> str:
        """What Kohya's tools put before the names of this part's layers."""
        return "lora_unet" if part.startswith("network") else part.replace("text_encoder", "lora_te")

    @classmethod
    @abstractmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        """Write a diffusers directory with random weights and every structural feature of the variant, for tests."""
