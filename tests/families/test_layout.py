"""Layouts read both ways: names, fused layers, values in another order, for weights and for adapters."""

from __future__ import annotations

import pytest
import torch

from kinema.errors import UserError
from kinema.families.layout import Changed, Fused, Layout, LoraFactors, swapped_halves

LAYOUT = Layout(
    [("embed", "img_in"), ("blocks.{}.out", "layers.{}.proj")],
    fused=[
        Fused("layers.{}.qkv", ("blocks.{}.to_q", "blocks.{}.to_k", "blocks.{}.to_v")),
        Fused("layers.{}.linear1", ("blocks.{}.gate", "blocks.{}.up"), (1, 3)),
    ],
    changed=[
        swapped_halves("norm_out.linear", "final.adaLN.1"),
        Changed("patch", "patch_in", lambda v: v.flatten(1), lambda v: v.unflatten(1, (2, 2, 2)), rows=False),
    ],
    dropped=[r"pos_embed\.freqs"],
)
IN, OUT = 6, 8


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    state = {"embed.weight": draw(OUT, IN), "patch.weight": draw(OUT, 2, 2, 2), "norm_out.linear.weight": draw(OUT, IN)}
    for i in range(2):
        for name in ("to_q", "to_k", "to_v", "out", "gate"):
            state |= {f"blocks.{i}.{name}.weight": draw(OUT, IN), f"blocks.{i}.{name}.bias": draw(OUT)}
        state |= {f"blocks.{i}.up.weight": draw(3 * OUT, IN), f"blocks.{i}.up.bias": draw(3 * OUT)}
    return state


def test_weights_there_and_back() -> None:
    ours = weights()
    original = LAYOUT.to_original(ours)
    assert set(original) == {
        "img_in.weight", "patch_in.weight", "final.adaLN.1.weight",
        *(f"layers.{i}.{n}.{w}" for i in range(2) for n in ("qkv", "linear1", "proj") for w in ("weight", "bias")),
    }  # fmt: skip
    assert torch.equal(original["layers.1.qkv.weight"][OUT : 2 * OUT], ours["blocks.1.to_k.weight"])
    assert torch.equal(original["layers.0.linear1.bias"][OUT:], ours["blocks.0.up.bias"])
    assert torch.equal(original["final.adaLN.1.weight"][: OUT // 2], ours["norm_out.linear.weight"][OUT // 2 :])
    assert LAYOUT.is_original(original) and not LAYOUT.is_original(ours)
    back = LAYOUT.from_original(original | {"pos_embed.freqs": torch.zeros(3)})
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    assert LAYOUT.from_original(ours).keys() == ours.keys()


def test_what_cannot_be_written() -> None:
    with pytest.raises(KeyError, match="strange"):
        LAYOUT.to_original({"strange.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"layers\.0\.qkv.*to_v"):
        LAYOUT.to_original({f"blocks.0.{n}.weight": torch.zeros(2, 2) for n in ("to_q", "to_k")})
    factors = LoraFactors(torch.zeros(2, 8), torch.zeros(OUT, 2), 2.0)
    with pytest.raises(UserError, match="patch"):
        LAYOUT.adapter_to_original({"patch": factors})
    with pytest.raises(UserError, match="DoRA"):
        LAYOUT.adapter_to_original({"blocks.0.to_q": LoraFactors(factors.A, factors.B, 2.0, torch.ones(OUT))})


def factors(out: int, rank: int, alpha: float, seed: int) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, IN, generator=g), torch.randn(out, rank, generator=g), alpha)


def update(f: LoraFactors) -> torch.Tensor:
    return f.scale * f.B @ f.A


@pytest.mark.parametrize("alphas", [(4.0, 2.0, 6.0), (1.0, 5.0, 2.0)], ids=["one-scale", "own-scales"])
def test_updates_of_fused_layers(alphas: tuple[float, float, float]) -> None:
    """The original's update is that of each part in its rows, and each part comes back with its own rank."""
    ranks = (2, 1, 3)
    layers = {
        f"blocks.0.{name}": factors(OUT, rank, alpha, i)
        for i, (name, rank, alpha) in enumerate(zip(("to_q", "to_k", "to_v"), ranks, alphas, strict=True))
    }
    layers["norm_out.linear"] = factors(OUT, 2, 2.0, 9)
    original = LAYOUT.adapter_to_original(layers)
    assert set(original) == {"layers.0.qkv", "final.adaLN.1"} and original["layers.0.qkv"].rank == 6
    expected = LAYOUT.to_original({f"{name}.weight": update(f) for name, f in layers.items()})
    for name, f in original.items():
        torch.testing.assert_close(update(f), expected[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    back = LAYOUT.adapter_from_original(original)
    assert {name: f.rank for name, f in back.items()} == {name: f.rank for name, f in layers.items()}
    for name, f in back.items():
        torch.testing.assert_close(update(f), update(layers[name]), rtol=1e-5, atol=1e-6)


def test_an_update_of_one_part_alone() -> None:
    one = {"blocks.1.up": factors(3 * OUT, 2, 2.0, 0)}
    original = LAYOUT.adapter_to_original(one)
    whole = update(original["layers.1.linear1"])
    assert whole.shape == (4 * OUT, IN) and whole[:OUT].abs().max() == 0
    torch.testing.assert_close(whole[OUT:], update(one["blocks.1.up"]))
    assert set(LAYOUT.adapter_from_original(original)) == {"blocks.1.up"}


def test_updates_that_share_their_columns() -> None:
    """Files of other trainers have one A for the whole fused layer."""
    shared = factors(3 * OUT, 4, 2.0, 1)
    parts = LAYOUT.adapter_from_original({"layers.0.qkv": shared})
    assert list(parts) == ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"]
    together = torch.cat([update(f) for f in parts.values()])
    torch.testing.assert_close(together, update(shared))
    fresh = LoraFactors(shared.A[:3], torch.zeros(3 * OUT, 3), 3.0)
    assert [f.rank for f in LAYOUT.adapter_from_original({"layers.0.qkv": fresh}).values()] == [1, 1, 1]
