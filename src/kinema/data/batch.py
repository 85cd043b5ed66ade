"""What passes between the data system and the layers above it: samples to encode, encodings, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoding:
    """One thing that a family's encoders make of a record, and what its result depends on.

    ``reads`` says what of the record goes in: "media" (the pixels of the clip), "caption", "both", or "controls" (the
    control pictures alone). With ``controls``, the record's control pictures go in too (for "caption", they alone of
    all pixels).
    ``parts`` are the model parts that must be loaded, ``settings`` whatever else changes the result
    (text length, transform); both are part of the cache key.
    """

    name: str
    reads: Literal["media", "caption", "both", "controls"]
    parts: tuple[str, ...]
    settings: str = ""
    controls: bool = False

    def __post_init__(self) -> None:
        assert self.controls or self.reads != "controls", f"{self.name} reads nothing"

    @property
    def reads_pixels(self) -> bool:
        """Whether the pixels of the clip go in."""
        return self.reads in ("media", "both")

    @property
    def reads_caption(self) -> bool:
        """Whether the caption goes in."""
        return self.reads in ("caption", "both")

    @property
    def text_encoder(self) -> str | None:
        """The one part that reads the caption, by which captions are dropped; None where no caption is read."""
        readers = [part for part in self.parts if part.startswith("text_encoder")]
        assert not self.reads_caption or len(readers) == 1, f"{self.name} reads the caption through {readers}"
        return readers[0] if self.reads_caption else None


@dataclass(frozen=True)
class Sample:
    """What an encoder gets: pixels uint8 [C, T, H, W] (None for encodings that read the caption alone), and the
    record's control pictures, each uint8 [C, 1, h, w] (empty for encodings that do not read them).

    ``size``: height and width of the file as shown, before it was scaled to cover the bucket and cropped at the centre;
    None: it had the size of its pixels.
    """

    caption: str
    pixels: torch.Tensor | None = None
    controls: tuple[torch.Tensor, ...] = ()
    size: tuple[int, int] | None = None


@dataclass
class Batch:
    """Samples of one bucket, this rank's share of the global batch of one step.

    ``tensors`` maps the names that the encodings gave to one tensor per sample (lengths may differ, text is stored
    trimmed). ``indices`` are positions in the global batch: the key of every random draw. ``weights`` are the shares
    of the samples in the global loss: 1 / (size of the global batch), times the loss weight of the sample's source; a
    rank without a sample repeats one with weight 0.
    """

    step: int
    tensors: dict[str, list[torch.Tensor]]
    captions: list[str]
    """As drawn for this use, before any is dropped; see `caption`."""
    indices: list[int]
    weights: list[float]
    masks: list[torch.Tensor | None] = field(default_factory=list)
    """What counts in the loss: uint8 [1, 1 or T, H, W] at the clip's size, 255 counts whole; None: everything. An empty
    list: everything, for all samples."""
    dropped: list[frozenset[str]] = field(default_factory=list)
    """Text encoders that are told the empty caption instead, for each sample. An empty list: none, for all samples."""

    def __len__(self) -> int:
        return len(self.indices)

    def caption(self, row: int, part: str) -> str:
        """What the text encoder ``part`` is told of a sample."""
        return "" if self.dropped and part in self.dropped[row] else self.captions[row]

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows: a micro-batch."""
        return Batch(
            self.step,
            {name: [values[i] for i in rows] for name, values in self.tensors.items()},
            [self.captions[i] for i in rows],
            [self.indices[i] for i in rows],
            [self.weights[i] for i in rows],
            [self.masks[i] for i in rows] if self.masks else [],
            [self.dropped[i] for i in rows] if self.dropped else [],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved = {name: [v.to(device, non_blocking=True) for v in values] for name, values in self.tensors.items()}
        masks = [mask if mask is None else mask.to(device, non_blocking=True) for mask in self.masks]
        return replace(self, tensors=moved, masks=masks)
