"""Float8 storage against its definition in float64."""

from __future__ import annotations

import torch
from torch import nn

from kinema.networks.float8 import Float8Linear, restore_float8, store_float8


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    one = nn.Linear(48, 32, bias=bias)
    one.weight.data *= torch.logspace(-3, 2, 32)[:, None]  # rows of very different size
    return one.requires_grad_(False)


def test_every_weight_is_within_half_a_step() -> None:
    """e4m3 has three bits after the leading one: relative error at most 2^-4 of normal numbers, and 2^-10 * 2^-... of
    the row's largest for those below its smallest normal one (2^-6 of 448)."""
    plain = layer()
    stored = Float8Linear.of(plain)
    w, q = plain.weight.double(), stored.weight.double()
    largest = w.abs().amax(1, keepdim=True)
    bound = torch.maximum(w.abs() * 2**-4, largest / 448 * 2**-10)
    assert ((w - q).abs() <= bound * (1 + 1e-6)).all()
    assert torch.allclose(q.abs().amax(1), w.abs().amax(1), rtol=1e-6)
    assert stored.quantized.dtype == torch.float8_e4m3fn and stored.quantized.element_size() == 1


def test_product_and_gradient_use_the_stored_weight() -> None:
    stored = Float8Linear.of(layer())
    x = torch.randn(5, 48, requires_grad=True)
    y = stored(x)
    torch.testing.assert_close(
        y.double(), x.double() @ stored.weight.double().T + stored.bias.double(), atol=1e-4, rtol=1e-5
    )
    g = torch.randn_like(y)
    y.backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g @ stored.weight)
    assert all(not p.requires_grad for p in stored.parameters())


def test_what_is_kept_for_backward_is_the_short_weight() -> None:
    stored = Float8Linear.of(layer(bias=False))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stored(torch.randn(2, 48, requires_grad=True))
    assert [t.dtype for t in kept] == [torch.float8_e4m3fn, torch.float32]
    assert kept[1].numel() == 32


def test_store_and_restore() -> None:
    torch.manual_seed(1)
    net = nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), "mod": nn.Linear(8, 8)})
    assert store_float8([net], keep=["mod"]) == 2
    assert isinstance(net["block"][0], Float8Linear) and type(net["mod"]) is nn.Linear  # type: ignore[index]
    x = torch.randn(3, 8)
    before = net["block"](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert net["block"](x).dtype == torch.bfloat16
    restore_float8(net)
    assert type(net["block"][0]) is nn.Linear  # type: ignore[index]
    torch.testing.assert_close(net["block"](x), before)
