"""The video DC-AE of Open-Sora 2.0: an autoencoder that makes one latent of 32 x 32 pixels in 4 frames.

Peng et al. 2025, "Open-Sora 2.0", arXiv 2503.09642, section 3; the picture autoencoder that it grew from is DC-AE
(Chen et al. 2024, arXiv 2410.10733). Parameter names are those of the published checkpoint, so that its weights load
unchanged. It is deterministic: no posterior. Frames are not causal.

One frame is one latent frame; otherwise four frames are. So 2 and 4 frames encode to one latent frame, and one latent
frame decodes to one frame. Lengths that come back whole are 1 and the multiples of 4 from 8 on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.networks.dc_ae_blocks import (
    ConvLayer,
    Downsample,
    EfficientViTBlock,
    Ops,
    ResBlock,
    Residual,
    RMSNorm3d,
    Upsample,
)
from kinema.networks.dc_ae_flow import run_in_chunks
from kinema.networks.dc_ae_tiling import Tiling, run_tiled, tiling_of

CHUNK_ELEMENTS = 2**28
"""Values that one activation at full resolution may have before frames are taken in chunks; 0.5 GiB in bf16."""
BLOCKS = {"ResBlock": ResBlock, "EfficientViTBlock": EfficientViTBlock}
_BLOCK_TYPES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_IN_TIME = (False, False, False, True, True, False)


@dataclass(frozen=True)
class Stage:
    """Blocks at one resolution; stages are numbered from the pixels."""

    block_type: str
    width: int
    depth: int
    in_time: bool
    """Whether the frames halve from this stage to the next too."""

    def blocks(self) -> list[nn.Module]:
        block: Any = BLOCKS[self.block_type]
        kinds = [block(self.width) for _ in range(self.depth)]
        return [Residual(one) if self.block_type == "ResBlock" else one for one in kinds]


class _Half(nn.Module, ABC):
    """What encoder and decoder share: modules one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    @abstractmethod
    def ops(self) -> list[nn.Module]:
        """Every block, in the order of execution."""

    def forward(self, x: Tensor, frames_at_once: int | None = None) -> Tensor:
        """``frames_at_once``: how many frames to compute at a time; the result is the same. Not for training."""
        if frames_at_once is not None and frames_at_once < x.shape[2]:
            return run_in_chunks(self.ops(), x, frames_at_once)
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        for op in self.ops():
            x = self._gradient_checkpointing_func(op, x) if checkpointed else op(x)  # type: ignore[operator]
        return x


class Encoder(_Half):
    def __init__(self, channels: int, latent_channels: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.project_in = ConvLayer(channels, stages[0].width)
        self.stages = nn.ModuleList()
        for stage, after in zip_longest(stages, stages[1:]):
            down = [] if after is None else [Downsample(stage.width, after.width, stage.in_time)]
            self.stages.append(Ops(*stage.blocks(), *down))
        self.project_out = Residual(Ops(ConvLayer(stages[-1].width, latent_channels)), latent_channels)

    def ops(self) -> list[nn.Module]:
        return [self.project_in, *(op for stage in self.stages for op in stage.op_list), self.project_out]


class Decoder(_Half):
    """Its stages are numbered from the pixels, so the last runs first."""

    def __init__(self, channels: int, latent_channels: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.project_in = Residual(ConvLayer(latent_channels, stages[-1].width), stages[-1].width)
        self.stages = nn.ModuleList()
        for stage, before in zip_longest(stages, stages[1:]):
            up = [] if before is None else [Upsample(before.width, stage.width, stage.in_time)]
            self.stages.append(Ops(*up, *stage.blocks()))
        self.project_out = Ops(RMSNorm3d(stages[0].width), nn.ReLU(), ConvLayer(stages[0].width, channels))

    def ops(self) -> list[nn.Module]:
        stages = reversed(list(self.stages))
        return [self.project_in, *(op for stage in stages for op in stage.op_list), self.project_out]


class VideoDCAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Video autoencoder; the defaults are the published f32t4c128.

    Args:
        in_channels: channels of the pixels.
        latent_channels: channels of the latents.
        encoder_block_types, decoder_block_types: "ResBlock" or "EfficientViTBlock" for each stage, from the pixels.
        encoder_widths, decoder_widths: channels of each stage; the resolution halves from one to the next.
        encoder_depths, decoder_depths: blocks of each stage.
        temporal: whether the frames halve after that stage too (and double before it, in the decoder).
        scaling_factor: what latents are divided by (and multiplied with before they are decoded).

    >>> autoencoder = VideoDCAE.from_pretrained(path)
    >>> autoencoder.enable_tiling()
    >>> latents = autoencoder.encode(pixels)  # [B, 3, 128, 576, 1024] -> [B, 128, 32, 18, 32]
    >>> pixels = autoencoder.decode(latents)
    """

    is_causal: ClassVar[bool] = False
    """Whether the first latent frame is made of the first frame alone."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 128,
        encoder_block_types: Sequence[str] = _BLOCK_TYPES,
        decoder_block_types: Sequence[str] = _BLOCK_TYPES,
        encoder_widths: Sequence[int] = _WIDTHS,
        decoder_widths: Sequence[int] = _WIDTHS,
        encoder_depths: Sequence[int] = (2, 2, 2, 3, 3, 3),
        decoder_depths: Sequence[int] = (3, 3, 3, 3, 3, 3),
        temporal: Sequence[bool] = _IN_TIME,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        encoder = zip(encoder_block_types, encoder_widths, encoder_depths, temporal, strict=True)
        decoder = zip(decoder_block_types, decoder_widths, decoder_depths, temporal, strict=True)
        self.encoder = Encoder(in_channels, latent_channels, [Stage(*one) for one in encoder])
        self.decoder = Decoder(in_channels, latent_channels, [Stage(*one) for one in decoder])
        self.spatial_compression_ratio = 2 ** (len(encoder_widths) - 1)
        self.temporal_compression_ratio = 2 ** sum(temporal[:-1])
        self.tiling: Tiling | None = None
        self.chunk_elements: int | None = CHUNK_ELEMENTS

    def enable_tiling(self, pixels: int | None = 256, frames: int | None = 32, overlap: float = 0.25) -> None:
        """Encode and decode in tiles of ``pixels`` in height and width and of ``frames``, which overlap by the share
        ``overlap`` and are blended there. None: no tiles that way. The defaults are the sizes it was trained on."""
        ratios = self.spatial_compression_ratio, self.temporal_compression_ratio
        self.tiling = tiling_of(pixels, frames, overlap, *ratios)

    def disable_tiling(self) -> None:
        self.tiling = None

    @apply_forward_hook
    def encode(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, T, H, W], to latents [B, C, t, h, w]. T is 1, 2 or a multiple of 4, H and W are
        multiples of 32; UserError otherwise."""
        self._check(x)
        unit = self.temporal_compression_ratio, self.spatial_compression_ratio
        return self._run(self.encoder, x, unit, (1, 1)) / self.config.scaling_factor

    @apply_forward_hook
    def decode(self, latents: Tensor, frames: int | None = None) -> Tensor:
        """Latents [B, C, t, h, w] to pixels [B, 3, T, H, W], T = 1 for t = 1 and else 4 t; not clamped. ``frames``:
        keep that many; UserError if there are fewer."""
        decoded = self.decoded_frames(latents.shape[2])
        if frames is not None and not 1 <= frames <= decoded:
            raise UserError(f"{latents.shape[2]} latent frames decode to {decoded} frames: {frames} cannot be kept.")
        scaled = latents * self.config.scaling_factor
        pixels = self._decode(scaled) if self.tiling is None else self.tiled_decode(scaled)
        return pixels if frames is None else pixels[:, :, :frames]

    def tiled_decode(self, scaled: Tensor) -> Tensor:
        """What `decode` does in tiles; by the name that diffusers has for it, at which processes share them."""
        return self._decode(scaled)

    def _decode(self, scaled: Tensor) -> Tensor:
        unit = self.temporal_compression_ratio, self.spatial_compression_ratio
        return self._run(self.decoder, scaled, (1, 1), unit)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(x))

    def decoded_frames(self, latent_frames: int) -> int:
        return 1 if latent_frames == 1 else latent_frames * self.temporal_compression_ratio

    def _run(self, half: nn.Module, x: Tensor, unit: tuple[int, int], unit_out: tuple[int, int]) -> Tensor:
        pixels = max(unit[1], unit_out[1]) // unit[1]  # in height and width, of one position of x

        def run(clip: Tensor) -> Tensor:
            if self.chunk_elements is None or torch.is_grad_enabled():
                return half(clip)
            frame = clip.shape[0] * prod(clip.shape[3:]) * pixels**2
            widest = max(self.config.encoder_widths[0], self.config.decoder_widths[0])
            return half(clip, max(1, self.chunk_elements // (frame * widest)))

        return run(x) if self.tiling is None else run_tiled(run, x, self.tiling, unit, unit_out)

    def _check(self, x: Tensor) -> None:
        frames, *sides = x.shape[2:]
        ratio, space = self.temporal_compression_ratio, self.spatial_compression_ratio
        short = [2**k for k in range(ratio.bit_length() - 1)]
        if frames % ratio and frames not in short:
            below = max([n for n in short if n < frames] + [frames // ratio * ratio])
            raise UserError(
                f"a clip of {frames} frames: this autoencoder takes {', '.join(map(str, short))} or a multiple of "
                f"{ratio}. The nearest are {below} and {-(-frames // ratio) * ratio}."
            )
        if any(side % space for side in sides):
            nearest = " x ".join(str(max(1, round(side / space)) * space) for side in sides)
            raise UserError(
                f"frames of {sides[0]} x {sides[1]} pixels (height x width): this autoencoder takes multiples of "
                f"{space}. The nearest is {nearest}."
            )
