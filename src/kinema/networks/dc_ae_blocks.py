"""Blocks of the video DC-AE (Chen et al. 2024, arXiv 2410.10733, taken to three dimensions by Open-Sora 2.0).

Tensors are [B, C, T, H, W]; every convolution pads with zeros on all sides, in time too. The parameter names are those
of the published checkpoint. Each block runs in two ways with one result, up to rounding:

- ``block(x)``: the whole clip at once;
- ``block.flow()``: chunk by chunk (see `dc_ae_flow`). What needs all frames (attention) or changes their number has
  ``streams = False`` and ``in_chunks(x, frames)`` instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.networks.dc_ae_flow import Chain, Each, Flow, Sum, Windows, chain_of, conv_inside, inner, results


class RMSNorm3d(nn.Module):
    """Each position's channels are brought to a root mean square of one, then scaled and shifted."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        # The authors' class starts at a truncated normal of std 0.02, which mutes every residual branch: ours at one.
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # A norm sums in float32 without writing x out in it.
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact)
        scale = torch.rsqrt(norm.square() / x.shape[1] + self.eps)
        weight, bias = (parameter.view(-1, 1, 1, 1) for parameter in (self.weight, self.bias))
        return (x * scale).to(x.dtype) * weight + bias


class ConvLayer(nn.Module):
    """Convolution of an odd kernel, padded to keep the size; then, where asked for, a norm and SiLU."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias
        )
        self.norm = RMSNorm3d(channels_out) if norm else None
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(self.conv(x))

    def flow(self) -> Flow:
        return Chain(Windows(int(self.conv.padding[0])), Each(self._inside))

    def _inside(self, window: Tensor) -> Tensor:
        return self._finish(conv_inside(self.conv, window))

    def _finish(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return F.silu(x, inplace=not x.requires_grad) if self.silu else x


class Ops(nn.Module):
    """Modules one after another."""

    def __init__(self, *ops: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x

    def flow(self) -> Flow:
        return chain_of(list(self.op_list))


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, silu=True)
        self.conv2 = ConvLayer(channels, channels, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))

    def flow(self) -> Flow:
        return Chain(self.conv1.flow(), self.conv2.flow())


class GLUConv(nn.Module):
    """Gated feed-forward: to 8 times the width, a depthwise convolution, one half gates the other, and back."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = 2 * expansion * channels
        self.inverted_conv = ConvLayer(channels, hidden, 1, silu=True)
        self.depth_conv = ConvLayer(hidden, hidden, groups=hidden)
        self.point_conv = ConvLayer(hidden // 2, channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self._gate(self.depth_conv(self.inverted_conv(x))))

    def flow(self) -> Flow:
        return Chain(self.inverted_conv.flow(), self.depth_conv.flow(), Each(self._gate), self.point_conv.flow())

    def _gate(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * F.silu(gate)


class LinearAttention(nn.Module):
    """Attention over all T * H * W positions, linear in their number: softmax is replaced by the product of ReLU(q)
    and ReLU(k) over its sum. As many heads again see queries, keys and values mixed over their neighbourhood, once
    for each size in ``scales``."""

    streams = False

    def __init__(self, channels: int, head_dim: int = 32, scales: Sequence[int] = (5,), eps: float = 1e-15) -> None:
        super().__init__()
        heads, width = channels // head_dim, 3 * channels
        self.head_dim, self.eps = head_dim, eps
        self.qkv = ConvLayer(channels, width, 1, bias=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, width, scale, padding=scale // 2, groups=width, bias=False),
                nn.Conv3d(width, width, 1, groups=3 * heads, bias=False),
            )
            for scale in scales
        )
        self.proj = ConvLayer(channels * (1 + len(scales)), channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        query, key, value = self._heads([qkv, *(mixed(qkv) for mixed in self.aggreg)])
        return self._attend(query, self._summary(key, value), x)

    def in_chunks(self, x: Tensor, frames: int) -> Tensor:
        """The same, never holding the queries, keys and values of more than ``frames`` frames: they are made twice,
        once for the sum over positions, once to ask it."""
        summary = sum(self._summary(key, value) for _, key, value in self._streamed_heads(x, frames))
        answers = [self._attend(query, cast(Tensor, summary), x) for query, _, _ in self._streamed_heads(x, frames)]
        return torch.cat(answers, dim=2)

    def _streamed_heads(self, x: Tensor, frames: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        halo = max((mixed[0].padding[0] for mixed in self.aggreg), default=0)
        # The projection has no bias, so zeros around it are zeros around the clip.
        for window in results(Chain(self.qkv.flow(), Windows(halo)), x, frames):
            yield self._heads([inner(window, halo), *self._mixed(window, halo)])

    def _mixed(self, window: Tensor, halo: int) -> Iterator[Tensor]:
        for depthwise, pointwise in self.aggreg:
            yield pointwise(conv_inside(depthwise, inner(window, halo - depthwise.padding[0])))

    def _heads(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, float32 [B, heads, head_dim, positions], from parts [B, 3 C, n, H, W]."""
        qkv = torch.cat(parts, dim=1).flatten(2).unflatten(1, (-1, 3 * self.head_dim))
        # The sum runs over thousands of positions: not in 16 bits.
        query, key, value = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=2)
        return F.relu(query), F.relu(key), value

    def _summary(self, key: Tensor, value: Tensor) -> Tensor:
        """Sums of values by keys, and of keys in the last row: [B, heads, head_dim + 1, head_dim]."""
        return F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2)

    def _attend(self, query: Tensor, summary: Tensor, like: Tensor) -> Tensor:
        answer = summary @ query
        answer = answer[:, :, :-1] / (answer[:, :, -1:] + self.eps)
        frame = like.shape[3:]
        return self.proj(answer.to(like.dtype).flatten(1, 2).unflatten(2, (-1, *frame)))


class Downsample(nn.Module):
    """Half the height and width, and frames where ``in_time``: a strided convolution."""

    def __init__(self, channels_in: int, channels_out: int, in_time: bool) -> None:
        super().__init__()
        self.streams = not in_time
        self.main = ConvLayer(channels_in, channels_out, stride=(2 if in_time else 1, 2, 2))
        self.channels_out, self.in_time = channels_out, in_time

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self._shortcut(x)

    def flow(self) -> Flow:
        return Sum(chain_of([self.main]), self._shortcut)

    def in_chunks(self, x: Tensor, frames: int) -> Tensor:
        return self(x)

    def _shortcut(self, x: Tensor) -> Tensor:
        factors = time_factor(x, self.in_time), 2, 2
        return mean_channels(space_to_channels(x, factors), self.channels_out)


class InterpolateConv(nn.Module):
    """Every frame twice as high and wide, and twice in a row where ``in_time``, by repetition; then a convolution."""

    def __init__(self, channels_in: int, channels_out: int, in_time: bool) -> None:
        super().__init__()
        self.conv = ConvLayer(channels_in, channels_out)
        self.in_time = in_time

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self._repeat(x))

    def flow(self) -> Flow:
        return Chain(Each(self._repeat), self.conv.flow())

    def _repeat(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(float(time_factor(x, self.in_time)), 2.0, 2.0), mode="nearest")


class Upsample(nn.Module):
    """Twice the height and width, and frames where ``in_time``: `InterpolateConv` beside a shuffle of channels."""

    def __init__(self, channels_in: int, channels_out: int, in_time: bool) -> None:
        super().__init__()
        self.streams = not in_time
        self.main = InterpolateConv(channels_in, channels_out, in_time)
        self.channels_out, self.in_time = channels_out, in_time

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self._shortcut(x)

    def flow(self) -> Flow:
        return Sum(chain_of([self.main]), self._shortcut)

    def in_chunks(self, x: Tensor, frames: int) -> Tensor:
        return self(x)

    def _shortcut(self, x: Tensor) -> Tensor:
        factors = time_factor(x, self.in_time), 2, 2
        return channels_to_space(repeat_channels(x, self.channels_out * factors[0] * 4), factors)


class Residual(nn.Module):
    """``main(x) + x``; where ``channels`` is given, x is brought to that many by means or repetition of channels."""

    def __init__(self, main: nn.Module, channels: int | None = None) -> None:
        super().__init__()
        self.main, self.channels = main, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self._shortcut(x)

    def flow(self) -> Flow:
        return Sum(chain_of([self.main]), self._shortcut)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return x
        fit = mean_channels if x.shape[1] >= self.channels else repeat_channels
        return fit(x, self.channels)


class EfficientViTBlock(nn.Module):
    streams = False

    def __init__(self, channels: int, head_dim: int = 32, scales: Sequence[int] = (5,)) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(channels, head_dim, scales))
        self.local_module = Residual(GLUConv(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))

    def in_chunks(self, x: Tensor, frames: int) -> Tensor:
        x = x + self.context_module.main.in_chunks(x, frames)
        return torch.cat(list(results(self.local_module.flow(), x, frames)), dim=2)


def time_factor(x: Tensor, in_time: bool) -> int:
    """A single frame stays one."""
    return 2 if in_time and x.shape[2] > 1 else 1


def space_to_channels(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, C * t * h * w, T / t, H / h, W / w]: what lies in a box of t x h x w becomes channels."""
    t, h, w = factors
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def channels_to_space(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """The inverse of `space_to_channels`."""
    x = x.unflatten(1, (-1, *factors)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def mean_channels(x: Tensor, channels: int) -> Tensor:
    """Means over groups of neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """Every channel several times in a row."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)
