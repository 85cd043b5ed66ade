"""Tensors that are made when somebody asks: what torch's functions make of them is what they make of the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinema.networks.unmade import Unmade, made

CONVERSIONS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "cut": lambda x, y: x.chunk(3),
    "swapped halves": lambda x, y: torch.cat(x.chunk(2)[::-1]),
    "put beside what is there": lambda x, y: torch.cat([x, y], dim=1),
    "other order": lambda x, y: x.unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1).contiguous(),
    "a row": lambda x, y: x[1:3, ..., None],
    "arithmetic": lambda x, y: 2 * x + y @ x.T[:, :4] - 1,
    "another type": lambda x, y: x.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("what", CONVERSIONS)
def test_conversions_are_put_off(what: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    asked: list[int] = []

    def make() -> Tensor:
        asked.append(1)
        return x

    convert = CONVERSIONS[what]
    unmade = Unmade.of(make, x.shape, x.dtype)
    got, want = convert(unmade, y), convert(x, y)
    got, want = (one if isinstance(one, tuple) else (one,) for one in (got, want))
    assert not asked
    for ours, theirs in zip(got, want, strict=True):
        assert isinstance(ours, Unmade) and ours.is_meta
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert type(made(ours)) is Tensor and torch.equal(made(ours), theirs)
    assert asked


def test_what_it_has_no_answer_to() -> None:
    x = Unmade.of(lambda: torch.ones(4), torch.Size([4]), torch.float32)
    assert (x.shape, x.ndim, x.dtype, len(x)) == ((4,), 1, torch.float32, 4)
    with pytest.raises(RuntimeError, match="meta tensor"):
        x.sum().item()
    with pytest.raises(AssertionError, match="mul_ of what is unmade"):
        x.mul_(2)
    with pytest.raises(AssertionError, match="__setitem__ of what is unmade"):
        x[0] = 1
    plain = torch.ones(2)
    assert made(plain) is plain
