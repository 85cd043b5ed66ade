"""Blockwise 8-bit numbers for an optimiser's moments (Dettmers et al. 2022, arXiv 2110.02861).

A block is a stretch of at most 256 elements of one row (the first dimension); it has a scale, its largest magnitude,
and a code for each element, which stands for one of 256 numbers in [-1, 1] or [0, 1] ("dynamic tree" numbers: a decimal
exponent from -6 to 0, and the more fraction bits the larger the number is). Blocks never leave a row, and so are the
same however FSDP2 shards rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

BLOCK = 256
SMALLEST = 4096
"""Parameters of fewer elements keep float32 moments: a small part of a network, and often its most sensitive."""


@cache
def numbers(signed: bool) -> Tensor:
    """The 256 numbers that codes stand for, ascending, in float32.

    For each exponent e of -6 to 0: the centres of 2^(e + 6) equal parts of [0.1, 1], times 10^e, with both signs; of
    numbers that have no sign twice as many parts. Beside them 0 and 1.
    """
    found = [0.0, 1.0]
    for exponent in range(-6, 1):
        parts = 2 ** (exponent + 6) * (1 if signed else 2)
        for part in range(parts):
            magnitude = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0**exponent
            found += [magnitude, -magnitude] if signed else [magnitude]
    assert len(found) == 256
    return torch.tensor(sorted(found), dtype=torch.float32)


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers; the bounds up to which each is the nearest; and, for the upper 16 bits of a float32, the code of the
    smallest value that begins so, as int32: the code of any such value is that or the next."""
    values = numbers(signed)
    bounds = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([torch.inf])])
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    ends = [torch.bucketize(bits.view(torch.float32), bounds[:-1], out_int32=True) for bits in (upper, upper | 0xFFFF)]
    least, most = torch.minimum(*ends), torch.maximum(*ends)
    assert (most - least)[upper.view(torch.float32).isfinite()].max() <= 1
    return values.to(device), bounds.to(device), least.to(device)


def nearest(values: Tensor, signed: bool) -> Tensor:
    """The code of the number nearest to each float32 value; int32."""
    _, bounds, least = _tables(signed, values.device)
    flat = values.reshape(-1)
    upper = flat.view(torch.int16)[1::2]  # both kinds of processors that torch runs on store the lower half first
    codes = least.index_select(0, upper.int() + 2**15)
    return codes.add_(flat > bounds.index_select(0, codes)).view(values.shape)


def takes_codes(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept as codes; by its whole size, so that it is the same on any mesh."""
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST and parameter.numel() > max(parameter.shape)


def blocks_of(shape: torch.Size) -> tuple[int, int]:
    """(blocks in a row, elements of each but the last) of a tensor."""
    columns = shape[1:].numel()
    return -(-columns // BLOCK), min(BLOCK, columns)


def zero_codes(parameter: nn.Parameter, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, like the parameter) and scales (float32 [rows, blocks in a row]) of zeros, laid out as it is."""
    codes = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=torch.contiguous_format, requires_grad=False)
    local = codes.to_local() if isinstance(codes, DTensor) else codes
    local.fill_(int((numbers(signed) == 0).nonzero()))
    count, _ = blocks_of(parameter.shape)
    scales = torch.zeros(local.shape[0], count, device=local.device)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        assert all(isinstance(one, Replicate) or one == Shard(0) for one in placements), "rows are shared, not cut"
        shape = (parameter.shape[0], count)
        laid_out = DTensor.from_local(scales, mesh, placements, run_check=False, shape=shape, stride=(count, 1))
        return codes, laid_out.to(local.device)  # shards may be in the host's memory
    return codes, scales


def encode(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Write the codes and scales of float32 values [rows, ...] in place."""
    if not values.numel():
        return
    blocks = _in_blocks(values, scales.shape[1])
    scales.copy_(blocks.abs().amax(-1))
    found = nearest(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1), signed)
    codes.copy_(found.view(len(values), -1)[:, : values[0].numel()].reshape(codes.shape))


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 values that codes and scales stand for."""
    if not codes.numel():
        return torch.zeros(codes.shape, device=codes.device)
    table = _tables(signed, codes.device)[0]
    found = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    values = _in_blocks(found, scales.shape[1]) * scales.unsqueeze(-1)
    return values.view(len(codes), -1)[:, : codes[0].numel()].reshape(codes.shape)


def _in_blocks(values: Tensor, count: int) -> Tensor:
    """[rows, ...] as [rows, blocks, elements], filled up with zeros."""
    rows = values.reshape(len(values), -1)
    size = min(BLOCK, rows.shape[1])
    missing = count * size - rows.shape[1]
    return (nn.functional.pad(rows, (0, missing)) if missing else rows).view(len(values), count, size)
