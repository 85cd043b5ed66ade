"""Weights stored in 8 and 4 bits, against the definitions of their formats in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from kinema.networks.quantized import (
    BLOCK,
    LEVELS,
    Kind,
    QuantizedLinear,
    chosen,
    encode,
    quantize,
    restore,
    stored_bytes,
)

KINDS: tuple[Kind, ...] = get_args(Kind)
LOST = {"fp8": 0.0264, "fp8_block": 0.0250, "int8": 0.0083, "int8_block": 0.0059, "nf4": 0.092}
"""Relative error of normal weights, as docs/guides/memory.md has it."""
LOST_BESIDE_OUTLIERS = {"fp8": 0.0265, "fp8_block": 0.0251, "int8": 0.0565, "int8_block": 0.0129, "nf4": 0.146}
"""The same of the others where one weight of a thousand is 20 times as large."""


def layer(width: int = 96, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    one = nn.Linear(width, 32, bias=bias)
    one.weight.data *= torch.logspace(-3, 2, 32)[:, None]  # rows of very different size
    return one.requires_grad_(False)


def of_blocks(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The largest magnitude of what shares a scale, for each weight."""
    if kind in ("fp8", "int8"):
        return weight.abs().amax(1, keepdim=True).expand_as(weight)
    return torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(BLOCK, 1)], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [96, 128, 40])
def test_every_weight_is_within_half_a_step(kind: Kind, width: int) -> None:
    """e4m3 has three bits after the leading one: relative error at most 2^-4 of normal numbers, and 2^-10 of the scale
    of those below its smallest normal one (2^-6). int8's steps are equal. nf4's widest gap, 0.304, is the lowest."""
    plain = layer(width)
    stored = QuantizedLinear.of(plain, kind)
    w, q = plain.weight.double(), stored.weight.double()
    largest = of_blocks(w, kind)
    bound = {
        "fp8": torch.maximum(w.abs() * 2**-4, largest / 448 * 2**-10),
        "int8": largest / 254,
        "nf4": largest * (0.304 / 2 + 2**-8),
    }[kind.removesuffix("_block")]
    assert ((w - q).abs() <= bound * (1 + 1e-5)).all()
    if kind != "nf4":
        torch.testing.assert_close(of_blocks(q, kind), largest, rtol=1e-5, atol=0)
    assert stored.quantized.nbytes + stored.scale.nbytes == stored_bytes(kind, 32, width)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost(kind: Kind) -> None:
    torch.manual_seed(0)
    normal = torch.randn(256, 2048) * 0.02
    outliers = torch.rand_like(normal) < 1e-3
    for weight, others, expected in (
        (normal, ~torch.zeros_like(outliers), LOST),
        (torch.where(outliers, normal * 20, normal), ~outliers, LOST_BESIDE_OUTLIERS),
    ):
        one = nn.Linear(2048, 256, bias=False)
        one.weight.data = weight
        error = (QuantizedLinear.of(one, kind).weight - weight)[others].norm() / weight[others].norm()
        assert abs(float(error) / expected[kind] - 1) < 0.03, float(error)


def test_levels_of_nf4_are_quantiles() -> None:
    """Of the normal distribution: eight at and above zero's side, seven below, from its tail of 1 - 0.9677083."""
    tail = 0.9677083
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), levels / levels.max(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_use_the_stored_weight(kind: Kind) -> None:
    stored = QuantizedLinear.of(layer(), kind)
    x = torch.randn(5, 96, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = stored(x)
    assert sum(t.nbytes for t in kept) == stored_bytes(kind, 32, 96) + (0 if kind != "nf4" else 256 * 2 * 4)
    torch.testing.assert_close(
        y.double(), x.double() @ stored.weight.double().T + stored.bias.double(), atol=1e-4, rtol=1e-5
    )
    g = torch.randn_like(y)
    y.backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g @ stored.weight)
    assert all(not p.requires_grad for p in stored.parameters())


@pytest.mark.parametrize("scales", [(1, 1), (32, 1)])
def test_weights_of_a_float8_file_are_kept(scales: tuple[int, int]) -> None:
    """Numbers of e4m3 times a scale, for the whole matrix or for each row, come back as they were; within
    half a step of bfloat16 once they have been that."""
    torch.manual_seed(1)
    quantized = (torch.randn(32, 256) * 60).to(torch.float8_e4m3fn)
    quantized[3, ::2] = 0  # of which a look at some columns does not tell
    published = quantized.float() * (torch.rand(scales) + 0.1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1.1 * 2**-8)):
        one = nn.Linear(256, 32, bias=False)
        one.weight.data = published.to(dtype)
        got = QuantizedLinear.of(one, "fp8").weight.float()
        torch.testing.assert_close(got, published, rtol=tolerance, atol=1e-12)
    ordinary = nn.Linear(256, 32, bias=False)
    ordinary.weight.data = torch.randn(32, 256)
    largest = ordinary.weight.abs().amax(1, keepdim=True)
    assert torch.equal(QuantizedLinear.of(ordinary, "fp8").scale, largest / 448)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros(kind: Kind) -> None:
    empty = nn.Linear(64, 8)
    empty.weight.data.zero_()
    assert torch.equal(QuantizedLinear.of(empty, kind).weight, torch.zeros(8, 64))


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 16)


def test_what_steers_every_token_takes_eight_bits() -> None:
    """By the names of layers and of what holds them; others with the words that are to be kept stay as they are."""
    root = nn.ModuleDict({
        "0": nn.ModuleDict({
            "img_mod": nn.Sequential(nn.SiLU(), nn.Linear(8, 8)), "steer": Modulation(), "model": nn.Linear(8, 8),
            "norm1": nn.ModuleDict({"linear": nn.Linear(8, 8)}), "to_q": nn.Linear(8, 8), "wo": nn.Linear(8, 8),
            "time_emb_proj": nn.Linear(8, 8), "adaLN_modulation": nn.Sequential(nn.Linear(8, 8)),
        }),
    })  # fmt: skip
    names = {id(module): name for name, module in root.named_modules()}
    found = {names[id(layer)]: kind for _, _, layer, kind in chosen([root], "nf4", keep=["wo"])}
    assert found == {
        "0.img_mod.1": "int8_block", "0.steer.lin": "int8_block", "0.norm1.linear": "int8_block", "0.to_q": "nf4",
        "0.time_emb_proj": "int8_block", "0.adaLN_modulation.0": "int8_block", "0.model": "nf4",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_store_and_restore(kind: Kind) -> None:
    torch.manual_seed(1)
    net = nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), "mod": nn.Linear(8, 8)})
    assert quantize([net], kind, keep=["mod"]) == 2
    assert isinstance(net["block"][0], QuantizedLinear) and type(net["mod"]) is nn.Linear  # type: ignore[index]
    x = torch.randn(3, 8)
    before = net["block"](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert net["block"](x).dtype == torch.bfloat16
    restore(net)
    assert type(net["block"][0]) is nn.Linear  # type: ignore[index]
    torch.testing.assert_close(net["block"](x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_the_same(kind: Kind) -> None:
    """In one graph, with its backward pass."""
    stored = QuantizedLinear.of(layer(), kind)
    expected = []
    for run in (stored, torch.compile(stored, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 96 * 3).view(3, 96).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        expected.append((y.detach(), x.grad))
    torch.testing.assert_close(expected[0], expected[1])


def test_encode_takes_any_float() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        q, scale = encode(torch.randn(4, 64).to(dtype), "int8")
        assert q.dtype == torch.int8 and scale.dtype == torch.float32
